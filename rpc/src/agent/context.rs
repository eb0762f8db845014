//! The request context: the first argument of whatever is done because somebody asked, as in Nova.
//!
//! It is read off a call in one place, [`RequestContext::receive`], the interceptor of both services, and put on a call in one,
//! [`RequestContext::carried`], without which no client of a peer can be had. What was accepted in a request keeps its context:
//! a migration makes its own calls under the id in which it was asked for, long after that request was answered.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tonic::{Request, Status};

use super::failure::Failure;
use super::instances::Agent;
use super::journal::{AuditRow, RowWrite};
use super::outgoing::now_text;
use super::who;
use crate::request::{Carried, PassedOn, RequestId};

/// What an agent does of its own accord, in events and in the audit table.
const OWN: &str = "the agent";
/// The longest name of an instance that is kept.
const LONGEST_NAME: usize = 64;

/// Which request something is done in, for whom, and until when somebody waits for it.
#[derive(Clone, Debug)]
pub(crate) struct RequestContext {
    request: RequestId,
    caller: Arc<Caller>,
    /// None: nobody waits, or as long as it takes.
    deadline: Option<Instant>,
}

/// Who asked. The kernel's tables are looked at only when somebody wants to know.
#[derive(Debug)]
struct Caller {
    passed_on: Option<PassedOn>,
    /// The ends of the connection: the caller's and this host's.
    ends: [Option<SocketAddr>; 2],
    names: OnceLock<Names>,
}

#[derive(Debug)]
struct Names {
    /// Who asked this agent.
    actor: String,
    /// Who asked the first agent of all, which is what the others are told.
    original: String,
}

impl Caller {
    fn written(actor: String) -> Arc<Self> {
        let original = actor.clone();
        Arc::new(Self {
            passed_on: None,
            ends: [None, None],
            names: OnceLock::from(Names { actor, original }),
        })
    }

    fn names(&self) -> &Names {
        self.names.get_or_init(|| {
            let [remote, local] = self.ends;
            let known = who::actor(remote, local);
            let said = self.passed_on.as_ref().and_then(|passed_on| passed_on.actor.as_ref());
            Names {
                original: said.unwrap_or(&known).clone(),
                actor: actor(self.passed_on.as_ref(), &known),
            }
        })
    }
}

/// What the interceptor read off a call.
#[derive(Clone)]
struct Received {
    carried: Carried,
    at: Instant,
}

impl RequestContext {
    /// Reads what a call carries. The interceptor of both services.
    ///
    /// # Errors
    /// Its deadline has passed: nobody waits for an answer any more.
    pub(crate) fn receive(mut call: Request<()>) -> Result<Request<()>, Status> {
        let (carried, at) = (Carried::from(call.metadata()), Instant::now());
        if carried.patience == Some(Duration::ZERO) {
            return Err(late("it arrived").into());
        }
        call.extensions_mut().insert(Received { carried, at });
        Ok(call)
    }

    /// The context of a call that came through [`Self::receive`], and of which something is written down.
    pub(crate) fn of<T>(call: &Request<T>) -> Self {
        let context = Self::of_question(call);
        // Now: whoever asked may hang up before it is done.
        context.caller.names();
        context
    }

    /// The context of a call that changes nothing: who asks is of interest only if it is passed on.
    pub(crate) fn of_question<T>(call: &Request<T>) -> Self {
        let received = call.extensions().get::<Received>().cloned();
        let Received { carried, at } = received.unwrap_or_else(|| Received {
            carried: Carried::from(call.metadata()),
            at: Instant::now(),
        });
        let caller = Caller {
            passed_on: carried.passed_on,
            ends: [call.remote_addr(), call.local_addr()],
            names: OnceLock::new(),
        };
        Self {
            request: carried.request,
            caller: Arc::new(caller),
            deadline: carried.patience.and_then(|patience| at.checked_add(patience)),
        }
    }

    /// This agent itself: nobody asked.
    pub(crate) fn agent() -> Self {
        Self {
            request: RequestId::new(),
            caller: Caller::written(OWN.to_owned()),
            deadline: None,
        }
    }

    /// The request in which something was accepted, as it is written down.
    pub(crate) fn written(request: &str, actor: String) -> Self {
        Self {
            request: RequestId::parse(request).unwrap_or_else(|_| RequestId::new()),
            caller: Caller::written(actor),
            deadline: None,
        }
    }

    /// The same, for work that goes on whoever waits for it: a migration, a cast.
    pub(crate) fn without_deadline(&self) -> Self {
        Self {
            deadline: None,
            ..self.clone()
        }
    }

    /// The request's id.
    pub(crate) fn request(&self) -> &str {
        self.request.as_str()
    }

    /// Who asked.
    pub(crate) fn actor(&self) -> &str {
        &self.caller.names().actor
    }

    /// How long something may be waited for that may take `patience`.
    pub(crate) fn left(&self, patience: Duration) -> Duration {
        match self.deadline {
            Some(deadline) => patience.min(deadline.saturating_duration_since(Instant::now())),
            None => patience,
        }
    }

    /// How long somebody waits; none: as long as it takes.
    pub(crate) fn deadline_left(&self) -> Option<Duration> {
        self.deadline.map(|_| self.left(Duration::MAX))
    }

    /// Refuses to begin what nobody waits for any more.
    ///
    /// # Errors
    /// The deadline has passed.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        match self.left(Duration::MAX).is_zero() {
            true => Err(late("it was begun")),
            false => Ok(()),
        }
    }

    /// Waits for something before anything is done, until the deadline.
    ///
    /// # Errors
    /// The deadline has passed.
    pub(crate) async fn wait<T>(&self, what: impl Future<Output = T>) -> Result<T, Failure> {
        self.check()?;
        match self.deadline {
            None => Ok(what.await),
            Some(deadline) => tokio::time::timeout_at(deadline.into(), what)
                .await
                .map_err(|_| late("it could be begun")),
        }
    }

    /// What a call to a peer carries that this host's agent makes in this request.
    pub(super) fn carried(&self, host: &str, patience: Duration) -> Carried {
        Carried {
            request: self.request.clone(),
            passed_on: Some(PassedOn {
                host: host.to_owned(),
                actor: Some(&self.caller.names().original).filter(|who| *who != OWN).cloned(),
            }),
            patience: Some(patience),
        }
    }

    /// What is written of a deed and its result.
    pub(crate) fn did(&self, what: &'static str, instance: &str, result: &str) -> AuditRow {
        AuditRow {
            time: now_text(),
            actor: self.actor().to_owned(),
            request: self.request.to_string(),
            what,
            instance: instance.chars().take(LONGEST_NAME).collect(),
            result: result.to_owned(),
        }
    }
}

fn late(before: &str) -> Failure {
    Failure::Late(format!(
        "the deadline of the call passed before {before}: nothing was done"
    ))
}

/// What a peer says of who asked it is what it says, and by whom it is said is what is known.
fn actor(passed_on: Option<&PassedOn>, known: &str) -> String {
    match passed_on {
        None => known.to_owned(),
        Some(PassedOn { host, actor: None }) => format!("agent {host}, says {known}"),
        Some(PassedOn {
            host,
            actor: Some(actor),
        }) => format!("agent {host} for {actor}, says {known}"),
    }
}

impl Agent {
    /// Writes down what came of a deed, which is over. The deed does not depend on it.
    pub(crate) async fn audit<T>(
        &self,
        context: &RequestContext,
        what: &'static str,
        instance: &str,
        result: &Result<T, Failure>,
    ) {
        let result = match result {
            Ok(_) => "done".to_owned(),
            Err(failure) => failure.chain(),
        };
        let row = context.did(what, instance, &result);
        if let Err(error) = self
            .journal
            .write(RowWrite::Audit, move |transaction| row.add(transaction))
            .await
        {
            tracing::error!(what, instance, %error, "failed to write to the audit table");
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::service::Interceptor;

    use super::*;

    /// The context that a peer has of a call made in this one.
    fn passed_on(context: &RequestContext, patience: Duration) -> Result<RequestContext, Status> {
        let call = context.carried("a", patience).call(Request::new(()))?;
        RequestContext::receive(call).map(|call| RequestContext::of(&call))
    }

    #[test]
    fn the_id_and_the_actor_are_passed_on_and_told_from_what_is_known() {
        let context = RequestContext::written("req-1", "root (uid 0)".to_owned());
        let there = passed_on(&context, Duration::from_secs(5)).unwrap();
        assert_eq!(there.request(), "req-1");
        assert_eq!(there.actor(), "agent a for root (uid 0), says unknown");
        let beyond = passed_on(&there, Duration::from_secs(5)).unwrap();
        assert_eq!(
            (beyond.request(), beyond.actor()),
            ("req-1", "agent a for root (uid 0), says unknown")
        );
    }

    #[test]
    fn what_an_agent_does_of_its_own_accord_is_told_as_its_own() {
        let there = passed_on(&RequestContext::agent(), Duration::from_secs(5)).unwrap();
        assert_eq!(there.actor(), "agent a, says unknown");
        assert!(there.request().starts_with("req-"));
    }

    #[test]
    fn the_deadline_bounds_what_is_waited_for() {
        let there = passed_on(&RequestContext::agent(), Duration::from_secs(5)).unwrap();
        let left = there.left(Duration::from_secs(60));
        assert!(left <= Duration::from_secs(5) && !left.is_zero(), "{left:?}");
        assert_eq!(there.left(Duration::ZERO), Duration::ZERO);
        assert_eq!(
            there.without_deadline().left(Duration::from_secs(60)),
            Duration::from_secs(60)
        );
    }

    #[test]
    fn a_call_whose_deadline_has_passed_when_it_arrives_is_refused() {
        let refused = passed_on(&RequestContext::agent(), Duration::ZERO).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::DeadlineExceeded);
        assert!(refused.message().contains("nothing was done"), "{refused}");
    }

    #[tokio::test]
    async fn what_is_not_begun_by_the_deadline_is_not_begun() {
        let there = passed_on(&RequestContext::agent(), Duration::from_millis(20)).unwrap();
        let busy = there.wait(std::future::pending::<()>()).await;
        assert!(matches!(busy, Err(Failure::Late(_))), "{busy:?}");
        let mut begun = false;
        let late = there.wait(async { begun = true }).await;
        assert!(matches!(late, Err(Failure::Late(_))) && !begun);
        assert!(RequestContext::agent().wait(async {}).await.is_ok());
    }
}
