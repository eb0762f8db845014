//! A destination whose guest waits for pages asks whether they are still here.
//!
//! Only what is certain is answered: they are here, or they are gone for good. A destination that hears neither waits on.

use ferry_migration::handover::{Decision, Wish};
use ferry_proto::agent::v1::{LatePagesReply, LatePagesRequest, MigrationInfo};
use ferry_proto::wire_uuid;

use super::handle::{Outgoing, now_text};
use crate::agent::events::{Action, Subject, end_of_migration};
use crate::agent::failure::Failure;
use crate::agent::instances::Agent;
use crate::agent::journal::{EventEnd, MigrationRow, Role, RowWrite};
use crate::agent::steps::SourceStep;

/// Characters that are kept of what a destination says: it chose the length.
const MOST_WORDS: usize = 1000;

impl Agent {
    /// Agent B asks whether its guest's pages are here, or says that it is lost without them.
    ///
    /// # Errors
    /// A field cannot be used, the migration does not go from here to that host, or the journal fails.
    pub(crate) async fn late_pages(&self, request: LatePagesRequest) -> Result<LatePagesReply, Failure> {
        let migration = wire_uuid("migration", &request.migration)?;
        self.peers.named(&request.destination)?;
        let row = self
            .journal
            .read(move |connection| MigrationRow::find(connection, migration))
            .await?;
        // Of a migration that nobody knows here nothing is known: the journal may be another one than it was.
        let Some(row) = row else {
            return Ok(LatePagesReply::default());
        };
        if row.role != Role::Source || row.peer != request.destination {
            return Err(Failure::Refused(format!(
                "migration {migration} does not go from here to host {:?}",
                request.destination
            )));
        }
        let lost: String = request.lost.chars().take(MOST_WORDS).collect();
        if let Some(outgoing) = self.outgoing.find(migration) {
            if !lost.is_empty() {
                outgoing.guest_lost.send_replace(Some(lost));
            }
            return Ok(outgoing.pages());
        }
        let reply = pages_of(&row);
        if !reply.gone.is_empty() && !lost.is_empty() {
            self.guest_was_lost(row, lost).await?;
        }
        Ok(reply)
    }

    /// A migration that was over here, and taken for completed, cost the guest.
    async fn guest_was_lost(&self, mut row: MigrationRow, lost: String) -> Result<(), Failure> {
        if row.info.status != "completed" {
            return Ok(());
        }
        tracing::error!(migration = %row.id, lost, "a guest is lost without pages that are here no more");
        note_lost(&mut row.info, &row.peer, &lost);
        let subject = Subject::migration(row.instance, &row.info.name, row.id);
        let context = self.context_of(row.id).await;
        let end = EventEnd {
            finished: now_text(),
            ..end_of_migration(&context, &row.info, None)
        };
        self.journal
            .write(RowWrite::LostAfterwards, move |transaction| row.save(transaction))
            .await?;
        // The migration's own event has its end.
        self.record_end(&context, Action::AskForPages, subject, end).await;
        Ok(())
    }
}

/// What the record says of a guest that was lost at the destination.
pub(super) fn note_lost(info: &mut MigrationInfo, peer: &str, reason: &str) {
    info.status = "error".to_owned();
    info.guest_ended = Some("lost".to_owned());
    info.error = Some(format!("on host {peer}: {reason}"));
}

impl Outgoing {
    /// Whether the pages are here that the destination may lack.
    fn pages(&self) -> LatePagesReply {
        if let Some(gone) = self.pages_lost.borrow().clone() {
            return LatePagesReply {
                gone,
                ..LatePagesReply::default()
            };
        }
        LatePagesReply {
            // Once the copy is destroyed the record is about to say so, and speaks for itself.
            kept: !self.has_let_go(),
            words: self.info.borrow().decision.clone().unwrap_or_default(),
            ..LatePagesReply::default()
        }
    }
}

/// The same of a migration that has no task. Where the guest was given away and all is over, nothing of it is left.
fn pages_of(row: &MigrationRow) -> LatePagesReply {
    let said = row.said.as_deref();
    // What was kept for it, a person may have freed.
    let is_discarded = said == Some(Wish::DiscardHere.as_str()) && row.info.step == SourceStep::Serve.row().word;
    let is_gone = row.over && (said == Some(Decision::Running.as_str()) || is_discarded);
    let why = || match &row.info.error {
        Some(error) => format!("its copy of the guest is gone: {error}"),
        None => "its copy of the guest is gone, the migration is over there".to_owned(),
    };
    LatePagesReply {
        gone: is_gone.then(why).unwrap_or_default(),
        ..LatePagesReply::default()
    }
}

#[cfg(test)]
mod tests {
    use ferry_proto::agent::v1::MigrationOptions;
    use uuid::Uuid;

    use super::*;

    fn row(over: bool, said: Option<&str>) -> MigrationRow {
        MigrationRow {
            id: Uuid::from_u128(1),
            instance: Uuid::from_u128(2),
            role: Role::Source,
            peer: "b".to_owned(),
            epoch: 1,
            over,
            armed: 1,
            said: said.map(str::to_owned),
            resumed: None,
            user_paused: false,
            options: MigrationOptions::default(),
            info: MigrationInfo::default(),
            began: 0,
            peer_journal: None,
        }
    }

    #[test]
    fn only_of_a_guest_that_was_given_away_and_of_which_nothing_is_left_the_pages_are_gone() {
        assert!(pages_of(&row(true, Some("RUNNING"))).gone.contains("gone"));
        let mut freed = row(true, Some("discard-here"));
        assert_eq!(
            pages_of(&freed),
            LatePagesReply::default(),
            "the guest may never have left"
        );
        freed.info.step = SourceStep::Serve.row().word.to_owned();
        assert!(pages_of(&freed).gone.contains("gone"));
        // It is being taken up; it stayed here, or a person ended it; nobody ever said.
        for row in [
            row(false, Some("RUNNING")),
            row(true, Some("SRC")),
            row(true, Some("run-here")),
            row(true, None),
        ] {
            assert_eq!(pages_of(&row), LatePagesReply::default());
        }
    }
}
