//! What a guest printed on both hosts, put together again: one sequence of heartbeats, and when each was read.
//!
//! The guest may be moved in the middle of a line. Then the line's first half is on the source's console and its second
//! half on the destination's; [`Record::settle`] joins them. A console may also be read again from its beginning; what is
//! known of a heartbeat already is passed over. A heartbeat that comes a second time with other words is counted: that
//! is what two runners would look like.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ferry_probe::console::parse;
use ferry_probe::report::{Heartbeat, Line};

/// A heartbeat as it was read.
#[derive(Debug, Clone, Copy)]
pub(in crate::cli) struct Beat {
    pub(in crate::cli) heartbeat: Heartbeat,
    /// On which of the two hosts it was printed.
    pub(in crate::cli) host: usize,
    /// When it was read here.
    pub(in crate::cli) at: Instant,
}

/// All that was read so far.
#[derive(Debug, Default)]
pub(in crate::cli) struct Record {
    beats: BTreeMap<u64, Beat>,
    consoles: [Console; 2],
    /// Frequency of the guest's time stamp counter in kHz, once it is ready.
    pub(super) tsc_khz: Option<u64>,
    /// Heartbeats that were printed a second time, but differently or elsewhere.
    pub(super) doubled: u64,
    /// FAULT lines as they were printed.
    pub(super) faults: Vec<String>,
    /// What the guest said against its command line.
    pub(super) error: Option<String>,
}

#[derive(Debug, Default)]
struct Console {
    partial: Vec<u8>,
    /// The next bytes are the console's first.
    from_the_beginning: bool,
    /// Lines that are no lines of the guest: halves, perhaps.
    fragments: Vec<(String, Instant)>,
}

/// What happened between two heartbeats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::cli) struct Span {
    pub(super) heartbeats: u64,
    pub(super) missing: u64,
    /// The largest gap that the guest itself saw.
    pub(super) guest_gap: Duration,
    /// The longest that the reader waited for a heartbeat.
    pub(super) reader_gap: Duration,
    pub(super) writes: u64,
    pub(super) checked: u64,
    pub(super) faults: u64,
    /// How often a vCPU's clock went backwards.
    pub(super) clock_back: u64,
    /// Page writes a second, by the guest's clock.
    pub(super) write_rate: f64,
}

impl Record {
    /// A host's console will be read from its beginning, if there is anything to read.
    pub(super) fn reopened(&mut self, host: usize) {
        self.consoles[host].from_the_beginning = true;
    }

    /// Takes what a host's console printed next.
    pub(super) fn feed(&mut self, host: usize, bytes: &[u8], at: Instant) {
        // Only now: the console may be gone with the guest, and the half of a line that it left is still wanted.
        if std::mem::take(&mut self.consoles[host].from_the_beginning) {
            self.consoles[host].partial.clear();
        }
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.consoles[host].partial.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.consoles[host].partial);
                let line = String::from_utf8_lossy(&line);
                if !self.line(host, &line, at) {
                    self.consoles[host].fragments.push((line.into_owned(), at));
                }
            }
        }
    }

    /// Joins the line that was cut by a move that is over. What was left on the source is not part of what it prints when
    /// the guest comes back.
    ///
    /// Returns what fits nowhere.
    pub(super) fn settle(&mut self, source: usize, destination: usize) -> Vec<String> {
        let head = std::mem::take(&mut self.consoles[source].partial);
        let head = String::from_utf8_lossy(&head).into_owned();
        let mut unreadable = Vec::new();
        let mut wanted = !head.is_empty();
        for (tail, at) in std::mem::take(&mut self.consoles[destination].fragments) {
            let whole = format!("{head}{tail}");
            if self.line(destination, &whole, at) {
                wanted = false;
            } else if !tail.trim().is_empty() {
                unreadable.push(whole);
            }
        }
        if wanted {
            unreadable.push(head);
        }
        unreadable
    }

    /// The newest heartbeat.
    pub(super) fn last(&self) -> Option<Beat> {
        self.beats.last_key_value().map(|(_, beat)| *beat)
    }

    /// The heartbeats of a host from a sequence number on.
    pub(super) fn since(&self, seq: u64, host: usize) -> impl Iterator<Item = &Beat> {
        self.beats
            .range(seq..)
            .map(|(_, beat)| beat)
            .filter(move |beat| beat.host == host)
    }

    /// What happened from one heartbeat to another.
    pub(super) fn span(&self, from: u64, to: u64) -> Option<Span> {
        let beats: Vec<&Beat> = self.beats.range(from..=to).map(|(_, beat)| beat).collect();
        let (first, last) = (beats.first()?, beats.last()?);
        let waited = beats
            .windows(2)
            .map(|pair| pair[1].at.saturating_duration_since(pair[0].at));
        // A gap is told by the heartbeat after it: the first one's lies before the span.
        let gaps = beats.iter().skip(1).map(|beat| beat.heartbeat.gap_ns);
        let khz = self.tsc_khz.unwrap_or(0);
        let rate = ferry_probe::console::write_rate(&first.heartbeat, &last.heartbeat, khz);
        Some(Span {
            heartbeats: beats.len() as u64,
            missing: (to - from + 1).saturating_sub(beats.len() as u64),
            guest_gap: Duration::from_nanos(gaps.max().unwrap_or(0)),
            reader_gap: waited.max().unwrap_or_default(),
            writes: last.heartbeat.writes.saturating_sub(first.heartbeat.writes),
            checked: last.heartbeat.checked.saturating_sub(first.heartbeat.checked),
            faults: last.heartbeat.faults.max(self.faults.len() as u64),
            clock_back: last.heartbeat.tsc_back,
            write_rate: rate.unwrap_or(0.0),
        })
    }

    /// Takes one line; false if it is none of the guest's.
    fn line(&mut self, host: usize, line: &str, at: Instant) -> bool {
        let Some(parsed) = parse(line) else {
            return false;
        };
        // Two halves that do not belong together may read like a line; only what reads back the same is one.
        if matches!(parsed, Line::Heartbeat(_)) && parsed.to_string() != line.trim_end() {
            return false;
        }
        match parsed {
            Line::Heartbeat(heartbeat) => self.heartbeat(Beat { heartbeat, host, at }),
            Line::Ready(ready) => self.tsc_khz = Some(ready.tsc_khz),
            Line::Fault(_) => {
                let text = line.trim_end().to_owned();
                if !self.faults.contains(&text) {
                    self.faults.push(text);
                }
            }
            Line::Error(text) => {
                self.error.get_or_insert_with(|| text.to_owned());
            }
            Line::Probe { .. } | Line::Transfers(_) | Line::End(_) => {}
        }
        true
    }

    fn heartbeat(&mut self, beat: Beat) {
        match self.beats.get(&beat.heartbeat.seq) {
            None => {
                self.beats.insert(beat.heartbeat.seq, beat);
            }
            Some(known) if known.host == beat.host && known.heartbeat == beat.heartbeat => {}
            Some(_) => self.doubled += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(seq: u64, gap_ns: u64) -> String {
        let heartbeat = Heartbeat {
            seq,
            tsc: seq * 1_000_000,
            gap_ns,
            max_gap_ns: 9,
            writes: seq * 10,
            ..Default::default()
        };
        format!("{}\r\n", Line::Heartbeat(heartbeat))
    }

    fn after(ms: u64) -> Instant {
        use std::sync::OnceLock;
        static START: OnceLock<Instant> = OnceLock::new();
        *START.get_or_init(Instant::now) + Duration::from_millis(ms)
    }

    #[test]
    fn a_line_that_was_cut_by_the_move_is_joined() {
        let mut record = Record::default();
        record.feed(0, line(0, 1).as_bytes(), after(0));
        let cut = line(1, 30_000_000);
        record.feed(0, &cut.as_bytes()[..9], after(10));
        record.feed(1, &cut.as_bytes()[9..], after(50));
        record.feed(1, line(2, 1).as_bytes(), after(60));
        // The source's console is gone, and asked for again.
        record.reopened(0);
        record.settle(0, 1);
        let span = record.span(0, 2).unwrap();
        assert_eq!((span.heartbeats, span.missing, record.doubled), (3, 0, 0));
        assert_eq!((span.guest_gap.as_millis(), span.reader_gap.as_millis()), (30, 50));
    }

    #[test]
    fn halves_that_do_not_belong_together_are_no_heartbeat() {
        let mut record = Record::default();
        let garbled = format!("HB seq=1 ts{}", line(7, 1));
        record.feed(0, garbled.as_bytes(), after(0));
        assert!(record.last().is_none());
    }

    #[test]
    fn a_console_read_again_adds_nothing_and_a_second_runner_is_seen() {
        let mut record = Record::default();
        for _ in 0..2 {
            record.reopened(0);
            record.feed(0, (line(0, 1) + &line(1, 1)).as_bytes(), after(0));
        }
        assert_eq!((record.span(0, 1).unwrap().heartbeats, record.doubled), (2, 0));
        record.feed(1, line(1, 1).as_bytes(), after(1));
        assert_eq!(record.doubled, 1);
    }

    #[test]
    fn a_lost_heartbeat_is_missing() {
        let mut record = Record::default();
        record.feed(0, (line(0, 1) + &line(2, 1)).as_bytes(), after(0));
        assert_eq!(record.span(0, 2).unwrap().missing, 1);
        assert_eq!(record.since(1, 0).count(), 1);
    }

    #[test]
    fn equal_halves_of_different_lines_are_joined_each_with_its_own() {
        let mut record = Record::default();
        for seq in 0..4 {
            let (cut, source) = (line(seq, 1), seq as usize % 2);
            let (head, tail) = cut.split_at(cut.len() - 10);
            record.feed(source, head.as_bytes(), after(seq));
            record.feed(1 - source, tail.as_bytes(), after(seq));
            assert!(record.settle(source, 1 - source).is_empty());
        }
        assert_eq!(record.span(0, 3).unwrap().heartbeats, 4);
    }

    #[test]
    fn a_line_that_was_cut_before_its_end_is_joined_too() {
        let mut record = Record::default();
        for (seq, source) in [(0, 0), (1, 1)] {
            let cut = line(seq, 1);
            record.feed(source, cut.trim_end().as_bytes(), after(seq));
            record.feed(1 - source, b"\r\n", after(seq));
            assert!(record.settle(source, 1 - source).is_empty());
        }
        assert_eq!(record.span(0, 1).unwrap().heartbeats, 2);
    }

    #[test]
    fn a_half_that_fits_nowhere_is_told() {
        let mut record = Record::default();
        record.feed(0, b"HB seq=1 ts", after(0));
        record.feed(1, line(2, 1).as_bytes(), after(1));
        assert_eq!(record.settle(0, 1), ["HB seq=1 ts"]);
    }

    #[test]
    fn what_a_move_left_at_the_source_is_not_part_of_the_next_stay() {
        let mut record = Record::default();
        let cut = line(0, 1);
        record.feed(0, &cut.as_bytes()[..5], after(0));
        record.feed(1, &cut.as_bytes()[5..], after(1));
        record.settle(0, 1);
        record.feed(0, line(1, 1).as_bytes(), after(2));
        assert_eq!(record.span(0, 1).unwrap().heartbeats, 2);
    }
}
