//! Comparing what arrived with what was sent, before GO.

use ferry_proto::stream::v1::{self, from_destination::Message as Reply};

use crate::destination::DestinationError;
use crate::destination::crew::Crew;
use crate::destination::hearing::Hearing;
use crate::destination::phase::from_wire;
use crate::guest::GuestMemory;
use crate::postcopy::Table;
use crate::verify::PageDigests;
use crate::wire::StreamTotals;

/// What came of comparing last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Compared {
    /// All of it is right, once this much was here.
    Equal(Vec<StreamTotals>),
    /// Some of it is to be sent again.
    Differs,
}

/// Waits for the last pages and tells the source which ranges differ.
pub(super) fn compare<M: GuestMemory>(
    compare: v1::Compare,
    hearing: &mut Hearing<'_>,
    crew: &Crew<'_, '_, M>,
) -> Result<Compared, DestinationError> {
    let v1::Compare { attempt, totals, sums } = compare;
    let Some(digests) = crew.shared.digests.get() else {
        return Err(DestinationError::Misbehaved(
            "it compares what it did not ask to be digested".to_owned(),
        ));
    };
    let ranges = digests.ranges().count();
    if sums.len() != ranges {
        return Err(DestinationError::Misbehaved(format!(
            "it compares {} ranges where there are {ranges}",
            sums.len()
        )));
    }
    let totals = from_wire(totals);
    hearing.await_totals(&crew.shared.delivered, &totals)?;
    let pairs = (0u32..).zip(digests.sums().into_iter().zip(sums));
    let differing: Vec<u32> = pairs
        .filter(|(_, (ours, theirs))| ours != theirs)
        .map(|(number, _)| number)
        .collect();
    let compared = match differing.len() {
        0 => Compared::Equal(totals),
        count => {
            tracing::info!(count, ranges, "ranges of memory are not what was sent");
            Compared::Differs
        }
    };
    hearing.say(Reply::Compared(v1::Compared {
        attempt,
        ranges: differing,
    }));
    Ok(compared)
}

/// Pages that come late are compared when they come, once the table of them is whole.
pub(super) fn leave_out<M: GuestMemory>(late: &Table, crew: &Crew<'_, '_, M>) {
    if let (Some(late), Some(digests)) = (late.as_whole(), crew.shared.digests.get()) {
        digests.leave_out(late);
    }
}

/// Why a guest is not to be claimed whose source wanted to compare: nothing may have come since all of it was right.
pub(super) fn check(
    digests: Option<&PageDigests>,
    compared: Option<&Compared>,
    totals: &[StreamTotals],
) -> Option<String> {
    let is_right = match (digests, compared) {
        (None, _) => true,
        (Some(_), Some(Compared::Equal(then))) => then == totals,
        (Some(_), Some(Compared::Differs) | None) => false,
    };
    (!is_right).then(|| "what is here was not compared with what was sent, or differs".to_owned())
}
