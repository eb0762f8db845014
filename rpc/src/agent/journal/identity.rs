//! Which journal this is.
//!
//! D is a row in one journal. An agent with another data directory may answer at the same URL, under the same host's name; what it
//! says of a migration that it never heard of is about nothing. So a journal has a UUID of its own, made with it, and each side keeps
//! that of the other with its record of a migration (`agent/peer_journal.rs`).

use rusqlite::{Connection, OptionalExtension};
use uuid::Uuid;

use super::instances::uuid;

const KEY: &str = "journal";

/// The journal's UUID. One that has none, for it is new or of a build before there were any, gets one: durable when this returns.
///
/// # Errors
/// The journal cannot be read or written, or what it has is no UUID.
pub(super) fn of(connection: &Connection) -> rusqlite::Result<Uuid> {
    let known: Option<String> = connection
        .query_row("SELECT value FROM meta WHERE key=?1", [KEY], |row| row.get(0))
        .optional()?;
    if let Some(known) = known {
        return uuid(&known, 0);
    }
    let made = Uuid::new_v4();
    connection.execute("INSERT INTO meta VALUES(?1,?2)", (KEY, made.to_string()))?;
    Ok(made)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::Journal;
    use super::*;

    fn id(path: &Path) -> Uuid {
        Journal::open(path).unwrap().id()
    }

    #[test]
    fn a_journal_is_the_same_whenever_it_is_opened_and_another_one_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (folder.path().join("one.db"), folder.path().join("other.db"));
        let first = id(&one);
        assert_eq!(id(&one), first);
        assert_ne!(id(&other), first);
    }

    #[test]
    fn an_older_journal_gets_its_own_when_it_is_first_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.db");
        let old = Connection::open(&path).unwrap();
        old.execute_batch(include_str!("golden/schema-2.sql")).unwrap();
        drop(old);
        let first = id(&path);
        assert_eq!(id(&path), first);
    }

    #[test]
    fn what_is_no_uuid_is_not_taken_for_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.db");
        id(&path);
        let damaged = Connection::open(&path).unwrap();
        damaged
            .execute("UPDATE meta SET value='?' WHERE key='journal'", ())
            .unwrap();
        drop(damaged);
        assert!(Journal::open(&path).is_err());
    }
}
