//! Whether pages that are sent again are told by what they changed, where that is left to Ferry. Pure, as the [`super::controller`] is.

use super::ways::cost;
use super::{Compression, Measured};

/// A stream that carries more bytes a second than this is faster than a thread that copies pages and compares them.
pub(super) const FAST_STREAM: f64 = 600e6;

/// It is judged by so many bytes of pages, of frames that have some of which there were copies, and again by as many.
const JUDGED_BY: u64 = 16 << 20;

/// Over one link.
#[derive(Debug)]
pub(super) struct Worth {
    state: State,
    /// What frames of the kind came to lately: bytes of pages, what was sent of them, seconds of processor time.
    seen: (u64, u64, f64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Whatever it costs.
    Always,
    /// For good: what is sent plainly, nobody keeps a copy of.
    Never,
    /// Nothing was sent yet that shows what the link carries.
    NotYet,
    On,
}

impl Worth {
    /// What its user wants, and whether the destination knows it.
    pub(super) fn new(wanted: Compression, is_known: bool) -> Self {
        let state = match wanted {
            Compression::Always(_) if is_known => State::Always,
            Compression::Auto if is_known => State::NotYet,
            Compression::Off | Compression::Always(_) | Compression::Auto => State::Never,
        };
        Self {
            state,
            seen: (0, 0, 0.0),
        }
    }

    pub(super) fn is_on(&self) -> bool {
        matches!(self.state, State::Always | State::On)
    }

    /// Pages are about to be sent again by a stream that carries so many bytes a second. Tells if they are told so from now on.
    pub(super) fn sends_again(&mut self, link: Option<f64>) -> Option<String> {
        let link = link.filter(|&link| self.state == State::NotYet && link < FAST_STREAM)?;
        self.state = State::On;
        Some(format!(
            "pages that are sent again are told by what they changed from now on: a stream carries {:.0} MB/s",
            link / 1e6
        ))
    }

    /// Takes in a frame that has pages of which there were copies. Tells if none are told so from now on.
    pub(super) fn measured(&mut self, frame: &Measured, link: Option<f64>) -> Option<String> {
        let (bytes, sent, worked) = &mut self.seen;
        *bytes += frame.bytes;
        *sent += frame.sent;
        *worked += frame.worked.as_secs_f64();
        let link = link.filter(|_| self.state == State::On && *bytes >= JUDGED_BY)?;
        let (made, left) = (*worked / *bytes as f64, *sent as f64 / *bytes as f64);
        self.seen = (0, 0, 0.0);
        if cost(made, left, link) < 1.0 / link {
            return None;
        }
        self.state = State::Never;
        Some(format!(
            "pages that are sent again are sent as they are from now on: a stream carries {:.0} MB/s, and what they changed is found out at {:.0} MB/s and leaves \
             {:.0} % of them",
            link / 1e6,
            1e-6 / made.max(1e-12),
            left * 100.0
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::compress::Method;

    /// A MiB of pages, of which so many KiB were sent after so many microseconds of work.
    fn frame(sent: u64, worked: u64) -> Measured {
        Measured {
            bytes: 1 << 20,
            sent: sent << 10,
            method: Some(Method::Lz4),
            copies: 200,
            deltas: 100,
            compressing: Duration::from_micros(worked),
            worked: Duration::from_micros(worked),
            sending: Duration::from_micros(1),
            sampled: None,
            streams: 1,
            cap: None,
        }
    }

    #[test]
    fn it_waits_for_what_the_link_carries_and_begins_where_that_is_little() {
        let mut worth = Worth::new(Compression::Auto, true);
        assert_eq!(worth.sends_again(None), None);
        assert_eq!(worth.sends_again(Some(2e9)), None);
        assert!(!worth.is_on());
        let words = worth.sends_again(Some(59e6)).unwrap();
        assert!(words.ends_with("a stream carries 59 MB/s"), "{words}");
        assert!(worth.is_on());
        assert_eq!(worth.sends_again(Some(59e6)), None);
    }

    #[test]
    fn it_goes_on_while_it_pays_and_ends_for_good_where_it_does_not() {
        let mut worth = Worth::new(Compression::Auto, true);
        worth.sends_again(Some(100e6)).unwrap();
        // A tenth is left, at 1 GB/s.
        assert!((0..100).all(|_| worth.measured(&frame(100, 1000), Some(100e6)).is_none()));
        // All is left; or a host that has no time.
        for (sent, worked) in [(1020, 4000), (100, 20_000)] {
            let mut worth = Worth::new(Compression::Auto, true);
            worth.sends_again(Some(100e6)).unwrap();
            let ended = (0..100).find_map(|_| worth.measured(&frame(sent, worked), Some(100e6)));
            assert!(
                ended
                    .unwrap()
                    .starts_with("pages that are sent again are sent as they are")
            );
            assert!(!worth.is_on());
            assert_eq!(worth.sends_again(Some(1e6)), None);
        }
    }

    #[test]
    fn what_its_user_wants_is_done_whether_it_pays_or_not() {
        let lz4 = Compression::Always(Method::Lz4);
        let mut worth = Worth::new(lz4, true);
        assert!((0..100).all(|_| worth.measured(&frame(1020, 20_000), Some(2e9)).is_none()));
        assert!(worth.is_on());
        for (wanted, is_known) in [(lz4, false), (Compression::Auto, false), (Compression::Off, true)] {
            let mut worth = Worth::new(wanted, is_known);
            assert_eq!(worth.sends_again(Some(1e6)), None);
            assert!(!worth.is_on());
        }
    }
}
