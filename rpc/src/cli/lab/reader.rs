//! Readers of the guest's console: a thread for each host, which takes what the host's console log has new.
//!
//! The logs are read as files and not through the agents: a guest that is measured prints all the time, a byte at a
//! time, and what passing that on costs an agent would be measured as the cost of a migration.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::timeout;

use super::record::Record;

/// What the readers of both hosts write down.
#[derive(Default)]
pub(super) struct SharedRecord {
    record: Mutex<Record>,
    news: Notify,
}

impl SharedRecord {
    pub(super) fn lock(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the record answers the question.
    pub(super) async fn until<T>(&self, limit: Duration, ask: impl Fn(&Record) -> Option<T>) -> Option<T> {
        let found = async {
            loop {
                let news = self.news.notified();
                if let Some(answer) = ask(&self.lock()) {
                    return answer;
                }
                news.await;
            }
        };
        timeout(limit, found).await.ok()
    }
}

/// A thread that reads one host's console log, until it is dropped.
pub(super) struct Reader {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    /// Reads the log from its beginning as soon as it is there, and again whenever it is another file.
    pub(super) fn start(host: usize, log: PathBuf, record: Arc<SharedRecord>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match File::open(&log) {
                    Ok(file) => read(file, host, &log, &record, &stopped),
                    Err(_) => thread::sleep(PAUSE),
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It panicked: what it read is all there is.
            let _ = thread.join();
        }
    }
}

/// Reads a log until it is not the one under its name any more.
fn read(mut file: File, host: usize, log: &Path, record: &SharedRecord, stopped: &AtomicBool) {
    record.lock().reopened(host);
    let mut buffer = vec![0; 64 << 10];
    while !stopped.load(Ordering::Relaxed) {
        match file.read(&mut buffer) {
            Ok(0) if is_replaced(&file, log) => return,
            Ok(0) => thread::sleep(PAUSE),
            Ok(count) => {
                let at = Instant::now();
                record.lock().feed(host, &buffer[..count], at);
                record.news.notify_waiters();
            }
            Err(_) => return,
        }
    }
}

fn is_replaced(file: &File, log: &Path) -> bool {
    let number = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), log.metadata()) {
        (Ok(open), Ok(named)) => number(open) != number(named),
        _ => true,
    }
}

/// How late a heartbeat may be read: little against the time between two.
const PAUSE: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;

    fn beats(record: &SharedRecord, wanted: u64) {
        let began = Instant::now();
        while record.lock().last().map(|beat| beat.heartbeat.seq) != Some(wanted) {
            assert!(
                began.elapsed() < Duration::from_secs(10),
                "heartbeat {wanted} was not read"
            );
            thread::sleep(PAUSE);
        }
    }

    #[test]
    fn a_log_is_followed_and_its_successor_too() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("console.log");
        let line = |seq| format!("HB seq={seq} tsc=1 gap_ns=1 maxgap_ns=1 writes=0 checked=0 faults=0\n");
        let record = Arc::new(SharedRecord::default());
        let _reader = Reader::start(0, log.clone(), Arc::clone(&record));
        let mut file = File::create(&log).unwrap();
        file.write_all(line(0).as_bytes()).unwrap();
        beats(&record, 0);
        file.write_all(line(1).as_bytes()).unwrap();
        beats(&record, 1);
        fs::remove_file(&log).unwrap();
        fs::write(&log, line(2)).unwrap();
        beats(&record, 2);
        assert_eq!(record.lock().doubled, 0);
    }
}
