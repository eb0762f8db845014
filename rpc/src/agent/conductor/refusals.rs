//! What a conductor refuses, at the host that has the instance.
//!
//! Any agent may be asked for a migration, and writes down what it refused. Whoever looks after the instance looks at its own host; so
//! that one is told, too.

use std::sync::Arc;

use ferry_proto::InvalidField;
use ferry_proto::agent::v1::{RecordRefusalReply, RecordRefusalRequest};

use crate::agent::context::RequestContext;
use crate::agent::events::{Action, Subject};
use crate::agent::failure::Failure;
use crate::agent::instances::Agent;
use crate::agent::reason::Reason;

/// Characters of a refusal that are kept: the peer chose its length.
const MOST_MESSAGE: usize = 4000;

impl Agent {
    /// Writes down that a migration was refused: here, and at the host that has the instance. What is no refusal is known here only,
    /// such as that a host does not answer: the source may be the one.
    pub(super) async fn record_refusal(
        self: &Arc<Self>,
        context: &RequestContext,
        source: &str,
        subject: Subject,
        failure: &Failure,
    ) {
        let instance = subject.instance.to_string();
        self.record_failure(context, Action::Migrate, subject, failure).await;
        let Some(reason) = failure.reason().filter(|&reason| reason != Reason::SourceDown) else {
            return;
        };
        if source == self.host() {
            return;
        }
        let refusal = RecordRefusalRequest {
            instance,
            reason: reason.code().to_owned(),
            message: failure.to_string(),
        };
        let told = match self.compute_rpcapi(context, source) {
            Ok(api) => api.record_refusal(refusal).await,
            Err(unknown) => Err(unknown),
        };
        if let Err(failure) = told {
            // It has its place here.
            tracing::info!(
                source,
                error = failure.chain(),
                "the host that has the instance is not told that it was refused a migration"
            );
        }
    }

    /// Another host's conductor refused a migration of an instance of this host.
    ///
    /// # Errors
    /// The instance is not here, or a field cannot be used.
    pub(crate) async fn refused_elsewhere(
        &self,
        context: &RequestContext,
        request: RecordRefusalRequest,
    ) -> Result<RecordRefusalReply, Failure> {
        let reason = Reason::parse(&request.reason).ok_or_else(|| InvalidField {
            field: "reason",
            problem: format!("{:?} is none", request.reason.chars().take(64).collect::<String>()),
        })?;
        let instance = self.instance(&request.instance).await?;
        let subject = Subject::instance(instance.id, &instance.name);
        let message: String = request.message.chars().take(MOST_MESSAGE).collect();
        let failure = Failure::denied(reason, message);
        self.record_failure(context, Action::Migrate, subject, &failure).await;
        Ok(RecordRefusalReply {})
    }
}
