//! What standard gRPC clients ask of any server: whether it serves (`grpc.health.v1`), and what (`grpc.reflection.v1`).
//!
//! The agent serves while its journal takes writes and it is not asked to end: without a journal nothing is decided and
//! nothing moves. One task says so, so that no earlier word comes after a later one.

use anyhow::Context;
use ferry_proto::agent::v1::compute_server::ComputeServer;
use ferry_proto::agent::v1::conductor_server::ConductorServer;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tonic::server::NamedService;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::{Health as HealthApi, HealthServer};
use tonic_health::server::{HealthReporter, health_reporter};
use tonic_reflection::server::v1::{ServerReflection, ServerReflectionServer};

use super::compute::ComputeService;
use super::conductor::ConductorService;
use super::transport::StreamsService;

/// The services whose health is told; the empty name is the whole agent's.
const SERVICES: [&str; 4] = [
    "",
    <ConductorServer<ConductorService> as NamedService>::NAME,
    <ComputeServer<ComputeService> as NamedService>::NAME,
    <StreamsService as NamedService>::NAME,
];

/// Tells how the agent is until it ends.
pub(super) struct Health {
    ending: oneshot::Sender<()>,
    telling: JoinHandle<()>,
}

impl Health {
    /// Begins to tell; the journal says whether it takes writes.
    pub(super) async fn begin(writable: watch::Receiver<bool>) -> (Self, HealthServer<impl HealthApi>) {
        let (reporter, server) = health_reporter();
        // Before the first question comes: a service that nobody has told of yet is unknown.
        say(&reporter, ServingStatus::Serving).await;
        let (ending, asked) = oneshot::channel();
        let telling = tokio::spawn(tell(reporter, writable, asked));
        (Self { ending, telling }, server)
    }

    /// The agent ends: whoever watches has heard it when this returns.
    pub(super) async fn end(self) {
        let _ = self.ending.send(());
        // A panic in there has nothing more to tell either.
        let _ = self.telling.await;
    }
}

async fn tell(reporter: HealthReporter, mut writable: watch::Receiver<bool>, mut ending: oneshot::Receiver<()>) {
    loop {
        let status = match *writable.borrow_and_update() {
            true => ServingStatus::Serving,
            false => ServingStatus::NotServing,
        };
        say(&reporter, status).await;
        tokio::select! {
            changed = writable.changed() => if changed.is_err() { break },
            _ = &mut ending => break,
        }
    }
    say(&reporter, ServingStatus::NotServing).await;
}

async fn say(reporter: &HealthReporter, status: ServingStatus) {
    for service in SERVICES {
        reporter.set_service_status(service, status).await;
    }
}

/// What the agent serves, described by the very files that it was generated from.
///
/// # Errors
/// The descriptors of this build do not parse.
pub(super) fn reflection() -> anyhow::Result<ServerReflectionServer<impl ServerReflection>> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(ferry_proto::AGENT_DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .context("failed to describe the services to clients")
}

#[cfg(test)]
mod tests {
    use tonic::Request;
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_check_response::ServingStatus as Told;
    use tonic_health::server::HealthService;

    use super::*;

    async fn told(server: &impl HealthApi, service: &str) -> Told {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let answer = server.check(Request::new(request)).await.unwrap().into_inner();
        answer.status()
    }

    /// Each service answers this, once the task came to it.
    async fn becomes(server: &impl HealthApi, wanted: Told) {
        for service in SERVICES {
            while told(server, service).await != wanted {
                tokio::task::yield_now().await;
            }
        }
    }

    #[tokio::test]
    async fn an_agent_serves_while_its_journal_takes_writes_and_until_it_ends() {
        let (writable, as_seen) = watch::channel(true);
        let (reporter, _) = health_reporter();
        let service = HealthService::from_health_reporter(reporter.clone());
        let (ending, asked) = oneshot::channel();
        say(&reporter, ServingStatus::NotServing).await;
        let telling = tokio::spawn(tell(reporter, as_seen, asked));

        becomes(&service, Told::Serving).await;
        writable.send_replace(false);
        becomes(&service, Told::NotServing).await;
        writable.send_replace(true);
        becomes(&service, Told::Serving).await;
        ending.send(()).unwrap();
        telling.await.unwrap();
        for service_name in SERVICES {
            assert_eq!(told(&service, service_name).await, Told::NotServing, "{service_name}");
        }
    }

    #[test]
    fn the_descriptors_of_this_build_describe_its_services() {
        assert!(reflection().is_ok());
        let set: prost_types::FileDescriptorSet = prost::Message::decode(ferry_proto::AGENT_DESCRIPTORS).unwrap();
        let described: Vec<String> = set
            .file
            .iter()
            .flat_map(|file| {
                file.service
                    .iter()
                    .map(move |service| format!("{}.{}", file.package(), service.name()))
            })
            .collect();
        assert_eq!(described, SERVICES[1..]);
    }
}
