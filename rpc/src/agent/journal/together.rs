//! Writes that wait at the same moment have one commit, and so one fsync.
//!
//! Each is a savepoint in the transaction of all: one that fails is rolled back alone, and told so. The others are told that they are
//! durable when the transaction is; where it fails, none is. What reads ends a group: it sees what is durable, and nothing else.

use std::sync::mpsc::Receiver;

use rusqlite::{Connection, Transaction, ffi};
use tokio::sync::oneshot;

use super::writer::Job;

/// How many writes share a commit: the first of them waits for the work of all.
const MOST: usize = 32;

/// A write, and who waits for it.
pub(super) trait Write: Send {
    /// Does its work.
    ///
    /// # Errors
    /// The transaction must not be committed: it holds a part of this work, or is not there any more.
    fn run(&mut self, transaction: &Transaction<'_>) -> rusqlite::Result<()>;

    /// Tells whoever waits what came of it.
    fn tell(self: Box<Self>, committed: rusqlite::Result<()>);
}

/// A write of a work that gives back a `T`.
pub(super) struct Waiting<T, W> {
    work: Option<W>,
    result: Option<rusqlite::Result<T>>,
    reply: oneshot::Sender<rusqlite::Result<T>>,
}

impl<T, W> Waiting<T, W> {
    /// The write, and where its answer comes.
    pub(super) fn new(work: W) -> (Self, oneshot::Receiver<rusqlite::Result<T>>) {
        let (reply, answer) = oneshot::channel();
        let waiting = Self {
            work: Some(work),
            result: None,
            reply,
        };
        (waiting, answer)
    }
}

impl<T: Send, W: FnOnce(&Transaction<'_>) -> rusqlite::Result<T> + Send> Write for Waiting<T, W> {
    fn run(&mut self, transaction: &Transaction<'_>) -> rusqlite::Result<()> {
        let Some(work) = self.work.take() else { return Ok(()) };
        transaction.execute_batch("SAVEPOINT one")?;
        let result = work(transaction);
        // A full disk and its like end the whole transaction at once, and the savepoint with it.
        let ended = match &result {
            Ok(_) => transaction.execute_batch("RELEASE one"),
            Err(error) if transaction.is_autocommit() => Err(again(error)),
            Err(_) => transaction.execute_batch("ROLLBACK TO one; RELEASE one"),
        };
        self.result = Some(result);
        ended
    }

    fn tell(self: Box<Self>, committed: rusqlite::Result<()>) {
        let answer = match (self.result, committed) {
            (Some(Ok(value)), Ok(())) => Ok(value),
            (Some(Err(own)), _) => Err(own),
            (_, Err(error)) => Err(error),
            (None, Ok(())) => Err(rusqlite::Error::InvalidQuery),
        };
        // Whoever asked may have given up waiting.
        let _ = self.reply.send(answer);
    }
}

/// Commits this write and those that wait behind it, and tells each. Gives back the job that ended the group, if one did.
pub(super) fn commit(connection: &mut Connection, first: Box<dyn Write>, jobs: &Receiver<Job>) -> Option<Job> {
    let mut group = Group {
        writes: vec![first],
        ended_by: None,
    };
    let committed = group.commit(connection, jobs);
    for write in group.writes {
        write.tell(committed.as_ref().map_or_else(|error| Err(again(error)), |()| Ok(())));
    }
    group.ended_by
}

struct Group {
    writes: Vec<Box<dyn Write>>,
    ended_by: Option<Job>,
}

impl Group {
    fn commit(&mut self, connection: &mut Connection, jobs: &Receiver<Job>) -> rusqlite::Result<()> {
        let transaction = connection.transaction()?;
        let mut at = 0;
        while let Some(write) = self.writes.get_mut(at) {
            write.run(&transaction)?;
            at += 1;
            if at == MOST {
                break;
            }
            match jobs.try_recv() {
                Ok(Job::Write(next)) => self.writes.push(next),
                other => self.ended_by = other.ok(),
            }
        }
        transaction.commit()
    }
}

/// The same error, for another who waits.
fn again(error: &rusqlite::Error) -> rusqlite::Error {
    match error {
        rusqlite::Error::SqliteFailure(code, message) => rusqlite::Error::SqliteFailure(*code, message.clone()),
        other => rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_ERROR), Some(other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::mpsc;

    use tempfile::TempDir;

    use super::super::{Journal, RowWrite};
    use super::*;
    use crate::error_chain;

    fn journal() -> (TempDir, PathBuf, Journal) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.db");
        let journal = Journal::open(&path).unwrap();
        (folder, path, journal)
    }

    fn add(transaction: &Transaction<'_>, key: &str) -> rusqlite::Result<()> {
        transaction.execute("INSERT INTO meta VALUES(?1,'v')", [key]).map(drop)
    }

    /// What of these keys somebody else finds.
    fn durable(path: &Path) -> Vec<String> {
        let connection = Connection::open(path).unwrap();
        let mut query = connection
            .prepare("SELECT key FROM meta WHERE key<>'journal' ORDER BY key")
            .unwrap();
        query
            .query_map((), |row| row.get(0))
            .unwrap()
            .map(Result::unwrap)
            .collect()
    }

    /// Keeps the journal's thread busy until the other end is dropped.
    async fn keep_busy(journal: &Journal, until: mpsc::Receiver<()>) {
        let wait = journal.read(move |_| {
            let _ = until.recv();
            Ok(())
        });
        wait.await.unwrap();
    }

    #[tokio::test]
    async fn those_that_wait_are_durable_together_and_one_that_fails_takes_nothing_along() {
        let (_folder, path, journal) = journal();
        let (release, until) = mpsc::channel::<()>();
        let looks = path.clone();
        let first = journal.write(RowWrite::Test, |t| add(t, "first"));
        let failing = journal.write(RowWrite::Test, |t| {
            add(t, "half")?;
            t.execute("INSERT INTO nowhere VALUES(1)", ())
        });
        // The first is not answered and not durable before the last has run.
        let last = journal.write(RowWrite::Test, move |t| add(t, "last").map(|()| durable(&looks)));
        let (_, first, failed, seen, ()) = tokio::join!(keep_busy(&journal, until), first, failing, last, async {
            drop(release)
        });
        first.unwrap();
        assert!(error_chain(&failed.unwrap_err()).contains("nowhere"));
        assert_eq!(seen.unwrap(), Vec::<String>::new());
        assert_eq!(durable(&path), ["first", "last"]);
    }

    #[tokio::test]
    async fn a_read_sees_what_is_durable_and_nothing_else() {
        let (_folder, path, journal) = journal();
        let (release, until) = mpsc::channel::<()>();
        let (_, wrote, seen, ()) = tokio::join!(
            keep_busy(&journal, until),
            journal.write(RowWrite::Test, |t| add(t, "before")),
            journal.read(move |_| Ok(durable(&path))),
            async { drop(release) }
        );
        wrote.unwrap();
        assert_eq!(seen.unwrap(), ["before"]);
    }

    #[tokio::test]
    async fn a_transaction_that_ends_by_itself_is_told_to_all_of_it_and_to_nobody_else() {
        let (_folder, path, journal) = journal();
        let (release, until) = mpsc::channel::<()>();
        let ending = journal.write(RowWrite::Test, |t| {
            add(t, "lost")?;
            // As SQLite does where the disk is full.
            t.execute_batch("ROLLBACK")?;
            t.execute("INSERT INTO nowhere VALUES(1)", ())
        });
        let (_, first, ended, next, ()) = tokio::join!(
            keep_busy(&journal, until),
            journal.write(RowWrite::Test, |t| add(t, "first")),
            ending,
            journal.write(RowWrite::Test, |t| add(t, "next")),
            async { drop(release) }
        );
        for error in [first.unwrap_err(), ended.unwrap_err()] {
            assert!(error_chain(&error).contains("nowhere"), "{}", error_chain(&error));
        }
        next.unwrap();
        assert_eq!(durable(&path), ["next"]);
    }
}
