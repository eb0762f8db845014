//! A look into an agent's journal from outside, while the agent runs; and what a reboot of its host changes in it.

use anyhow::{Context, Result};
use ferry_tests::Host;
use rusqlite::{Connection, OpenFlags};

/// A journal, open for reading.
pub(crate) struct Journal {
    connection: Connection,
}

/// The journal of this host.
pub(crate) fn of(host: &Host) -> Result<Journal> {
    let file = host.data_dir.join("journal.db");
    let connection = Connection::open_with_flags(&file, OpenFlags::SQLITE_OPEN_READ_ONLY);
    let connection = connection.with_context(|| format!("failed to open {}", file.display()))?;
    connection.busy_timeout(std::time::Duration::from_secs(5))?;
    Ok(Journal { connection })
}

/// From the next start of its agent on, this host has rebooted since: it has another boot id than what its journal names.
pub(crate) fn reboot(host: &Host) -> Result<()> {
    let connection = Connection::open(host.data_dir.join("journal.db"))?;
    connection.execute_batch("UPDATE instances SET boot_id = 'before'; UPDATE decisions SET boot_id = 'before';")?;
    Ok(())
}

impl Journal {
    /// How often the audit table has this deed with a result that begins so.
    pub(crate) fn audited(&self, what: &str, result: &str) -> Result<i64> {
        let query = "SELECT count(*) FROM audit WHERE what = ?1 AND substr(result, 1, length(?2)) = ?2
                     AND (actor = 'the agent' OR actor LIKE '%uid %')";
        Ok(self.connection.query_row(query, [what, result], |row| row.get(0))?)
    }

    /// Whether a start of some instance is waited for.
    pub(crate) fn has_a_start_due(&self) -> Result<bool> {
        let query = "SELECT count(*) FROM instances WHERE restart_at IS NOT NULL";
        Ok(self.connection.query_row(query, [], |row| row.get::<_, i64>(0))? > 0)
    }

    /// Whether some attempt of the migration has this decision.
    pub(crate) fn decision_of(&self, migration: &str, decision: &str) -> Result<bool> {
        let query = "SELECT count(*) FROM decisions WHERE migration = ?1 AND decision = ?2";
        Ok(self
            .connection
            .query_row(query, [migration, decision], |row| row.get::<_, i64>(0))?
            > 0)
    }

    /// Whether the migration has a row.
    pub(crate) fn has_migration(&self, migration: &str) -> Result<bool> {
        let query = "SELECT count(*) FROM migrations WHERE id = ?1";
        Ok(self
            .connection
            .query_row(query, [migration], |row| row.get::<_, i64>(0))?
            == 1)
    }

    /// What this host itself has written of the migration: asked, it passes the question on to the source.
    pub(crate) fn record_of(&self, migration: &str) -> Result<serde_json::Value> {
        let query = "SELECT info FROM migrations WHERE id = ?1";
        let info: String = self.connection.query_row(query, [migration], |row| row.get(0))?;
        serde_json::from_str(&info).with_context(|| format!("the record of {migration} is {info:?}"))
    }

    /// Whether the migration's row says that it is over.
    pub(crate) fn is_over(&self, migration: &str) -> Result<bool> {
        let query = "SELECT over FROM migrations WHERE id = ?1";
        Ok(self.connection.query_row(query, [migration], |row| row.get(0))?)
    }

    /// The names of its tables.
    pub(crate) fn tables(&self) -> Result<Vec<String>> {
        let query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name";
        let mut query = self.connection.prepare(query)?;
        let names = query.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
        Ok(names)
    }

    /// Every row of a table as text, the table's name first.
    pub(crate) fn rows(&self, table: &str) -> Result<Vec<String>> {
        let mut query = self.connection.prepare(&format!("SELECT * FROM {table}"))?;
        let columns = query.column_count();
        let rows = query.query_map([], |row| {
            let values = (0..columns).map(|at| row.get::<_, rusqlite::types::Value>(at));
            Ok(format!("{table} {:?}", values.collect::<Result<Vec<_>, _>>()?))
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// What a pragma answers.
    pub(crate) fn pragma(&self, name: &str) -> Result<String> {
        Ok(self
            .connection
            .query_row(&format!("PRAGMA {name}"), [], |row| row.get(0))?)
    }
}
