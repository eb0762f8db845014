//! What its user changes of a migration while it copies: the VMM obeys, then the journal has it, then whoever asked is told.

use std::sync::Arc;

use ferry_proto::InvalidField;
use ferry_proto::agent::v1::{MigrationInfo, MigrationOptions, RetuneRequest};
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::{self as wire};
use tokio::sync::oneshot;

use super::options::{DOWNTIMES_US, NO_DOWNTIME};
use super::script::Script;
use crate::agent::failure::Failure;
use crate::agent::instances::Instance;
use crate::agent::journal::RowWrite;

/// Checks what a caller chose.
///
/// # Errors
/// Names the field.
pub(crate) fn check_retuning(request: &RetuneRequest, is_cold: bool) -> Result<(), InvalidField> {
    let invalid = |field, problem: &str| {
        let problem = problem.to_owned();
        Err(InvalidField { field, problem })
    };
    match (
        request.max_downtime_us,
        request.timeout_ms,
        request.bandwidth_bytes_per_s,
    ) {
        (None, None, None) => invalid(
            "max_downtime_us",
            "is missing, and so is everything else that could be changed",
        ),
        (Some(_), _, _) if is_cold => invalid("max_downtime_us", "does not apply to a cold migration"),
        (Some(us), _, _) if !DOWNTIMES_US.contains(&us) => invalid("max_downtime_us", NO_DOWNTIME),
        (_, Some(0), _) => invalid("timeout_ms", "is zero"),
        _ => Ok(()),
    }
}

/// Other terms, and who waits for them to hold.
pub(super) struct Retuning {
    new: wire::Retune,
    reply: oneshot::Sender<Result<(), Failure>>,
}

impl Retuning {
    /// As it was asked for, and where the answer comes.
    pub(super) fn new(request: &RetuneRequest) -> (Self, oneshot::Receiver<Result<(), Failure>>) {
        let new = wire::Retune {
            max_downtime_us: request.max_downtime_us,
            timeout_ms: request.timeout_ms,
            bandwidth_bytes_per_s: request.bandwidth_bytes_per_s,
        };
        let (reply, answer) = oneshot::channel();
        (Self { new, reply }, answer)
    }

    pub(super) fn answer(self, result: Result<(), Failure>) {
        // Whoever asked may have given up waiting.
        let _ = self.reply.send(result);
    }

    /// Has the VMM obey. It gives itself back where that did, for what is left to do.
    pub(super) async fn carry_out(self, instance: Arc<Instance>) -> Option<Self> {
        let order = Command::Retune(self.new);
        let obeyed = async {
            let vmm = instance.state.lock().await.vmm()?.clone();
            let done = vmm.order(order).await;
            done.map_err(Failure::vmm("failed to have the VMM take other terms"))
        };
        match obeyed.await {
            Ok(_) => Some(self),
            Err(failure) => {
                self.answer(Err(failure));
                None
            }
        }
    }
}

impl Script {
    /// The VMM goes by other terms: so does the record.
    pub(super) async fn retuned(&mut self, retuning: Retuning) {
        let (new, options) = (retuning.new, &mut self.row.options);
        options.max_downtime_us = new.max_downtime_us.unwrap_or(options.max_downtime_us);
        options.timeout_ms = new.timeout_ms.unwrap_or(options.timeout_ms);
        options.bandwidth_bytes_per_s = new.bandwidth_bytes_per_s.unwrap_or(options.bandwidth_bytes_per_s);
        note_terms(&mut self.row.info, &self.row.options);
        let saved = self.save(RowWrite::SourceStatus).await;
        retuning.answer(saved);
    }
}

/// What the migration may take, as its user last said.
pub(super) fn note_terms(info: &mut MigrationInfo, options: &MigrationOptions) {
    let is_some = |&figure: &u64| figure > 0;
    // A cold one has no budget.
    info.max_downtime_ms = Some(options.max_downtime_us).filter(is_some).map(|us| us as f64 / 1e3);
    info.timeout_ms = Some(options.timeout_ms as f64);
    info.resume_window_ms = Some(options.resume_window_ms).filter(is_some).map(|ms| ms as f64);
    info.bandwidth_bytes_per_s = Some(options.bandwidth_bytes_per_s).filter(is_some);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(request: RetuneRequest, is_cold: bool) -> Option<&'static str> {
        check_retuning(&request, is_cold).err().map(|invalid| invalid.field)
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let downtime = |us| RetuneRequest {
            max_downtime_us: Some(us),
            ..RetuneRequest::default()
        };
        let timeout = |ms| RetuneRequest {
            timeout_ms: Some(ms),
            ..RetuneRequest::default()
        };
        let no_cap = RetuneRequest {
            bandwidth_bytes_per_s: Some(0),
            ..RetuneRequest::default()
        };
        assert_eq!(field(RetuneRequest::default(), false), Some("max_downtime_us"));
        assert_eq!(field(downtime(0), false), Some("max_downtime_us"));
        assert_eq!(field(downtime(61_000_000), false), Some("max_downtime_us"));
        assert_eq!(field(downtime(300_000), true), Some("max_downtime_us"));
        assert_eq!(field(downtime(300_000), false), None);
        assert_eq!(field(timeout(0), true), Some("timeout_ms"));
        assert_eq!(field(timeout(1), true), None);
        assert_eq!(field(no_cap, false), None);
    }
}
