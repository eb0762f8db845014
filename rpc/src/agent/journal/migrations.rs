//! The migrations in which this host takes or took part.

use std::mem;

use ferry_proto::agent::v1::{MigrationDecision, MigrationInfo, MigrationOptions, Round};
use rusqlite::{Connection, OptionalExtension, Row, Transaction};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::instances::{Status, bad_text, uuid};
use crate::agent::mode::Mode;
use crate::agent::steps::SourceStep;
use crate::agent::transport::Transport;

/// This host's part in a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Source,
    Destination,
}

impl Role {
    fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// One row of `migrations`.
#[derive(Clone, Debug)]
pub(crate) struct MigrationRow {
    pub(crate) id: Uuid,
    pub(crate) instance: Uuid,
    pub(crate) role: Role,
    pub(crate) peer: String,
    pub(crate) epoch: u64,
    pub(crate) over: bool,
    pub(crate) armed: u32,
    pub(crate) said: Option<String>,
    pub(crate) resumed: Option<u64>,
    pub(crate) user_paused: bool,
    pub(crate) options: MigrationOptions,
    pub(crate) info: MigrationInfo,
    pub(crate) began: i64,
    /// Which journal the other host has; none: it was not told, as by an agent of before 4.3.
    pub(crate) peer_journal: Option<Uuid>,
}

/// How much of a migration is to be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    /// But for what it has of each round: of one that did not come to an end there is ten times as much of that as of all else.
    Summary,
    /// All of it.
    Full,
}

/// What a record has of each round. It has a column of its own, the last: who reads a summary reads no page of it.
#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
struct Details {
    rounds: Vec<Round>,
    decisions: Vec<MigrationDecision>,
}

impl Details {
    /// Takes them out of a record: what is left is its summary.
    fn take(info: &mut MigrationInfo) -> Self {
        Self {
            rounds: mem::take(&mut info.rounds),
            decisions: mem::take(&mut info.decisions),
        }
    }

    fn put(self, info: &mut MigrationInfo) {
        let Self { rounds, decisions } = self;
        (info.rounds, info.decisions) = (rounds, decisions);
    }
}

impl Depth {
    /// The record with no more than is to be known.
    pub(crate) fn of(self, mut info: MigrationInfo) -> MigrationInfo {
        if self == Self::Summary {
            Details::take(&mut info);
        }
        info
    }
}

/// What is to be known of a migration, as it was last written.
pub(crate) struct Report {
    row: i64,
    summary: String,
    details: Option<String>,
}

impl Report {
    /// Its place among all: the later one was accepted later.
    pub(crate) fn row(&self) -> i64 {
        self.row
    }

    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            row: row.get(0)?,
            summary: row.get(1)?,
            details: row.get(2)?,
        })
    }

    /// What it says.
    ///
    /// # Errors
    /// It is not what this agent writes.
    pub(crate) fn read(&self) -> serde_json::Result<MigrationInfo> {
        read(&self.summary, self.details.as_deref())
    }
}

fn read(summary: &str, details: Option<&str>) -> serde_json::Result<MigrationInfo> {
    let mut info = MigrationInfo::from_json(summary)?;
    if let Some(details) = details {
        serde_json::from_str::<Details>(details)?.put(&mut info);
    }
    Ok(info)
}

const COLUMNS: &str =
    "id,instance,role,peer,epoch,over,armed,said,resumed,user_paused,options,info,began,details,peer_journal";

impl MigrationRow {
    /// What the instance was when the migration was accepted, and is to be once it is over.
    pub(crate) fn status_before(&self) -> Status {
        match (self.info.guest_was.as_str(), self.user_paused) {
            ("stopped", _) => Status::Stopped,
            (_, true) => Status::Paused,
            (_, false) => Status::Running,
        }
    }

    /// How the guest moves.
    pub(crate) fn is_cold(&self) -> bool {
        self.info.mode == Mode::Cold.as_str()
    }

    /// Whether pages may come after the guest was handed over.
    pub(crate) fn may_be_late(&self) -> bool {
        Mode::parse(&self.info.mode).is_ok_and(Mode::may_be_late)
    }

    /// How pages travel. Of an agent that knew one way only, that.
    pub(crate) fn transport(&self) -> Transport {
        Transport::parse(&self.info.transport).unwrap_or_default()
    }

    /// POSTCOPY: the guest is the destination's, and only its memory is kept here.
    pub(crate) fn is_serving(&self) -> bool {
        self.role == Role::Source && !self.over && self.info.step == SourceStep::Serve.row().word
    }

    /// Writes the row, new or changed.
    pub(crate) fn save(&self, transaction: &Transaction<'_>) -> rusqlite::Result<()> {
        let json = |error: serde_json::Error| rusqlite::Error::ToSqlConversionFailure(error.into());
        let mut summary = self.info.clone();
        let details = Details::take(&mut summary);
        transaction
            .prepare_cached(&format!(
                "INSERT INTO migrations({COLUMNS}) VALUES(?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14,?15)
                     ON CONFLICT(id) DO UPDATE SET instance=?2,role=?3,peer=?4,epoch=?5,over=?6,armed=?7,said=?8,
                                                   resumed=?9,user_paused=?10,options=?11,info=?12,began=?13,details=?14,
                                                   peer_journal=?15"
            ))?
            .execute((
                self.id.to_string(),
                self.instance.to_string(),
                self.role.as_str(),
                &self.peer,
                self.epoch,
                self.over,
                self.armed,
                &self.said,
                self.resumed,
                self.user_paused,
                serde_json::to_string(&self.options).map_err(json)?,
                serde_json::to_string(&summary).map_err(json)?,
                self.began,
                serde_json::to_string(&details).map_err(json)?,
                self.peer_journal.map(|journal| journal.to_string()),
            ))
            .map(drop)
    }

    /// The migration with this id.
    pub(crate) fn find(connection: &Connection, id: Uuid) -> rusqlite::Result<Option<Self>> {
        connection
            .prepare_cached(&format!("SELECT {COLUMNS} FROM migrations WHERE id=?1"))?
            .query_row([id.to_string()], Self::from_row)
            .optional()
    }

    /// The last reports of so many migrations at most that were accepted after the one of this row, in their order, as they were written.
    /// There may be thousands: nothing else of them is read, and whoever asked for them makes sense of them, not the journal's thread.
    pub(crate) fn reports(
        connection: &Connection,
        after: i64,
        most: u32,
        depth: Depth,
    ) -> rusqlite::Result<Vec<Report>> {
        let details = match depth {
            Depth::Summary => "NULL",
            Depth::Full => "details",
        };
        connection
            .prepare_cached(&format!(
                "SELECT rowid,info,{details} FROM migrations WHERE rowid>?1 ORDER BY rowid LIMIT ?2"
            ))?
            .query_map((after, most), Report::from_row)?
            .collect()
    }

    /// The reports of the last migrations to or from this host that are over, the newest first, so many at most.
    pub(crate) fn last_with(connection: &Connection, peer: &str, most: u32) -> rusqlite::Result<Vec<Report>> {
        connection
            .prepare_cached(
                "SELECT rowid,info,details FROM migrations WHERE peer=?1 AND over=1 ORDER BY rowid DESC LIMIT ?2",
            )?
            .query_map((peer, most), Report::from_row)?
            .collect()
    }

    /// The migrations that are not over, in the order in which they were accepted: a row keeps the place in which it was added.
    pub(crate) fn unfinished(connection: &Connection) -> rusqlite::Result<Vec<Self>> {
        connection
            .prepare(&format!("SELECT {COLUMNS} FROM migrations WHERE over=0 ORDER BY rowid"))?
            .query_map((), Self::from_row)?
            .collect()
    }

    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        let role: String = row.get(2)?;
        Ok(Self {
            id: uuid(&row.get::<_, String>(0)?, 0)?,
            instance: uuid(&row.get::<_, String>(1)?, 1)?,
            role: [Role::Source, Role::Destination]
                .into_iter()
                .find(|known| known.as_str() == role)
                .ok_or_else(|| bad_text(2, format!("role {role:?}")))?,
            peer: row.get(3)?,
            epoch: row.get(4)?,
            over: row.get(5)?,
            armed: row.get(6)?,
            said: row.get(7)?,
            resumed: row.get(8)?,
            user_paused: row.get(9)?,
            options: serde_json::from_str(&row.get::<_, String>(10)?).map_err(|error| bad_text(10, error))?,
            info: read(&row.get::<_, String>(11)?, Some(&row.get::<_, String>(13)?))
                .map_err(|error| bad_text(11, error))?,
            began: row.get(12)?,
            peer_journal: row
                .get::<_, Option<String>>(14)?
                .map(|journal| uuid(&journal, 14))
                .transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{Journal, RowWrite};
    use super::*;

    const ID: Uuid = Uuid::from_u128(7);

    fn info() -> MigrationInfo {
        MigrationInfo {
            id: ID.to_string(),
            status: "completed".to_owned(),
            total_ms: Some(0.1),
            rounds: vec![Round {
                pages: 3,
                ..Round::default()
            }],
            decisions: vec![MigrationDecision {
                words: "as good as it gets".to_owned(),
                blackout_ms: Some(1.25),
                ..MigrationDecision::default()
            }],
            ..MigrationInfo::default()
        }
    }

    fn row() -> MigrationRow {
        MigrationRow {
            id: ID,
            instance: Uuid::from_u128(1),
            role: Role::Source,
            peer: "b".to_owned(),
            epoch: 1,
            over: true,
            armed: 1,
            said: None,
            resumed: None,
            user_paused: false,
            options: MigrationOptions::default(),
            info: info(),
            began: 0,
            peer_journal: Some(Uuid::from_u128(9)),
        }
    }

    async fn reports(journal: &Journal, depth: Depth) -> Vec<MigrationInfo> {
        let read = journal.read(move |c| MigrationRow::reports(c, 0, 10, depth)).await;
        read.unwrap().iter().map(|report| report.read().unwrap()).collect()
    }

    async fn is_all_there(journal: &Journal) {
        let found = journal.read(|c| MigrationRow::find(c, ID)).await.unwrap().unwrap();
        assert_eq!(found.info, info());
        assert_eq!(reports(journal, Depth::Full).await, [info()]);
        assert_eq!(reports(journal, Depth::Summary).await, [Depth::Summary.of(info())]);
        let last = journal.read(|c| MigrationRow::last_with(c, "b", 1)).await.unwrap();
        assert_eq!(last[0].read().unwrap(), info());
    }

    fn open(folder: &Path) -> Journal {
        Journal::open(&folder.join("journal.db")).unwrap()
    }

    #[tokio::test]
    async fn a_record_comes_back_whole_and_its_summary_without_what_it_has_of_each_round() {
        let folder = tempfile::tempdir().unwrap();
        let journal = open(folder.path());
        journal.write(RowWrite::Test, |t| row().save(t)).await.unwrap();
        is_all_there(&journal).await;
        let summary = Depth::Summary.of(info());
        assert_eq!((summary.rounds.len(), summary.decisions.len()), (0, 0));
        assert_eq!(summary.total_ms, Some(0.1));
    }

    #[tokio::test]
    async fn a_record_of_schema_2_has_its_rounds_and_decisions_after_the_upgrade() {
        let folder = tempfile::tempdir().unwrap();
        let written = Connection::open(folder.path().join("journal.db")).unwrap();
        written.execute_batch(include_str!("golden/schema-2.sql")).unwrap();
        let whole = serde_json::to_string(&info()).unwrap();
        let add = "INSERT INTO migrations VALUES(?1,?1,'source','b',1,1,1,NULL,NULL,0,'{}',?2,0)";
        written.execute("DELETE FROM migrations", ()).unwrap();
        // Older still: it knew neither. And one that is damaged does not keep the others from being upgraded.
        for (id, info) in [(ID, &*whole), (Uuid::from_u128(8), "{}"), (Uuid::from_u128(9), "{")] {
            written.execute(add, (id.to_string(), info)).unwrap();
        }
        drop(written);

        let journal = open(folder.path());

        let remove = |info: &'static str| {
            journal.write(RowWrite::Test, move |t| {
                t.execute("DELETE FROM migrations WHERE info=?1", [info])
            })
        };
        remove("{").await.unwrap();
        assert_eq!(reports(&journal, Depth::Full).await, [info(), MigrationInfo::default()]);
        remove("{}").await.unwrap();
        is_all_there(&journal).await;
    }
}
