//! What both agents' journals say of the guest and its migration, read from outside.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use ferry_tests::Host;
use rusqlite::{Connection, OpenFlags, OptionalExtension};

/// One host's journal at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Look {
    /// The guest's status and epoch, if it is this host's.
    pub(crate) instance: Option<(String, u64)>,
    /// The migration's record.
    pub(crate) migration: Option<Record>,
    /// D of each attempt, at the destination.
    pub(crate) decisions: Vec<(u32, String)>,
}

/// The migration's row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) over: bool,
    pub(crate) armed: u32,
    pub(crate) said: Option<String>,
    pub(crate) resumed: Option<u64>,
    pub(crate) status: String,
}

impl Look {
    /// D of the newest attempt.
    pub(crate) fn decision(&self) -> Option<&str> {
        self.decisions.last().map(|(_, decision)| decision.as_str())
    }

    /// The guest's status here.
    pub(crate) fn status(&self) -> Option<&str> {
        self.instance.as_ref().map(|(status, _)| status.as_str())
    }

    /// Whether nothing is left to do here.
    pub(crate) fn is_over(&self) -> bool {
        self.migration.as_ref().is_none_or(|record| record.over)
    }
}

/// Looks into the journal of this host.
pub(crate) fn look(host: &Host, migration: &str) -> Result<Look> {
    read(&host.data_dir.join("journal.db"), migration)
        .with_context(|| format!("failed to read the journal of {}", host.name))
}

fn read(file: &Path, migration: &str) -> Result<Look> {
    let mut connection = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    // One transaction: one moment.
    let moment = connection.transaction()?;
    let instance = moment
        .query_row("SELECT status, epoch FROM instances", (), |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .optional()?;
    let record = "SELECT over, armed, said, resumed, info ->> 'status' FROM migrations WHERE id = ?1";
    let migration_row = moment
        .query_row(record, [migration], |row| {
            Ok(Record {
                over: row.get(0)?,
                armed: row.get(1)?,
                said: row.get(2)?,
                resumed: row.get(3)?,
                status: row.get(4)?,
            })
        })
        .optional()?;
    let decisions = moment
        .prepare("SELECT attempt, decision FROM decisions WHERE migration = ?1 ORDER BY attempt")?
        .query_map([migration], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    Ok(Look {
        instance,
        migration: migration_row,
        decisions,
    })
}
