//! Instances that are started again: by their restart policy, and when.
//!
//! Who may start a guest, and under which epoch, is [`Fallen::verdict`]'s to say; this carries it out. When the next start
//! is due is in the journal, so that an agent that restarts, or a host, goes on with it.

use std::sync::Arc;
use std::time::Duration;

use ferry_migration::handover::{BackOff, Ended, Epoch, Fallen, Leaving, RestartPolicy, Verdict, Wanted};
use ferry_proto::agent::v1::InstanceSpec;
use tokio::sync::mpsc::UnboundedReceiver;
use uuid::Uuid;

use super::instance::{Agent, Instance, InstanceState};
use crate::agent::backends::Occasion;
use crate::agent::context::RequestContext;
use crate::agent::events::{Action, Subject};
use crate::agent::failure::Failure;
use crate::agent::journal::{InstanceRow, Status};
use crate::agent::outgoing::now_ms;

/// The clock may be set while a start is waited for: it is looked at again after this at the latest.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// The pauses between two questions to a host that does not answer grow from the one to the other.
const ASK_AGAIN: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(30)];

/// How a reason goes on while a start is waited for.
const STARTED_AGAIN: &str = "; it is started again";

/// The policy in a spec that was checked; a word that is none counts as never.
pub(crate) fn policy_of(spec: &InstanceSpec) -> RestartPolicy {
    RestartPolicy::parse(&spec.restart).unwrap_or_default()
}

/// Starts each instance that is named here once its start is due.
pub(crate) async fn restart_when_due(agent: Arc<Agent>, mut named: UnboundedReceiver<Uuid>) {
    while let Some(id) = named.recv().await {
        tokio::spawn(Arc::clone(&agent).look_after_restart(id));
    }
}

/// Plans the next start of an instance that just ended, if its policy wants one, and says so in its reason.
pub(super) fn plan(row: &mut InstanceRow, ended: Ended, now_ms: i64) {
    let ended = if row.restarts.asked_off { Ended::ByUser } else { ended };
    row.restarts.due = None;
    if !policy_of(&row.spec).wants(ended) {
        return;
    }
    let ran = now_ms.saturating_sub(row.restarts.started);
    let ran = Duration::from_millis(u64::try_from(ran).unwrap_or(0));
    let before = BackOff {
        restarts: row.restarts.count,
    };
    let (back_off, pause) = before.after(ran);
    row.restarts.count = back_off.restarts;
    row.restarts.due = Some(now_ms.saturating_add(i64::try_from(pause.as_millis()).unwrap_or(i64::MAX)));
    let when = match pause {
        Duration::ZERO => String::new(),
        pause => format!(
            " in {}, start {} in a row",
            humantime::format_duration(pause),
            back_off.restarts
        ),
    };
    let reason = row.reason.take().unwrap_or_default();
    row.reason = Some(format!("{reason}{STARTED_AGAIN}{when}"));
}

/// How long until a start is due. No pause is longer than the longest, so what seems later is due: the clock was set back since.
fn until(due_ms: i64, now_ms: i64) -> Duration {
    let left = Duration::from_millis(u64::try_from(due_ms.saturating_sub(now_ms)).unwrap_or(0));
    if left > BackOff::LONGEST { Duration::ZERO } else { left }
}

/// What may be said and done about an instance that is to be started.
pub(super) enum Clearance {
    /// It may be started under this epoch.
    Epoch(u64),
    /// Not now, or not at all: a failure for whoever asked.
    No(Failure),
}

/// Whether a guest without a VMM may be started. The host that it came from has been asked ([`Agent::ask_origin`]) before it was locked.
fn verdict(state: &InstanceState, wanted: Wanted) -> Verdict {
    let fallen = Fallen {
        wanted,
        had: Epoch(state.row.epoch),
        known: Epoch(state.row.known_epoch),
        leaving: match state.migrating {
            Some(_) => Leaving::Armed(None),
            None => Leaving::No,
        },
        origin: state.origin,
    };
    fallen.verdict()
}

impl Agent {
    /// The verdict for a user who wants it to run now, carried out as far as nothing is started.
    pub(super) async fn clear_for_user(&self, state: &mut InstanceState) -> Clearance {
        let name = state.row.spec.name.clone();
        let source = state
            .arrival
            .as_ref()
            .map_or_else(String::new, |arrival| arrival.source.clone());
        let refused = |reason: String| Clearance::No(Failure::Refused(reason));
        match verdict(state, Wanted::ByUser) {
            Verdict::Start(epoch) => Clearance::Epoch(epoch.0),
            Verdict::Superseded(epoch) => {
                self.destroy_stale(state, epoch).await;
                Clearance::No(self.not_here(&name).await)
            }
            Verdict::Indeterminate => {
                Self::doubt(state);
                refused(state.row.reason.clone().unwrap_or_default())
            }
            Verdict::AskOrigin => refused(format!(
                "host {source}, from which instance {name} came, is about to acknowledge that: ask again"
            )),
            Verdict::AskDecision | Verdict::Departed | Verdict::StayDown => {
                refused(format!("instance {name} is {}", state.row.status))
            }
        }
    }

    /// Nobody knows who has the guest: said loudly, until its source answers or a person resolves it.
    fn doubt(state: &mut InstanceState) {
        let Some(arrival) = &state.arrival else { return };
        if state.row.status == Status::Indeterminate {
            return;
        }
        let reason = format!(
            "host {} had not acknowledged that the guest left it, and does not answer: it may have started it anew. It is asked \
             until it does; if it is gone for good, `ferry migration resolve {} --run-here --confirm {}` starts the guest here",
            arrival.source, arrival.migration, state.row.spec.name
        );
        tracing::warn!(instance = %state.row.id, reason, "the instance is indeterminate");
        // The journal keeps what it was: the doubt is about others, and is raised again by whoever wants it started.
        state.doubted = Some((state.row.status, state.row.reason.take()));
        state.row.status = Status::Indeterminate;
        state.row.reason = Some(reason);
    }

    /// Waits until the start of an instance is due and starts it, unless somebody else comes first. How it ended is in the journal before that.
    async fn look_after_restart(self: Arc<Self>, id: Uuid) {
        let mut ask_again = ASK_AGAIN[0];
        while let Some(instance) = self.instances.by_id(id) {
            let mut state = instance.state.lock().await;
            // Who waited for it may have waited for its end: nothing more is written of an instance that was deleted.
            let is_here = self.instances.by_id(id).is_some_and(|now| Arc::ptr_eq(&now, &instance));
            if !is_here {
                continue;
            }
            if self.write_end(&mut state).await.is_err() {
                drop(state);
                tokio::time::sleep(ask_again).await;
                ask_again = ASK_AGAIN[1].min(2 * ask_again);
                continue;
            }
            let Some(due) = state.row.restarts.due else { return };
            drop(state);
            let left = until(due, now_ms());
            if !left.is_zero() {
                tokio::time::sleep(left.min(LOOK_AGAIN)).await;
                continue;
            }
            self.ask_origin(&instance).await;
            let mut state = instance.state.lock().await;
            if state.row.restarts.due != Some(due) || self.instances.by_id(id).is_none() {
                continue;
            }
            if !self.restart(&instance, &mut state).await {
                drop(state);
                tokio::time::sleep(ask_again).await;
                ask_again = ASK_AGAIN[1].min(2 * ask_again);
            }
        }
    }

    /// One try. False if it must be asked again before anything can be done.
    async fn restart(self: &Arc<Self>, instance: &Arc<Instance>, state: &mut InstanceState) -> bool {
        let ended = match state.row.status {
            Status::Stopped => Ended::PoweredOff,
            Status::Indeterminate if matches!(state.doubted, Some((Status::Stopped, _))) => Ended::PoweredOff,
            Status::Crashed | Status::Indeterminate => Ended::Crashed,
            // Its user was faster.
            Status::Running | Status::Paused | Status::Incoming => {
                state.row.restarts.due = None;
                return true;
            }
        };
        match verdict(state, Wanted::ByPolicy(policy_of(&state.row.spec), ended)) {
            Verdict::Start(epoch) => self.start_again(instance, state, epoch).await,
            Verdict::StayDown => {
                state.row.restarts.due = None;
                if let Err(failure) = self.save(&state.row).await {
                    tracing::error!(error = failure.chain(), "failed to journal that an instance stays down");
                }
            }
            Verdict::Superseded(epoch) => self.destroy_stale(state, epoch).await,
            Verdict::Indeterminate => {
                Self::doubt(state);
                return false;
            }
            Verdict::AskOrigin | Verdict::AskDecision | Verdict::Departed => return false,
        }
        true
    }

    async fn start_again(self: &Arc<Self>, instance: &Arc<Instance>, state: &mut InstanceState, epoch: Epoch) {
        let why = state.row.reason.clone().unwrap_or_default();
        let context = RequestContext::agent();
        let subject = Subject::instance(instance.id, &state.row.spec.name);
        let start = self.start(instance, state, Occasion::Start, epoch.0);
        let started = self.recorded(&context, Action::Restart, Some(subject), start).await;
        self.audit(&context, Action::Restart.word(), &instance.id.to_string(), &started)
            .await;
        match started {
            Ok(()) => tracing::info!(%instance.id, %epoch, count = state.row.restarts.count, why, "started again"),
            Err(failure) => {
                tracing::warn!(%instance.id, error = failure.chain(), "an instance could not be started again");
                // It did not run at all: the pauses grow.
                state.row.restarts.started = now_ms();
                let reason = format!("it could not be started again: {}", failure.chain());
                self.end(state, Ended::Crashed, reason).await;
            }
        }
    }

    /// Its user wants it to stay as it is.
    pub(super) async fn cancel_restart(&self, state: &mut InstanceState) -> Result<(), Failure> {
        if state.row.restarts.due.take().is_none() {
            return self.write_end(state).await;
        }
        let reason = state.row.reason.take().unwrap_or_default();
        let why = reason.split(STARTED_AGAIN).next().unwrap_or_default();
        state.row.reason = Some(format!("{why}; its user does not want it started again"));
        state.is_unwritten = true;
        self.write_end(state).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(restart: &str) -> InstanceRow {
        InstanceRow {
            id: Uuid::from_u128(1),
            status: Status::Crashed,
            epoch: 1,
            known_epoch: 1,
            spec: InstanceSpec {
                restart: restart.to_owned(),
                ..InstanceSpec::default()
            },
            migration: None,
            reason: Some("the VMM died".to_owned()),
            boot_id: "boot".to_owned(),
            restarts: Default::default(),
        }
    }

    #[test]
    fn a_crash_is_followed_by_a_start_if_the_policy_wants_it() {
        let mut crashed = row("on-crash");
        plan(&mut crashed, Ended::Crashed, 5_000_000);
        assert_eq!(crashed.restarts.due, Some(5_000_000));
        assert_eq!(crashed.reason.as_deref(), Some("the VMM died; it is started again"));
        for (policy, ended) in [
            ("", Ended::Crashed),
            ("never", Ended::Crashed),
            ("on-crash", Ended::PoweredOff),
        ] {
            let mut other = row(policy);
            plan(&mut other, ended, 5_000_000);
            assert_eq!(other.restarts.due, None, "{policy}");
        }
    }

    #[test]
    fn a_crash_loop_waits_and_tells_how_long() {
        let mut crashed = row("always");
        crashed.restarts.count = 4;
        crashed.restarts.started = 4_999_000;
        plan(&mut crashed, Ended::Crashed, 5_000_000);
        assert_eq!(crashed.restarts.due, Some(5_008_000));
        let reason = crashed.reason.unwrap();
        assert!(reason.contains("in 8s, start 5 in a row"), "{reason}");
    }

    #[test]
    fn a_clock_that_is_set_back_does_not_put_a_start_off() {
        let due = 5_008_000;
        assert_eq!(until(due, 5_000_000), Duration::from_secs(8));
        assert_eq!(until(due, 6_000_000), Duration::ZERO);
        let days = 3 * 24 * 3_600_000;
        assert_eq!(until(due, due - days), Duration::ZERO);
    }

    #[test]
    fn a_guest_that_was_asked_to_switch_off_stays_off() {
        let mut asked = row("always");
        asked.restarts.asked_off = true;
        for ended in [Ended::PoweredOff, Ended::Crashed] {
            plan(&mut asked, ended, 5_000_000);
            assert_eq!(asked.restarts.due, None, "{ended:?}");
        }
    }
}
