//! What was done to instances: an event for each action, with its start, its end and what came of it.
//!
//! Events outlive their instance, as Nova's do, and there is an end to them: the newest of each instance are kept, and of all
//! instances together the newest. Who did what is the `audit` table's, of which nothing is ever removed.

use ferry_proto::agent::v1::InstanceEvent;
use rusqlite::{Connection, OptionalExtension, Row, Transaction};

use super::faults::FaultRow;

/// How many events of one instance are kept.
const MOST_OF_ONE: i64 = 200;
/// How many events are kept in all.
const MOST: i64 = 20_000;
/// Characters of a message that are kept: whoever asks must not fill the disk.
const MOST_MESSAGE: usize = 2000;

/// The actions that last as long as a migration does, at its source and at its destination.
pub(crate) const MIGRATE: &str = "migrate";
pub(crate) const MIGRATE_IN: &str = "migrate-in";

/// An open event of a migration's own; others name the migration that they are about.
const IS_MIGRATION: &str = "finished IS NULL AND migration IS NOT NULL AND action IN ('migrate','migrate-in')";

/// What a restarted agent says of what the one before it had begun.
const INTERRUPTED: &str = "the agent ended before the end of it was written";

/// An event that begins.
#[derive(Clone, Debug)]
pub(crate) struct EventRow {
    /// The instance's id.
    pub(crate) instance: String,
    /// What it is called.
    pub(crate) name: String,
    /// The action: one word, or two.
    pub(crate) action: &'static str,
    pub(crate) actor: String,
    pub(crate) request: String,
    pub(crate) migration: Option<String>,
    /// RFC 3339, UTC.
    pub(crate) started: String,
}

/// How an event ended.
#[derive(Clone, Debug)]
pub(crate) struct EventEnd {
    /// RFC 3339, UTC.
    pub(crate) finished: String,
    pub(crate) result: &'static str,
    pub(crate) message: Option<String>,
    /// What is kept of a failure.
    pub(crate) fault: Option<FaultRow>,
}

const COLUMNS: &str = "instance,name,action,actor,request,migration,started,finished,result,message";

impl EventRow {
    /// Adds an event that begins, and gives its number back. What is too old makes room for it.
    pub(crate) fn begin(&self, transaction: &Transaction<'_>) -> rusqlite::Result<i64> {
        let mut add = transaction.prepare_cached(
            "INSERT INTO events(instance,name,action,actor,request,migration,started) VALUES(?1,?2,?3,?4,?5,?6,?7)",
        )?;
        add.execute((
            &self.instance,
            &self.name,
            self.action,
            &self.actor,
            &self.request,
            &self.migration,
            &self.started,
        ))?;
        let id = transaction.last_insert_rowid();
        prune(transaction, "events", &self.instance, [MOST_OF_ONE, MOST])?;
        Ok(id)
    }

    /// Whose request a migration is that goes on, as its event says: the request's id, and the actor.
    pub(crate) fn of_migration(connection: &Connection, migration: &str) -> rusqlite::Result<Option<(String, String)>> {
        connection
            .query_row(
                &format!("SELECT request, actor FROM events WHERE migration=?1 AND {IS_MIGRATION}"),
                [migration],
                |row| Ok((row.get(0)?, row.get(1)?)),
            )
            .optional()
    }

    /// The events of every instance of this id or name, the newest first.
    pub(crate) fn of(connection: &Connection, name_or_id: &str, limit: u32) -> rusqlite::Result<Vec<InstanceEvent>> {
        let limit = if limit == 0 { -1 } else { i64::from(limit) };
        connection
            .prepare(&format!(
                "SELECT {COLUMNS} FROM events WHERE instance=?1 OR name=?1 ORDER BY id DESC LIMIT ?2"
            ))?
            .query_map((name_or_id, limit), from_row)?
            .collect()
    }
}

impl EventEnd {
    /// Ends the event with this number, unless it has ended.
    pub(crate) fn of_event(&self, transaction: &Transaction<'_>, id: i64) -> rusqlite::Result<()> {
        let message = self.message.as_ref().map(|message| shortened(message, MOST_MESSAGE));
        transaction
            .prepare_cached("UPDATE events SET finished=?2, result=?3, message=?4 WHERE id=?1 AND finished IS NULL")?
            .execute((id, &self.finished, self.result, message))?;
        self.fault.as_ref().map_or(Ok(()), |fault| fault.add(transaction))
    }

    /// Ends the event of a migration, if it has one that goes on.
    pub(crate) fn of_migration(&self, transaction: &Transaction<'_>, migration: &str) -> rusqlite::Result<()> {
        let query = format!("SELECT id FROM events WHERE migration=?1 AND {IS_MIGRATION}");
        let found: Option<i64> = transaction
            .prepare_cached(&query)?
            .query_row([migration], |row| row.get(0))
            .optional()?;
        found.map_or(Ok(()), |id| self.of_event(transaction, id))
    }
}

/// Ends what an agent before this one had begun, but for migrations that go on. Gives back how many there were.
pub(crate) fn interrupt(transaction: &Transaction<'_>, now: &str) -> rusqlite::Result<usize> {
    transaction.execute(
        &format!(
            "UPDATE events SET finished=?1, result='interrupted', message=?2 WHERE finished IS NULL
             AND NOT ({IS_MIGRATION} AND migration IN (SELECT id FROM migrations WHERE over=0))"
        ),
        (now, INTERRUPTED),
    )
}

/// Removes what is too old: beyond the newest of this instance, and beyond the newest of all.
pub(super) fn prune(
    transaction: &Transaction<'_>,
    table: &str,
    instance: &str,
    [most_of_one, most]: [i64; 2],
) -> rusqlite::Result<()> {
    // What has not ended is needed by whoever ends it.
    let ended = match table {
        "events" => "AND finished IS NOT NULL",
        _ => "",
    };
    let mut of_one = transaction.prepare_cached(&format!(
        "DELETE FROM {table} WHERE instance=?1 {ended} AND id <=
             (SELECT id FROM {table} WHERE instance=?1 ORDER BY id DESC LIMIT 1 OFFSET ?2)"
    ))?;
    of_one.execute((instance, most_of_one))?;
    transaction
        .prepare_cached(&format!(
            "DELETE FROM {table} WHERE id <= (SELECT max(id) FROM {table}) - ?1 {ended}"
        ))?
        .execute([most])
        .map(drop)
}

/// A text of at most so many characters.
pub(super) fn shortened(text: &str, most: usize) -> String {
    text.chars().take(most).collect()
}

fn from_row(row: &Row<'_>) -> rusqlite::Result<InstanceEvent> {
    Ok(InstanceEvent {
        instance: row.get(0)?,
        name: row.get(1)?,
        action: row.get(2)?,
        actor: row.get(3)?,
        request: row.get(4)?,
        migration: row.get(5)?,
        started: row.get(6)?,
        finished: row.get(7)?,
        result: row.get(8)?,
        message: row.get(9)?,
    })
}

#[cfg(test)]
mod tests {
    use super::super::Journal;
    use super::*;

    fn event(instance: &str, action: &'static str) -> EventRow {
        EventRow {
            instance: instance.to_owned(),
            name: format!("name-of-{instance}"),
            action,
            actor: "root (uid 0)".to_owned(),
            request: "req-1".to_owned(),
            migration: None,
            started: "2024-01-01T00:00:00Z".to_owned(),
        }
    }

    fn end(result: &'static str) -> EventEnd {
        EventEnd {
            finished: "2024-01-01T00:00:01Z".to_owned(),
            result,
            message: (result == "error").then(|| "x".repeat(2 * MOST_MESSAGE)),
            fault: None,
        }
    }

    async fn journal() -> (tempfile::TempDir, Journal) {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(&folder.path().join("journal.db")).unwrap();
        (folder, journal)
    }

    #[tokio::test]
    async fn an_event_has_a_start_and_an_end_and_is_found_by_id_and_name() {
        let (_folder, journal) = journal().await;
        journal
            .note(|t| {
                let id = event("i", "pause").begin(t)?;
                end("error").of_event(t, id)?;
                // It has ended once.
                end("success").of_event(t, id)?;
                event("i", "resume").begin(t)?;
                event("j", "run").begin(t)
            })
            .await
            .unwrap();
        for asked in ["i", "name-of-i"] {
            let events = journal.read(move |c| EventRow::of(c, asked, 0)).await.unwrap();
            let [resume, pause] = &events[..] else {
                panic!("{events:?}")
            };
            assert_eq!((resume.action.as_str(), &resume.result), ("resume", &None));
            assert_eq!(pause.result.as_deref(), Some("error"));
            assert_eq!(pause.message.as_ref().map(String::len), Some(MOST_MESSAGE));
        }
        let newest = journal.read(|c| EventRow::of(c, "i", 1)).await.unwrap();
        assert_eq!(newest.len(), 1);
    }

    #[tokio::test]
    async fn the_newest_are_kept_and_what_goes_on_is() {
        let (_folder, journal) = journal().await;
        let (of_one, of_all) = journal
            .note(|t| {
                event("i", "run").begin(t)?;
                for _ in 0..MOST_OF_ONE + 10 {
                    let id = event("i", "pause").begin(t)?;
                    end("success").of_event(t, id)?;
                }
                let of_one: i64 = t.query_row("SELECT count(*) FROM events", (), |row| row.get(0))?;
                // As if very many had been there before the last.
                t.execute(
                    "UPDATE events SET id = id + ?1 WHERE id = (SELECT max(id) FROM events)",
                    [MOST],
                )?;
                event("j", "run").begin(t)?;
                let of_all: Vec<String> = t
                    .prepare("SELECT instance || ' ' || action FROM events ORDER BY id")?
                    .query_map((), |row| row.get(0))?
                    .collect::<rusqlite::Result<_>>()?;
                Ok((of_one, of_all))
            })
            .await
            .unwrap();
        // The one that goes on is beyond them.
        assert_eq!(of_one, MOST_OF_ONE + 1);
        assert_eq!(of_all, ["i run", "i pause", "j run"]);
    }

    #[tokio::test]
    async fn what_an_agent_left_open_is_interrupted_unless_its_migration_goes_on() {
        let (_folder, journal) = journal().await;
        let migrating = |migration: &str, action| EventRow {
            migration: Some(migration.to_owned()),
            ..event("i", action)
        };
        let closed = journal
            .note(move |t| {
                for (migration, over) in [("goes-on", 0), ("is-over", 1)] {
                    t.execute(
                        "INSERT INTO migrations VALUES(?1,'i','source','b',1,?2,0,NULL,NULL,0,'{}','{}',0,NULL,'{}')",
                        (migration, over),
                    )?;
                    migrating(migration, MIGRATE).begin(t)?;
                }
                event("i", "pause").begin(t)?;
                migrating("goes-on", "abort").begin(t)?;
                interrupt(t, "2024-01-01T00:00:02Z")
            })
            .await
            .unwrap();
        assert_eq!(closed, 3);
        let events = journal.read(|c| EventRow::of(c, "i", 0)).await.unwrap();
        let open: Vec<_> = events.iter().filter(|event| event.result.is_none()).collect();
        assert_eq!(
            (open.len(), open[0].action.as_str(), open[0].migration.as_deref()),
            (1, "migrate", Some("goes-on"))
        );
        let request = journal.read(|c| EventRow::of_migration(c, "goes-on")).await.unwrap();
        assert_eq!(request, Some(("req-1".to_owned(), "root (uid 0)".to_owned())));
        journal
            .note(|t| end("success").of_migration(t, "goes-on"))
            .await
            .unwrap();
        let events = journal.read(|c| EventRow::of(c, "i", 0)).await.unwrap();
        assert!(events.iter().all(|event| event.result.is_some()), "{events:?}");
    }
}
