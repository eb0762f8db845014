//! What actions on instances failed of. The newest are kept, also of an instance that is gone.

use ferry_proto::agent::v1::InstanceFault;
use rusqlite::{Connection, OptionalExtension, Transaction};

use super::events::{prune, shortened};

/// How many faults of one instance are kept.
const MOST_OF_ONE: i64 = 50;
/// How many faults are kept in all.
const MOST: i64 = 5_000;
/// Characters of a message, and of its causes, that are kept.
const MOST_TEXT: usize = 4000;

/// One row of `faults`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FaultRow {
    /// The instance's id.
    pub(crate) instance: String,
    /// RFC 3339, UTC.
    pub(crate) created: String,
    /// The gRPC status code by its name.
    pub(crate) code: &'static str,
    /// One of the closed list of reasons.
    pub(crate) reason: Option<&'static str>,
    pub(crate) message: String,
    /// The causes, one a line.
    pub(crate) details: String,
    pub(crate) request: String,
}

impl FaultRow {
    /// Adds the row. What is too old makes room for it.
    pub(crate) fn add(&self, transaction: &Transaction<'_>) -> rusqlite::Result<()> {
        transaction.execute(
            "INSERT INTO faults(instance,created,code,reason,message,details,request) VALUES(?1,?2,?3,?4,?5,?6,?7)",
            (
                &self.instance,
                &self.created,
                self.code,
                self.reason,
                shortened(&self.message, MOST_TEXT),
                shortened(&self.details, MOST_TEXT),
                &self.request,
            ),
        )?;
        prune(transaction, "faults", &self.instance, [MOST_OF_ONE, MOST])
    }

    /// The newest fault of an instance.
    pub(crate) fn newest(connection: &Connection, instance: &str) -> rusqlite::Result<Option<InstanceFault>> {
        connection
            .prepare(
                "SELECT created,code,reason,message,details,request FROM faults WHERE instance=?1 ORDER BY id DESC LIMIT 1",
            )?
            .query_row([instance], |row| {
                Ok(InstanceFault {
                    created: row.get(0)?,
                    code: row.get(1)?,
                    reason: row.get(2)?,
                    message: row.get(3)?,
                    details: row.get(4)?,
                    request: row.get(5)?,
                })
            })
            .optional()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Journal;
    use super::*;

    #[tokio::test]
    async fn the_newest_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(&folder.path().join("journal.db")).unwrap();
        let fault = |number: i64| FaultRow {
            instance: "i".to_owned(),
            created: "2024-01-01T00:00:00Z".to_owned(),
            code: "FAILED_PRECONDITION",
            reason: Some("DISKS"),
            message: format!("fault {number}"),
            details: "x".repeat(2 * MOST_TEXT),
            request: "req-1".to_owned(),
        };
        let kept: i64 = journal
            .note(move |t| {
                for number in 0..MOST_OF_ONE + 10 {
                    fault(number).add(t)?;
                }
                t.query_row("SELECT count(*) FROM faults", (), |row| row.get(0))
            })
            .await
            .unwrap();
        assert_eq!(kept, MOST_OF_ONE);
        let newest = journal.read(|c| FaultRow::newest(c, "i")).await.unwrap().unwrap();
        assert_eq!(newest.message, format!("fault {}", MOST_OF_ONE + 9));
        assert_eq!(
            (newest.reason.as_deref(), newest.details.len()),
            (Some("DISKS"), MOST_TEXT)
        );
        assert_eq!(journal.read(|c| FaultRow::newest(c, "j")).await.unwrap(), None);
    }
}
