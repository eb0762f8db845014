//! What the other agent of a migration may ask, and what it is told.

use ferry_migration::handover::{Decision, Wish};
use ferry_proto::agent::v1::{AttemptRequest, DecisionReply, DestinationPart};
use ferry_proto::wire_uuid;
use uuid::Uuid;

use super::ComputeService;
use crate::agent::failure::Failure;
use crate::agent::journal::{InstanceRow, MigrationRow, Role};
use crate::agent::peer_journal::check_question;

impl ComputeService {
    /// Decide, Expect and their like are answered only to the host that the migration's record names.
    pub(super) async fn check_peer(&self, migration: Uuid, source: &str) -> Result<(), Failure> {
        self.0.peers.named(source)?;
        let foreign = || Failure::Refused(format!("migration {migration} does not come from host {source:?}"));
        if let Some(incoming) = self.0.incoming.find(migration) {
            return if incoming.of.source == source {
                Ok(())
            } else {
                Err(foreign())
            };
        }
        let row = self
            .0
            .journal
            .read(move |connection| MigrationRow::find(connection, migration))
            .await?;
        match row {
            Some(row) if row.role != Role::Destination || row.peer != source => Err(foreign()),
            _ => Ok(()),
        }
    }

    /// Whether an instance that was here is neither here nor where it went from here.
    pub(super) async fn is_deleted(&self, instance: &str) -> Result<bool, Failure> {
        let id = wire_uuid("instance", instance)?;
        if self.0.instances.by_id(id).is_some() {
            return Ok(false);
        }
        let moved_to = self
            .0
            .journal
            .read(move |connection| InstanceRow::moved_to(connection, &id.to_string()))
            .await?;
        Ok(moved_to.is_none())
    }

    /// The epoch under which this host had a guest again that had left in a migration; 0 if it never did. A migration that
    /// nobody knows here is one whose guest nobody has here.
    pub(super) async fn kept_epoch(&self, migration: Uuid, destination: &str) -> Result<u64, Failure> {
        let row = self
            .0
            .journal
            .read(move |connection| MigrationRow::find(connection, migration))
            .await?;
        let Some(row) = row else { return Ok(0) };
        if row.role != Role::Source || row.peer != destination {
            return Err(goes_elsewhere(migration, destination));
        }
        let is_gone = [Decision::Running.as_str(), Wish::DiscardHere.as_str()];
        match row.said {
            Some(said) if is_gone.contains(&said.as_str()) => Ok(0),
            _ => Ok(row.resumed.unwrap_or(0)),
        }
    }

    /// A question for another journal than this agent's: nothing is known of it here.
    pub(super) fn check_journal(&self, told: &str) -> Result<(), Failure> {
        check_question(self.0.host(), self.0.journal.id(), told)
    }

    pub(super) fn decision_reply(&self, (decision, part): (Decision, Option<DestinationPart>)) -> DecisionReply {
        DecisionReply {
            decision: decision.to_string(),
            part,
            journal: self.0.journal.id().to_string(),
        }
    }

    /// The tuple (vm, M, n, e) of a request, as far as the record knows it.
    pub(super) async fn check_attempt(&self, request: &AttemptRequest) -> Result<Uuid, Failure> {
        self.check_journal(&request.journal)?;
        let migration = wire_uuid("migration", &request.migration)?;
        self.check_peer(migration, &request.source).await?;
        let row = self
            .0
            .journal
            .read(move |connection| MigrationRow::find(connection, migration))
            .await?;
        let is_other = |row: &MigrationRow| row.instance.to_string() != request.instance || row.epoch != request.epoch;
        if row.as_ref().is_some_and(is_other) {
            return Err(Failure::Refused(format!(
                "migration {migration} is of another instance or epoch here"
            )));
        }
        Ok(migration)
    }
}

pub(super) fn goes_elsewhere(migration: Uuid, host: &str) -> Failure {
    Failure::Refused(format!("migration {migration} does not go from here to host {host:?}"))
}
