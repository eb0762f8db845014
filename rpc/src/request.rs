//! What every call carries in its metadata: the id of the request that it belongs to, for whom it is made, and how long it
//! is waited for.
//!
//! A request is what a user asked for: one call of the command line. Its id is made there and goes along from agent to agent,
//! so that what the hosts wrote down of it can be put together. [`Carried`] is the one place where these are put on a call, as
//! an interceptor of the clients: no call can forget it. They are read in `agent::context`.
//!
//! The deadline is gRPC's own `grpc-timeout`, a length of time that counts from the arrival of the call, and not an instant: hosts'
//! clocks differ and jump, and a call would be refused, or obeyed, by the wrong one. Besides, every client of gRPC can set it, and tonic
//! ends the call on both sides when it has passed.

use std::fmt;
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};
use uuid::Uuid;

/// The metadata with the request's id.
const REQUEST: &str = "request-id";
/// The metadata in which an agent names its host.
const AGENT: &str = "ferry-agent";
/// The metadata in which an agent says who asked it; none: nobody did.
const ACTOR: &str = "ferry-actor";
/// gRPC's deadline: at most eight digits and a unit.
const TIMEOUT: &str = "grpc-timeout";

/// The longest request id, and the longest name of a host.
const LONGEST_ID: usize = 64;
/// The longest actor that is passed on.
const LONGEST_ACTOR: usize = 200;

/// The id of a request, such as `req-9b1deb4d-3b7d-4bad-9bdd-2b0d7b3dcb6d`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RequestId(String);

/// A text that is no request id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a request id has 1 to {LONGEST_ID} letters, digits and '-'")]
pub(crate) struct NoRequestId;

impl RequestId {
    /// An id that no request has had.
    pub(crate) fn new() -> Self {
        Self(format!("req-{}", Uuid::new_v4()))
    }

    /// Reads what a user or a peer says.
    ///
    /// # Errors
    /// It is none.
    pub(crate) fn parse(text: &str) -> Result<Self, NoRequestId> {
        let is_id = is_word(text) && (1..=LONGEST_ID).contains(&text.len());
        if is_id {
            Ok(Self(text.to_owned()))
        } else {
            Err(NoRequestId)
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

fn is_word(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
}

/// Who passes a request on, and for whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PassedOn {
    /// The host of the agent that passes it on.
    pub(crate) host: String,
    /// Who asked that agent; none: it does so of its own accord.
    pub(crate) actor: Option<String>,
}

/// What is put on a call. An interceptor of the clients of `Compute` and `Conductor`.
#[derive(Clone, Debug)]
pub(crate) struct Carried {
    pub(crate) request: RequestId,
    pub(crate) passed_on: Option<PassedOn>,
    /// None: the call has its deadline already, or is waited for as long as it takes.
    pub(crate) patience: Option<Duration>,
}

impl Interceptor for Carried {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(patience) = self.patience {
            request.set_timeout(patience);
        }
        let metadata = request.metadata_mut();
        put(metadata, REQUEST, self.request.as_str());
        if let Some(PassedOn { host, actor }) = &self.passed_on {
            put(metadata, AGENT, host);
            if let Some(actor) = actor {
                put(metadata, ACTOR, actor);
            }
        }
        Ok(request)
    }
}

fn put(metadata: &mut MetadataMap, key: &'static str, text: &str) {
    let ascii: String = text
        .chars()
        .map(|c| if matches!(c, ' '..='~') { c } else { '?' })
        .collect();
    if let Ok(value) = MetadataValue::<Ascii>::try_from(ascii) {
        metadata.insert(key, value);
    }
}

/// What a received call carries. What cannot be read counts as not said: it is nothing that a decision depends on.
impl From<&MetadataMap> for Carried {
    fn from(metadata: &MetadataMap) -> Self {
        let text = |key: &str| metadata.get(key).and_then(|value| value.to_str().ok());
        let host = text(AGENT).filter(|host| (1..=LONGEST_ID).contains(&host.len()));
        let actor = || text(ACTOR).map(|actor| actor.chars().take(LONGEST_ACTOR).collect());
        Self {
            request: text(REQUEST)
                .and_then(|id| RequestId::parse(id).ok())
                .unwrap_or_else(RequestId::new),
            passed_on: host.map(|host| PassedOn {
                host: host.to_owned(),
                actor: actor(),
            }),
            patience: text(TIMEOUT).and_then(duration),
        }
    }
}

/// Reads a `grpc-timeout`.
fn duration(text: &str) -> Option<Duration> {
    let (unit_at, unit) = text.char_indices().next_back()?;
    let digits = &text[..unit_at];
    let is_number = (1..=8).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
    let count: u64 = digits.parse().ok().filter(|_| is_number)?;
    Some(match unit {
        'H' => Duration::from_secs(count * 3600),
        'M' => Duration::from_secs(count * 60),
        'S' => Duration::from_secs(count),
        'm' => Duration::from_millis(count),
        'u' => Duration::from_micros(count),
        'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(carried: &Carried) -> Carried {
        let sent = carried.clone().call(Request::new(())).unwrap();
        Carried::from(sent.metadata())
    }

    #[test]
    fn what_a_call_carries_is_read_as_it_was_put_on() {
        let sent = Carried {
            request: RequestId::new(),
            passed_on: Some(PassedOn {
                host: "a".to_owned(),
                actor: Some("root (uid 0)".to_owned()),
            }),
            patience: Some(Duration::from_millis(2500)),
        };
        let read = received(&sent);
        assert_eq!((&read.request, &read.passed_on), (&sent.request, &sent.passed_on));
        assert_eq!(read.patience, sent.patience);
        assert!(sent.request.as_str().starts_with("req-"));
    }

    #[test]
    fn a_call_that_says_nothing_gets_an_id_and_has_no_deadline() {
        let read = Carried::from(&MetadataMap::new());
        assert!(RequestId::parse(read.request.as_str()).is_ok());
        assert_eq!((read.passed_on, read.patience), (None, None));
    }

    #[test]
    fn what_is_no_id_and_what_is_too_long_is_not_kept() {
        for bad in ["", "a b", "x/y", "ü", &"x".repeat(LONGEST_ID + 1)] {
            assert_eq!(RequestId::parse(bad), Err(NoRequestId), "{bad:?}");
        }
        let sent = Carried {
            request: RequestId::new(),
            passed_on: Some(PassedOn {
                host: "a".to_owned(),
                actor: Some("ü".repeat(1000)),
            }),
            patience: None,
        };
        assert_eq!(
            received(&sent).passed_on.unwrap().actor,
            Some("?".repeat(LONGEST_ACTOR))
        );
    }

    #[test]
    fn timeouts_are_read_as_grpc_has_them() {
        assert_eq!(duration("0n"), Some(Duration::ZERO));
        assert_eq!(duration("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(duration("99999999m"), Some(Duration::from_millis(99_999_999)));
        for bad in ["", "5", "S", "-1S", "+1S", "123456789S", "1s", "1ü"] {
            assert_eq!(duration(bad), None, "{bad:?}");
        }
    }
}
