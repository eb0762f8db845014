//! The thread that owns the database.
//!
//! Writes that wait for it at the same time share one commit (`together.rs`): each is answered when that is on the disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, Transaction};
use tokio::sync::{oneshot, watch};
use uuid::Uuid;

use super::identity;
use super::row_write::RowWrite;
use super::schema::{self, NotOpened};
use super::together::{self, Waiting, Write};
use crate::faults::{self, Moment};

/// Why the journal did not take a write, or could not be read. What was acknowledged before is not touched by it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JournalError {
    /// No room is left.
    #[error("no room is left for the journal {path}: make some on its file system, nothing that was written is lost")]
    Full {
        /// The journal's file.
        path: PathBuf,
        /// What SQLite says.
        #[source]
        source: rusqlite::Error,
    },
    /// It cannot be written.
    #[error(
        "the journal {path} cannot be written: its folder must be writable for the agent's user, and its file system not mounted read-only"
    )]
    ReadOnly {
        /// The journal's file.
        path: PathBuf,
        /// What SQLite says.
        #[source]
        source: rusqlite::Error,
    },
    /// It is not what it was when it was written.
    #[error("the journal {path} is damaged: keep a copy of it; docs/operations.md of ferry says what can be saved")]
    Damaged {
        /// The journal's file.
        path: PathBuf,
        /// What SQLite says.
        #[source]
        source: rusqlite::Error,
    },
    /// It is no journal of this build.
    #[error("the journal {path} cannot be used")]
    NotOpened {
        /// The journal's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: NotOpened,
    },
    /// Another error of SQLite's.
    #[error("the journal {path} failed")]
    Database {
        /// The journal's file.
        path: PathBuf,
        /// What SQLite says.
        #[source]
        source: rusqlite::Error,
    },
    /// The writer thread is gone.
    #[error("the journal's writer ended")]
    Ended,
}

impl JournalError {
    /// Whether no other write would fare better.
    fn is_of_the_disk(&self) -> bool {
        match self {
            Self::Full { .. } | Self::ReadOnly { .. } | Self::Damaged { .. } | Self::Ended => true,
            Self::Database { source, .. } => source.sqlite_error_code() == Some(ErrorCode::SystemIoFailure),
            Self::NotOpened { .. } => false,
        }
    }

    fn of(path: &Path, source: rusqlite::Error) -> Self {
        let path = path.to_owned();
        match source.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::Full { path, source },
            Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
                Self::ReadOnly { path, source }
            }
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Self::Damaged { path, source },
            _ => Self::Database { path, source },
        }
    }
}

/// What the thread is given to do.
pub(super) enum Job {
    /// Something of its own.
    Alone(Box<dyn FnOnce(&mut Connection) + Send>),
    /// A write that may share its commit with others.
    Write(Box<dyn Write>),
}

/// A handle on the journal; clones share it.
#[derive(Clone)]
pub(crate) struct Journal {
    jobs: Sender<Job>,
    /// Which one it is.
    id: Uuid,
    path: Arc<Path>,
    switchovers: Arc<AtomicUsize>,
    writable: Arc<watch::Sender<bool>>,
}

/// While one of these lives, the WAL is not checkpointed.
pub(crate) struct Switchover(Arc<AtomicUsize>);

impl Drop for Switchover {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How long the journal is idle before its WAL is moved into the database.
const IDLE: Duration = Duration::from_secs(1);
/// How long after so many jobs: what they wrote takes a third of the WAL's length, and a WAL that has to grow makes each fsync take twice
/// as long.
const SHORTLY: Duration = Duration::from_millis(20);
const MANY: u32 = 16;
/// How long no write was tried before one is that changes nothing: who only waits hears, too, that the journal takes none.
const LOOK: Duration = Duration::from_secs(5);
/// After so many of these the WAL is moved into the database, which they would lengthen otherwise.
const MOST_LOOKS: u32 = 100;
/// How many statements are kept compiled. There are some forty.
const STATEMENTS: usize = 64;

impl Journal {
    /// Opens the journal, creating it where there is none.
    ///
    /// # Errors
    /// The file cannot be opened or written, or is a newer agent's.
    pub(crate) fn open(path: &Path) -> Result<Self, JournalError> {
        let connection = Connection::open(path).map_err(|source| JournalError::of(path, source))?;
        schema::open(&connection).map_err(|error| match error {
            NotOpened::Database(source) => JournalError::of(path, source),
            source => JournalError::NotOpened {
                path: path.to_owned(),
                source,
            },
        })?;
        let id = identity::of(&connection).map_err(|source| JournalError::of(path, source))?;
        connection.set_prepared_statement_cache_capacity(STATEMENTS);
        let (jobs, receiver) = mpsc::channel();
        let switchovers = Arc::new(AtomicUsize::new(0));
        let writable = Arc::new(watch::channel(true).0);
        let (busy, tried) = (Arc::clone(&switchovers), Arc::clone(&writable));
        thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || write(connection, &receiver, &busy, &tried))
            .map_err(|_| JournalError::Ended)?;
        Ok(Self {
            jobs,
            id,
            path: path.into(),
            switchovers,
            writable,
        })
    }

    /// Which journal this is, for as long as it lasts. A copy of the file is the same one.
    pub(crate) fn id(&self) -> Uuid {
        self.id
    }

    /// Runs `work`, all of it or nothing; when this returns, it is durable. Others' works that wait at the same moment are committed
    /// with it, and one of them that fails takes nothing of it along. `row` says what it is, and so where a test can cut it.
    ///
    /// # Errors
    /// Nothing of it is in the journal, or it cannot be told whether it is.
    pub(crate) async fn write<T: Send + 'static>(
        &self,
        row: RowWrite,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, JournalError> {
        faults::reach_row(row, Moment::Before).await;
        let (waiting, answer) = Waiting::new(work);
        let written = self.ask(Job::Write(Box::new(waiting)), answer).await;
        if written.is_ok() {
            faults::reach_row(row, Moment::After).await;
        }
        let is_writable = !matches!(&written, Err(error) if error.is_of_the_disk());
        tell_writable(&self.writable, is_writable);
        written
    }

    /// Runs `work` in a transaction of its own that survives the agent, and the host once anything else was written: it waits for
    /// no disk. For what decides nothing.
    ///
    /// # Errors
    /// Nothing of it is in the journal.
    pub(crate) async fn note<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, JournalError> {
        self.run(move |connection| without_sync(connection, work)).await
    }

    /// The same, by whoever cannot wait for it.
    pub(crate) fn note_later(&self, work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<()> + Send + 'static) {
        let job = Box::new(move |connection: &mut Connection| {
            if let Err(error) = without_sync(connection, work) {
                tracing::error!(%error, "the journal did not take a note");
            }
        });
        // A journal that has ended takes no note.
        let _ = self.jobs.send(Job::Alone(job));
    }

    /// Whether it takes writes, by the last one that was tried: a few seconds ago at the longest, while nothing else is asked of it. One
    /// that does not is tried each second.
    pub(crate) fn writable(&self) -> watch::Receiver<bool> {
        self.writable.subscribe()
    }

    /// Runs `work` on what is in the journal.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, JournalError> {
        self.run(move |connection| work(connection)).await
    }

    /// Says that a switchover is between ARM and CONFIRM, until the value is dropped.
    pub(crate) fn switchover(&self) -> Switchover {
        self.switchovers.fetch_add(1, Ordering::Relaxed);
        Switchover(Arc::clone(&self.switchovers))
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, JournalError> {
        let (reply, answer) = oneshot::channel();
        let job = Box::new(move |connection: &mut Connection| {
            // Whoever asked may have given up waiting.
            let _ = reply.send(work(connection));
        });
        self.ask(Job::Alone(job), answer).await
    }

    async fn ask<T>(&self, job: Job, answer: oneshot::Receiver<rusqlite::Result<T>>) -> Result<T, JournalError> {
        self.jobs.send(job).map_err(|_| JournalError::Ended)?;
        let result = answer.await.map_err(|_| JournalError::Ended)?;
        result.map_err(|source| JournalError::of(&self.path, source))
    }
}

fn in_transaction<T>(
    connection: &mut Connection,
    work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    let transaction = connection.transaction()?;
    let result = work(&transaction)?;
    transaction.commit()?;
    Ok(result)
}

/// In WAL mode a commit with `synchronous=NORMAL` is an append; the next one with `FULL` syncs it too.
fn without_sync<T>(
    connection: &mut Connection,
    work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    let result = in_transaction(connection, work);
    connection
        .pragma_update(None, "synchronous", "FULL")
        .expect("SQLite takes again what it took when it was opened; without it nothing that follows would be durable");
    result
}

/// Tries to write where nobody else does. It waits for no disk.
fn look(connection: &mut Connection, writable: &watch::Sender<bool>) {
    match without_sync(connection, schema::write_nothing) {
        Ok(()) => {}
        // Somebody reads it with other tools, and has it locked.
        Err(error)
            if matches!(
                error.sqlite_error_code(),
                Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked)
            ) => {}
        Err(error) => {
            tracing::error!(%error, "the journal takes no writes");
            tell_writable(writable, false);
        }
    }
}

fn tell_writable(writable: &watch::Sender<bool>, now: bool) {
    writable.send_if_modified(|known| std::mem::replace(known, now) != now);
}

fn write(mut connection: Connection, jobs: &Receiver<Job>, switchovers: &AtomicUsize, writable: &watch::Sender<bool>) {
    let mut done = 0_u32;
    let mut tried = Instant::now();
    let mut looks = 0;
    let mut next = None;
    loop {
        let switches_over = switchovers.load(Ordering::Relaxed) > 0;
        let idle = if done >= MANY && !switches_over { SHORTLY } else { IDLE };
        match next.take().map_or_else(|| jobs.recv_timeout(idle), Ok) {
            Ok(Job::Alone(job)) => {
                job(&mut connection);
                done = done.saturating_add(1);
            }
            Ok(Job::Write(first)) => {
                next = together::commit(&mut connection, first, jobs);
                (done, tried) = (done.saturating_add(1), Instant::now());
            }
            Err(RecvTimeoutError::Timeout) => {
                let switches_over = switchovers.load(Ordering::Relaxed) > 0;
                if !*writable.borrow() {
                    if schema::try_to_write(&connection).is_ok() {
                        tell_writable(writable, true);
                    }
                } else if tried.elapsed() >= LOOK && !switches_over {
                    look(&mut connection, writable);
                    (tried, looks) = (Instant::now(), looks + 1);
                    done += u32::from(looks % MOST_LOOKS == 0);
                }
                if done > 0 && !switches_over {
                    done = 0;
                    if let Err(error) = schema::checkpoint(&connection) {
                        tracing::info!(%error, "the journal's WAL grows: it could not be checkpointed");
                    }
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_written_is_there_when_it_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.db");
        let journal = Journal::open(&path).unwrap();
        journal
            .write(RowWrite::Test, |t| t.execute("INSERT INTO meta VALUES('k','v')", ()))
            .await
            .unwrap();
        let again = Journal::open(&path).unwrap();
        let value: String = again
            .read(|c| c.query_row("SELECT value FROM meta WHERE key='k'", (), |row| row.get(0)))
            .await
            .unwrap();
        assert_eq!(value, "v");
    }

    #[tokio::test]
    async fn a_note_is_there_and_what_follows_is_synced_as_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.db");
        let journal = Journal::open(&path).unwrap();
        journal
            .note(|t| t.execute("INSERT INTO meta VALUES('k','v')", ()))
            .await
            .unwrap();
        let failed = journal.note(|t| t.execute("INSERT INTO nowhere VALUES(1)", ())).await;
        assert!(failed.is_err());
        journal.note_later(|t| t.execute("INSERT INTO meta VALUES('l','w')", ()).map(drop));
        let synchronous: i64 = journal
            .read(|c| c.pragma_query_value(None, "synchronous", |row| row.get(0)))
            .await
            .unwrap();
        assert_eq!(synchronous, 2);
        let rows: i64 = Connection::open(&path)
            .unwrap()
            .query_row("SELECT count(*) FROM meta WHERE key IN ('k','l')", (), |row| row.get(0))
            .unwrap();
        assert_eq!(rows, 2);
    }

    #[tokio::test]
    async fn a_failed_write_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(&folder.path().join("journal.db")).unwrap();
        let failed = journal
            .write(RowWrite::Test, |t| {
                t.execute("INSERT INTO meta VALUES('k','v')", ())?;
                t.execute("INSERT INTO nowhere VALUES(1)", ())
            })
            .await;
        assert!(failed.is_err());
        let rows: i64 = journal
            .read(|c| c.query_row("SELECT count(*) FROM meta WHERE key='k'", (), |r| r.get(0)))
            .await
            .unwrap();
        assert_eq!(rows, 0);
    }
}
