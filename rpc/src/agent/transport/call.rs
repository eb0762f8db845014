//! One call of `Streams.Carry`, as HTTP has it: what is said in it, and what is heard.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use ferry_proto::agent::v1::streams_server::SERVICE_NAME;
use http_body::{Body as _, Frame};
use prost::bytes::Bytes;
use tokio::sync::mpsc;
use tonic::body::Body;
use tonic::codegen::http::header::{CONTENT_TYPE, TE};
use tonic::codegen::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};
use tonic::{Code, Status};

use super::messages::{Heard, Reading};
use crate::agent::compute_rpcapi::at;
use crate::agent::versions::RpcVersion;

/// What a call is given to say: messages, and last perhaps why it fails.
pub(super) type Outgoing = mpsc::Sender<Result<Bytes, Status>>;

/// Messages that wait for a call to take them.
pub(super) const WAITING: usize = 1;

const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// Where a call goes.
pub(super) fn path() -> String {
    format!("/{SERVICE_NAME}/Carry")
}

/// A call that says what its other end is given.
pub(super) fn request() -> (Outgoing, Request<Body>) {
    let (outgoing, said) = Said::channel(Ending::Silent);
    let mut call = Request::new(said);
    *call.method_mut() = Method::POST;
    *call.version_mut() = Version::HTTP_2;
    *call.uri_mut() = path().parse().expect("a path");
    *call.headers_mut() = at(RpcVersion::V4_3, ()).into_parts().0.into_headers();
    call.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
    call.headers_mut().insert(CONTENT_TYPE, GRPC);
    (outgoing, call)
}

/// An answer that says what its other end is given.
pub(super) fn response() -> (Outgoing, Response<Body>) {
    let (outgoing, said) = Said::channel(Ending::Status);
    let mut answer = Response::new(said);
    answer.headers_mut().insert(CONTENT_TYPE, GRPC);
    (outgoing, answer)
}

/// What is heard of an answer.
///
/// # Errors
/// It is a refusal.
pub(super) fn answered(answer: Response<Body>) -> Result<Hearing, Status> {
    if answer.status() != StatusCode::OK {
        return Err(Status::unknown(format!("it answered with {}", answer.status())));
    }
    match Status::from_header_map(answer.headers()) {
        Some(status) if status.code() != Code::Ok => Err(status),
        _ => Ok(Hearing::new(answer.into_body())),
    }
}

/// How what is said ends.
#[derive(Debug, PartialEq, Eq)]
enum Ending {
    /// A request just ends.
    Silent,
    /// An answer ends with a status.
    Status,
    /// It has ended.
    Over,
}

/// The body of a request or an answer.
struct Said {
    messages: mpsc::Receiver<Result<Bytes, Status>>,
    ending: Ending,
}

impl Said {
    fn channel(ending: Ending) -> (Outgoing, Body) {
        let (outgoing, messages) = mpsc::channel(WAITING);
        (outgoing, Body::new(Self { messages, ending }))
    }

    fn end(&mut self, status: &Status) -> Option<Frame<Bytes>> {
        let ending = std::mem::replace(&mut self.ending, Ending::Over);
        if ending != Ending::Status {
            return None;
        }
        let mut trailers = HeaderMap::new();
        // One whose words no header can have is told without them.
        if status.add_header(&mut trailers).is_err() {
            let _ = Status::new(status.code(), "").add_header(&mut trailers);
        }
        Some(Frame::trailers(trailers))
    }
}

impl http_body::Body for Said {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ending == Ending::Over {
            return Poll::Ready(None);
        }
        self.messages.poll_recv(context).map(|said| match said {
            Some(Ok(message)) => Some(Ok(Frame::data(message))),
            Some(Err(status)) => self.end(&status).map(Ok),
            None => self.end(&Status::ok("")).map(Ok),
        })
    }
}

/// What is heard in a call.
pub(super) struct Hearing {
    body: Body,
    reading: Reading,
}

impl Hearing {
    pub(super) fn new(body: Body) -> Self {
        Self {
            body,
            reading: Reading::default(),
        }
    }

    /// What comes next; nothing, if the call is over.
    ///
    /// # Errors
    /// The call failed, or what came is no message of a stream.
    pub(super) async fn next(&mut self) -> Result<Option<Heard>, Status> {
        loop {
            let read = self.reading.next();
            if let Some(heard) = read.map_err(|malformed| Status::invalid_argument(format!("it sent {malformed}")))? {
                return Ok(Some(heard));
            }
            let Some(frame) = poll_fn(|context| Pin::new(&mut self.body).poll_frame(context)).await else {
                return Ok(None);
            };
            match frame?.into_data() {
                Ok(part) => self.reading.take_in(part),
                Err(frame) => return ended(frame.trailers_ref()).map(|()| None),
            }
        }
    }
}

fn ended(trailers: Option<&HeaderMap>) -> Result<(), Status> {
    match trailers.and_then(Status::from_header_map) {
        Some(status) if status.code() != Code::Ok => Err(status),
        _ => Ok(()),
    }
}
