//! Versions: what is refused by name, and what a host gets that speaks another one than was thought.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::pin::Pin;
use std::task::{Context, Poll};

use ferry_proto::agent::v1::{AttemptRequest, DecisionReply, HeartbeatReply, HeartbeatRequest, MigrationOptions};
use http_body::Frame;
use prost::Message;
use prost::bytes::Bytes;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::metadata::MetadataMap;
use tonic::server::NamedService;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use uuid::Uuid;

use super::super::peers::Peers;
use super::*;

#[test]
fn a_message_of_a_newer_version_is_refused_by_name() {
    assert!(check_version(RpcVersion::V4_0, at(RpcVersion::V4_0, ())).is_ok());
    let status = check_version(RpcVersion::V4_0, at(RpcVersion::V4_2, ())).unwrap_err();
    assert!(
        status.message().contains("\"4.2\"") && status.message().contains("4.0"),
        "{status}"
    );
}

#[test]
fn a_message_that_says_nothing_is_taken() {
    assert!(check_version(RpcVersion::V4_0, Request::new(())).is_ok());
}

#[tokio::test]
async fn a_source_whose_cap_was_lowered_to_4_2_gets_the_cast_again_at_that() {
    let (receipt, calls) = cast_to(RpcVersion::V4_2, MigrationOptions::default()).await;
    assert_eq!(receipt.unwrap(), Receipt::default());
    assert_eq!(calls, ["LiveMigration 4.3", "Host -", "LiveMigration 4.2"]);
}

#[tokio::test]
async fn a_source_whose_cap_was_lowered_to_4_0_gets_the_record_before_its_cast() {
    let (receipt, calls) = cast_to(RpcVersion::V4_0, MigrationOptions::default()).await;
    assert_eq!(receipt.unwrap(), Receipt::default());
    assert_eq!(
        calls,
        [
            "LiveMigration 4.3",
            "Host -",
            "CreateMigration 4.0",
            "LiveMigration 4.0"
        ]
    );
}

#[tokio::test]
async fn what_a_source_of_a_lowered_cap_would_take_no_notice_of_is_not_cast_again() {
    let options = MigrationOptions {
        verify: true,
        ..MigrationOptions::default()
    };
    let (receipt, calls) = cast_to(RpcVersion::V4_2, options).await;
    assert_eq!(receipt.unwrap_err().reason(), Some(Reason::RpcVersion));
    assert_eq!(calls, ["LiveMigration 4.3", "Host -"]);
}

#[tokio::test]
async fn what_is_asked_of_the_other_agent_in_a_migration_has_its_version_too() {
    let (api, destination) = lowered(RpcVersion::V4_2);
    let decided = api.decide(AttemptRequest::default(), None).await;
    assert_eq!(decided.unwrap(), DecisionReply::default());
    let beat = api.heartbeat(HeartbeatRequest::default(), CALL_TIME).await;
    assert_eq!(beat.unwrap(), HeartbeatReply::default());
    assert_eq!(
        destination.calls(),
        ["Decide 4.3", "Host -", "Decide 4.2", "Heartbeat 4.2"]
    );
}

#[tokio::test]
async fn who_does_not_tell_its_journal_is_not_believed_where_that_is_known() {
    let (api, _destination) = lowered(RpcVersion::V4_3);
    let decided = api.decide(AttemptRequest::default(), Some(Uuid::from_u128(2))).await;
    assert_eq!(decided.unwrap_err().reason(), Some(Reason::JournalIsOther));
}

/// Casts to a source with this cap, and tells what it was asked at which versions.
async fn cast_to(cap: RpcVersion, options: MigrationOptions) -> (Result<Receipt, Failure>, Vec<String>) {
    let (api, source) = lowered(cap);
    let record = LiveMigrationCast {
        migration: Uuid::from_u128(1).to_string(),
        options: Some(options),
        ..LiveMigrationCast::default()
    };
    (api.live_migration(&record).await, source.calls())
}

/// A client of an agent that is thought to speak 4.3 and has this cap. It is there for as long as the test's runtime.
fn lowered(cap: RpcVersion) -> (ComputeRpcApi, Lowered) {
    let there = Lowered {
        cap,
        calls: Arc::default(),
    };
    let incoming = TcpIncoming::bind(([127, 0, 0, 1], 0).into()).unwrap();
    let url = format!("http://{}", incoming.local_addr().unwrap());
    let serving = Server::builder().add_service(there.clone());
    tokio::spawn(serving.serve_with_incoming(incoming));
    let peers = Peers::new("b", &[("a".to_owned(), url)]).unwrap();
    let api = ComputeRpcApi {
        to: To::There(peers.named("a").unwrap().clone()),
        context: RequestContext::agent(),
        version: Mutex::new(RpcVersion::V4_3),
    };
    (api, there)
}

/// An agent whose cap was lowered since it was last heard, as far as a cast meets it.
#[derive(Clone)]
struct Lowered {
    cap: RpcVersion,
    calls: Arc<Mutex<Vec<String>>>,
}

impl Lowered {
    /// What it was asked, and at which version.
    fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }
}

impl NamedService for Lowered {
    const NAME: &'static str = "ferry.agent.v1.Compute";
}

impl Service<http::Request<Body>> for Lowered {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        let mut asked = Request::new(());
        *asked.metadata_mut() = MetadataMap::from_headers(request.headers().clone());
        let told = asked
            .metadata()
            .get(VERSION_KEY)
            .map_or("-", |told| told.to_str().unwrap());
        self.calls.lock().unwrap().push(format!("{method} {told}"));
        ready(Ok(match check_version(self.cap, asked) {
            Err(status) => status.into_http(),
            Ok(_) if method == "Host" => answer(&HostInfo {
                rpc_version: self.cap.to_string(),
                ..HostInfo::default()
            }),
            Ok(_) => answer(&Receipt::default()),
        }))
    }
}

fn answer(message: &impl Message) -> http::Response<Body> {
    // Not compressed, and so many bytes.
    let mut framed = vec![0];
    framed.extend(u32::try_from(message.encoded_len()).unwrap().to_be_bytes());
    framed.extend(message.encode_to_vec());
    let ok = http::HeaderMap::from_iter([(
        http::HeaderName::from_static("grpc-status"),
        http::HeaderValue::from_static("0"),
    )]);
    let frames = Frames([Frame::data(framed.into()), Frame::trailers(ok)].into());
    let response = http::Response::builder().header("content-type", "application/grpc");
    response.body(Body::new(frames)).unwrap()
}

struct Frames(VecDeque<Frame<Bytes>>);

impl http_body::Body for Frames {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Ready(self.0.pop_front().map(Ok))
    }
}
