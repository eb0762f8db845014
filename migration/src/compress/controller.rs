//! Whether the next frame is compressed, and how, where its user leaves that to Ferry. Pure: what was measured goes in, an order comes out; time is only ever an
//! argument.
//!
//! ```text
//!             ┌────────────── compressing pays clearly ──────────────┐
//!             │                                                      ▼
//!   plain: the link is measured all the time,            compressed: the way is measured all the time,
//!   a way to compress now and then, on a part            the other ways now and then; the link by a few plain
//!   of a frame that is sent plain anyway                 frames, soon after the change and then ever more rarely
//!             ▲                                                      │
//!             └──────────── it is slower than plain frames ──────────┘
//! ```
//!
//! What a byte of a page costs is what it costs the link, plainly or compressed, or what it costs the processor: the slower of the two decides, for the
//! kernel sends one frame while the next one is compressed. All of it is per stream: what one stream gets of the link, beside what one thread gets of the
//! processors, the guest and the other end on the same host included.
//!
//! That is a thought, and leaves out what cannot be seen from here: an end that has no processor to unpack what it gets. So what compressed frames came to
//! counts more than what was thought of them, and plain ones are tried again wherever the two are near each other.

use std::time::Duration;

use super::ways::{CLEARLY_LESS, WAYS, cost};
use super::{Codecs, Measured, Method, Sampled};

/// A slower way is looked at where the one before it takes no more of what a plain byte takes on the link.
const ROOM_FOR_SLOWER: f64 = 0.5;

/// What a look at the link lasts: so many bytes of pages, or so much waiting for the link, whatever comes first. Buffers of the kernel take
/// some MiB before the link is felt; and an end that was without a processor for a moment is not the link, so it takes two looks.
const LOOK: Span = Span {
    bytes: 16 << 20,
    time: Duration::from_millis(48),
};

/// What a look at compressed frames lasts: what of them is in the kernel's buffers must not count.
const COMPRESSED_LOOK: Span = Span {
    bytes: 64 << 20,
    time: Duration::from_millis(200),
};

/// Bytes of pages between two samples, at first and at most; doubled whenever one changed nothing.
const SAMPLE_EVERY: u64 = 32 << 20;
const SAMPLE_EVERY_AT_MOST: u64 = 512 << 20;

/// Bytes of pages before the first sample: a guest's first pages are not like the others.
const FIRST_SAMPLE: u64 = 4 << 20;

/// A way is not taken before it was tried so often: one frame may be unlike the others.
const TRIED_BEFORE: u32 = 2;

/// What is sent plainly to see what the link carries by now, where pages are compressed; all for each stream. First what does not count: what was compressed
/// is still in the kernel's buffers, and has to be unpacked before what comes after it is read; or they are empty, and take some MiB at once. Where so much was
/// waited for they are full.
const PROBE_UNSEEN: u64 = 2 << 20;
const PROBE_WAITED: Duration = Duration::from_millis(24);
const PROBE_UNSEEN_AT_MOST: u64 = 16 << 20;
const PROBE: Span = Span {
    bytes: 4 << 20,
    time: Duration::from_millis(24),
};

/// The time of sending threads before the first probe. What was thought of the link may have been a moment's, and only plain frames can tell; but where
/// compressed ones come to clearly more than plain ones did, there is time.
const FIRST_PROBE: Duration = Duration::from_secs(2);
const FIRST_PROBE_IF_NEAR: Duration = Duration::from_millis(400);
const CLEARLY_MORE: f64 = 1.6;

/// A probe comes when so many times of what the last one took have passed, twice as many after each that changed nothing: 6 % of the time at first, and 2 %.
const PROBE_EVERY: u32 = 16;
const PROBE_EVERY_AT_MOST: u32 = 64;

/// How much of a slowness that was not foreseen is forgotten with each look at plain frames.
const FORGOTTEN: f64 = 0.02;

/// Compressed frames that take so many times longer than is thought are looked into.
const MUCH_SLOWER_THAN_THOUGHT: f64 = 1.4;

/// The most that a way is believed to be slower than was thought.
const SLOWER_AT_MOST: f64 = 50.0;

/// A link that carries this share of what it did is looked at anew.
const MUCH_SLOWER: f64 = 0.5;

/// How the next frame is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Compressed this way; `None`: plainly.
    pub(crate) method: Option<Method>,
    /// Of a part of it is to be found out what this way makes of it.
    pub(crate) sample: Option<Method>,
    /// Pages may be told by what they changed, and are sent as they were copied.
    pub(crate) deltas: bool,
}

/// The sending is done otherwise from now on, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) to: Option<Method>,
    pub(super) words: String,
}

/// What is known of one way.
#[derive(Clone, Copy, Debug)]
struct Way {
    method: Method,
    /// Seconds for a byte, and what is left of it; `None`: never tried.
    known: Option<(f64, f64)>,
    /// How often it was tried.
    tried: u32,
}

/// What a look at the link lasts, as [`LOOK`] says.
#[derive(Clone, Copy, Debug)]
struct Span {
    bytes: u64,
    time: Duration,
}

impl Span {
    fn times(self, streams: u32) -> Self {
        Self {
            bytes: self.bytes * u64::from(streams),
            time: self.time * streams,
        }
    }
}

/// A look at the link.
#[derive(Clone, Copy, Debug, Default)]
struct Look {
    bytes: u64,
    sent: u64,
    sending: Duration,
    busy: Duration,
}

/// Plain frames that are sent for what they tell.
#[derive(Clone, Copy, Debug, Default)]
struct Probe {
    /// All of them, and those that count.
    all: Look,
    seen: Look,
}

/// The decision, and what it is made of. One for all streams.
#[derive(Debug)]
pub(super) struct Controller {
    ways: Vec<Way>,
    /// Bytes a second that a stream carries.
    link: Option<f64>,
    /// A stream's share of the user's cap.
    cap: Option<f64>,
    /// What it carried when it was decided last.
    link_then: f64,
    /// The way that is used, of `ways`.
    now: Option<usize>,
    look: Look,
    /// The look before it, at plain frames.
    look_before: Option<Look>,
    /// Bytes of pages until the next sample, and until the one after it.
    until_sample: u64,
    sample_every: u64,
    /// The way that is sampled next, of `ways`.
    next_sample: usize,
    /// Bytes of pages a second that a stream of compressed frames came to lately.
    came_to: Option<f64>,
    /// How many times longer that was than is thought; 1: no longer.
    slower: f64,
    probe: Option<Probe>,
    /// Time of sending threads until the next probe; none was made with less than this many times of what it takes before it.
    until_probe: Duration,
    probe_every: u32,
}

impl Controller {
    /// Nothing is known yet; only these formats may be used.
    pub(super) fn new(codecs: Codecs) -> Self {
        let ways = WAYS.into_iter().filter(|way| codecs.contains(way.codec()));
        Self {
            ways: ways.map(Way::new).collect(),
            link: None,
            cap: None,
            link_then: 0.0,
            now: None,
            look: Look::default(),
            look_before: None,
            until_sample: FIRST_SAMPLE,
            sample_every: SAMPLE_EVERY,
            next_sample: 0,
            came_to: None,
            slower: 1.0,
            probe: None,
            until_probe: FIRST_PROBE,
            probe_every: PROBE_EVERY,
        }
    }

    /// The way that is used now.
    pub(super) fn method(&self) -> Option<Method> {
        self.now.map(|now| self.ways[now].method)
    }

    /// Bytes a second that a stream carries, or may, if that is known.
    pub(super) fn link(&self) -> Option<f64> {
        match (self.link, self.cap) {
            (Some(link), Some(cap)) => Some(link.min(cap)),
            (link, cap) => link.or(cap),
        }
    }

    /// How the next frame is sent, which has so many bytes of pages at most.
    pub(super) fn plan(&mut self, bytes: u64) -> Plan {
        if self.ways.is_empty() {
            return Plan::default();
        }
        let mut sample = None;
        self.until_sample = self.until_sample.saturating_sub(bytes);
        if self.until_sample == 0 {
            self.until_sample = self.sample_every;
            sample = self.wanted_sample();
        }
        let method = match self.probe {
            Some(_) => None,
            None => self.method(),
        };
        Plan {
            method,
            sample,
            deltas: false,
        }
    }

    /// Takes in what of a frame does not depend on how it was sent.
    pub(super) fn note(&mut self, frame: &Measured) {
        self.cap = frame.cap.map(|cap| cap / f64::from(frame.streams));
        if let Some(sampled) = frame.sampled {
            self.learn(&sampled, 0.5);
        }
    }

    /// Takes in what a frame told.
    pub(super) fn measured(&mut self, frame: &Measured) -> Option<Change> {
        self.note(frame);
        if let Some(method) = frame.method {
            let whole = Sampled {
                method,
                bytes: frame.bytes,
                packed: frame.sent.min(frame.bytes),
                took: frame.worked,
            };
            self.learn(&whole, 0.25);
        }
        let looked = match (self.now, self.probe, frame.method) {
            (None, _, None) => self.look_plain(frame),
            (Some(now), Some(_), None) => self.look_by_probe(now, frame),
            (Some(now), None, Some(_)) => self.look_compressed(now, frame),
            // Planned before that was changed.
            _ => false,
        };
        let is_new = frame.sampled.is_some() && self.link.is_some();
        (looked || is_new).then(|| self.decide(is_new)).flatten()
    }

    /// What was decided, in words, where nothing changed yet.
    pub(super) fn words(&self) -> String {
        let (Some(link), Some(way)) = (self.link, self.best().or(self.ways.first())) else {
            return "too little was sent to tell".to_owned();
        };
        describe(link, way)
    }

    /// The way to be sampled: each in turn that could pay for all that is known.
    fn wanted_sample(&mut self) -> Option<Method> {
        let plain = self.link.map(|link| 1.0 / link);
        for _ in 0..self.ways.len() {
            let index = self.next_sample % self.ways.len();
            self.next_sample = index + 1;
            // What is used is measured anyway.
            if self.now == Some(index) {
                continue;
            }
            let has_room = match (index.checked_sub(1).map(|before| self.ways[before].known), plain) {
                (None, _) => true,
                (Some(Some((cost, _))), Some(plain)) => cost < ROOM_FOR_SLOWER * plain,
                (Some(_), _) => false,
            };
            if has_room {
                return Some(self.ways[index].method);
            }
        }
        None
    }

    fn learn(&mut self, sampled: &Sampled, weight: f64) {
        if sampled.bytes == 0 {
            return;
        }
        let bytes = sampled.bytes as f64;
        let (cost, left) = (sampled.took.as_secs_f64() / bytes, sampled.packed as f64 / bytes);
        let Some(way) = self.ways.iter_mut().find(|way| way.method == sampled.method) else {
            return;
        };
        way.tried += 1;
        let blend = |before: f64, now: f64| before + weight * (now - before);
        way.known = Some(match way.known {
            // One good frame proves nothing: the worse of the first ones counts.
            Some((cost_before, left_before)) if way.tried <= TRIED_BEFORE => {
                (cost.max(cost_before), left.max(left_before))
            }
            Some((cost_before, left_before)) => (blend(cost_before, cost), blend(left_before, left)),
            None => (cost, left),
        });
    }

    /// Plain frames show what the link carries: the last two looks count, once there are two.
    fn look_plain(&mut self, frame: &Measured) -> bool {
        self.look.add(frame);
        if !self.look.has_waited(LOOK) {
            return false;
        }
        let look = std::mem::take(&mut self.look);
        let before = self.look_before.replace(look);
        let Some(before) = before else { return false };
        let Some(carried) = rate(look.sent + before.sent, look.sending + before.sending) else {
            return false;
        };
        self.slower += FORGOTTEN * (1.0 - self.slower);
        self.carries(carried);
        true
    }

    /// The same, where pages are compressed otherwise.
    fn look_by_probe(&mut self, now: usize, frame: &Measured) -> bool {
        let Some(probe) = &mut self.probe else { return false };
        let streams = frame.streams.max(1);
        let bytes = probe.all.bytes / u64::from(streams);
        let has_waited = probe.all.sending >= PROBE_WAITED * streams;
        if bytes >= PROBE_UNSEEN_AT_MOST || bytes >= PROBE_UNSEEN && has_waited {
            probe.seen.add(frame);
        }
        probe.all.add(frame);
        if !probe.seen.has_waited(PROBE.times(streams)) {
            return false;
        }
        let Probe { all, seen } = *probe;
        self.probe = None;
        self.look = Look::default();
        self.until_probe = self.probe_every * all.sending;
        self.probe_every = (2 * self.probe_every).min(PROBE_EVERY_AT_MOST);
        let Some(carried) = rate(seen.sent, seen.sending) else {
            return false;
        };
        self.carries(carried);
        self.slower = self.slowness(now);
        true
    }

    /// What was saved up under a cap goes at once, and is not the link.
    fn carries(&mut self, seen: f64) {
        let link = self.cap.map_or(seen, |cap| seen.min(cap));
        self.link = Some(link);
        if link < MUCH_SLOWER * self.link_then {
            self.sample_every = SAMPLE_EVERY;
            self.until_sample = 0;
        }
    }

    /// Compressed frames show what they come to, and that the link carries no less than they do.
    fn look_compressed(&mut self, now: usize, frame: &Measured) -> bool {
        self.until_probe = self.until_probe.saturating_sub(frame.sending + frame.compressing);
        if self.until_probe.is_zero() {
            self.probe = Some(Probe::default());
            return false;
        }
        self.look.add(frame);
        if !self.look.is_over(COMPRESSED_LOOK) {
            return false;
        }
        let look = std::mem::take(&mut self.look);
        let (Some(sent), Some(came_to)) = (rate(look.sent, look.busy), rate(look.bytes, look.busy)) else {
            return false;
        };
        let link = self.link.unwrap_or(sent);
        self.came_to = Some(came_to);
        // It may be the link that is slower than it was, or what cannot be seen from here: plain frames tell which.
        if came_to < CLEARLY_MORE * link || self.slowness(now) > MUCH_SLOWER_THAN_THOUGHT {
            let soon = FIRST_PROBE_IF_NEAR * (self.probe_every / PROBE_EVERY);
            self.until_probe = self.until_probe.min(soon);
        }
        self.carries(link.max(sent));
        true
    }

    /// How many times longer compressed frames took than is thought of this way.
    fn slowness(&self, now: usize) -> f64 {
        let thought = self.link.and_then(|link| self.ways[now].cost(link));
        let slowness = thought
            .zip(self.came_to)
            .map(|(thought, came_to)| 1.0 / (came_to * thought));
        slowness.unwrap_or(1.0).clamp(1.0, SLOWER_AT_MOST)
    }

    fn decide(&mut self, is_new: bool) -> Option<Change> {
        let link = self.link?;
        self.link_then = link;
        let best = self.best_index()?;
        let plain = 1.0 / link;
        let cost = |index: usize| self.slower * self.ways[index].cost(link).unwrap_or(f64::INFINITY);
        let wanted = match self.now {
            Some(now) if cost(best) < CLEARLY_LESS * cost(now) && cost(best) < plain => Some(best),
            Some(now) if cost(now) < plain => Some(now),
            None if cost(best) < CLEARLY_LESS * plain => Some(best),
            _ => None,
        };
        let untried = |&index: &usize| self.ways[index].tried < TRIED_BEFORE;
        if let Some(index) = wanted.filter(untried) {
            (self.until_sample, self.next_sample) = (0, index);
            return None;
        }
        if wanted == self.now {
            if is_new {
                self.sample_every = (2 * self.sample_every).min(SAMPLE_EVERY_AT_MOST);
                self.until_sample = self.until_sample.max(self.sample_every);
            }
            return None;
        }
        let way = self.ways[wanted.or(self.now).unwrap_or(best)];
        let was_plain = self.now.is_none();
        self.now = wanted;
        (self.look, self.look_before, self.probe, self.came_to) = (Look::default(), None, None, None);
        if was_plain {
            (self.until_probe, self.probe_every) = (FIRST_PROBE, PROBE_EVERY);
        }
        self.sample_every = SAMPLE_EVERY;
        self.until_sample = match wanted {
            // What else could be used is of interest at once.
            Some(_) => 0,
            None => SAMPLE_EVERY,
        };
        let words = match wanted {
            Some(_) => format!(
                "pages are compressed with {} from now on: {}",
                way.method,
                describe(link, &way)
            ),
            None => format!("pages are sent plainly from now on: {}", describe(link, &way)),
        };
        Some(Change {
            to: self.method(),
            words,
        })
    }

    fn best(&self) -> Option<&Way> {
        self.best_index().map(|index| &self.ways[index])
    }

    fn best_index(&self) -> Option<usize> {
        let link = self.link?;
        let costs = self.ways.iter().enumerate();
        let costs = costs.filter_map(|(index, way)| Some((index, way.cost(link)?)));
        costs
            .min_by(|(_, one), (_, other)| one.total_cmp(other))
            .map(|(index, _)| index)
    }
}

impl Way {
    fn new(method: Method) -> Self {
        Self {
            method,
            known: None,
            tried: 0,
        }
    }

    /// Seconds for a byte of a page over such a link; `None`: it was never tried.
    fn cost(&self, link: f64) -> Option<f64> {
        let (compressing, left) = self.known?;
        Some(cost(compressing, left, link))
    }
}

impl Look {
    fn add(&mut self, frame: &Measured) {
        self.bytes += frame.bytes;
        self.sent += frame.sent;
        self.sending += frame.sending;
        self.busy += frame.sending + frame.compressing;
    }

    fn is_over(&self, span: Span) -> bool {
        self.bytes >= span.bytes || self.busy >= span.time
    }

    /// The same, of what was waited for.
    fn has_waited(&self, span: Span) -> bool {
        self.bytes >= span.bytes || self.sending >= span.time
    }
}

fn rate(bytes: u64, time: Duration) -> Option<f64> {
    let seconds = time.as_secs_f64();
    (seconds > 0.0 && bytes > 0).then(|| bytes as f64 / seconds)
}

fn describe(link: f64, way: &Way) -> String {
    let link = link / 1e6;
    match way.known {
        Some((cost, left)) => format!(
            "a stream carries {link:.0} MB/s, and {} takes in {:.0} MB/s and leaves {:.0} % of it",
            way.method,
            1e-6 / cost.max(1e-12),
            left * 100.0
        ),
        None => format!("a stream carries {link:.0} MB/s"),
    }
}

#[cfg(test)]
mod tests;
