//! The instances of this host.

use std::fmt;

use ferry_proto::agent::v1::InstanceSpec;
use rusqlite::{Connection, OptionalExtension, Row, Transaction};
use uuid::Uuid;

/// An instance's status, in Nova's manner. `Paused` always means the user's pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Running,
    Paused,
    Stopped,
    Crashed,
    /// It is being loaded, by a migration into here or from a snapshot.
    Incoming,
    /// Nobody knows on which host it runs.
    Indeterminate,
}

impl Status {
    const ALL: [Self; 6] = [
        Self::Running,
        Self::Paused,
        Self::Stopped,
        Self::Crashed,
        Self::Incoming,
        Self::Indeterminate,
    ];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Crashed => "crashed",
            Self::Incoming => "incoming",
            Self::Indeterminate => "indeterminate",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == word)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// One row of `instances`.
#[derive(Clone, Debug)]
pub(crate) struct InstanceRow {
    pub(crate) id: Uuid,
    pub(crate) status: Status,
    pub(crate) epoch: u64,
    pub(crate) known_epoch: u64,
    pub(crate) spec: InstanceSpec,
    pub(crate) migration: Option<Uuid>,
    pub(crate) reason: Option<String>,
    pub(crate) boot_id: String,
    pub(crate) restarts: Restarts,
}

/// How often and when an instance is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Restarts {
    /// Starts by its policy in a row.
    pub(crate) count: u32,
    /// When the next one is due, in milliseconds of unix time; none: it stays as it is.
    pub(crate) due: Option<i64>,
    /// Its user asked the guest to switch off: however it ends now, that is what was wanted.
    pub(crate) asked_off: bool,
    /// When it last began to run here, in milliseconds of unix time.
    pub(crate) started: i64,
}

impl InstanceRow {
    /// Writes the row, new or changed.
    pub(crate) fn save(&self, transaction: &Transaction<'_>) -> rusqlite::Result<()> {
        let mut save = transaction.prepare_cached(
            "INSERT INTO instances(id,name,status,epoch,known_epoch,spec,migration,reason,boot_id,
                                   restarts,restart_at,asked_off,started)
             VALUES(?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13)
             ON CONFLICT(id) DO UPDATE SET name=?2,status=?3,epoch=?4,known_epoch=?5,spec=?6,migration=?7,reason=?8,boot_id=?9,
                                           restarts=?10,restart_at=?11,asked_off=?12,started=?13",
        )?;
        save.execute((
            self.id.to_string(),
            &self.spec.name,
            self.status.as_str(),
            self.epoch,
            self.known_epoch,
            serde_json::to_string(&self.spec).map_err(|e| rusqlite::Error::ToSqlConversionFailure(e.into()))?,
            self.migration.map(|id| id.to_string()),
            &self.reason,
            &self.boot_id,
            self.restarts.count,
            self.restarts.due,
            self.restarts.asked_off,
            self.restarts.started,
        ))?;
        transaction
            .prepare_cached("DELETE FROM departed WHERE id=?1")?
            .execute([self.id.to_string()])
            .map(drop)
    }

    /// Every instance of this host.
    pub(crate) fn all(connection: &Connection) -> rusqlite::Result<Vec<Self>> {
        connection
            .prepare(
                "SELECT id,status,epoch,known_epoch,spec,migration,reason,boot_id,restarts,restart_at,asked_off,started
                 FROM instances ORDER BY name",
            )?
            .query_map((), Self::from_row)?
            .collect()
    }

    /// Removes an instance.
    pub(crate) fn delete(transaction: &Transaction<'_>, id: Uuid) -> rusqlite::Result<()> {
        transaction
            .execute("DELETE FROM instances WHERE id=?1", [id.to_string()])
            .map(drop)
    }

    /// Removes an instance that went to `host`, and remembers where it went.
    pub(crate) fn depart(
        transaction: &Transaction<'_>,
        row: &Self,
        host: &str,
        migration: Uuid,
    ) -> rusqlite::Result<()> {
        Self::delete(transaction, row.id)?;
        transaction
            .execute(
                "INSERT OR REPLACE INTO departed VALUES(?1,?2,?3,?4)",
                (row.id.to_string(), &row.spec.name, host, migration.to_string()),
            )
            .map(drop)
    }

    /// The host to which an instance of this id or name went last.
    pub(crate) fn moved_to(connection: &Connection, name_or_id: &str) -> rusqlite::Result<Option<String>> {
        connection
            .query_row(
                "SELECT host FROM departed WHERE id=?1 OR name=?1 ORDER BY rowid DESC LIMIT 1",
                [name_or_id],
                |row| row.get(0),
            )
            .optional()
    }

    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        let status: String = row.get(1)?;
        let migration: Option<String> = row.get(5)?;
        Ok(Self {
            id: uuid(&row.get::<_, String>(0)?, 0)?,
            status: Status::parse(&status).ok_or_else(|| bad_text(1, format!("status {status:?}")))?,
            epoch: row.get(2)?,
            known_epoch: row.get(3)?,
            spec: serde_json::from_str(&row.get::<_, String>(4)?).map_err(|error| bad_text(4, error))?,
            migration: migration.map(|text| uuid(&text, 5)).transpose()?,
            reason: row.get(6)?,
            boot_id: row.get(7)?,
            restarts: Restarts {
                count: row.get(8)?,
                due: row.get(9)?,
                asked_off: row.get(10)?,
                started: row.get(11)?,
            },
        })
    }
}

/// A UUID column.
pub(super) fn uuid(text: &str, column: usize) -> rusqlite::Result<Uuid> {
    Uuid::parse_str(text).map_err(|error| bad_text(column, error))
}

/// A text column that does not hold what this agent writes.
pub(super) fn bad_text(column: usize, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, error.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_from_before_there_were_disks_has_none() {
        let old = r#"{"name":"web","memory_bytes":536870912,"vcpus":1,"cpu":"host","dirty":"log","kernel":"k","initrd":"","cmdline":"","hugepages":false}"#;
        let spec: InstanceSpec = serde_json::from_str(old).unwrap();
        assert_eq!((spec.name.as_str(), spec.vcpus), ("web", 1));
        assert!(spec.disks.is_empty() && spec.nics.is_empty());
    }
}
