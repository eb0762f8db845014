//! Reads the guest's heartbeats on every host, without asking an agent.
//!
//! It follows the console logs themselves and keeps them open, so what a guest printed is known even where the agent was
//! killed or the instance is gone. Two copies that run show as a sequence number told twice.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use ferry_probe::console::parse;
use ferry_probe::report::{Heartbeat, Line, Transfers};

use crate::host::Host;
use crate::waiting::{CALL, MOVE, until};

/// A heartbeat, where it was printed and when it was read.
#[derive(Clone, Copy, Debug)]
pub struct Beat {
    /// The host.
    pub host: &'static str,
    /// What it said.
    pub heartbeat: Heartbeat,
    /// When it was read: late by up to 2 ms or so.
    pub read_at: Instant,
}

/// Follows the console of one guest on some hosts: of the only one, or of the one that was named.
pub struct Witness {
    seen: Arc<Mutex<Seen>>,
    over: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Seen {
    ready: usize,
    tsc_khz: u64,
    beats: Vec<Beat>,
    complaints: Vec<String>,
    /// What came of its work, and when that was read.
    transfers: Option<(Transfers, Instant)>,
}

impl Witness {
    /// Begins to follow the only guest that these hosts have.
    #[must_use]
    pub fn of(hosts: &[&Host]) -> Self {
        Self::following(hosts, None)
    }

    /// Begins to follow one guest of several, by its id.
    #[must_use]
    pub fn of_instance(hosts: &[&Host], id: &str) -> Self {
        Self::following(hosts, Some(id.to_owned()))
    }

    fn following(hosts: &[&Host], only: Option<String>) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let over = Arc::new(AtomicBool::new(false));
        let mut consoles = Consoles {
            folders: hosts
                .iter()
                .map(|host| (host.name, host.data_dir.join("instances")))
                .collect(),
            only,
            open: BTreeMap::new(),
            seen: Arc::clone(&seen),
        };
        let stop = Arc::clone(&over);
        let reader = thread::spawn(move || {
            for turn in 0_u32.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                if turn % 8 == 0 {
                    consoles.look();
                }
                consoles.read();
                thread::sleep(INTERVAL);
            }
        });
        Self {
            seen,
            over,
            reader: Some(reader),
        }
    }

    /// Waits until the guest said READY once and beat a few times.
    ///
    /// # Errors
    /// What the guest complained of, if it does not.
    pub fn wait_ready(&self) -> Result<()> {
        self.wait_ready_within(4 * CALL)
    }

    /// The same of a guest that has much to fill first.
    ///
    /// # Errors
    /// As [`Witness::wait_ready`].
    pub fn wait_ready_within(&self, deadline: Duration) -> Result<()> {
        until("the guest is ready and beats", deadline, || {
            let seen = self.lock();
            if let Some(complaint) = seen.complaints.first() {
                bail!("the guest says {complaint}");
            }
            Ok((seen.ready > 0 && seen.beats.len() >= 3).then_some(()))
        })
    }

    /// How often the guest has said READY so far.
    #[must_use]
    pub fn times_ready(&self) -> usize {
        self.lock().ready
    }

    /// Waits until the guest said READY so many times: once, and once more after each reboot.
    ///
    /// # Errors
    /// If it does not.
    pub fn wait_ready_times(&self, times: usize) -> Result<()> {
        until(&format!("the guest was ready {times} times"), 4 * CALL, || {
            Ok((self.lock().ready >= times).then_some(()))
        })
    }

    /// Waits until this many more heartbeats were read from this host.
    ///
    /// # Errors
    /// If they do not come.
    pub fn wait_for_beats_at(&self, host: &'static str, more: usize) -> Result<()> {
        let count = || self.lock().beats.iter().filter(|beat| beat.host == host).count();
        let before = count();
        until(&format!("{more} more heartbeats from {host}"), CALL, || {
            Ok((count() >= before + more).then_some(()))
        })
    }

    /// Waits until the guest says what came of its work with a disk or a card, wherever it does.
    ///
    /// # Errors
    /// What the guest complained of, or that it does not say it.
    pub fn transfers(&self) -> Result<Transfers> {
        self.done_at().map(|(transfers, _)| transfers)
    }

    /// The same of a guest that was to be at work at this moment: as its move began.
    ///
    /// # Errors
    /// It was done before, and as [`Witness::transfers`].
    pub fn transfers_after(&self, moment: Instant) -> Result<Transfers> {
        let (transfers, at) = self.done_at()?;
        match at > moment {
            true => Ok(transfers),
            false => bail!("the guest was done with its work before: {transfers}"),
        }
    }

    fn done_at(&self) -> Result<(Transfers, Instant)> {
        until("the guest is done with its work", MOVE, || {
            let seen = self.lock();
            if let Some(complaint) = seen.complaints.first() {
                bail!("the guest says {complaint}");
            }
            Ok(seen.transfers)
        })
    }

    /// Whether no heartbeat comes for so long, once what had been printed before is read.
    #[must_use]
    pub fn is_silent(&self, time: Duration) -> bool {
        thread::sleep(SETTLED);
        let before = self.lock().beats.len();
        thread::sleep(time);
        self.lock().beats.len() == before
    }

    /// The heartbeats so far.
    #[must_use]
    pub fn beats(&self) -> Vec<Beat> {
        self.lock().beats.clone()
    }

    /// The guest's clock in kHz.
    #[must_use]
    pub fn tsc_khz(&self) -> u64 {
        self.lock().tsc_khz
    }

    /// Checks what was seen so far: each heartbeat once and on one host, none lost but one that a move cut in two,
    /// no page damaged, no clock that went backwards, no complaint.
    ///
    /// # Errors
    /// What does not hold.
    pub fn check(&self) -> Result<()> {
        let seen = self.lock();
        if !seen.complaints.is_empty() {
            bail!("the guest says {}", seen.complaints.join("; "));
        }
        let mut beats = seen.beats.clone();
        beats.sort_by_key(|beat| beat.heartbeat.seq);
        for pair in beats.windows(2) {
            let [one, next] = [&pair[0], &pair[1]];
            let step = next.heartbeat.seq - one.heartbeat.seq;
            let cut_in_two = step == 2 && one.host != next.host;
            if step != 1 && !cut_in_two {
                bail!(
                    "heartbeat {} at {} is followed by {} at {}",
                    one.heartbeat.seq,
                    one.host,
                    next.heartbeat.seq,
                    next.host
                );
            }
            if next.heartbeat.tsc <= one.heartbeat.tsc {
                bail!(
                    "the clock of heartbeat {} is not later than the one before",
                    next.heartbeat.seq
                );
            }
        }
        match beats.last().map(|last| last.heartbeat) {
            Some(last) if last.faults > 0 || last.tsc_back > 0 => bail!("the guest counts faults: {last}"),
            Some(_) => Ok(()),
            None => bail!("no heartbeat was read"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// How often the logs are read.
const INTERVAL: Duration = Duration::from_millis(2);

/// By then the reader has read what was in the logs.
const SETTLED: Duration = Duration::from_millis(100);

struct Consoles {
    folders: Vec<(&'static str, PathBuf)>,
    only: Option<String>,
    /// Console logs by inode: one that is written again after a return is the same file.
    open: BTreeMap<(&'static str, u64), Console>,
    seen: Arc<Mutex<Seen>>,
}

struct Console {
    file: File,
    partial: Vec<u8>,
}

impl Consoles {
    /// Looks for new ones.
    fn look(&mut self) {
        for (host, folder) in &self.folders {
            for instance in fs::read_dir(folder).into_iter().flatten().flatten() {
                if self
                    .only
                    .as_ref()
                    .is_some_and(|only| instance.file_name() != only.as_str())
                {
                    continue;
                }
                let Ok(file) = File::open(instance.path().join("console.log")) else {
                    continue;
                };
                let Ok(metadata) = file.metadata() else { continue };
                let console = || Console {
                    file,
                    partial: Vec::new(),
                };
                self.open.entry((*host, metadata.ino())).or_insert_with(console);
            }
        }
    }

    fn read(&mut self) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for ((host, _), console) in &mut self.open {
            console.read(host, &mut seen);
        }
    }
}

impl Console {
    fn read(&mut self, host: &'static str, seen: &mut Seen) {
        let mut bytes = Vec::new();
        if self.file.read_to_end(&mut bytes).is_err() {
            return;
        }
        let read_at = Instant::now();
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.partial.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.partial);
                seen.line(&String::from_utf8_lossy(&line), host, read_at);
            }
        }
    }
}

impl Seen {
    fn line(&mut self, line: &str, host: &'static str, read_at: Instant) {
        match parse(line) {
            Some(Line::Ready(ready)) => {
                self.ready += 1;
                self.tsc_khz = ready.tsc_khz;
            }
            Some(Line::Heartbeat(heartbeat)) => self.beats.push(Beat {
                host,
                heartbeat,
                read_at,
            }),
            Some(Line::Fault(_) | Line::Error(_)) => self.complaints.push(format!("{} (at {host})", line.trim_end())),
            Some(Line::Transfers(transfers)) => self.transfers = Some((transfers, read_at)),
            Some(Line::Probe { .. } | Line::End(_)) | None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn witness(beats: &[(&'static str, u64)], faults: u64) -> Witness {
        let beat = |&(host, seq): &(&'static str, u64)| {
            let heartbeat = Heartbeat {
                seq,
                tsc: 10 + seq,
                faults,
                ..Heartbeat::default()
            };
            Beat {
                host,
                heartbeat,
                read_at: Instant::now(),
            }
        };
        let seen = Seen {
            beats: beats.iter().map(beat).collect(),
            ..Seen::default()
        };
        Witness {
            seen: Arc::new(Mutex::new(seen)),
            over: Arc::default(),
            reader: None,
        }
    }

    #[test]
    fn a_sequence_over_two_hosts_is_whole() {
        assert!(witness(&[("a", 0), ("a", 1), ("b", 2), ("b", 3)], 0).check().is_ok());
        assert!(witness(&[("a", 0), ("a", 1), ("b", 3)], 0).check().is_ok());
    }

    #[test]
    fn two_copies_or_a_lost_stretch_are_found() {
        assert!(witness(&[("a", 0), ("a", 1), ("b", 1)], 0).check().is_err());
        assert!(witness(&[("a", 0), ("a", 2)], 0).check().is_err());
        assert!(witness(&[("a", 0), ("b", 3)], 0).check().is_err());
        assert!(witness(&[], 0).check().is_err());
    }

    #[test]
    fn a_damaged_page_is_found() {
        assert!(witness(&[("a", 0)], 1).check().is_err());
    }
}
