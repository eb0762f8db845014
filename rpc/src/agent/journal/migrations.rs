//! The migrations in which this host takes or took part.

use ferry_proto::agent::v1::{MigrationInfo, MigrationOptions};
use rusqlite::{Connection, OptionalExtension, Row, Transaction};
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
}

/// What is to be known of a migration, as it was last written.
pub(crate) struct Report {
    row: i64,
    written: String,
}

impl Report {
    /// Its place among all: the later one was accepted later.
    pub(crate) fn row(&self) -> i64 {
        self.row
    }

    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            row: row.get(0)?,
            written: row.get(1)?,
        })
    }

    /// What it says.
    ///
    /// # Errors
    /// It is not what this agent writes.
    pub(crate) fn read(&self) -> serde_json::Result<MigrationInfo> {
        serde_json::from_str(&self.written)
    }
}

const COLUMNS: &str = "id,instance,role,peer,epoch,over,armed,said,resumed,user_paused,options,info,began";

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
        transaction
            .prepare_cached(&format!(
                "INSERT INTO migrations({COLUMNS}) VALUES(?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13)
                     ON CONFLICT(id) DO UPDATE SET instance=?2,role=?3,peer=?4,epoch=?5,over=?6,armed=?7,said=?8,
                                                   resumed=?9,user_paused=?10,options=?11,info=?12,began=?13"
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
                serde_json::to_string(&self.info).map_err(json)?,
                self.began,
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
    pub(crate) fn reports(connection: &Connection, after: i64, most: u32) -> rusqlite::Result<Vec<Report>> {
        connection
            .prepare_cached("SELECT rowid, info FROM migrations WHERE rowid>?1 ORDER BY rowid LIMIT ?2")?
            .query_map((after, most), Report::from_row)?
            .collect()
    }

    /// The reports of the last migrations to or from this host that are over, the newest first, so many at most.
    pub(crate) fn last_with(connection: &Connection, peer: &str, most: u32) -> rusqlite::Result<Vec<Report>> {
        connection
            .prepare_cached("SELECT rowid, info FROM migrations WHERE peer=?1 AND over=1 ORDER BY rowid DESC LIMIT ?2")?
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
            info: serde_json::from_str(&row.get::<_, String>(11)?).map_err(|error| bad_text(11, error))?,
            began: row.get(12)?,
        })
    }
}
