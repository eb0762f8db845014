//! Whether the next frame is compressed, and how, where its user leaves that to Ferry. Pure: what was measured goes in, an order comes out; time is only ever an
//! argument.
//!
//! ```text
//!             ┌────────────── compressing pays clearly ──────────────┐
//!             │                                                      ▼
//!   plain: the link is measured all the time,            compressed: the way is measured all the time,
//!   a way to compress now and then, on a part            the other ways now and then; the link where it is what is
//!   of a frame that is sent plain anyway                 waited for, and else by a few plain frames now and then
//!             ▲                                                      │
//!             └──────────── it is slower than plain frames ──────────┘
//! ```
//!
//! What a byte of a page costs is what it costs the link, plainly or compressed, or what it costs the processor: the slower of the two decides, for the
//! kernel sends one frame while the next one is compressed. All of it is per stream: what one stream gets of the link, beside what one thread gets of the
//! processors, the guest and the other end on the same host included.

use std::time::Duration;

use super::{Codecs, Measured, Method, Sampled};

/// The ways that are thought of, each slower than the one before it. What higher levels save is not worth their time at any speed that a migration can live with.
const WAYS: [Method; 3] = [Method::Lz4, Method::Zstd(1), Method::Zstd(3)];

/// A way to compress is changed to when a byte costs this share of what it does, or less: what is measured varies.
const CLEARLY_LESS: f64 = 0.85;

/// What of the shorter of the two, compressing and sending, is not hidden behind the longer one.
const NOT_HIDDEN: f64 = 0.25;

/// A slower way is looked at where the one before it takes no more of what a plain byte takes on the link.
const ROOM_FOR_SLOWER: f64 = 0.5;

/// What a look at the link lasts: so many bytes of pages, or so much waiting for the link, whatever comes first. Buffers of the kernel take
/// some MiB before the link is felt.
const LOOK_BYTES: u64 = 16 << 20;
const LOOK_WAITED: Duration = Duration::from_millis(16);

/// Where compressing goes on, the link is what is waited for if sending takes this share of the time.
const LINK_IS_WAITED_FOR: f64 = 0.25;

/// Bytes of pages between two samples, at first and at most; doubled whenever one changed nothing.
const SAMPLE_EVERY: u64 = 32 << 20;
const SAMPLE_EVERY_AT_MOST: u64 = 512 << 20;

/// Bytes of pages before the first sample: a guest's first pages are not like the others.
const FIRST_SAMPLE: u64 = 4 << 20;

/// A way is not taken before it was tried so often: one frame may be unlike the others.
const TRIED_BEFORE: u32 = 2;

/// Bytes of pages that are sent plainly to see what the link carries by now, and bytes between two such probes: 3 %. Doubled whenever one changed nothing.
const PROBE_BYTES: u64 = 8 << 20;
const PROBE_EVERY: u64 = 256 << 20;
const PROBE_EVERY_AT_MOST: u64 = 4 << 30;

/// A link that is waited for and carries this share of what was known of it is as it was.
const AS_KNOWN: f64 = 0.7;

/// A link that carries this share of what it did is looked at anew.
const MUCH_SLOWER: f64 = 0.5;

/// How the next frame is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Compressed this way; `None`: plainly.
    pub(crate) method: Option<Method>,
    /// Of a part of it is to be found out what this way makes of it.
    pub(crate) sample: Option<Method>,
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

/// A look at the link.
#[derive(Clone, Copy, Debug, Default)]
struct Look {
    bytes: u64,
    sent: u64,
    sending: Duration,
    busy: Duration,
}

/// The decision, and what it is made of. One for all streams.
#[derive(Debug)]
pub(super) struct Controller {
    ways: Vec<Way>,
    /// Bytes a second that a stream carries.
    link: Option<f64>,
    /// What it carried when it was decided last.
    link_then: f64,
    /// The way that is used, of `ways`.
    now: Option<usize>,
    look: Look,
    /// Bytes of pages until the next sample, and until the one after it.
    until_sample: u64,
    sample_every: u64,
    /// The way that is sampled next, of `ways`.
    next_sample: usize,
    until_probe: u64,
    probe_every: u64,
    /// Bytes of pages that are still to be sent plainly.
    probing: u64,
}

impl Controller {
    /// Nothing is known yet; only these formats may be used.
    pub(super) fn new(codecs: Codecs) -> Self {
        let ways = WAYS.into_iter().filter(|way| codecs.contains(way.codec()));
        Self {
            ways: ways.map(Way::new).collect(),
            link: None,
            link_then: 0.0,
            now: None,
            look: Look::default(),
            until_sample: FIRST_SAMPLE,
            sample_every: SAMPLE_EVERY,
            next_sample: 0,
            until_probe: PROBE_EVERY,
            probe_every: PROBE_EVERY,
            probing: 0,
        }
    }

    /// The way that is used now.
    pub(super) fn method(&self) -> Option<Method> {
        self.now.map(|now| self.ways[now].method)
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
        let Some(now) = self.now else {
            return Plan { method: None, sample };
        };
        if self.probing == 0 {
            self.until_probe = self.until_probe.saturating_sub(bytes);
            if self.until_probe == 0 {
                self.probing = PROBE_BYTES;
                self.look = Look::default();
            }
        }
        let method = (self.probing == 0).then_some(self.ways[now].method);
        Plan { method, sample }
    }

    /// Takes in what a frame told.
    pub(super) fn measured(&mut self, frame: &Measured) -> Option<Change> {
        if let Some(sampled) = frame.sampled {
            self.learn(&sampled, 0.5);
        }
        if let Some(method) = frame.method {
            let whole = Sampled {
                method,
                bytes: frame.bytes,
                packed: frame.sent.min(frame.bytes),
                took: frame.compressing,
            };
            self.learn(&whole, 0.25);
        }
        let looked = match (self.now.is_some() && self.probing == 0, frame.method) {
            (false, None) => self.look_plain(frame),
            (true, Some(_)) => self.look_compressed(frame),
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

    /// Plain frames show what the link carries.
    fn look_plain(&mut self, frame: &Measured) -> bool {
        let is_probe = self.probing > 0;
        self.probing = self.probing.saturating_sub(frame.bytes);
        // The kernel's buffers take the first half of a probe.
        if is_probe && self.probing > PROBE_BYTES / 2 {
            return false;
        }
        self.look.add(frame);
        let is_over = match is_probe {
            true => self.probing == 0,
            false => self.look.bytes >= LOOK_BYTES || self.look.sending >= LOOK_WAITED,
        };
        if !is_over {
            return false;
        }
        let look = std::mem::take(&mut self.look);
        let Some(carried) = rate(look.sent, look.sending) else {
            return false;
        };
        self.link = Some(match self.link {
            Some(before) if !is_probe => (before + carried) / 2.0,
            _ => carried,
        });
        if is_probe {
            self.probe_every = (2 * self.probe_every).min(PROBE_EVERY_AT_MOST);
            self.until_probe = self.probe_every;
        }
        if carried < MUCH_SLOWER * self.link_then {
            self.sample_every = SAMPLE_EVERY;
            self.until_sample = 0;
        }
        true
    }

    /// Compressed frames show that the link carries no less than they do. Less says nothing of it: the other end may have no processor to unpack them.
    fn look_compressed(&mut self, frame: &Measured) -> bool {
        self.look.add(frame);
        if self.look.bytes < LOOK_BYTES {
            return false;
        }
        let look = std::mem::take(&mut self.look);
        let Some(carried) = rate(look.sent, look.busy) else {
            return false;
        };
        let known = self.link.unwrap_or(carried);
        let is_waited_for = look.sending.as_secs_f64() >= LINK_IS_WAITED_FOR * look.busy.as_secs_f64();
        if is_waited_for && carried >= AS_KNOWN * known {
            // It is full of them, as it was of plain ones: nothing is to be found out by a probe.
            self.until_probe = self.probe_every;
        }
        self.link = Some(known.max(carried));
        true
    }

    fn decide(&mut self, is_new: bool) -> Option<Change> {
        let link = self.link?;
        self.link_then = link;
        let best = self.best_index()?;
        let plain = 1.0 / link;
        let cost = |index: usize| self.ways[index].cost(link).unwrap_or(f64::INFINITY);
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
        self.now = wanted;
        self.look = Look::default();
        self.probing = 0;
        self.until_probe = self.probe_every;
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
        let sending = left / link;
        Some(compressing.max(sending) + NOT_HIDDEN * compressing.min(sending))
    }
}

impl Look {
    fn add(&mut self, frame: &Measured) {
        self.bytes += frame.bytes;
        self.sent += frame.sent;
        self.sending += frame.sending;
        self.busy += frame.sending + frame.compressing;
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
