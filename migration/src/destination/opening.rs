//! How a conversation begins, at the destination: the handshake, then the map of what the source has populated.

use ferry_proto::stream::v1::{self, from_destination::Message as Reply, from_source::Message as Said};

use super::crew::Crew;
use super::hearing::Hearing;
use super::population::wanted_huge;
use super::resume::Kept;
use super::{DestinationError, DestinationParameters, DestinationReport};
use crate::compress::Codecs;
use crate::guest::{DestinationGuest, FrameRun, GuestMemory, MemoryShape, Population};
use crate::verify::PageDigests;
use crate::wire::{StreamIdentity, VERIFY_SINCE, Versions, check_hello, runs_from_wire, shorten_all};

/// Takes the source's word for what it is and wants, and answers it.
pub(super) fn handshake<G: DestinationGuest>(
    guest: &G,
    hearing: &mut Hearing<'_>,
    crew: &Crew<'_, '_, G::Memory>,
    kept: &mut Kept,
) -> Result<StreamIdentity, DestinationError> {
    let hello = match hearing.message()? {
        Said::Hello(hello) => hello,
        _ => {
            return Err(DestinationError::Misbehaved(
                "it did not begin with the handshake".to_owned(),
            ));
        }
    };
    let DestinationParameters {
        instance,
        migration,
        epoch,
        ..
    } = *hearing.asked.parameters;
    let expected = StreamIdentity {
        instance,
        migration,
        epoch,
        streams: crew.sockets.streams(),
        session: hello.session,
    };
    let late = late_refusals(&hello, crew);
    let check = |profile: &[u8]| guest.check(profile).into_iter().chain(late).collect();
    match check_hello(&hello, &expected, crew.memory.shape(), Versions::OURS, check) {
        Ok(protocol) => {
            if hello.verify && protocol >= VERIFY_SINCE {
                crew.shared
                    .digests
                    .get_or_init(|| PageDigests::new(crew.memory.shape()));
            }
            kept.take_up(hello.session)?;
            kept.codecs = Codecs::from_wire(&hello.codecs);
            hearing.say(Reply::HelloReply(kept.reply(protocol, crew)));
            hearing.asked.report(DestinationReport::Accepted { protocol });
            Ok(expected)
        }
        Err(mut refusals) => {
            // Names out of the source's profile are in them.
            shorten_all(&mut refusals);
            hearing.say(Reply::HelloReply(v1::HelloReply {
                refusals: refusals.clone(),
                ..v1::HelloReply::default()
            }));
            Err(DestinationError::Incompatible(refusals))
        }
    }
}

/// Why pages cannot come late, if the source wants that.
fn late_refusals<M: GuestMemory>(hello: &v1::Hello, crew: &Crew<'_, '_, M>) -> Vec<String> {
    let (theirs, ours) = (hello.late_streams, crew.shared.late_streams);
    let mut refusals = Vec::new();
    if theirs != ours {
        refusals.push(format!("streams of late pages: {theirs} at the source, {ours} here"));
    }
    if theirs > 0
        && let Err(error) = crew.memory.check_late()
    {
        refusals.push(format!("late pages: {error}"));
    }
    refusals
}

/// The parts of a map come in the order of memory, so that no page is in two of them.
fn append(runs: &mut Vec<FrameRun>, part: &[u64], shape: &MemoryShape) -> Result<(), DestinationError> {
    let part = runs_from_wire(part, shape).map_err(DestinationError::Misbehaved)?;
    let end = runs.last().map_or(0, |run| run.end());
    if part.first().is_some_and(|run| run.first < end) {
        let what = "the parts of its population map are not in the order of memory";
        return Err(DestinationError::Misbehaved(what.to_owned()));
    }
    runs.extend(part);
    Ok(())
}

/// Takes in the map of what the source has populated, and asks for huge pages.
pub(super) fn load_population<M: GuestMemory>(
    hearing: &mut Hearing<'_>,
    crew: &Crew<'_, '_, M>,
    kept: &mut Kept,
) -> Result<(), DestinationError> {
    let shape = crew.memory.shape();
    let mut population = Population::default();
    loop {
        let Said::Population(part) = hearing.message()? else {
            return Err(DestinationError::Misbehaved(
                "it did not send its population map".to_owned(),
            ));
        };
        append(&mut population.populated, &part.populated, shape)?;
        append(&mut population.huge, &part.huge, shape)?;
        if part.last {
            break;
        }
        if part.populated.is_empty() && part.huge.is_empty() {
            return Err(DestinationError::Misbehaved(
                "a part of its population map is empty and not the last".to_owned(),
            ));
        }
    }
    let wanted = wanted_huge(&population, shape);
    for &run in &wanted {
        if let Err(error) = crew.memory.advise_huge(run) {
            tracing::debug!(%error, first = run.first, count = run.count, "huge pages are not to be had");
        }
    }
    crew.shared.backing.want(&wanted);
    kept.begun = true;
    hearing.say(Reply::PopulationReady(v1::PopulationReady {}));
    hearing.asked.report(DestinationReport::Loading {
        populated_pages: population.populated.iter().map(|run| run.count).sum(),
        huge_pages: wanted.iter().map(|run| run.count).sum(),
    });
    Ok(())
}
