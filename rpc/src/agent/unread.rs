//! Refusals of calls that no handler saw: unknown methods, messages that cannot be read.
//!
//! tonic makes these itself, with a code and a sentence. Here they get what every other refusal has: a reason for scripts, and
//! the field where one was wrong. A layer around both services. What tonic says of a deadline that passed is beyond it: that is said
//! when nobody waits any more.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use tonic::codegen::{Service, http};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use tower_layer::Layer;

use super::reason::DOMAIN;

/// The layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct WithReasons;

/// A service whose refusals all have a reason.
#[derive(Clone, Debug)]
pub(super) struct Reasoned<S>(S);

impl<S> Layer<S> for WithReasons {
    type Service = Reasoned<S>;

    fn layer(&self, inner: S) -> Reasoned<S> {
        Reasoned(inner)
    }
}

impl<S, Q, B> Service<http::Request<Q>> for Reasoned<S>
where
    S: Service<http::Request<Q>, Response = http::Response<B>, Error = Infallible>,
    S::Future: Send + 'static,
    B: Default,
{
    type Response = http::Response<B>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, call: http::Request<Q>) -> Self::Future {
        let answer = self.0.call(call);
        Box::pin(async move {
            let answer = answer.await?;
            Ok(match Status::from_header_map(answer.headers()) {
                Some(status) if status.code() != Code::Ok && status.details().is_empty() => {
                    reasoned(&status).into_http()
                }
                _ => answer,
            })
        })
    }
}

/// The same refusal with its reason. A message that cannot be read is its sender's fault, not this host's.
fn reasoned(status: &Status) -> Status {
    let (code, word) = match status.code() {
        Code::Unimplemented => (Code::Unimplemented, "UNIMPLEMENTED"),
        Code::Internal | Code::InvalidArgument => (Code::InvalidArgument, UNREADABLE),
        code @ (Code::OutOfRange | Code::ResourceExhausted) => (code, UNREADABLE),
        code => (code, "REFUSED"),
    };
    let mut details = ErrorDetails::with_error_info(word, DOMAIN, [] as [(String, String); 0]);
    if let Some((field, problem)) = field(status.message()) {
        details.add_bad_request_violation(field, problem);
    }
    let said = match status.message() {
        "" => "this agent does not know the method",
        said => said,
    };
    Status::with_error_details_and_metadata(code, said, details, status.metadata().clone())
}

/// A message that cannot be read.
const UNREADABLE: &str = "INVALID_MESSAGE";

/// The field that prost names, by its path, and what is wrong with it: of each message on the way to it prost says `Message.field: `,
/// the innermost first.
fn field(message: &str) -> Option<(String, String)> {
    let mut rest = message.strip_prefix("failed to decode Protobuf message: ")?;
    let mut path = Vec::new();
    while let Some((step, further)) = rest.split_once(": ") {
        let Some((_, field)) = step.split_once('.').filter(|_| !step.contains(' ')) else {
            break;
        };
        path.push(field);
        rest = further;
    }
    path.reverse();
    (!path.is_empty()).then(|| (path.join("."), rest.to_owned()))
}

#[cfg(test)]
mod tests {
    use ferry_proto::agent::v1::RunInstanceRequest;
    use prost::Message;

    use super::*;

    #[test]
    fn a_message_that_cannot_be_read_names_its_field() {
        // RunInstanceRequest.spec with a name of one byte that is no UTF-8.
        let bytes: &[u8] = &[0x0a, 0x03, 0x0a, 0x01, 0xff];
        let error = RunInstanceRequest::decode(bytes).unwrap_err();
        let refused = reasoned(&Status::internal(error.to_string()));
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert_eq!(refused.get_details_error_info().unwrap().reason, "INVALID_MESSAGE");
        let violations = refused.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, "spec.name");
        assert!(violations[0].description.contains("UTF-8"), "{violations:?}");
    }

    /// A service that answers with this status.
    struct Says(Status);

    impl Service<http::Request<()>> for Says {
        type Response = http::Response<String>;
        type Error = Infallible;
        type Future = std::future::Ready<Result<Self::Response, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: http::Request<()>) -> Self::Future {
            std::future::ready(Ok(self.0.clone().into_http()))
        }
    }

    async fn answered(status: Status) -> Status {
        let answer = WithReasons.layer(Says(status)).call(http::Request::new(())).await;
        Status::from_header_map(answer.unwrap().headers()).unwrap()
    }

    #[tokio::test]
    async fn a_refusal_that_has_a_reason_stays_as_it_is() {
        let refused = answered(Status::unimplemented("no such method")).await;
        assert_eq!(refused.get_details_error_info().unwrap().reason, "UNIMPLEMENTED");
        let failure = super::super::failure::Failure::Late("too late".to_owned());
        let late = answered(failure.into()).await;
        assert_eq!((late.code(), late.message()), (Code::DeadlineExceeded, "too late"));
        assert_eq!(late.get_details_error_info().unwrap().reason, "DEADLINE");
        assert_eq!(answered(Status::ok("")).await.code(), Code::Ok);
    }

    #[test]
    fn an_unknown_method_has_a_reason_and_no_field() {
        let refused = reasoned(&Status::unimplemented(""));
        assert_eq!(refused.code(), Code::Unimplemented);
        assert_eq!(refused.get_details_error_info().unwrap().reason, "UNIMPLEMENTED");
        assert!(refused.get_details_bad_request().is_none() && !refused.message().is_empty());
    }
}
