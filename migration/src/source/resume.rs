//! Going on over another link after one was lost before the switchover was asked for.
//!
//! ```text
//!   Hello{session} ─► HelloReply{round, held_session} ─► Holding … ─► Proceed ─► what is due goes as a round
//! ```
//!
//! A barrier is what acknowledges pages. So of the round that was cut all are due again, but for those that the destination says came whole,
//! in the same session: whatever it holds of them from before may be older. Nothing else is needed for the guest's writes: their range was
//! re-armed before they were sent, and tracking goes on while there is no link, so what was written since is told by the next fetch.

use std::time::{Duration, Instant};

use ferry_proto::stream::v1::{self, from_source::Message as Said};

use crate::PageSet;
use crate::guest::{GuestMemory as _, Population, SourceGuest};
use crate::policy::Policy;
use crate::source::conversation::Heard;
use crate::source::heat::Heat;
use crate::source::hints::Hints;
use crate::source::meter::Meter;
use crate::source::rounds::Copy;
use crate::source::verifying::Comparing;
use crate::source::{SourceError, SourceReport, Stop};
use crate::wire::Holdings;

/// How far the copy is: what it keeps while there is no link.
pub(super) struct Kept {
    /// What rounds did not bring of memory comes late; of disks, nothing does.
    pub(super) is_late: bool,
    pub(super) policy: Policy,
    /// Frames that the destination does not hold as they are, as far as was fetched. Nothing leaves this set but by
    /// being sent after its range was re-armed, and a barrier.
    pub(super) pending: PageSet,
    /// What the guest says of pages that are free.
    pub(super) hints: Hints,
    /// What of a round goes last.
    pub(super) heat: Heat,
    pub(super) meter: Meter,
    /// The number of the next round.
    pub(super) round: u32,
    /// After a switchover was called off, the next one is not asked for before this.
    pub(super) rest_until: Instant,
    pub(super) announced: Option<u32>,
    pub(super) told: (Instant, u64),
    pub(super) copying_since: Instant,
    /// The map of what is populated, until the destination has it.
    pub(super) population: Option<Population>,
    /// The round that was cut with the link before.
    pub(super) unacknowledged: Option<Unacknowledged>,
    /// What came of comparing so far.
    pub(super) comparing: Comparing,
}

/// Pages that were being sent when a link was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unacknowledged {
    /// Over which link.
    pub(crate) session: u32,
    /// In which round.
    pub(crate) round: u32,
    /// All pages of the round.
    pub(crate) set: PageSet,
}

/// What a destination holds.
pub(crate) struct Holding {
    /// The round whose barrier comes next.
    pub(crate) round: u32,
    /// The session in which `held` came.
    pub(crate) session: u32,
    /// Pages of that round which came whole.
    pub(crate) held: PageSet,
}

impl Unacknowledged {
    /// The pages that are due again, given what the destination holds.
    ///
    /// # Errors
    /// It is in a round in which it cannot be.
    pub(crate) fn due(self, holding: &Holding) -> Result<PageSet, SourceError> {
        let Self {
            session,
            round,
            mut set,
        } = self;
        if holding.round == round.wrapping_add(1) {
            // Its barrier was reached, and the word of that was lost.
            set.clear();
        } else if holding.round != round {
            let what = format!("it is in round {} where round {round} was cut", holding.round);
            return Err(SourceError::Misbehaved(what));
        } else if holding.session == session {
            set.subtract(&holding.held);
        }
        Ok(set)
    }
}

impl<G: SourceGuest> Copy<'_, '_, G> {
    /// Keeps the copy if the link was lost, so that it can go on over another one.
    pub(super) fn keep_if_lost(self, ended: Result<(), Stop>) -> Result<(), Stop> {
        let Err(Stop::LinkLost(_)) = &ended else {
            return ended;
        };
        let Self {
            guest,
            mut so_far,
            streams,
            summary,
            kept,
            ..
        } = self;
        // What it named may be used by the time that there is a link again, and the destination may hold some of it.
        so_far.hints.end(guest);
        so_far.meter.is_at(streams.feed.remaining());
        so_far.meter.round_is_cut();
        summary.copied = Some(so_far.meter.copied());
        // Nothing is sent for which they could wait. With the next round they are held back again.
        guest.hold_back_disk_writes(None);
        if so_far.policy.throttle() > 0 {
            // It is throttled again with the next round.
            if let Err(cause) = guest.throttle(0) {
                tracing::warn!(%cause, "the vCPUs cannot be let run freely");
            }
        }
        *kept = Some(so_far);
        ended
    }

    /// The first words over this link, up to the first page.
    pub(super) fn begin(&mut self, reply: &v1::HelloReply) -> Result<(), Stop> {
        if self.conversation.session > 0 {
            self.go_on(reply)?;
        }
        self.populate()?;
        match self.is_cold() && self.halt.is_none() {
            true => self.halt(),
            false => Ok(()),
        }
    }

    /// Takes in what the destination holds, and has it count from here on.
    fn go_on(&mut self, reply: &v1::HelloReply) -> Result<(), Stop> {
        let holding = self.hear_holding(reply)?;
        let held = holding.held.count();
        if !reply.begun && self.so_far.population.is_none() {
            let what = "it has not got what was acknowledged before".to_owned();
            return Err(SourceError::Misbehaved(what).into());
        }
        match self.so_far.unacknowledged.take() {
            Some(cut) => {
                let before = cut.set.count();
                let due = cut.due(&holding)?;
                tracing::info!(
                    pages = before,
                    due = due.count(),
                    held,
                    "the round that was cut goes on"
                );
                self.so_far.pending.union_with(&due);
            }
            None if holding.round != self.so_far.round => {
                let what = format!("it is in round {} instead of {}", holding.round, self.so_far.round);
                return Err(SourceError::Misbehaved(what).into());
            }
            None => {}
        }
        self.so_far.round = holding.round;
        if reply.begun {
            self.so_far.population = None;
        }
        self.conversation.say(Said::Proceed(v1::Proceed {}));
        self.conversation.lasting.goes_on();
        self.conversation.asked.report(SourceReport::Resumed {
            held_pages: held,
            due_pages: self.so_far.pending.count(),
        });
        Ok(())
    }

    fn hear_holding(&mut self, reply: &v1::HelloReply) -> Result<Holding, Stop> {
        let memory = self.guest.memory();
        let mut holdings = Holdings::new(memory.shape());
        loop {
            let part = self.conversation.wait_for(self.guest, |heard| match heard {
                Heard::Holding(part) => Ok(part),
                other => Err(other),
            })?;
            if holdings.take(&part, memory.shape()).map_err(SourceError::Misbehaved)? {
                break;
            }
        }
        Ok(Holding {
            round: reply.round,
            session: reply.held_session,
            held: holdings.held(),
        })
    }

    /// How long the copy has had a link.
    pub(super) fn copying_for(&self) -> Duration {
        self.so_far
            .copying_since
            .elapsed()
            .saturating_sub(self.conversation.lasting.waited())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::guest::{FrameRun, MemoryShape, Region};

    const FRAMES: u64 = 24;

    fn shape() -> MemoryShape {
        MemoryShape::new(vec![Region {
            start_frame: 0,
            frames: FRAMES,
        }])
        .unwrap()
    }

    fn page(frame: u64) -> FrameRun {
        FrameRun { first: frame, count: 1 }
    }

    /// What happens next.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        /// The guest writes a page.
        Write(u64),
        /// A round begins, if none is open.
        Begin,
        /// The next page of the round is re-armed, sent, and arrives.
        Arrives,
        /// The round's barrier; whether the source hears of it.
        Barrier { is_heard: bool },
        /// The link is cut, and made again: whether the source hears the table, and whether the destination hears that it went on.
        Cut { is_told: bool, is_heard: bool },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0..FRAMES).prop_map(Step::Write),
            2 => Just(Step::Begin),
            8 => Just(Step::Arrives),
            2 => any::<bool>().prop_map(|is_heard| Step::Barrier { is_heard }),
            2 => (any::<bool>(), any::<bool>()).prop_map(|(is_told, is_heard)| Step::Cut { is_told, is_heard }),
        ];
        prop::collection::vec(step, 0..200)
    }

    /// Both ends, with a version in place of each page's contents.
    struct World {
        versions: Vec<u64>,
        dirty: PageSet,
        pending: PageSet,
        round: u32,
        session: u32,
        open: Option<(PageSet, Vec<u64>)>,
        unacknowledged: Option<Unacknowledged>,
        there: Vec<u64>,
        there_round: u32,
        whole: PageSet,
        whole_session: u32,
    }

    impl World {
        fn new() -> Self {
            let empty = PageSet::new(&shape());
            let mut pending = empty.clone();
            pending.insert(FrameRun {
                first: 0,
                count: FRAMES,
            });
            Self {
                versions: vec![1; FRAMES as usize],
                dirty: empty.clone(),
                pending,
                round: 1,
                session: 0,
                open: None,
                unacknowledged: None,
                there: vec![0; FRAMES as usize],
                there_round: 1,
                whole: empty,
                whole_session: 0,
            }
        }

        fn step(&mut self, step: Step) {
            match step {
                Step::Write(frame) => {
                    self.versions[frame as usize] += 1;
                    self.dirty.insert(page(frame));
                }
                Step::Begin if self.open.is_none() => {
                    self.pending.union_with(&self.dirty);
                    let set = std::mem::replace(&mut self.pending, PageSet::new(&shape()));
                    let mut frames: Vec<u64> = set.runs().flat_map(|run| run.first..run.end()).collect();
                    frames.reverse();
                    self.open = Some((set, frames));
                }
                Step::Begin => {}
                Step::Arrives => {
                    let Some(frame) = self.open.as_mut().and_then(|(_, frames)| frames.pop()) else {
                        return;
                    };
                    self.dirty.remove(page(frame));
                    self.there[frame as usize] = self.versions[frame as usize];
                    self.whole.insert(page(frame));
                }
                Step::Barrier { is_heard } => {
                    if !self.open.as_ref().is_some_and(|(_, frames)| frames.is_empty()) {
                        return;
                    }
                    self.whole.clear();
                    self.there_round += 1;
                    match is_heard {
                        true => {
                            self.open = None;
                            self.round += 1;
                        }
                        false => self.cut(true, true),
                    }
                }
                Step::Cut { is_told, is_heard } => self.cut(is_told, is_heard),
            }
        }

        fn cut(&mut self, is_told: bool, is_heard: bool) {
            if let Some((set, frames)) = self.open.take() {
                // The range of pages that were not sent may be re-armed all the same.
                frames.iter().for_each(|&frame| self.dirty.remove(page(frame)));
                self.unacknowledged = Some(Unacknowledged {
                    session: self.session,
                    round: self.round,
                    set,
                });
            }
            self.session += 1;
            if !is_told {
                return self.cut(true, is_heard);
            }
            let holding = Holding {
                round: self.there_round,
                session: self.whole_session,
                held: self.whole.clone(),
            };
            if let Some(cut) = self.unacknowledged.take() {
                self.pending.union_with(&cut.due(&holding).unwrap());
            }
            self.round = holding.round;
            if is_heard {
                self.whole.clear();
                self.whole_session = self.session;
            } else {
                // A round began on the link, and nothing of it arrived.
                self.step(Step::Begin);
                self.cut(true, true);
            }
        }

        fn finish(&mut self) {
            for _ in 0..2 {
                while self.open.as_ref().is_some_and(|(_, frames)| !frames.is_empty()) {
                    self.step(Step::Arrives);
                }
                self.step(Step::Barrier { is_heard: true });
                self.step(Step::Begin);
            }
        }
    }

    proptest! {
        #[test]
        fn no_write_is_lost_however_links_are_cut(steps in steps()) {
            let mut world = World::new();
            for step in steps {
                world.step(step);
            }
            world.finish();
            prop_assert_eq!(world.there, world.versions);
        }
    }

    fn cut(session: u32, round: u32) -> Unacknowledged {
        let mut set = PageSet::new(&shape());
        set.insert(FrameRun { first: 2, count: 10 });
        Unacknowledged { session, round, set }
    }

    fn holding(session: u32, round: u32) -> Holding {
        let mut held = PageSet::new(&shape());
        held.insert(FrameRun { first: 0, count: 7 });
        Holding { round, session, held }
    }

    #[test]
    fn what_came_in_the_same_session_is_not_due_again() {
        let due = cut(3, 5).due(&holding(3, 5)).unwrap();
        assert_eq!(due.runs().collect::<Vec<_>>(), [FrameRun { first: 7, count: 5 }]);
    }

    #[test]
    fn what_came_in_an_earlier_session_may_be_old() {
        assert_eq!(cut(3, 5).due(&holding(2, 5)).unwrap().count(), 10);
    }

    #[test]
    fn a_round_whose_barrier_was_reached_is_there() {
        assert!(cut(3, 5).due(&holding(3, 6)).unwrap().is_empty());
    }

    #[test]
    fn a_destination_in_another_round_misbehaves() {
        assert!(cut(3, 5).due(&holding(3, 4)).is_err());
        assert!(cut(3, 5).due(&holding(3, 7)).is_err());
    }
}
