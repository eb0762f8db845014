//! The host's side of the serial console: lines back into values, and a tally of what they tell.

use std::str::FromStr;
use std::time::{Duration, Instant};

use crate::cmdline::End;
use crate::report::{Fault, Heartbeat, Line, Ready, Transfers};

/// Reads one line of the console, with or without its line end.
///
/// `None` if the line is none of the guest's or is damaged: whoever counts on heartbeats sees that in their
/// sequence.
pub fn parse(line: &str) -> Option<Line<'_>> {
    let line = line.trim_end();
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    let pairs = Pairs(rest);
    match word {
        "PROBE" => Some(Line::Probe {
            version: pairs.text("version")?,
        }),
        "READY" => Some(Line::Ready(Ready {
            tsc_khz: pairs.value("tsc_khz")?,
            tsc_from: pairs.text("tsc_from")?,
            mem_mib: pairs.value("mem_mib")?,
            cpus: pairs.value("cpus")?,
            fill_mib: pairs.value("fill_mib")?,
            work_mib: pairs.value("work_mib")?,
        })),
        "HB" => Some(Line::Heartbeat(Heartbeat {
            seq: pairs.value("seq")?,
            tsc: pairs.value("tsc")?,
            gap_ns: pairs.value("gap_ns")?,
            max_gap_ns: pairs.value("maxgap_ns")?,
            writes: pairs.value("writes")?,
            checked: pairs.value("checked")?,
            faults: pairs.value("faults")?,
            tsc_back: match pairs.text("tscback") {
                Some(times) => times.parse().ok()?,
                None => 0,
            },
        })),
        "FAULT" => Some(Line::Fault(Fault {
            page: pairs.value("page")?,
            want: pairs.value("want")?,
            got: pairs.value("got")?,
            kind: pairs.text("kind")?,
            area: pairs.text("area")?,
            holds: pairs.value("holds")?,
            gpa: pairs.value("gpa")?,
            cpu: pairs.value("cpu")?,
        })),
        "IO" => Some(Line::Transfers(Transfers {
            operations: pairs.value("ops")?,
            bytes: pairs.value("bytes")?,
            nanoseconds: pairs.value("ns")?,
            latency_ns: pairs.value("median_ns").zip(pairs.value("p99_ns")),
            failed: pairs.value("failed")?,
            wrong: pairs.value("wrong")?,
        })),
        "ERROR" => Some(Line::Error(rest)),
        "END" => Some(Line::End(rest.parse().ok()?)),
        _ => None,
    }
}

/// What a console told so far. One reader feeds it, in the order in which the bytes came.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Frequency of the guest's time stamp counter in kHz, from its READY line; 0 before it.
    pub tsc_khz: u64,
    /// When the READY line was read.
    pub ready_at: Option<Instant>,
    /// The last heartbeat and when it was read.
    pub last: Option<(Heartbeat, Instant)>,
    /// Heartbeats read.
    pub heartbeats: u64,
    /// Heartbeats whose sequence number was not the one after the last.
    pub sequence_breaks: u64,
    /// The largest gap the guest itself told of since the last [`Tally::mark`].
    pub guest_gap: Duration,
    /// The longest time between two heartbeats, as the reader saw them, since the last [`Tally::mark`].
    pub reader_gap: Duration,
    /// The FAULT lines, as they were printed.
    pub faults: Vec<String>,
    /// The first ERROR line.
    pub error: Option<String>,
    /// How the guest said that it ends.
    pub end: Option<End>,
    partial: Vec<u8>,
}

impl Tally {
    /// Takes what the console printed next, read at `at`; cuts into lines wherever it was cut.
    pub fn feed(&mut self, bytes: &[u8], at: Instant) {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.partial.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.partial);
                self.line(&String::from_utf8_lossy(&line), at);
            } else if self.partial.len() > LONGEST_LINE {
                self.partial.clear();
            }
        }
    }

    /// Takes one whole line, read at `at`.
    pub fn line(&mut self, line: &str, at: Instant) {
        match parse(line) {
            Some(Line::Ready(ready)) => {
                self.tsc_khz = ready.tsc_khz;
                self.ready_at = Some(at);
                self.mark();
            }
            Some(Line::Heartbeat(heartbeat)) => self.heartbeat(heartbeat, at),
            Some(Line::Fault(_)) => self.faults.push(line.trim_end().to_owned()),
            Some(Line::Error(text)) => {
                self.error.get_or_insert_with(|| text.to_owned());
            }
            Some(Line::End(end)) => self.end = Some(end),
            Some(Line::Probe { .. } | Line::Transfers(_)) | None => {}
        }
    }

    /// Forgets the gaps seen so far: what follows is measured anew.
    pub fn mark(&mut self) {
        self.guest_gap = Duration::ZERO;
        self.reader_gap = Duration::ZERO;
    }

    /// Whether everything told so far is as it should be: no fault, no error, no heartbeat lost or repeated, no
    /// clock that went backwards.
    pub fn is_clean(&self) -> bool {
        let counted = self
            .last
            .is_none_or(|(heartbeat, _)| heartbeat.faults == 0 && heartbeat.tsc_back == 0);
        counted && self.faults.is_empty() && self.error.is_none() && self.sequence_breaks == 0
    }

    fn heartbeat(&mut self, heartbeat: Heartbeat, at: Instant) {
        if let Some((last, last_at)) = self.last {
            self.sequence_breaks += u64::from(heartbeat.seq != last.seq.wrapping_add(1));
            self.reader_gap = self.reader_gap.max(at.saturating_duration_since(last_at));
        }
        self.guest_gap = self.guest_gap.max(Duration::from_nanos(heartbeat.gap_ns));
        self.heartbeats += 1;
        self.last = Some((heartbeat, at));
    }
}

/// Page writes a second between two heartbeats, by the guest's own clock; `None` if no time passed.
pub fn write_rate(from: &Heartbeat, to: &Heartbeat, tsc_khz: u64) -> Option<f64> {
    let seconds = to.tsc.checked_sub(from.tsc)? as f64 / (tsc_khz as f64 * 1000.0);
    let writes = to.writes.checked_sub(from.writes)? as f64;
    (seconds > 0.0 && seconds.is_finite()).then(|| writes / seconds)
}

/// No line of the guest is longer; more without a line end is noise and is dropped.
const LONGEST_LINE: usize = 4096;

struct Pairs<'a>(&'a str);

impl<'a> Pairs<'a> {
    fn text(&self, key: &str) -> Option<&'a str> {
        let words = self.0.split_ascii_whitespace();
        let mut pairs = words.filter_map(|word| word.split_once('='));
        pairs.find(|(name, _)| *name == key).map(|(_, value)| value)
    }

    fn value<T: FromStr>(&self, key: &str) -> Option<T> {
        self.text(key)?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heartbeat(seq: u64) -> Heartbeat {
        Heartbeat {
            seq,
            tsc: 1_000_000 * seq,
            gap_ns: 10 + seq,
            max_gap_ns: 10 + seq,
            writes: 5 * seq,
            ..Heartbeat::default()
        }
    }

    #[test]
    fn no_line_harms_its_reader() {
        let lines = [
            "PROBE version=1\nREADY tsc_khz=2000000 tsc_from=cpuid mem_mib=128 cpus=1 fill_mib=16 work_mib=16\n"
                .to_owned(),
            (1..4)
                .map(|seq| format!("{}\n", Line::Heartbeat(heartbeat(seq))))
                .collect(),
            "FAULT page=1 want=2 got=3 kind=lost area=fill holds=4 gpa=5 cpu=0\n".to_owned(),
            "IO ops=7 bytes=28672 ns=1000 median_ns=10 p99_ns=20 failed=0 wrong=0\n".to_owned(),
        ];
        let samples = lines.map(String::into_bytes);
        ferry_fuzz_inputs::feed("console_lines", &samples, |bytes| {
            let mut tally = Tally::default();
            let (first, second) = bytes.split_at(bytes.len() / 2);
            tally.feed(first, Instant::now());
            tally.feed(second, Instant::now());
        });
    }

    #[test]
    fn what_the_guest_prints_is_read_back() {
        let back = Heartbeat {
            tsc_back: 2,
            ..heartbeat(3)
        };
        let lines = [
            Line::Probe { version: "0.1.0" },
            Line::Ready(Ready {
                tsc_khz: 2_000_000,
                tsc_from: "pit",
                mem_mib: 512,
                cpus: 2,
                fill_mib: 1,
                work_mib: 64,
            }),
            Line::Heartbeat(heartbeat(7)),
            Line::Heartbeat(back),
            Line::Fault(Fault {
                page: 1,
                want: 2,
                got: 3,
                kind: "stale",
                area: "work",
                holds: 1,
                gpa: 4096,
                cpu: 1,
            }),
            Line::Transfers(Transfers {
                operations: 5,
                bytes: 20_480,
                nanoseconds: 7,
                latency_ns: Some((8, 9)),
                failed: 1,
                wrong: 2,
            }),
            Line::Transfers(Transfers::default()),
            Line::Error("bad value in cpus=0"),
            Line::End(End::TripleFault),
        ];
        for line in lines {
            assert_eq!(parse(&format!("{line}\r\n")), Some(line));
        }
    }

    #[test]
    fn noise_is_not_a_line() {
        for noise in [
            "",
            "HB",
            "HB seq=x",
            "SeaBIOS",
            "READY tsc_khz=1",
            "END",
            "FAULT page=1",
        ] {
            assert_eq!(parse(noise), None, "{noise:?}");
        }
        let extra = format!("{} more=1", Line::Heartbeat(heartbeat(1)));
        assert_eq!(parse(&extra), Some(Line::Heartbeat(heartbeat(1))));
    }

    #[test]
    fn a_tally_joins_pieces_and_finds_what_is_missing() {
        let start = Instant::now();
        let mut tally = Tally::default();
        let mut text = String::new();
        for seq in 0..4 {
            text += &format!("{}\n", Line::Heartbeat(heartbeat(seq)));
        }
        for (at, piece) in text.as_bytes().chunks(7).enumerate() {
            tally.feed(piece, start + Duration::from_millis(at as u64));
        }
        assert!(tally.is_clean());
        assert_eq!((tally.heartbeats, tally.guest_gap.as_nanos()), (4, 13));
        assert!(tally.reader_gap >= Duration::from_millis(5));

        tally.mark();
        let line = Line::Heartbeat(heartbeat(5)).to_string();
        tally.line(&line, start + Duration::from_secs(1));
        assert_eq!(tally.sequence_breaks, 1);
        assert!(!tally.is_clean());
        tally.line(
            "FAULT page=1 want=2 got=1 kind=stale area=work holds=1 gpa=0 cpu=0",
            start,
        );
        assert_eq!(tally.faults.len(), 1);
    }

    #[test]
    fn the_rate_is_by_the_guests_clock() {
        let rate = write_rate(&heartbeat(1), &heartbeat(3), 1_000).unwrap();
        assert!((rate - 5.0).abs() < 1e-6, "{rate}");
        assert_eq!(write_rate(&heartbeat(1), &heartbeat(1), 1_000), None);
    }
}
