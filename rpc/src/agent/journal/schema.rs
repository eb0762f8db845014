//! The tables, their versions, and what a connection is set to.
//!
//! A journal says its version in `user_version`. An older one is brought up step by step in one transaction: it is either
//! still what it was, or what this build writes. A newer one is refused: an older agent cannot know what it would break.

use rusqlite::{Connection, Transaction};

/// The schema that this build writes.
pub(super) const SCHEMA_VERSION: i64 = 3;

/// How many pages the WAL is made long before anything is written: extending a file costs more than writing into it. A cast takes some
/// ten of them, a switchover's rows as many.
const WAL_PAGES: u32 = 512;

/// What leads from each version to the next, from none on.
const STEPS: [&str; SCHEMA_VERSION as usize] = [VERSION_1, VERSION_2, VERSION_3];

const VERSION_1: &str = "
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

CREATE TABLE instances(
  id TEXT PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  status TEXT NOT NULL,       -- running paused stopped crashed incoming indeterminate
  epoch INTEGER NOT NULL,     -- the right under which it runs or ran here
  known_epoch INTEGER NOT NULL, -- the highest epoch heard of
  spec TEXT NOT NULL,         -- JSON
  migration TEXT,             -- the last or present one
  reason TEXT,                -- why it is crashed or stopped
  boot_id TEXT NOT NULL       -- the host's boot in which it last ran here
) STRICT;

-- Instances that left, and where to.
CREATE TABLE departed(
  id TEXT PRIMARY KEY,
  name TEXT NOT NULL,
  host TEXT NOT NULL,
  migration TEXT NOT NULL
) STRICT;

CREATE TABLE migrations(
  id TEXT PRIMARY KEY,
  instance TEXT NOT NULL,
  role TEXT NOT NULL,         -- source destination
  peer TEXT NOT NULL,         -- the other host
  epoch INTEGER NOT NULL,     -- the source's, when it began
  over INTEGER NOT NULL,      -- 1: nothing is left to do
  armed INTEGER NOT NULL,     -- at the source: the newest attempt that is ARMED, 0 for none
  said TEXT,                  -- at the source: what D said
  resumed INTEGER,            -- at the source: the epoch of RESUMED
  user_paused INTEGER NOT NULL,
  options TEXT NOT NULL,      -- JSON
  info TEXT NOT NULL,         -- JSON: the last report
  began INTEGER NOT NULL      -- unix time, milliseconds
) STRICT;
CREATE INDEX migrations_by_instance ON migrations(instance);

-- D(M,n), at the destination.
CREATE TABLE decisions(
  migration TEXT NOT NULL,
  attempt INTEGER NOT NULL,
  decision TEXT NOT NULL,     -- OPEN CLAIMED RUNNING SRC
  boot_id TEXT NOT NULL,      -- the host's boot in which it was written
  PRIMARY KEY(migration, attempt)
) STRICT;
";

const VERSION_2: &str = "
ALTER TABLE instances ADD COLUMN restarts INTEGER NOT NULL DEFAULT 0; -- starts by its policy in a row
ALTER TABLE instances ADD COLUMN restart_at INTEGER;                  -- unix time, milliseconds: when the next one is due
ALTER TABLE instances ADD COLUMN asked_off INTEGER NOT NULL DEFAULT 0; -- 1: its user asked the guest to switch off
ALTER TABLE instances ADD COLUMN started INTEGER NOT NULL DEFAULT 0;  -- unix time, milliseconds: when it last began to run here

-- Guests that came here and whose source has not acknowledged that yet.
CREATE TABLE arrivals(
  migration TEXT PRIMARY KEY,
  instance TEXT NOT NULL,
  source TEXT NOT NULL,       -- the host that it came from
  attempt INTEGER NOT NULL
) STRICT;

-- Who did what. Rows are added and never changed.
CREATE TABLE audit(
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  time TEXT NOT NULL,         -- RFC 3339, UTC
  actor TEXT NOT NULL,        -- the unix user who asked, another host, or the agent itself
  request TEXT NOT NULL,      -- the request's id
  what TEXT NOT NULL,         -- run delete stop migrate abort resolve restart destroy-stale
  instance TEXT NOT NULL,     -- its id, or the name that was asked for
  result TEXT NOT NULL        -- done, or why not
) STRICT;
CREATE TRIGGER audit_keeps_its_rows BEFORE DELETE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit table is append-only'); END;
CREATE TRIGGER audit_does_not_change BEFORE UPDATE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit table is append-only'); END;
-- INSERT OR REPLACE would delete without the first trigger.
CREATE TRIGGER audit_is_not_replaced BEFORE INSERT ON audit WHEN EXISTS(SELECT 1 FROM audit WHERE id = NEW.id)
BEGIN SELECT RAISE(ABORT, 'the audit table is append-only'); END;
";

const VERSION_3: &str = "
-- Nobody asks for migrations by it, and each write of one paid for a page of it.
DROP INDEX migrations_by_instance;

-- Which journal the other host has: only that answers for the migration. NULL: it was not told.
ALTER TABLE migrations ADD COLUMN peer_journal TEXT;

-- What the last report has of each round is read where one migration is looked at: a list of thousands does without.
ALTER TABLE migrations ADD COLUMN details TEXT NOT NULL DEFAULT '{}'; -- JSON: its rounds and decisions
UPDATE migrations SET
  details = json_object('rounds', json(coalesce(info -> '$.rounds', '[]')), 'decisions', json(coalesce(info -> '$.decisions', '[]'))),
  info = json_remove(info, '$.rounds', '$.decisions')
WHERE json_valid(info);

-- What was done to instances. The newest are kept, also of instances that are gone.
CREATE TABLE events(
  id INTEGER PRIMARY KEY,     -- the newest row is never removed: no number is used twice
  instance TEXT NOT NULL,     -- its id
  name TEXT NOT NULL,         -- what it was called then
  action TEXT NOT NULL,       -- run start pause resume reboot stop delete snapshot restore balloon migrate migrate-in abort resolve ...
  actor TEXT NOT NULL,        -- who asked, as in audit
  request TEXT NOT NULL,      -- the request's id
  migration TEXT,
  started TEXT NOT NULL,      -- RFC 3339, UTC
  finished TEXT,              -- NULL: it goes on
  result TEXT,                -- success error interrupted
  message TEXT                -- why, with all causes
) STRICT;
CREATE INDEX events_by_instance ON events(instance);
CREATE INDEX events_by_name ON events(name);
CREATE INDEX events_open ON events(migration) WHERE finished IS NULL;

-- What of it failed, and why.
CREATE TABLE faults(
  id INTEGER PRIMARY KEY,     -- the newest row is never removed: no number is used twice
  instance TEXT NOT NULL,
  created TEXT NOT NULL,      -- RFC 3339, UTC
  code TEXT NOT NULL,         -- of gRPC, by its name
  reason TEXT,                -- of the closed list
  message TEXT NOT NULL,
  details TEXT NOT NULL,      -- the causes, one a line
  request TEXT NOT NULL
) STRICT;
CREATE INDEX faults_by_instance ON faults(instance);
";

/// Why a file is not opened as a journal.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotOpened {
    /// A newer agent wrote it.
    #[error(
        "it has schema {found}, this build knows {SCHEMA_VERSION} and older ones: start the newer ferry that wrote it"
    )]
    Newer {
        /// Its version.
        found: i64,
    },
    /// Pages of it are damaged.
    #[error("it is damaged: keep a copy of it; docs/operations.md of ferry says what can be saved ({0})")]
    Damaged(String),
    /// SQLite says so.
    #[error(transparent)]
    Database(#[from] rusqlite::Error),
}

/// Settings, tables and the WAL's length.
///
/// # Errors
/// The file is not a journal, is damaged, is of a newer schema, or cannot be written.
pub(super) fn open(connection: &Connection) -> Result<(), NotOpened> {
    connection.pragma_update(None, "busy_timeout", 2000)?;
    let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    // Before anything is written: the newer agent may need it as it is.
    if found > SCHEMA_VERSION {
        return Err(NotOpened::Newer { found });
    }
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    let check: String = connection.pragma_query_value(None, "quick_check", |row| row.get(0))?;
    if check != "ok" {
        return Err(NotOpened::Damaged(check.lines().next().unwrap_or_default().to_owned()));
    }
    upgrade(connection, found)?;
    Ok(lengthen_wal(connection)?)
}

fn upgrade(connection: &Connection, found: i64) -> rusqlite::Result<()> {
    let done = usize::try_from(found).unwrap_or_default();
    let steps = STEPS.get(done..).unwrap_or_default();
    if steps.is_empty() {
        return Ok(());
    }
    if found > 0 {
        tracing::info!(found, now = SCHEMA_VERSION, "upgrading the journal");
    }
    let transaction = connection.unchecked_transaction()?;
    for step in steps {
        transaction.execute_batch(step)?;
    }
    transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    transaction.commit()
}

/// One page is written again and again: the database itself gets no longer by it.
fn lengthen_wal(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute("INSERT OR REPLACE INTO meta VALUES('filler', 0)", ())?;
    // None of these has to wait for the disk: the checkpoint does.
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    let mut fill = connection.prepare("UPDATE meta SET value=?1 WHERE key='filler'")?;
    for page in 0..WAL_PAGES {
        fill.execute([page])?;
    }
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.execute("DELETE FROM meta WHERE key='filler'", ())?;
    checkpoint(connection)
}

/// A write that changes nothing of what is kept, brought to the disk.
pub(super) fn try_to_write(connection: &Connection) -> rusqlite::Result<()> {
    let transaction = connection.unchecked_transaction()?;
    write_nothing(&transaction)?;
    transaction.commit()
}

/// Changes nothing of what is kept, and writes.
pub(super) fn write_nothing(transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    transaction.execute("INSERT OR REPLACE INTO meta VALUES('tried', '1')", ())?;
    transaction.execute("DELETE FROM meta WHERE key='tried'", ()).map(drop)
}

/// Moves the WAL into the database; the next write begins it anew without shortening the file. Whoever reads it with other tools is not
/// waited for: what he still needs stays where it is until the next time.
pub(super) fn checkpoint(connection: &Connection) -> rusqlite::Result<()> {
    connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", (), |_| Ok(()))
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::super::{Arrival, EventRow, InstanceRow, Journal, MigrationRow, Restarts, RowWrite, Status};
    use super::*;
    use crate::error_chain;

    const GOLDEN: &str = include_str!("golden/schema-1.sql");
    const GOLDEN_2: &str = include_str!("golden/schema-2.sql");

    #[tokio::test]
    async fn a_journal_of_schema_1_is_upgraded_with_its_rows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.db");
        Connection::open(&path).unwrap().execute_batch(GOLDEN).unwrap();

        let journal = Journal::open(&path).unwrap();

        let version: i64 = journal
            .read(|c| c.pragma_query_value(None, "user_version", |row| row.get(0)))
            .await
            .unwrap();
        assert_eq!(version, SCHEMA_VERSION);
        let instances = journal.read(InstanceRow::all).await.unwrap();
        let [old, web] = &instances[..] else {
            panic!("{instances:?}")
        };
        assert_eq!((web.status, web.epoch, web.known_epoch), (Status::Running, 4, 5));
        assert_eq!(
            (web.spec.disks[0].path.as_str(), web.spec.restart.as_str()),
            ("/srv/web.img", "")
        );
        assert_eq!(
            (old.reason.as_deref(), old.restarts),
            (Some("the VMM died"), Restarts::default())
        );
        let unfinished = journal.read(MigrationRow::unfinished).await.unwrap();
        assert_eq!((unfinished[0].id, unfinished[0].armed), (Uuid::from_u128(10), 1));
        let moved = journal.read(|c| InstanceRow::moved_to(c, "gone")).await.unwrap();
        assert_eq!(moved.as_deref(), Some("b"));
        let decision: String = journal
            .read(|c| c.query_row("SELECT decision FROM decisions", (), |row| row.get(0)))
            .await
            .unwrap();
        assert_eq!(decision, "SRC");
    }

    #[tokio::test]
    async fn a_journal_of_schema_2_is_upgraded_with_its_rows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.db");
        Connection::open(&path).unwrap().execute_batch(GOLDEN_2).unwrap();

        let journal = Journal::open(&path).unwrap();

        let instances = journal.read(InstanceRow::all).await.unwrap();
        let [web] = &instances[..] else { panic!("{instances:?}") };
        assert_eq!((web.status, web.restarts.count), (Status::Crashed, 3));
        assert_eq!(
            (web.restarts.due, web.restarts.asked_off),
            (Some(1_700_000_060_000), false)
        );
        let arrivals = journal.read(Arrival::all).await.unwrap();
        assert_eq!(arrivals[0].source, "a");
        let audited: (String, i64) = journal
            .read(|c| c.query_row("SELECT what, id FROM audit", (), |row| Ok((row.get(0)?, row.get(1)?))))
            .await
            .unwrap();
        assert_eq!(audited, ("migrate".to_owned(), 7));
        // What was done under it left no events.
        let events = journal.read(|c| EventRow::of(c, "web", 0)).await.unwrap();
        assert_eq!(events, []);
    }

    #[tokio::test]
    async fn a_wal_that_was_moved_into_the_database_is_written_again_and_gets_no_longer() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(&folder.path().join("journal.db")).unwrap();
        let long = || std::fs::metadata(folder.path().join("journal.db-wal")).unwrap().len();
        let before = long();
        assert!(before >= u64::from(WAL_PAGES) * 4096, "{before}");
        for key in ["one", "two", "three"] {
            let most_of_it = "0".repeat(300 * 4096);
            journal
                .write(RowWrite::Test, move |t| {
                    t.execute("INSERT INTO meta VALUES(?1,?2)", (key, most_of_it))
                })
                .await
                .unwrap();
            journal.read(checkpoint).await.unwrap();
        }
        assert_eq!(long(), before);
    }

    #[test]
    fn an_upgrade_that_fails_leaves_the_older_schema() {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(GOLDEN).unwrap();
        // Somebody's own table is in the way of the last step.
        connection.execute_batch("CREATE TABLE faults(mine)").unwrap();
        assert!(upgrade(&connection, 1).is_err());
        let version: i64 = connection
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .unwrap();
        assert_eq!(version, 1);
        assert!(connection.prepare("SELECT restarts FROM instances").is_err());
    }

    #[test]
    fn a_newer_schema_is_refused_and_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.db");
        Connection::open(&path)
            .unwrap()
            .pragma_update(None, "user_version", 99)
            .unwrap();
        let before = std::fs::read(&path).unwrap();
        let told = error_chain(&Journal::open(&path).err().unwrap());
        assert!(
            told.contains("schema 99") && told.contains(&format!("knows {SCHEMA_VERSION}")),
            "{told}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
}
