//! Migrations of which nothing is left to do but to write that they are over.
//!
//! The agent before this one ended between the last that it did for a migration and the migration's last row. Meanwhile the instance
//! may have been given to another migration: it moves on before the row of its arrival is written, or it stayed and is migrated again.

use std::sync::Arc;

use ferry_migration::handover::Decision;
use uuid::Uuid;

use crate::agent::backends::room;
use crate::agent::events::end_of_migration;
use crate::agent::failure::Failure;
use crate::agent::instances::Agent;
use crate::agent::journal::{DecisionRow, InstanceRow, MigrationRow, Role, RowWrite};
use crate::agent::outgoing::{note_completed, now_text};

/// The unfinished migrations of one instance.
#[derive(Debug, Default)]
pub(super) struct OfInstance {
    /// The one that has it.
    pub(super) current: Option<MigrationRow>,
    /// Those that had it before: each had been done with it before another could be accepted.
    pub(super) earlier: Vec<MigrationRow>,
}

impl OfInstance {
    /// Tells them apart by the instance's own row, which names a migration in the transaction that accepts or prepares it.
    pub(super) fn new(instance: &InstanceRow, unfinished: &[MigrationRow]) -> Self {
        let mut found = Self::default();
        // One that serves late pages has no instance here any more, whatever came since.
        let its_own = |row: &&MigrationRow| row.instance == instance.id && !row.is_serving();
        for row in unfinished.iter().filter(its_own) {
            match instance.migration == Some(row.id) {
                true => found.current = Some(row.clone()),
                false => found.earlier.push(row.clone()),
            }
        }
        found
    }
}

/// Writes the last row of a migration that had an instance of this host before another migration has it.
pub(super) async fn of_one_before(agent: &Arc<Agent>, row: MigrationRow) -> Result<(), Failure> {
    tracing::info!(migration = %row.id, instance = %row.instance, "a migration that another one came after was not written as over");
    let has_arrived = has_arrived(agent, &row).await?;
    settle(agent, row, has_arrived).await
}

/// Writes the last row of a migration whose instance left this host, or was removed. What was made here of disks that did not come
/// whole goes, too, and what is left of those that went.
pub(super) async fn of_one_without_its_instance(agent: &Arc<Agent>, row: MigrationRow) -> Result<(), Failure> {
    let has_arrived = has_arrived(agent, &row).await?;
    let is_nobodys = match row.role {
        Role::Source => has_arrived,
        // The disks of a guest that came are its user's, who may have deleted the instance alone.
        Role::Destination => !has_arrived,
    };
    if is_nobodys {
        room::remove(&row.info.copied_disks, row.instance, agent.host());
    }
    settle(agent, row, has_arrived).await
}

/// Whether the guest became the destination's.
async fn has_arrived(agent: &Agent, row: &MigrationRow) -> Result<bool, Failure> {
    match row.role {
        Role::Destination => Ok(decision_of(agent, row.id).await? == Some(Decision::Running)),
        Role::Source => Ok(row.said.as_deref() == Some(Decision::Running.as_str())),
    }
}

async fn settle(agent: &Arc<Agent>, mut row: MigrationRow, has_arrived: bool) -> Result<(), Failure> {
    let (here, there) = (agent.host().to_owned(), row.peer.clone());
    let (source, destination) = match row.role {
        Role::Destination => {
            // Its driver does that before its last row.
            agent.marks.remove(row.id);
            (there, here)
        }
        Role::Source => (here, there),
    };
    match has_arrived {
        true => completed(&mut row, destination),
        false => failed(&mut row, source),
    }
    over(agent, row).await
}

async fn decision_of(agent: &Agent, migration: Uuid) -> Result<Option<Decision>, Failure> {
    let newest = move |connection: &rusqlite::Connection| DecisionRow::newest(connection, migration);
    Ok(agent.journal.read(newest).await?.map(|row| row.decision))
}

fn completed(row: &mut MigrationRow, at: String) {
    note_completed(&mut row.info);
    row.info.guest_location = Some(at);
    // How many were missing last is in no journal: all of them came, or the guest ended without them.
    row.info.late_missing = None;
    row.info.decision = None;
}

fn failed(row: &mut MigrationRow, at: String) {
    // Not of one that a person ended: its record says all.
    if row.info.ended.is_some() {
        return;
    }
    row.info.guest_location = Some(at);
    row.info.status = "failed".to_owned();
    row.info
        .error
        .get_or_insert_with(|| "the agent ended during it".to_owned());
}

async fn over(agent: &Arc<Agent>, mut row: MigrationRow) -> Result<(), Failure> {
    row.over = true;
    row.info.link_lost_until = None;
    row.info.ended = Some(now_text());
    let end = end_of_migration(&agent.context_of(row.id).await, &row.info, None);
    let written = agent.journal.write(RowWrite::FoundOver, move |transaction| {
        row.save(transaction)?;
        end.of_migration(transaction, &row.id.to_string())
    });
    written.await.map_err(Failure::from)
}

#[cfg(test)]
mod tests {
    use ferry_proto::agent::v1::{InstanceSpec, MigrationInfo, MigrationOptions};

    use super::*;
    use crate::agent::journal::Status;
    use crate::agent::steps::SourceStep;

    fn instance(migration: u128) -> InstanceRow {
        InstanceRow {
            id: Uuid::from_u128(1),
            status: Status::Running,
            epoch: 2,
            known_epoch: 2,
            spec: InstanceSpec::default(),
            migration: Some(Uuid::from_u128(migration)),
            reason: None,
            boot_id: String::new(),
            restarts: Default::default(),
        }
    }

    fn migration(id: u128, role: Role, step: SourceStep) -> MigrationRow {
        MigrationRow {
            id: Uuid::from_u128(id),
            instance: Uuid::from_u128(1),
            role,
            peer: "a".to_owned(),
            epoch: 1,
            over: false,
            armed: 0,
            said: None,
            resumed: None,
            user_paused: false,
            options: MigrationOptions::default(),
            info: MigrationInfo {
                step: step.to_string(),
                ..MigrationInfo::default()
            },
            began: 0,
            peer_journal: None,
        }
    }

    fn ids(rows: &[MigrationRow]) -> Vec<u128> {
        rows.iter().map(|row| row.id.as_u128()).collect()
    }

    #[test]
    fn the_migration_that_the_instance_names_has_it_and_those_before_it_had_it() {
        let rows = [
            migration(10, Role::Destination, SourceStep::Copy),
            migration(11, Role::Source, SourceStep::Copy),
            migration(12, Role::Source, SourceStep::Copy),
        ];
        let onward = OfInstance::new(&instance(12), &rows);
        assert_eq!(onward.current.map(|row| row.id.as_u128()), Some(12));
        assert_eq!(ids(&onward.earlier), [10, 11]);
        let ended_since = OfInstance::new(&instance(13), &rows[..1]);
        assert!(ended_since.current.is_none());
        assert_eq!(ids(&ended_since.earlier), [10]);
    }

    #[test]
    fn other_instances_and_memory_that_is_served_are_nothing_to_it() {
        let mut other = migration(10, Role::Source, SourceStep::Copy);
        other.instance = Uuid::from_u128(2);
        let rows = [other, migration(11, Role::Source, SourceStep::Serve)];
        let found = OfInstance::new(&instance(12), &rows);
        assert!(found.current.is_none() && found.earlier.is_empty(), "{found:?}");
    }
}
