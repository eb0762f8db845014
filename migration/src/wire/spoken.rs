//! What each side says on the control stream, and how much of it: texts and lists of a peer are bounded before anything else sees them.

use ferry_proto::stream::v1::{self, from_destination::Message as Reply, from_source::Message as Said};
use prost::Message;

use super::texts::{shorten, shorten_all};

/// A message of one side.
pub(crate) trait Spoken: Message + Default {
    /// The fields of the kinds that may be longer than other messages.
    const LONG_KINDS: &'static [u32];

    /// What it is, for a complaint about it.
    fn kind(&self) -> &'static str;

    /// Entries of all its lists.
    fn entries(&self) -> usize;

    /// Cuts the texts in it.
    fn shorten_texts(&mut self);
}

impl Spoken for v1::FromSource {
    /// `State`: the rest stays below a megabyte, also the sums of all ranges of memory and of 16 disks.
    const LONG_KINDS: &'static [u32] = &[4];

    fn kind(&self) -> &'static str {
        self.message.as_ref().map_or("nothing", kind_of_said)
    }

    fn entries(&self) -> usize {
        match &self.message {
            Some(Said::Hello(hello)) => hello.regions.len() + hello.codecs.len(),
            Some(Said::Population(part)) => part.populated.len() + part.huge.len(),
            Some(Said::Barrier(barrier)) => barrier.totals.len(),
            Some(Said::DigestRequest(request)) => request.totals.len(),
            Some(Said::Compare(compare)) => compare.totals.len() + compare.sums.len(),
            Some(Said::Go(go)) => go.manifest.as_ref().map_or(0, |manifest| manifest.totals.len()),
            Some(Said::Missing(part)) => part.runs.len(),
            Some(
                Said::State(_) | Said::Disarm(_) | Said::Abort(_) | Said::Ping(_) | Said::Pong(_) | Said::Proceed(_),
            )
            | None => 0,
        }
    }

    fn shorten_texts(&mut self) {
        match &mut self.message {
            Some(Said::Abort(abort)) => shorten(&mut abort.reason),
            Some(Said::Disarm(disarm)) => shorten(&mut disarm.reason),
            Some(
                Said::Hello(_)
                | Said::Population(_)
                | Said::Barrier(_)
                | Said::State(_)
                | Said::DigestRequest(_)
                | Said::Compare(_)
                | Said::Go(_)
                | Said::Ping(_)
                | Said::Pong(_)
                | Said::Missing(_)
                | Said::Proceed(_),
            )
            | None => {}
        }
    }
}

impl Spoken for v1::FromDestination {
    const LONG_KINDS: &'static [u32] = &[];

    fn kind(&self) -> &'static str {
        match &self.message {
            Some(Reply::HelloReply(_)) => "hello reply",
            Some(Reply::PopulationReady(_)) => "population ready",
            Some(Reply::BarrierReached(_)) => "barrier reached",
            Some(Reply::Refused(_)) => "refused",
            Some(Reply::Ping(_)) => "ping",
            Some(Reply::Pong(_)) => "pong",
            Some(Reply::Missing(_)) => "missing pages",
            Some(Reply::AllHere(_)) => "all here",
            Some(Reply::Holding(_)) => "holding",
            Some(Reply::Compared(_)) => "compared",
            None => "nothing",
        }
    }

    fn entries(&self) -> usize {
        match &self.message {
            Some(Reply::HelloReply(reply)) => reply.refusals.len() + reply.codecs.len(),
            Some(Reply::Refused(refused)) => refused.reasons.len(),
            Some(Reply::Missing(part)) => part.runs.len(),
            Some(Reply::Holding(part)) => part.runs.len(),
            Some(Reply::Compared(compared)) => compared.ranges.len(),
            Some(
                Reply::PopulationReady(_)
                | Reply::BarrierReached(_)
                | Reply::Ping(_)
                | Reply::Pong(_)
                | Reply::AllHere(_),
            )
            | None => 0,
        }
    }

    fn shorten_texts(&mut self) {
        match &mut self.message {
            Some(Reply::HelloReply(reply)) => shorten_all(&mut reply.refusals),
            Some(Reply::Refused(refused)) => shorten_all(&mut refused.reasons),
            Some(
                Reply::PopulationReady(_)
                | Reply::BarrierReached(_)
                | Reply::Ping(_)
                | Reply::Pong(_)
                | Reply::Missing(_)
                | Reply::AllHere(_)
                | Reply::Holding(_)
                | Reply::Compared(_),
            )
            | None => {}
        }
    }
}

/// What a source said.
pub(crate) fn kind_of_said(said: &Said) -> &'static str {
    match said {
        Said::Hello(_) => "hello",
        Said::Population(_) => "population",
        Said::Barrier(_) => "barrier",
        Said::State(_) => "state",
        Said::DigestRequest(_) => "digest request",
        Said::Compare(_) => "compare",
        Said::Go(_) => "go",
        Said::Disarm(_) => "disarm",
        Said::Abort(_) => "abort",
        Said::Ping(_) => "ping",
        Said::Pong(_) => "pong",
        Said::Missing(_) => "missing pages",
        Said::Proceed(_) => "proceed",
    }
}
