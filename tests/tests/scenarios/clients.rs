//! Standard gRPC clients, which know nothing of Ferry: they ask how an agent is, and what it serves.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Pair, waiting::CALL};
use libtest_mimic::Trial;
use prost::Message as _;
use prost_types::FileDescriptorProto;
use tokio::runtime::Runtime;
use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use crate::scenario::without_kvm;

pub(crate) fn trials() -> Vec<Trial> {
    without_kvm![
        each_service_says_that_it_serves_until_the_agent_ends,
        what_an_agent_serves_is_found_by_reflection,
    ]
}

const SERVICES: [&str; 3] = [
    "ferry.agent.v1.Conductor",
    "ferry.agent.v1.Compute",
    "ferry.agent.v1.Streams",
];

fn each_service_says_that_it_serves_until_the_agent_ends(pair: &mut Pair) -> Result<()> {
    pair.a.start()?;
    let runtime = Runtime::new()?;
    let mut client = HealthClient::new(runtime.block_on(connect(&pair.a.url()))?);
    let asked = |service: &str| HealthCheckRequest {
        service: service.to_owned(),
    };
    for service in ["", SERVICES[0], SERVICES[1], SERVICES[2]] {
        let told = runtime.block_on(client.check(asked(service)))?.into_inner();
        ensure!(told.status() == ServingStatus::Serving, "{service:?}: {told:?}");
    }
    let unknown = runtime.block_on(client.check(asked("ferry.agent.v1.Nothing")));
    ensure!(unknown.is_err_and(|status| status.code() == Code::NotFound));

    let mut watched = runtime.block_on(client.watch(asked(SERVICES[0])))?.into_inner();
    let mut next = || runtime.block_on(async { timeout(CALL, watched.next()).await });
    let first = next()?.context("no first word")??;
    ensure!(first.status() == ServingStatus::Serving, "{first:?}");
    pair.a.terminate()?;
    let last = next()?.context("the agent ended without a word")??;
    ensure!(last.status() == ServingStatus::NotServing, "{last:?}");
    Ok(())
}

fn what_an_agent_serves_is_found_by_reflection(pair: &mut Pair) -> Result<()> {
    pair.a.start()?;
    let runtime = Runtime::new()?;
    let listed = runtime.block_on(reflect(&pair.a.url(), MessageRequest::ListServices(String::new())))?;
    let MessageResponse::ListServicesResponse(listed) = listed else {
        anyhow::bail!("no list: {listed:?}");
    };
    let names: Vec<String> = listed.service.into_iter().map(|service| service.name).collect();
    for service in SERVICES.into_iter().chain(["grpc.health.v1.Health"]) {
        ensure!(
            names.iter().any(|name| name == service),
            "{service} is not among {names:?}"
        );
    }

    let symbol = MessageRequest::FileContainingSymbol("ferry.agent.v1.Conductor.LiveMigrate".to_owned());
    let found = runtime.block_on(reflect(&pair.a.url(), symbol))?;
    let MessageResponse::FileDescriptorResponse(found) = found else {
        anyhow::bail!("no file: {found:?}");
    };
    let file = found.file_descriptor_proto.first().context("no descriptor")?;
    let file = FileDescriptorProto::decode(file.as_slice())?;
    let fields = file
        .message_type
        .iter()
        .find(|message| message.name() == "LiveMigrateRequest");
    let fields: Vec<&str> = fields
        .context("the request is not described")?
        .field
        .iter()
        .map(|field| field.name())
        .collect();
    ensure!(fields.contains(&"request_id"), "{fields:?}");
    Ok(())
}

async fn connect(url: &str) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(url.to_owned())?.connect_timeout(CALL);
    endpoint.connect().await.context("failed to connect to the agent")
}

/// One question, and its answer.
async fn reflect(url: &str, question: MessageRequest) -> Result<MessageResponse> {
    let mut client = ServerReflectionClient::new(connect(url).await?);
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(question),
    };
    let mut answers = client
        .server_reflection_info(tokio_stream::iter([request]))
        .await?
        .into_inner();
    let answer = timeout(CALL, answers.next()).await?.context("no answer")??;
    answer.message_response.context("an empty answer")
}
