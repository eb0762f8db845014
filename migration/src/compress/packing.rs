//! Where the script and the sending threads meet over compression: what is to be done, what was agreed, and what came of it.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::controller::{Controller, Plan};
use super::worth::Worth;
use super::{Codecs, Compression, Extent, Measured, Method, OF_DELTAS, SentPages};
use crate::guest::FRAME_SIZE;
use crate::wire::MAX_DATA_PAGES;

/// The most pages of a frame that is compressed: 512 KiB. A thread that compresses does not give way to the guest in the middle of a frame, which is 1 to 3 ms
/// then, and neither format gains much from more.
const COMPRESSED_PAGES: u64 = 128;

const FIRST_ROUND: u32 = 1;

/// Changes beyond so many are counted, and not told one by one.
const TOLD_CHANGES: u32 = 32;

/// What came of compression in one migration, over all its links.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// What its user wants.
    pub wanted: Compression,
    /// How pages are compressed now, or were in the end; `None`: they are sent plainly.
    pub method: Option<Method>,
    /// Why, in words.
    pub why: String,
    /// Frames with pages that are not zero.
    pub frames: u64,
    /// Those of them that were sent compressed.
    pub compressed_frames: u64,
    /// Those that were compressed and sent plainly, for that hardly made them less.
    pub incompressible_frames: u64,
    /// Bytes of the pages in compressed frames.
    pub bytes_before: u64,
    /// What was sent of them.
    pub bytes_after: u64,
    /// Pages in them that were told by what they changed since they were sent last.
    pub delta_pages: u64,
    /// How often compression was switched on by itself.
    pub switched_on: u32,
    /// How often it was switched off by itself.
    pub switched_off: u32,
}

impl Tally {
    /// Bytes that were not sent.
    #[must_use]
    pub fn saved(&self) -> u64 {
        self.bytes_before - self.bytes_after
    }
}

/// Shared by the script and all its sending threads, over all links.
#[derive(Debug)]
pub(crate) struct Packing {
    state: Mutex<State>,
    /// What the destination of this link holds, where it can be told what pages changed.
    sent: OnceLock<SentPages>,
}

#[derive(Debug)]
struct State {
    agreed: Codecs,
    controller: Controller,
    deltas: Worth,
    tally: Tally,
    changes: Vec<String>,
}

impl Packing {
    pub(crate) fn new(wanted: Compression) -> Self {
        let tally = Tally {
            wanted,
            why: "its user wants it so".to_owned(),
            ..Tally::default()
        };
        Self {
            state: Mutex::new(State {
                agreed: Codecs::default(),
                controller: Controller::new(Codecs::default()),
                deltas: Worth::new(wanted, false),
                tally,
                changes: Vec::new(),
            }),
            sent: OnceLock::new(),
        }
    }

    /// The formats that may be used, to be offered to the destination.
    pub(crate) fn wanted(&self) -> Codecs {
        match self.lock().tally.wanted {
            Compression::Auto => Codecs::ours(),
            Compression::Off => Codecs::default(),
            Compression::Always(method) => Codecs::default().with(method.codec()).with_deltas(),
        }
    }

    /// The destination reads these formats; compressing may pay for its link, or cannot: both ends share the same processors, and pages go from memory to
    /// memory. What was learned over another link is of little use over this one, and what of its last round arrived is not known.
    ///
    /// # Errors
    /// Its user wants one that it does not read.
    pub(crate) fn agree(&self, theirs: Codecs, may_pay: bool, memory: Extent) -> Result<(), String> {
        let mut agreed = self.wanted().and(theirs);
        let mut state = self.lock();
        let is_idle = state.tally.wanted == Compression::Auto && !may_pay;
        if is_idle {
            agreed = Codecs::default();
        }
        state.agreed = agreed;
        state.controller = Controller::new(agreed);
        let knows =
            agreed.has_deltas() && (state.tally.wanted != Compression::Auto || agreed.contains(OF_DELTAS.codec()));
        state.deltas = Worth::new(state.tally.wanted, knows);
        self.sent.get_or_init(|| SentPages::new(memory)).forget_all();
        match state.tally.wanted {
            Compression::Always(method) if !agreed.contains(method.codec()) => {
                return Err(format!(
                    "it does not know pages that are compressed with {}",
                    method.codec()
                ));
            }
            Compression::Always(method) => state.tally.method = Some(method),
            Compression::Auto if is_idle => {
                state.tally.method = None;
                state.tally.why = "both ends are on one host".to_owned();
            }
            Compression::Auto if agreed.is_empty() => {
                state.tally.method = None;
                state.tally.why = "the destination does not know it".to_owned();
            }
            Compression::Auto => {
                state.tally.method = None;
                state.tally.why = state.controller.words();
            }
            Compression::Off => {}
        }
        Ok(())
    }

    /// The most pages that the next frame should have.
    pub(crate) fn most_pages(&self) -> u64 {
        let state = self.lock();
        match state.tally.method {
            None if !state.deltas.is_on() => MAX_DATA_PAGES,
            _ => COMPRESSED_PAGES,
        }
    }

    /// How a frame of so many pages is sent. While the guest stands still nothing is tried out.
    pub(crate) fn plan(&self, pages: u64, round: u32, guest: GuestIs) -> Plan {
        let mut state = self.lock();
        let plan = match (state.tally.wanted, guest) {
            (Compression::Off, _) => return Plan::default(),
            (Compression::Always(_), _) | (Compression::Auto, GuestIs::Waiting) => Plan {
                method: state.tally.method,
                ..Plan::default()
            },
            (Compression::Auto, GuestIs::NotWaiting) => state.controller.plan(pages * FRAME_SIZE),
        };
        // Everything travels in the first round, most of it for the only time.
        if round == FIRST_ROUND {
            return plan;
        }
        if guest == GuestIs::NotWaiting {
            let link = state.controller.link();
            let change = state.deltas.sends_again(link);
            state.changes.extend(change);
        }
        Plan {
            deltas: state.deltas.is_on(),
            ..plan
        }
    }

    /// Whether from the next round on, after the second one, most of so many dirty pages are told by what they changed.
    pub(crate) fn deltas_begin(&self, round: u32, dirty_pages: u64) -> bool {
        let most = self.sent.get().map_or(0, SentPages::most);
        round == FIRST_ROUND + 1 && dirty_pages <= 2 * most && self.lock().deltas.is_on()
    }

    /// Copies of what was sent; none before a destination agreed.
    pub(crate) fn sent_pages(&self) -> Option<&SentPages> {
        self.sent.get()
    }

    /// What arrived is not what was sent: nobody knows what pages changed since.
    pub(crate) fn has_differed(&self) {
        self.sent.get().into_iter().for_each(SentPages::forget_all);
    }

    /// Takes in what a frame with pages told.
    pub(crate) fn sent(&self, frame: &Measured, guest: GuestIs) {
        let mut state = self.lock();
        let tally = &mut state.tally;
        tally.frames += 1;
        tally.delta_pages += frame.deltas;
        match frame.method {
            Some(_) if frame.sent < frame.bytes => {
                tally.compressed_frames += 1;
                tally.bytes_before += frame.bytes;
                tally.bytes_after += frame.sent;
            }
            Some(_) => tally.incompressible_frames += 1,
            None => {}
        }
        if tally.wanted != Compression::Auto || guest == GuestIs::Waiting {
            return;
        }
        // What they came to tells nothing of other frames.
        if frame.copies > 0 {
            state.controller.note(frame);
            let link = state.controller.link();
            let change = state.deltas.measured(frame, link);
            state.changes.extend(change);
            return;
        }
        let Some(change) = state.controller.measured(frame) else {
            return;
        };
        let tally = &mut state.tally;
        match (tally.method, change.to) {
            (None, Some(_)) => tally.switched_on += 1,
            (Some(_), None) => tally.switched_off += 1,
            _ => {}
        }
        tally.method = change.to;
        tally.why.clone_from(&change.words);
        if tally.switched_on + tally.switched_off <= TOLD_CHANGES {
            state.changes.push(change.words);
        }
    }

    /// What came of it so far.
    pub(crate) fn tally(&self) -> Tally {
        let state = self.lock();
        let mut tally = state.tally.clone();
        let has_changed = tally.switched_on > 0;
        if tally.wanted == Compression::Auto && !state.agreed.is_empty() && !has_changed {
            tally.why = state.controller.words();
        }
        tally
    }

    /// Bytes that were not sent so far.
    pub(crate) fn saved(&self) -> u64 {
        self.lock().tally.saved()
    }

    /// What was changed since this was asked last, in words.
    pub(crate) fn changes(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().changes)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the guest stands still for what is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GuestIs {
    /// For its last pages.
    Waiting,
    /// It runs, or has stood still from the beginning.
    NotWaiting,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const MEMORY: Extent = Extent { pages: 1, end: 1 };

    fn frame(method: Option<Method>, sent: u64) -> Measured {
        Measured {
            bytes: 1000,
            sent,
            method,
            copies: 0,
            deltas: 0,
            compressing: Duration::from_micros(1),
            worked: Duration::from_micros(1),
            sending: Duration::from_micros(1),
            sampled: None,
            streams: 1,
            cap: None,
        }
    }

    #[test]
    fn what_its_user_wants_is_refused_by_name_where_it_is_not_known() {
        let packing = Packing::new(Compression::Always(Method::Zstd(3)));
        let error = packing.agree(Codecs::from_wire(&[1]), true, MEMORY).unwrap_err();
        assert_eq!(error, "it does not know pages that are compressed with zstd");
        packing.agree(Codecs::ours(), true, MEMORY).unwrap();
        assert_eq!(packing.plan(5, 1, GuestIs::Waiting).method, Some(Method::Zstd(3)));
    }

    #[test]
    fn where_it_is_left_to_ferry_a_destination_without_it_gets_plain_frames() {
        let packing = Packing::new(Compression::Auto);
        packing.agree(Codecs::default(), true, MEMORY).unwrap();
        assert_eq!(packing.plan(512, 1, GuestIs::NotWaiting), Plan::default());
        assert_eq!(packing.tally().why, "the destination does not know it");
    }

    #[test]
    fn within_one_host_it_is_only_done_where_its_user_says_so() {
        let packing = Packing::new(Compression::Auto);
        packing.agree(Codecs::ours(), false, MEMORY).unwrap();
        for _ in 0..100 {
            assert_eq!(packing.plan(512, 1, GuestIs::NotWaiting), Plan::default());
        }
        assert_eq!(packing.tally().why, "both ends are on one host");
        let packing = Packing::new(Compression::Always(Method::Lz4));
        packing.agree(Codecs::ours(), false, MEMORY).unwrap();
        assert_eq!(packing.plan(512, 1, GuestIs::NotWaiting).method, Some(Method::Lz4));
    }

    #[test]
    fn frames_are_counted_by_what_became_of_them() {
        let packing = Packing::new(Compression::Always(Method::Lz4));
        packing.agree(Codecs::ours(), true, MEMORY).unwrap();
        packing.sent(&frame(Some(Method::Lz4), 300), GuestIs::NotWaiting);
        packing.sent(&frame(Some(Method::Lz4), 1000), GuestIs::NotWaiting);
        packing.sent(&frame(Some(Method::Lz4), 200), GuestIs::Waiting);
        let tally = packing.tally();
        assert_eq!(
            (tally.frames, tally.compressed_frames, tally.incompressible_frames),
            (3, 2, 1)
        );
        assert_eq!(
            (tally.bytes_before, tally.bytes_after, tally.saved()),
            (2000, 500, 1500)
        );
    }

    #[test]
    fn pages_that_are_sent_again_are_told_by_what_they_changed_where_the_destination_knows_that() {
        for (theirs, may) in [(Codecs::ours(), true), (Codecs::ours().without_deltas(), false)] {
            let packing = Packing::new(Compression::Always(Method::Lz4));
            packing.agree(theirs, true, MEMORY).unwrap();
            assert!(!packing.plan(5, 1, GuestIs::NotWaiting).deltas);
            assert_eq!(packing.plan(5, 2, GuestIs::NotWaiting).deltas, may);
            assert_eq!(packing.plan(5, 3, GuestIs::Waiting).deltas, may);
        }
    }

    #[test]
    fn a_cap_is_a_slow_link_too() {
        let packing = Packing::new(Compression::Auto);
        packing.agree(Codecs::ours(), true, MEMORY).unwrap();
        assert!(!packing.plan(5, 2, GuestIs::NotWaiting).deltas);
        let cap = Some(10e6);
        packing.sent(
            &Measured {
                cap,
                ..frame(None, 1000)
            },
            GuestIs::NotWaiting,
        );
        assert!(!packing.plan(5, 2, GuestIs::Waiting).deltas);
        assert!(packing.plan(5, 2, GuestIs::NotWaiting).deltas);
        assert!(packing.plan(5, 2, GuestIs::Waiting).deltas);
        assert_eq!(packing.changes().len(), 1);
        assert_eq!(packing.most_pages(), COMPRESSED_PAGES);
    }

    #[test]
    fn nothing_is_tried_out_while_the_guest_waits() {
        let packing = Packing::new(Compression::Auto);
        packing.agree(Codecs::ours(), true, MEMORY).unwrap();
        assert_eq!(packing.plan(512, 1, GuestIs::Waiting), Plan::default());
        assert_eq!(packing.plan(512, 1, GuestIs::NotWaiting).sample, None);
        assert_eq!(packing.plan(512, 1, GuestIs::NotWaiting).sample, Some(Method::Lz4));
    }
}
