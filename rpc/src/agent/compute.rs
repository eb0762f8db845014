//! The `Compute` service: convert, call, map the error.

mod of_peers;
mod upload;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use ferry_migration::handover::Decision;
use ferry_proto::agent::v1::compute_server::Compute;
use ferry_proto::agent::v1::{
    AttemptRequest, BalloonInstanceRequest, CheckDestinationReply, CheckDestinationRequest, CheckSourceReply,
    CheckSourceRequest, ConsoleInputReply, ConsoleInputRequest, ConsoleOutput, ConsoleRequest, DecisionReply,
    DeleteInstanceReply, DeleteInstanceRequest, FirstFramesReply, FirstFramesRequest, HeartbeatReply, HeartbeatRequest,
    HostInfo, HostRequest, ImageChunk, InstanceInfo, InstanceRequest, LateLinkReply, LateLinkRequest, LatePagesReply,
    LatePagesRequest, ListEventsReply, ListEventsRequest, ListInstancesReply, ListInstancesRequest, LiveMigrationCast,
    MigrationPrediction, PostLiveMigrationReply, PostLiveMigrationRequest, PreLiveMigrationReply,
    PreLiveMigrationRequest, PredictMigrationRequest, ProbeLinkReply, ProbeLinkRequest, PutImageReply, Receipt,
    RecordRefusalReply, RecordRefusalRequest, RestoreInstanceRequest, RollbackReply, RollbackRequest,
    RunInstanceRequest, SnapshotInfo, SnapshotInstanceRequest, StopInstanceRequest,
};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::{InvalidField, required, wire_uuid};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use self::of_peers::goes_elsewhere;
use super::config::is_name;
use super::console::{self, Follow};
use super::context::RequestContext;
use super::events::{Action, Subject};
use super::failure::Failure;
use super::instances::{Agent, Press};
use super::outgoing::PeerNews;
use super::peers::CALL_TIME;
use super::snapshots::Identity;
use super::spawn::VMM_LOG;
use crate::vmm_process::{CONSOLE_LOG, monotonic_ns};

/// The service over one agent.
pub(crate) struct ComputeService(pub(crate) Arc<Agent>);

/// The most bytes that one request types into a console.
const MOST_INPUT: usize = 64 << 10;

type Answer<T> = Result<Response<T>, Status>;
type Output = Pin<Box<dyn Stream<Item = Result<ConsoleOutput, Status>> + Send>>;

fn answer<T>(result: Result<T, Failure>) -> Answer<T> {
    result.map(Response::new).map_err(Status::from)
}

/// Runs work that changes something to its end, also when whoever asked goes away in the middle of it.
pub(super) async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> Result<T, Failure> {
    tokio::spawn(work).await.unwrap_or_else(|error| {
        Err(Failure::Host {
            what: "the request was not carried out".to_owned(),
            source: std::io::Error::other(error),
        })
    })
}

impl ComputeService {
    /// Does something to an instance that is here: whole, and with an event.
    async fn act<T, F>(
        &self,
        context: RequestContext,
        action: Action,
        name: String,
        work: impl FnOnce(Arc<Agent>, RequestContext, String) -> F + Send + 'static,
    ) -> Answer<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + Send,
    {
        let agent = Arc::clone(&self.0);
        let acted = async move {
            let subject = agent.subject(&name);
            let work = work(Arc::clone(&agent), context.clone(), name);
            agent.recorded(&context, action, subject, work).await
        };
        answer(whole(acted).await)
    }

    async fn output(&self, request: ConsoleRequest, file: &str) -> Answer<Output> {
        let instance = self.0.instance(&request.instance).await?;
        let follow = if request.follow { Follow::Yes } else { Follow::No };
        let path = self.0.folder(instance.id).join(file);
        Ok(Response::new(Box::pin(ReceiverStream::new(console::stream(
            path, follow,
        )))))
    }
}

#[tonic::async_trait]
impl Compute for ComputeService {
    async fn host(&self, _: Request<HostRequest>) -> Answer<HostInfo> {
        Ok(Response::new(self.0.host_info().await))
    }

    async fn run_instance(&self, request: Request<RunInstanceRequest>) -> Answer<InstanceInfo> {
        let context = RequestContext::of(&request);
        let spec = required("spec", request.into_inner().spec).map_err(Failure::from)?;
        let agent = Arc::clone(&self.0);
        let run = async move {
            let (id, name) = (Uuid::new_v4(), spec.name.clone());
            // Nobody could ask for the events of what no instance is called.
            let subject = is_name(&name).then(|| Subject::instance(id, &name));
            let run = agent.run_instance(id, spec);
            let run = agent.recorded(&context, Action::Run, subject, run).await;
            let instance = run.as_ref().map_or(&name, |info| &info.id);
            agent.audit(&context, Action::Run.word(), instance, &run).await;
            run
        };
        answer(whole(run).await)
    }

    async fn list_instances(&self, _: Request<ListInstancesRequest>) -> Answer<ListInstancesReply> {
        let mut instances = Vec::new();
        for instance in self.0.instances.all() {
            instances.push(instance.state.lock().await.info(self.0.host()));
        }
        instances.sort_by(|left, right| left.name.cmp(&right.name));
        Ok(Response::new(ListInstancesReply { instances }))
    }

    async fn show_instance(&self, request: Request<InstanceRequest>) -> Answer<InstanceInfo> {
        answer(self.0.show_instance(&request.into_inner().instance).await)
    }

    async fn list_events(&self, request: Request<ListEventsRequest>) -> Answer<ListEventsReply> {
        let request = request.into_inner();
        let events = self.0.events(&request.instance, request.limit).await;
        answer(events.map(|events| ListEventsReply { events }))
    }

    async fn balloon_instance(&self, request: Request<BalloonInstanceRequest>) -> Answer<InstanceInfo> {
        let (context, request) = (RequestContext::of(&request), request.into_inner());
        let (name, bytes) = (request.instance, request.memory_bytes);
        self.act(context, Action::Balloon, name, move |agent, context, name| async move {
            agent.balloon_instance(&context, &name, bytes).await
        })
        .await
    }

    async fn start_instance(&self, request: Request<InstanceRequest>) -> Answer<InstanceInfo> {
        let (context, name) = (RequestContext::of(&request), request.into_inner().instance);
        self.act(context, Action::Start, name, |agent, context, name| async move {
            agent.start_instance(&context, &name).await
        })
        .await
    }

    async fn pause_instance(&self, request: Request<InstanceRequest>) -> Answer<InstanceInfo> {
        let (context, name) = (RequestContext::of(&request), request.into_inner().instance);
        self.act(context, Action::Pause, name, |agent, context, name| async move {
            agent.pause_instance(&context, &name).await
        })
        .await
    }

    async fn resume_instance(&self, request: Request<InstanceRequest>) -> Answer<InstanceInfo> {
        let (context, name) = (RequestContext::of(&request), request.into_inner().instance);
        self.act(context, Action::Resume, name, |agent, context, name| async move {
            agent.resume_instance(&context, &name).await
        })
        .await
    }

    async fn reboot_instance(&self, request: Request<InstanceRequest>) -> Answer<InstanceInfo> {
        let (context, name) = (RequestContext::of(&request), request.into_inner().instance);
        self.act(context, Action::Reboot, name, |agent, context, name| async move {
            agent.reboot_instance(&context, &name).await
        })
        .await
    }

    async fn stop_instance(&self, request: Request<StopInstanceRequest>) -> Answer<InstanceInfo> {
        let context = RequestContext::of(&request);
        let (agent, request) = (Arc::clone(&self.0), request.into_inner());
        let patience = Duration::from_millis(request.timeout_ms);
        let name = request.instance;
        let subject = agent.subject(&name);
        if request.force {
            let stop = async move {
                context.check()?;
                let stop = agent.stop_by_force(&name, patience);
                let stopped = agent.recorded(&context, Action::ForceStop, subject, stop).await;
                let instance = stopped.as_ref().map_or(&name, |info| &info.id);
                agent
                    .audit(&context, Action::ForceStop.word(), instance, &stopped)
                    .await;
                stopped
            };
            return answer(whole(stop).await);
        }
        let (asking, asked_in) = (Arc::clone(&agent), context.clone());
        // Asking is done whole; waiting is for a caller that is there.
        let stop = async {
            match whole(async move { asking.press_power_button(&asked_in, &name).await }).await? {
                Press::IsOff(info) => Ok(*info),
                Press::Asked(asked) => agent.switched_off(&asked, patience).await,
            }
        };
        answer(agent.recorded(&context, Action::Stop, subject, stop).await)
    }

    async fn delete_instance(&self, request: Request<DeleteInstanceRequest>) -> Answer<DeleteInstanceReply> {
        let context = RequestContext::of(&request);
        let (agent, request) = (Arc::clone(&self.0), request.into_inner());
        let delete = async move {
            context.check()?;
            let action = match request.force {
                true => Action::ForceDelete,
                false => Action::Delete,
            };
            let subject = agent.subject(&request.instance);
            let delete = agent.delete_instance(&request.instance, request.force);
            let deleted = agent.recorded(&context, action, subject, delete).await;
            let instance = deleted.as_ref().map_or(request.instance, Uuid::to_string);
            agent.audit(&context, action.word(), &instance, &deleted).await;
            deleted
        };
        answer(whole(delete).await.map(|id| DeleteInstanceReply { id: id.to_string() }))
    }

    async fn snapshot_instance(&self, request: Request<SnapshotInstanceRequest>) -> Answer<SnapshotInfo> {
        let (context, request) = (RequestContext::of(&request), request.into_inner());
        let (name, directory) = (request.instance, request.directory);
        self.act(
            context,
            Action::Snapshot,
            name,
            move |agent, context, name| async move { agent.snapshot_instance(&context, &name, &directory).await },
        )
        .await
    }

    async fn restore_instance(&self, request: Request<RestoreInstanceRequest>) -> Answer<InstanceInfo> {
        let context = RequestContext::of(&request);
        let (agent, request) = (Arc::clone(&self.0), request.into_inner());
        let identity = match request.same_identity {
            true => Identity::Same,
            false => Identity::New,
        };
        let restored = async move {
            agent
                .restore_instance(&context, &request.directory, &request.name, identity)
                .await
        };
        answer(whole(restored).await)
    }

    type ConsoleStream = Output;

    async fn console(&self, request: Request<ConsoleRequest>) -> Answer<Output> {
        self.output(request.into_inner(), CONSOLE_LOG).await
    }

    async fn console_input(&self, request: Request<ConsoleInputRequest>) -> Answer<ConsoleInputReply> {
        let request = request.into_inner();
        if request.bytes.len() > MOST_INPUT {
            let problem = format!(
                "has {} bytes, {MOST_INPUT} are the limit of one request",
                request.bytes.len()
            );
            return Err(Failure::from(InvalidField {
                field: "bytes",
                problem,
            })
            .into());
        }
        let instance = self.0.instance(&request.instance).await?;
        let vmm = instance.state.lock().await.vmm()?.clone();
        let input = Command::ConsoleInput(wire::ConsoleInput { bytes: request.bytes });
        let typed = vmm
            .order(input)
            .await
            .map_err(Failure::vmm("failed to type into the console"));
        answer(typed.map(|_| ConsoleInputReply {}))
    }

    type LogsStream = Output;

    async fn logs(&self, request: Request<ConsoleRequest>) -> Answer<Output> {
        self.output(request.into_inner(), VMM_LOG).await
    }

    async fn check_can_live_migrate_destination(
        &self,
        request: Request<CheckDestinationRequest>,
    ) -> Answer<CheckDestinationReply> {
        let (context, request) = (RequestContext::of_question(&request), request.into_inner());
        answer(self.0.check_can_live_migrate_destination(&context, request).await)
    }

    async fn check_can_live_migrate_source(&self, request: Request<CheckSourceRequest>) -> Answer<CheckSourceReply> {
        answer(self.0.check_can_live_migrate_source(request.into_inner()).await)
    }

    async fn predict_migration(&self, request: Request<PredictMigrationRequest>) -> Answer<MigrationPrediction> {
        let (context, request) = (RequestContext::of_question(&request), request.into_inner());
        // Not whole: whoever hangs up ends the sample.
        answer(self.0.predict_migration(&context, request).await)
    }

    async fn record_refusal(&self, request: Request<RecordRefusalRequest>) -> Answer<RecordRefusalReply> {
        let (context, request) = (RequestContext::of(&request), request.into_inner());
        answer(self.0.refused_elsewhere(&context, request).await)
    }

    async fn probe_link(&self, request: Request<ProbeLinkRequest>) -> Answer<ProbeLinkReply> {
        answer(self.0.probe_link(&request.into_inner()))
    }

    async fn create_migration(&self, request: Request<LiveMigrationCast>) -> Answer<Receipt> {
        let context = RequestContext::of(&request);
        let (agent, record) = (Arc::clone(&self.0), request.into_inner());
        answer(whole(async move { agent.create_migration(&context, record).await }).await)
    }

    async fn live_migration(&self, request: Request<LiveMigrationCast>) -> Answer<Receipt> {
        let context = RequestContext::of(&request);
        let (agent, cast) = (Arc::clone(&self.0), request.into_inner());
        answer(whole(async move { agent.live_migration(&context, cast).await }).await)
    }

    async fn pre_live_migration(&self, request: Request<PreLiveMigrationRequest>) -> Answer<PreLiveMigrationReply> {
        let context = RequestContext::of(&request);
        let (agent, request) = (Arc::clone(&self.0), request.into_inner());
        answer(whole(async move { agent.pre_live_migration(&context, request).await }).await)
    }

    async fn put_image(&self, request: Request<Streaming<ImageChunk>>) -> Answer<PutImageReply> {
        self.take_image(request.into_inner()).await?;
        Ok(Response::new(PutImageReply {}))
    }

    async fn expect(&self, request: Request<AttemptRequest>) -> Answer<DecisionReply> {
        let request = request.into_inner();
        let migration = self.check_attempt(&request).await?;
        let expected = self.0.expect(migration, request.attempt).await;
        answer(expected.map(|expected| self.decision_reply(expected)))
    }

    async fn decide(&self, request: Request<AttemptRequest>) -> Answer<DecisionReply> {
        let request = request.into_inner();
        let migration = self.check_attempt(&request).await?;
        let decided = self.0.decide(migration, request.attempt).await;
        answer(decided.map(|decided| self.decision_reply(decided)))
    }

    async fn post_live_migration(&self, request: Request<PostLiveMigrationRequest>) -> Answer<PostLiveMigrationReply> {
        let heard_ns = monotonic_ns();
        let request = request.into_inner();
        self.check_journal(&request.journal)?;
        let migration = wire_uuid("migration", &request.migration).map_err(Failure::from)?;
        let decision = Decision::parse(&request.decision).ok_or_else(|| {
            Failure::from(InvalidField {
                field: "decision",
                problem: format!("{:?} is none", request.decision),
            })
        })?;
        // Of a migration that is over here, the news is old.
        if let Some(outgoing) = self.0.outgoing.find(migration) {
            if outgoing.destination != request.destination {
                return Err(goes_elsewhere(migration, &request.destination).into());
            }
            let PostLiveMigrationRequest {
                attempt, part, reason, ..
            } = request.clone();
            outgoing.hear(PeerNews {
                attempt,
                decision,
                part,
                reason,
                heard_ns,
            });
            if decision == Decision::Running {
                // Most often it is, at once: then it need not be told again.
                let _ = tokio::time::timeout(CALL_TIME / 2, outgoing.let_go()).await;
            }
        }
        let kept_epoch = self.kept_epoch(migration, &request.destination).await?;
        Ok(Response::new(PostLiveMigrationReply {
            pending: self
                .0
                .outgoing
                .find(migration)
                .is_some_and(|outgoing| !outgoing.has_let_go()),
            kept_epoch,
            deleted: kept_epoch > 0 && self.is_deleted(&request.instance).await?,
            journal: self.0.journal.id().to_string(),
        }))
    }

    async fn rollback_live_migration(&self, request: Request<RollbackRequest>) -> Answer<RollbackReply> {
        let request = request.into_inner();
        let migration = wire_uuid("migration", &request.migration).map_err(Failure::from)?;
        self.check_peer(migration, &request.source).await?;
        if let Some(incoming) = self.0.incoming.give_up(migration, &request.reason) {
            // Answered once nothing is left of it, so that the same guest may come again at once.
            let _ = tokio::time::timeout(CALL_TIME / 2, incoming.over()).await;
        }
        Ok(Response::new(RollbackReply {}))
    }

    async fn late_link(&self, request: Request<LateLinkRequest>) -> Answer<LateLinkReply> {
        let request = request.into_inner();
        let migration = wire_uuid("migration", &request.migration).map_err(Failure::from)?;
        self.check_journal(&request.journal)?;
        self.check_peer(migration, &request.source).await?;
        let mut reply = self.0.late_link(request).await?;
        reply.journal = self.0.journal.id().to_string();
        Ok(Response::new(reply))
    }

    async fn late_pages(&self, request: Request<LatePagesRequest>) -> Answer<LatePagesReply> {
        answer(self.0.late_pages(request.into_inner()).await)
    }

    async fn first_frames(&self, request: Request<FirstFramesRequest>) -> Answer<FirstFramesReply> {
        let request = request.into_inner();
        let migration = wire_uuid("migration", &request.migration).map_err(Failure::from)?;
        self.check_peer(migration, &request.source).await?;
        answer(self.0.first_frames(migration).await)
    }

    async fn heartbeat(&self, request: Request<HeartbeatRequest>) -> Answer<HeartbeatReply> {
        let request = request.into_inner();
        let migration = wire_uuid("migration", &request.migration).map_err(Failure::from)?;
        self.check_peer(migration, &request.source).await?;
        let taking_part = self
            .0
            .incoming
            .find(migration)
            .is_some_and(|incoming| incoming.heartbeat());
        let reason = if taking_part {
            String::new()
        } else {
            self.0.why_over(migration).await
        };
        Ok(Response::new(HeartbeatReply { taking_part, reason }))
    }
}
