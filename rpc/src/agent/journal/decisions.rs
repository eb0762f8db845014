//! The decision register D(M,n), at the destination.

use ferry_migration::handover::Decision;
use rusqlite::{Connection, OptionalExtension, Transaction};
use uuid::Uuid;

use super::instances::bad_text;

/// One row of `decisions`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DecisionRow {
    pub(crate) migration: Uuid,
    pub(crate) attempt: u32,
    pub(crate) decision: Decision,
    /// The host's boot in which the decision was written: for CLAIMED it tells whether the host has rebooted since.
    pub(crate) boot_id: String,
}

impl DecisionRow {
    /// Moves the register. The value that is there never goes back from a final one.
    pub(crate) fn save(&self, transaction: &Transaction<'_>) -> rusqlite::Result<()> {
        let mut save = transaction.prepare_cached(
            "INSERT INTO decisions VALUES(?1,?2,?3,?4)
             ON CONFLICT(migration, attempt) DO UPDATE SET decision=?3, boot_id=?4
             WHERE decision NOT IN ('RUNNING','SRC') OR decision=?3",
        )?;
        let changed = save.execute((
            self.migration.to_string(),
            self.attempt,
            self.decision.as_str(),
            &self.boot_id,
        ))?;
        if changed == 1 {
            Ok(())
        } else {
            Err(rusqlite::Error::StatementChangedRows(changed))
        }
    }

    /// D of the newest attempt of a migration.
    pub(crate) fn newest(connection: &Connection, migration: Uuid) -> rusqlite::Result<Option<Self>> {
        connection
            .query_row(
                "SELECT attempt, decision, boot_id FROM decisions WHERE migration=?1 ORDER BY attempt DESC LIMIT 1",
                [migration.to_string()],
                |row| {
                    let word: String = row.get(1)?;
                    Ok(Self {
                        migration,
                        attempt: row.get(0)?,
                        decision: Decision::parse(&word).ok_or_else(|| bad_text(1, format!("decision {word:?}")))?,
                        boot_id: row.get(2)?,
                    })
                },
            )
            .optional()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Journal, RowWrite};
    use super::*;

    fn row(decision: Decision) -> DecisionRow {
        DecisionRow {
            migration: Uuid::from_u128(1),
            attempt: 1,
            decision,
            boot_id: "boot".to_owned(),
        }
    }

    #[tokio::test]
    async fn a_final_decision_is_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(&folder.path().join("journal.db")).unwrap();
        journal
            .write(RowWrite::Test, |t| row(Decision::Open).save(t))
            .await
            .unwrap();
        journal
            .write(RowWrite::Test, |t| row(Decision::Source).save(t))
            .await
            .unwrap();
        assert!(
            journal
                .write(RowWrite::Test, |t| row(Decision::Claimed).save(t))
                .await
                .is_err()
        );
        let newest = journal
            .read(|c| DecisionRow::newest(c, Uuid::from_u128(1)))
            .await
            .unwrap();
        assert_eq!(newest, Some(row(Decision::Source)));
    }
}
