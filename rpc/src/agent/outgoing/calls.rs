//! What a switchover asks of its VMM and of agent B without waiting for it: each call reports what it brought.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_migration::handover::{Decision, Epoch, SourceEvent, Traded};
use ferry_proto::agent::v1::{AttemptRequest, DestinationPart, HeartbeatRequest, RollbackRequest};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report as Body;
use tokio::sync::mpsc;

use super::begin::{attempt_of, call_off};
use super::retuning::Retuning;
use super::script::{Script, Stop};
use crate::agent::failure::Failure;
use crate::agent::instances::Instance;
use crate::agent::peer_journal::another_answers;
use crate::agent::peers::{CALL_TIME, PeerError};
use crate::agent::reason::Reason;
use crate::agent::vmm_client::VmmError;
use crate::vmm_process::monotonic_ns;

/// How often agent B is asked whether it still takes part.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// After this long without an answer agent B counts as dead or hung.
pub(super) const SILENCE: Duration = Duration::from_secs(5);
/// The pause between two tries to reach a VMM that lives and does not answer, and the first between two tries to resume.
const RETRY: Duration = Duration::from_millis(200);
/// The longest pause between two tries to resume.
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// What a call that was started earlier brought.
pub(super) enum Outcome {
    Event(SourceEvent),
    /// A failed expectation, with the reason.
    NotExpected(u32, String),
    /// D, with B's part of the blackout.
    Decided(u32, Decision, Option<DestinationPart>, u64),
    /// Whoever was asked for D has another journal than the one that it is in.
    AnotherAnswers(Failure),
    /// RUNNING was heard before GO, and has waited long enough for it.
    EarlyNews,
    /// B had its time to say why the link broke.
    LinkLost,
    /// The VMM goes by other terms.
    Retuned(Retuning),
    /// The destination does not take part any more.
    PeerLost(String),
    /// The guest is this host's and does not run yet, for this reason. It is tried again.
    NotResumed(String),
}

/// Where the calls that this task started report to.
pub(super) struct Calls {
    pub(super) sender: mpsc::UnboundedSender<Outcome>,
}

impl Calls {
    pub(super) fn start(&self, call: impl Future<Output = Option<Outcome>> + Send + 'static) {
        let sender = self.sender.clone();
        tokio::spawn(async move {
            if let Some(outcome) = call.await {
                // The switchover may be over: of what its VMM obeyed until then, whoever asked is told.
                if let Err(mpsc::error::SendError(Outcome::Retuned(retuning))) = sender.send(outcome) {
                    retuning.answer(Ok(()));
                }
            }
        });
    }

    pub(super) fn ask_after(&self, pause: Duration) {
        self.start(async move {
            tokio::time::sleep(pause).await;
            Some(Outcome::Event(SourceEvent::TimeToAsk))
        });
    }
}

impl Script {
    fn attempt_request(&self, attempt: u32) -> AttemptRequest {
        AttemptRequest {
            instance: self.row.instance.to_string(),
            migration: self.row.id.to_string(),
            attempt,
            epoch: self.row.epoch,
            source: self.agent.host().to_owned(),
            journal: String::new(),
        }
    }

    pub(super) fn ask_expect(&self, attempt: u32, calls: &Calls) {
        let request = self.attempt_request(attempt);
        let Ok(peer) = self.agent.peers.named(&self.row.peer).cloned() else {
            return;
        };
        let compute = self.agent.peer_rpcapi(&self.outgoing.context, &peer);
        let journal = self.row.peer_journal;
        calls.start(async move {
            Some(match compute.expect(request, journal).await {
                Ok(reply) if reply.decision == Decision::Open.as_str() => {
                    Outcome::Event(SourceEvent::Expecting(attempt))
                }
                Ok(reply) => Outcome::NotExpected(attempt, format!("host {} says {}", peer.host, reply.decision)),
                Err(failure) => Outcome::NotExpected(attempt, failure.chain()),
            })
        });
    }

    pub(super) fn ask_decision(&self, attempt: u32, calls: &Calls) {
        let request = self.attempt_request(attempt);
        let Ok(peer) = self.agent.peers.named(&self.row.peer).cloned() else {
            calls.start(async { Some(Outcome::Event(SourceEvent::NoAnswer)) });
            return;
        };
        let compute = self.agent.peer_rpcapi(&self.outgoing.context, &peer);
        let journal = self.row.peer_journal;
        calls.start(async move {
            Some(match compute.decide(request, journal).await {
                Ok(reply) => match Decision::parse(&reply.decision) {
                    Some(decision) => Outcome::Decided(attempt, decision, reply.part, monotonic_ns()),
                    None => Outcome::Event(SourceEvent::NoAnswer),
                },
                Err(failure) if failure.reason() == Some(Reason::JournalIsOther) => {
                    Outcome::AnotherAnswers(another_answers(&peer))
                }
                Err(failure) => {
                    tracing::info!(error = failure.chain(), "the destination does not say what was decided");
                    Outcome::Event(SourceEvent::NoAnswer)
                }
            })
        });
    }

    pub(super) fn give_grant(&self, attempt: u32, calls: &Calls) {
        let order = Command::Grant(wire::Grant {
            attempt: Some(attempt_of(&self.row, attempt)),
        });
        let instance = Arc::clone(&self.instance);
        calls.start(async move {
            match order_until_answered(&instance, order).await? {
                // Stale, or nothing is sent any more, or taken and traded already if it was given twice: the VMM is asked.
                Err(_) => Some(Outcome::Event(SourceEvent::GrantRefused(attempt))),
                Ok(_) => None,
            }
        });
    }

    pub(super) fn ask_trade(&self, attempt: u32, end: bool, calls: &Calls) {
        let reason = match &self.stop {
            Some(Stop::Aborted(reason) | Stop::Failed(reason) | Stop::Busy(reason)) => reason.clone(),
            None => "called off by the agent".to_owned(),
        };
        let order = Command::CallOff(call_off(&self.row, attempt, end, &reason));
        let instance = Arc::clone(&self.instance);
        calls.start(async move {
            let Ok(Body::Traded(traded)) = order_until_answered(&instance, order).await? else {
                tracing::error!("the VMM does not say what became of the grant");
                return None;
            };
            let traded = if traded.go_sent {
                Traded::GoSent
            } else {
                Traded::Cancelled
            };
            Some(Outcome::Event(SourceEvent::Answered(traded)))
        });
    }

    pub(super) fn send_permit(&self, epoch: Epoch, calls: &Calls) {
        let permit = wire::Permit {
            instance: self.row.instance.to_string(),
            epoch: epoch.0,
            paused: self.row.user_paused,
        };
        let instance = Arc::clone(&self.instance);
        let waiting = calls.sender.clone();
        calls.start(async move {
            let mut pause = RETRY;
            loop {
                let order = Command::Permit(permit.clone());
                let Err(reason) = order_until_answered(&instance, order).await? else {
                    return Some(Outcome::Event(SourceEvent::Resumed));
                };
                // Taken before, from an agent that was here before this one?
                let asked = order_until_answered(&instance, Command::Ping(wire::Ping {})).await?;
                if matches!(asked, Ok(Body::Standing(standing)) if standing.epoch >= epoch.0) {
                    return Some(Outcome::Event(SourceEvent::Resumed));
                }
                let _ = waiting.send(Outcome::NotResumed(reason));
                tokio::time::sleep(pause).await;
                pause = LONGEST_RETRY.min(2 * pause);
            }
        });
    }

    /// Tells agent B that it is over before GO. It would find out by itself.
    pub(super) fn roll_back_destination(&mut self) {
        let Ok(peer) = self.agent.peers.named(&self.row.peer).cloned() else {
            return;
        };
        let reason = match &self.stop {
            Some(Stop::Aborted(reason) | Stop::Failed(reason) | Stop::Busy(reason)) => reason.clone(),
            None => "the migration ended at the source".to_owned(),
        };
        let request = RollbackRequest {
            migration: self.row.id.to_string(),
            reason,
            source: self.agent.host().to_owned(),
        };
        let compute = self.agent.peer_rpcapi(&self.outgoing.context, &peer);
        self.rollback = Some(tokio::spawn(async move {
            for pause in [0, 500, 2000] {
                tokio::time::sleep(Duration::from_millis(pause)).await;
                match compute.rollback_live_migration(request.clone()).await {
                    Ok(()) => return true,
                    Err(error) => tracing::info!(%error, "the destination does not take the rollback"),
                }
            }
            false
        }));
    }

    /// Asks agent B each second whether it takes part; ends with why it does not.
    pub(super) fn heartbeats(&self) -> impl Future<Output = String> + Send + 'static {
        let peer = self.agent.peers.named(&self.row.peer);
        let compute = peer.map(|peer| self.agent.peer_rpcapi(&self.outgoing.context, peer));
        let host = self.row.peer.clone();
        let request = HeartbeatRequest {
            migration: self.row.id.to_string(),
            source: self.agent.host().to_owned(),
        };
        let patience = self.peer_patience.subscribe();
        async move {
            let Ok(compute) = compute else {
                return "the destination is not a peer any more".to_owned();
            };
            let mut answered = Instant::now();
            loop {
                let patience = *patience.borrow();
                let left = patience
                    .saturating_sub(answered.elapsed())
                    .max(Duration::from_millis(100));
                match compute.heartbeat(request.clone(), left.min(CALL_TIME)).await {
                    Ok(reply) if reply.taking_part => answered = Instant::now(),
                    Ok(reply) => return format!("host {host} does not take part any more: {}", reply.reason),
                    Err(PeerError::Refused { text, .. }) => return text,
                    Err(PeerError::NoAnswer(reason)) if answered.elapsed() >= patience => return reason,
                    Err(PeerError::NoAnswer(_)) => {}
                }
                tokio::time::sleep(HEARTBEAT.min(patience.saturating_sub(answered.elapsed()))).await;
            }
        }
    }
}

/// Gives an order again until the VMM answers, however long it is stopped: only its word counts. None once it is dead.
pub(super) async fn order_until_answered(instance: &Instance, order: Command) -> Option<Result<Body, String>> {
    loop {
        // A connection that broke is made anew by whoever looks after the VMM.
        let vmm = instance.state.lock().await.vmm.clone()?;
        match vmm.order(order.clone()).await {
            Ok(body) => return Some(Ok(body)),
            Err(VmmError::Refused(reason)) => return Some(Err(reason)),
            Err(_) if vmm.is_dead() => return None,
            Err(error) => {
                tracing::info!(%error, "the VMM does not answer, asking again");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}
