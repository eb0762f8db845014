//! Guests that came here and whose source has not acknowledged that yet: until then it may come to start them itself.

use rusqlite::{Connection, Transaction};
use uuid::Uuid;

use super::instances::uuid;

/// One row of `arrivals`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Arrival {
    pub(crate) migration: Uuid,
    pub(crate) instance: Uuid,
    /// The host that it came from.
    pub(crate) source: String,
    pub(crate) attempt: u32,
}

impl Arrival {
    /// Writes the row.
    pub(crate) fn save(&self, transaction: &Transaction<'_>) -> rusqlite::Result<()> {
        transaction
            .execute(
                "INSERT OR REPLACE INTO arrivals VALUES(?1,?2,?3,?4)",
                (
                    self.migration.to_string(),
                    self.instance.to_string(),
                    &self.source,
                    self.attempt,
                ),
            )
            .map(drop)
    }

    /// The source acknowledged it.
    pub(crate) fn settle(transaction: &Transaction<'_>, migration: Uuid) -> rusqlite::Result<()> {
        transaction
            .execute("DELETE FROM arrivals WHERE migration=?1", [migration.to_string()])
            .map(drop)
    }

    /// Every one that is not acknowledged.
    pub(crate) fn all(connection: &Connection) -> rusqlite::Result<Vec<Self>> {
        connection
            .prepare("SELECT migration,instance,source,attempt FROM arrivals")?
            .query_map((), |row| {
                Ok(Self {
                    migration: uuid(&row.get::<_, String>(0)?, 0)?,
                    instance: uuid(&row.get::<_, String>(1)?, 1)?,
                    source: row.get(2)?,
                    attempt: row.get(3)?,
                })
            })?
            .collect()
    }
}
