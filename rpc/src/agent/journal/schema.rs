//! The tables, and what a connection is set to.

use rusqlite::Connection;

/// The schema that this build writes.
const SCHEMA_VERSION: i64 = 1;

/// Rows written and removed once, so that the WAL has its length before the first switchover: extending a file costs more
/// than writing into it.
const WAL_FILLER_ROWS: usize = 256;

const TABLES: &str = "
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

/// Settings, tables and the WAL's length.
///
/// # Errors
/// The file is not a journal, is of a newer schema, or cannot be written.
pub(super) fn open(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    connection.pragma_update(None, "busy_timeout", 2000)?;
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if version > SCHEMA_VERSION {
        return Err(rusqlite::Error::InvalidParameterName(format!(
            "the journal has schema {version}, this build knows {SCHEMA_VERSION}: use a newer ferry"
        )));
    }
    if version == 0 {
        connection.execute_batch(&format!("BEGIN;{TABLES}PRAGMA user_version={SCHEMA_VERSION};COMMIT;"))?;
    }
    lengthen_wal(connection)
}

fn lengthen_wal(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch("BEGIN;")?;
    for row in 0..WAL_FILLER_ROWS {
        connection.execute(
            "INSERT OR REPLACE INTO meta VALUES(?1, zeroblob(0) || ?2)",
            (format!("filler-{row}"), "0".repeat(4096)),
        )?;
    }
    connection.execute_batch("COMMIT; BEGIN; DELETE FROM meta WHERE key LIKE 'filler-%'; COMMIT;")?;
    checkpoint(connection)
}

/// Moves the WAL into the database; the next write begins it anew without shortening the file.
pub(super) fn checkpoint(connection: &Connection) -> rusqlite::Result<()> {
    connection.query_row("PRAGMA wal_checkpoint(RESTART)", (), |_| Ok(()))
}
