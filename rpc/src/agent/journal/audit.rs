//! Who did what: rows that are added and never changed.

use rusqlite::Transaction;

/// One row of `audit`.
#[derive(Clone, Debug)]
pub(crate) struct AuditRow {
    /// RFC 3339, UTC.
    pub(crate) time: String,
    /// The unix user who asked, another host, or the agent itself.
    pub(crate) actor: String,
    /// The request's id.
    pub(crate) request: String,
    /// The deed: one word.
    pub(crate) what: &'static str,
    /// The instance's id, or the name that was asked for.
    pub(crate) instance: String,
    /// `done`, or why not.
    pub(crate) result: String,
}

/// Characters of a result that are kept: whoever asks must not fill the disk.
const MOST_RESULT: usize = 1000;

impl AuditRow {
    /// Adds the row.
    pub(crate) fn add(&self, transaction: &Transaction<'_>) -> rusqlite::Result<()> {
        let result: String = self.result.chars().take(MOST_RESULT).collect();
        transaction
            .prepare_cached("INSERT INTO audit(time,actor,request,what,instance,result) VALUES(?1,?2,?3,?4,?5,?6)")?
            .execute((
                &self.time,
                &self.actor,
                &self.request,
                self.what,
                &self.instance,
                result,
            ))
            .map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Journal, RowWrite};
    use super::*;

    #[tokio::test]
    async fn rows_are_added_and_never_changed() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(&folder.path().join("journal.db")).unwrap();
        let row = AuditRow {
            time: "2024-01-01T00:00:00Z".to_owned(),
            actor: "root (uid 0)".to_owned(),
            request: "r".to_owned(),
            what: "delete",
            instance: "i".to_owned(),
            result: "x".repeat(2 * MOST_RESULT),
        };
        journal.write(RowWrite::Test, move |t| row.add(t)).await.unwrap();
        for change in [
            "DELETE FROM audit",
            "UPDATE audit SET actor='nobody'",
            "INSERT OR REPLACE INTO audit VALUES(1,'','','','','','')",
        ] {
            let refused = journal
                .write(RowWrite::Test, move |t| t.execute(change, ()))
                .await
                .unwrap_err();
            let told = crate::error_chain(&refused);
            assert!(told.contains("append-only"), "{change}: {told}");
        }
        let (rows, length): (i64, usize) = journal
            .read(|c| {
                c.query_row("SELECT count(*), max(length(result)) FROM audit", (), |r| {
                    Ok((r.get(0)?, r.get(1)?))
                })
            })
            .await
            .unwrap();
        assert_eq!((rows, length), (1, MOST_RESULT));
    }
}
