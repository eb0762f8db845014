//! Comparing what was sent with what arrived, while the guest stands still: the last thing before GO.
//!
//! What differs is sent again, in a round of its own, and compared again: the guest stands still, so this time it must be right. A second
//! difference ends the migration, in a later attempt, too: that is a host or a link that damages what it carries.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use ferry_proto::stream::v1::{self, from_source::Message as Said};

use crate::PageSet;
use crate::guest::{FrameRun, SourceGuest};
use crate::handover::Attempt;
use crate::source::conversation::Heard;
use crate::source::rounds::Copy;
use crate::source::switchover::{Budget, LastPages, LastRound, Setback, wait_within};
use crate::source::{Decided, SourceError, Stop, Verified};
use crate::verify::{PageDigests, Ranges};
use crate::wire::attempt_to_wire;

/// What came of comparing so far, in all attempts.
#[derive(Debug, Default)]
pub(super) struct Comparing {
    /// The destination was asked and has not answered.
    is_asked: bool,
    /// Something differed before.
    has_differed: bool,
    sent_again: u64,
}

/// Compares, where that is wanted, until nothing differs. Every page was sent but those that come late, which are left out of it on both sides.
pub(super) fn agree<G: SourceGuest>(
    copy: &mut Copy<'_, '_, G>,
    budget: &Budget,
    grant: Attempt,
    late: Option<&PageSet>,
    last_round: &mut LastRound,
) -> Result<Duration, Setback> {
    let streams = copy.streams;
    let Some(digests) = &streams.digests else {
        return Ok(Duration::ZERO);
    };
    let began = Instant::now();
    loop {
        let differing = compare(copy, digests, budget, grant)?;
        if differing.is_empty() {
            break;
        }
        let what = describe(digests.ranges(), &differing);
        if copy.so_far.comparing.has_differed {
            return Err(Setback::End(SourceError::Differs(what).into()));
        }
        tracing::warn!(what, "what the destination holds is not what was sent");
        copy.so_far.comparing.has_differed = true;
        streams.packing.has_differed();
        copy.so_far.comparing.sent_again += differing.len() as u64;
        let throttle = copy.so_far.policy.throttle();
        copy.conversation
            .lasting
            .tell(Decided::send_again((copy.so_far.round, throttle), &what));
        let mut set = copy.empty_set();
        let runs = differing
            .iter()
            .filter_map(|&number| digests.ranges().run(number as usize));
        runs.for_each(|run| set.insert(run));
        late.into_iter().for_each(|late| set.subtract(late));
        copy.so_far.hints.are_sent(&set);
        if set.is_empty() {
            let what = "it says of ranges that differ which come late as a whole".to_owned();
            return Err(Setback::End(SourceError::Misbehaved(what).into()));
        }
        send_again(copy, set, budget, last_round)?;
    }
    let took = began.elapsed();
    copy.summary.verified = Some(Verified {
        pages: digests.pages(),
        ranges_sent_again: copy.so_far.comparing.sent_again,
        blackout: took,
    });
    Ok(took)
}

/// Asks which ranges differ.
fn compare<G: SourceGuest>(
    copy: &mut Copy<'_, '_, G>,
    digests: &PageDigests,
    budget: &Budget,
    grant: Attempt,
) -> Result<Vec<u32>, Setback> {
    let totals = copy.streams.each().into_iter().map(v1::StreamTotals::from).collect();
    let attempt = Some(attempt_to_wire(grant));
    copy.conversation.say(Said::Compare(v1::Compare {
        attempt: attempt.clone(),
        totals,
        sums: digests.sums(),
    }));
    copy.so_far.comparing.is_asked = true;
    let compared = wait_within(copy, budget, "what arrived was being compared", |heard| match heard {
        Heard::Compared(compared) => Ok(compared),
        other => Err(other),
    })?;
    copy.so_far.comparing.is_asked = false;
    let ranges = compared.ranges;
    if compared.attempt != attempt || !digests.ranges().are_some(&ranges) {
        let what = "it compared something else than it was asked to".to_owned();
        return Err(Setback::End(SourceError::Misbehaved(what).into()));
    }
    Ok(ranges)
}

/// Sends these pages once more; where the budget does not allow that, while the guest runs.
fn send_again<G: SourceGuest>(
    copy: &mut Copy<'_, '_, G>,
    set: PageSet,
    budget: &Budget,
    last_round: &mut LastRound,
) -> Result<(), Setback> {
    let sending = LastPages::begin(copy);
    if *last_round == LastRound::Sent {
        // A page travels once in a round. Its pages were not re-armed: they are owed if the guest is to run on.
        let number = copy.so_far.round;
        copy.tell_barrier(number);
        *last_round = LastRound::Told;
        let when = "the end of the round was being answered";
        let answered = wait_within(copy, budget, when, |heard| match heard {
            Heard::BarrierReached(round) if round == number => Ok(()),
            other => Err(other),
        });
        if answered.is_err() {
            copy.so_far.pending.union_with(&set);
        }
        answered?;
        let sent = copy.closed_round(number)?;
        copy.so_far.pending.union_with(&sent.set);
        *last_round = LastRound::NotStarted;
    }
    let pages = set.count();
    if copy.so_far.policy.after_stop(pages) > budget.left() {
        copy.so_far.pending.union_with(&set);
        return Err(Setback::CallOff(format!(
            "{pages} pages that differ at the destination cannot be sent again within the budget"
        )));
    }
    sending.send(copy, Some(set), budget, last_round)
}

/// Waits for an answer that nobody wants any more: it comes before that to anything that is said later.
pub(super) fn hear_out<G: SourceGuest>(copy: &mut Copy<'_, '_, G>) -> Result<(), Stop> {
    if std::mem::take(&mut copy.so_far.comparing.is_asked) {
        copy.wait(|heard| matches!(heard, Heard::Compared(_)))?;
    }
    Ok(())
}

/// How many ranges differ, and where the first of them are.
fn describe(ranges: &Ranges, differing: &[u32]) -> String {
    const SHOWN: usize = 4;
    let mut words = format!("{} of {} ranges, pages", differing.len(), ranges.count());
    let runs = differing.iter().filter_map(|&number| ranges.run(number as usize));
    for FrameRun { first, count } in runs.take(SHOWN) {
        let _ = write!(words, " {first:#x}+{count:#x}");
    }
    if differing.len() > SHOWN {
        words.push_str(" …");
    }
    words
}
