//! What a probe's console told, with the time at which it was read.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use ferry_probe::console::{parse, write_rate};
use ferry_probe::report::{Heartbeat, Line};

use super::Work;
use super::stolen::Stolen;

/// A heartbeat and when it was read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Beat {
    pub(super) heartbeat: Heartbeat,
    pub(super) read_at: Instant,
}

/// The lines of one console, read by a thread of its own until the console ends.
#[derive(Clone, Default)]
pub(super) struct Console {
    told: Arc<Mutex<Told>>,
}

#[derive(Default)]
struct Told {
    beats: Vec<Beat>,
    ready: bool,
    complaints: Vec<String>,
    /// The beginning of a line that the guest finished elsewhere, or the end of one that it began elsewhere.
    rest: String,
}

impl Console {
    /// Reads `stream` until it ends.
    pub(super) fn follow(stream: impl Read + Send + 'static) -> Self {
        let console = Self::default();
        let writer = console.clone();
        thread::spawn(move || {
            let mut reader = BufReader::new(stream);
            let mut line = Vec::new();
            while reader.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                writer.take(&String::from_utf8_lossy(&line), Instant::now());
                line.clear();
            }
        });
        console
    }

    fn take(&self, line: &str, read_at: Instant) {
        let mut told = self.lock();
        match parse(line) {
            Some(Line::Ready(_)) => {
                // A guest that fills its memory beats too; what counts begins here.
                told.ready = true;
                told.beats.clear();
            }
            Some(Line::Heartbeat(heartbeat)) => told.beats.push(Beat { heartbeat, read_at }),
            Some(Line::Fault(_) | Line::Error(_)) => told.complaints.push(line.trim_end().to_owned()),
            Some(Line::Probe { .. } | Line::Transfers(_) | Line::End(_)) => {}
            None => told.rest.push_str(line),
        }
    }

    /// The heartbeats so far.
    pub(super) fn beats(&self) -> Vec<Beat> {
        self.lock().beats.clone()
    }

    /// Waits until the guest is ready.
    ///
    /// # Errors
    /// If the guest complains or is not ready in time.
    pub(super) fn wait_ready(&self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        while !self.lock().ready {
            let complaints = self.lock().complaints.join("; ");
            if !complaints.is_empty() {
                bail!("the guest says {complaints}");
            }
            if Instant::now() > deadline {
                bail!("the guest is not ready after {} s", timeout.as_secs());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits until this many heartbeats were read, since READY where the guest got ready here.
    ///
    /// # Errors
    /// If the guest complains or does not beat in time.
    pub(super) fn wait_for_beats(&self, count: usize, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let (beats, complaints) = {
                let told = self.lock();
                (told.beats.len(), told.complaints.join("; "))
            };
            if !complaints.is_empty() {
                bail!("the guest says {complaints}");
            }
            if beats >= count {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{beats} heartbeats after {} s, not {count}", timeout.as_secs());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What guest and reader saw of one move.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) gap_ms: f64,
    /// What the host's own host took of each processor, until the last heartbeat was read.
    pub(super) stolen_ms: Option<f64>,
    pub(super) reader_gap_ms: f64,
    pub(super) clock_lost_ms: f64,
    /// `None` of a guest that writes nothing.
    pub(super) work: Option<Work>,
}

/// When a move was, by the reader's clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// Until then nothing was prepared for it.
    pub(super) calm: Instant,
    /// It was ordered.
    pub(super) began: Instant,
    /// What had been stolen by then.
    pub(super) stolen: Stolen,
}

impl Times {
    /// Of a move that is ordered now.
    pub(super) fn ordered_now(calm: Instant) -> Self {
        let stolen = Stolen::so_far();
        Self {
            calm,
            began: Instant::now(),
            stolen,
        }
    }
}

/// Compares the beats before and after a move.
///
/// A guest whose clock stood still during the blackout sees no gap. What its clock lost against the host's is added to the
/// first heartbeat's gap after the move, so that all contenders are measured by the same clock. The loss is the step between
/// the fastest readings before and after, because a reading can be late and never early.
///
/// # Errors
/// If a heartbeat is missing, which would mean that the guest did not live through the move.
pub(super) fn compare(before: &[Beat], after: &[Beat], tsc_khz: u64, times: Times) -> Result<Seen> {
    let began = times.began;
    let (Some(last), Some(first)) = (before.last(), after.first()) else {
        bail!("no heartbeat on one of the hosts");
    };
    // One line may have been cut in two by the move.
    if first.heartbeat.seq <= last.heartbeat.seq || first.heartbeat.seq > last.heartbeat.seq + 2 {
        bail!(
            "heartbeat {} is followed by {}",
            last.heartbeat.seq,
            first.heartbeat.seq
        );
    }
    let origin = before[0];
    let offset = |beat: &Beat| {
        let host = beat.read_at.duration_since(origin.read_at).as_secs_f64() * 1e3;
        let guest = (beat.heartbeat.tsc as f64 - origin.heartbeat.tsc as f64) / tsc_khz as f64;
        host - guest
    };
    let fastest = |beats: &[Beat]| beats.iter().map(offset).fold(f64::INFINITY, f64::min);
    let clock_lost_ms = fastest(after) - fastest(before);

    let during: Vec<_> = before
        .iter()
        .filter(|beat| beat.read_at >= began)
        .chain(after)
        .collect();
    let own_gap = during.iter().map(|beat| beat.heartbeat.gap_ns).max().unwrap_or(0) as f64 / 1e6;
    let stood_still_ms = if clock_lost_ms > READING_NOISE_MS {
        clock_lost_ms
    } else {
        0.0
    };
    let across = first.heartbeat.gap_ns as f64 / 1e6 + stood_still_ms;
    let mut reader_gap_ms: f64 = 0.0;
    let mut previous = *before.iter().rev().find(|beat| beat.read_at < began).unwrap_or(&origin);
    for beat in during {
        reader_gap_ms = reader_gap_ms.max(beat.read_at.duration_since(previous.read_at).as_secs_f64() * 1e3);
        previous = *beat;
    }
    Ok(Seen {
        gap_ms: own_gap.max(across),
        stolen_ms: times.stolen.ms_since(),
        reader_gap_ms,
        clock_lost_ms,
        work: work(before, after, tsc_khz, times),
    })
}

/// What the guest got done before a move, meanwhile and afterwards.
fn work(before: &[Beat], after: &[Beat], tsc_khz: u64, times: Times) -> Option<Work> {
    let ordered = before.iter().rev().find(|beat| beat.read_at < times.began)?;
    let arrived = after.get(1)?;
    Some(Work {
        before: usual_rate(before, tsc_khz, times.calm)?,
        during: write_rate(&ordered.heartbeat, &arrived.heartbeat, tsc_khz)?,
        after: write_rate(&arrived.heartbeat, &after.last()?.heartbeat, tsc_khz)?,
    })
}

/// Pages written a second in the half second before `calm`; `None` of a guest that writes nothing.
pub(super) fn usual_rate(before: &[Beat], tsc_khz: u64, calm: Instant) -> Option<f64> {
    let undisturbed = before.partition_point(|beat| beat.read_at < calm);
    let last = undisturbed.checked_sub(1)?;
    let first = last.checked_sub(BEATS_OF_WORK)?;
    write_rate(&before[first].heartbeat, &before[last].heartbeat, tsc_khz).filter(|&rate| rate > 0.0)
}

/// Half a second of heartbeats, each 20 ms.
const BEATS_OF_WORK: usize = 25;

/// What the fastest readings before and after a move differ by although no clock stood still.
const READING_NOISE_MS: f64 = 2.0;

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(start: Instant, seq: u64, host_ms: u64, guest_ms: u64, gap_ms: u64) -> Beat {
        let heartbeat = Heartbeat {
            seq,
            tsc: guest_ms * 1000,
            gap_ns: gap_ms * 1_000_000,
            ..Heartbeat::default()
        };
        Beat {
            heartbeat,
            read_at: start + Duration::from_millis(host_ms),
        }
    }

    fn at(start: Instant, ms: u64) -> Times {
        let began = start + Duration::from_millis(ms);
        Times {
            began,
            ..Times::ordered_now(began)
        }
    }

    #[test]
    fn a_clock_that_stood_still_hides_no_gap() {
        let start = Instant::now();
        let before = [
            beat(start, 0, 0, 0, 0),
            beat(start, 1, 10, 10, 1),
            beat(start, 2, 20, 20, 1),
        ];
        let after = [beat(start, 3, 70, 30, 2), beat(start, 4, 80, 40, 1)];
        let seen = compare(&before, &after, 1000, at(start, 15)).unwrap();
        assert!((seen.clock_lost_ms - 40.0).abs() < 0.01, "{seen:?}");
        assert!((seen.gap_ms - 42.0).abs() < 0.01, "{seen:?}");
        assert!((seen.reader_gap_ms - 50.0).abs() < 0.01, "{seen:?}");
        assert_eq!(seen.work, None);
    }

    #[test]
    fn work_is_counted_before_the_preparations_from_the_order_on_and_at_the_destination() {
        let start = Instant::now();
        // 10 writes each 20 ms, from the 30th beat on one.
        let lived = |seq: u64| {
            let mut beat = beat(start, seq, seq * 20, seq * 20, 0);
            beat.heartbeat.writes = seq.min(30) * 10 + seq.saturating_sub(30);
            beat
        };
        let (before, after): (Vec<_>, Vec<_>) = ((0..40).map(lived).collect(), (40..50).map(lived).collect());
        let times = Times {
            calm: start + Duration::from_millis(590),
            ..at(start, 700)
        };
        let work = compare(&before, &after, 1000, times).unwrap().work.unwrap();
        assert!((work.before - 500.0).abs() < 0.01, "{work:?}");
        assert!((work.during - 50.0).abs() < 0.01, "{work:?}");
        assert!((work.after - 50.0).abs() < 0.01, "{work:?}");
    }

    #[test]
    fn a_lost_heartbeat_is_an_error() {
        let start = Instant::now();
        let before = [beat(start, 0, 0, 0, 0)];
        let times = at(start, 0);
        assert!(compare(&before, &[beat(start, 3, 10, 10, 0)], 1000, times).is_err());
        assert!(compare(&before, &[beat(start, 0, 10, 10, 0)], 1000, times).is_err());
        assert!(compare(&before, &[], 1000, times).is_err());
    }
}
