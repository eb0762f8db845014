//! `ferry migration resolve`: a person ends a migration of which nobody knows who has the guest.

use std::sync::Arc;

use ferry_migration::handover::{Decision, Doubt, Epoch, NotResolved, Peer, Side, Wish};
use ferry_proto::agent::v1::{HostRequest, MigrationInfo, ResolveRequest};
use ferry_proto::{InvalidField, wire_uuid};

use super::backends::Occasion;
use super::context::RequestContext;
use super::events::{Action, Subject};
use super::failure::Failure;
use super::instances::{Agent, Instance, InstanceState};
use super::journal::{InstanceRow, MigrationRow, Role, RowWrite, Status};
use super::peer_journal::check_answer;
use super::peers::{CALL_TIME, ComputeClient, PeerError};

impl Agent {
    /// Ends the doubt about an instance of this host.
    ///
    /// # Errors
    /// It is not for a person to end, the name that was typed is another, or the guest could not be started: then the doubt is
    /// ended all the same, and the failure says so.
    pub(crate) async fn resolve_migration(
        self: &Arc<Self>,
        request: ResolveRequest,
        context: &RequestContext,
    ) -> Result<MigrationInfo, Failure> {
        let id = wire_uuid("migration", &request.migration)?;
        let wish = Wish::parse(&request.wish).ok_or_else(|| InvalidField {
            field: "wish",
            problem: format!("{:?} is not one of run-here, discard-here", request.wish),
        })?;
        let find = move |connection: &rusqlite::Connection| MigrationRow::find(connection, id);
        let row = self.journal.read(find).await?.ok_or_else(|| Failure::NotFound {
            what: format!("migration {id}"),
            moved_to: None,
        })?;
        let instance = self.instances.by_id(row.instance);
        let is_kept = row.is_serving() && !row.over;
        if instance.is_none() && !is_kept {
            return Err(self.not_here(&row.info.name).await);
        }
        let subject = Subject::migration(row.instance, &row.info.name, id);
        let resolve = async {
            // Before the instance is locked: this takes as long as a silent host is waited for.
            let peer = self.contact(context, &row).await;
            let peer = peer.by_word_of(request.host_is_gone, &row)?;
            let said = (wish, request.confirm.as_str());
            let Some(instance) = instance.filter(|_| !is_kept) else {
                self.resolve_kept_pages(&row, said, peer, context).await?;
                return Ok(self.journal.read(find).await?.unwrap_or_else(|| row.clone()).info);
            };
            match row.role {
                Role::Source => self.resolve_at_source(&instance, &row, said, peer, context).await?,
                Role::Destination => {
                    self.resolve_at_destination(&instance, &row, said, peer, context)
                        .await?;
                }
            }
            let resolved = self.journal.read(find).await?;
            if wish == Wish::RunHere {
                self.start_resolved(&instance).await?;
            }
            Ok(resolved.unwrap_or_else(|| row.clone()).info)
        };
        self.recorded(context, Action::Resolve, Some(subject), resolve).await
    }

    /// Whether the other agent is there at all. A refusal is an answer.
    async fn contact(&self, context: &RequestContext, row: &MigrationRow) -> Contact {
        let Ok(peer) = self.peers.named(&row.peer) else {
            return Contact::Unasked(format!("this agent was started without --peer for host {}", row.peer));
        };
        let host = |mut client: ComputeClient| async move { client.host(HostRequest {}).await };
        match peer.ask(context, CALL_TIME, host).await {
            Ok(info) => match check_answer(peer, row.peer_journal, &info.journal) {
                Ok(()) => Contact::Asked(Peer::Answers),
                Err(another) => Contact::Unasked(another.chain()),
            },
            Err(PeerError::Refused { .. }) => Contact::Asked(Peer::Answers),
            Err(PeerError::NoAnswer(_)) => Contact::Asked(Peer::Silent),
        }
    }

    /// The task that drives the switchover ends it: nothing decides beside that.
    async fn resolve_at_source(
        &self,
        instance: &Instance,
        row: &MigrationRow,
        (wish, confirm): (Wish, &str),
        peer: Peer,
        context: &RequestContext,
    ) -> Result<(), Failure> {
        let said = row.said.as_deref().and_then(Decision::parse);
        {
            let state = instance.state.lock().await;
            let side = Side::Source(said);
            check(&state, row, (wish, confirm), side, peer)?;
        }
        let decided = || {
            Failure::Refused(format!(
                "migration {} was decided meanwhile: see it with `show`",
                row.id
            ))
        };
        let outgoing = self.outgoing.find(row.id).ok_or_else(decided)?;
        outgoing
            .resolve(wish, context.clone())
            .await
            .unwrap_or_else(|| Err(decided()))
    }

    /// The guest has left, its memory is kept for it, and the host that it is on does not come back: nobody will ever say that it needs
    /// no more pages.
    async fn resolve_kept_pages(
        &self,
        row: &MigrationRow,
        (wish, confirm): (Wish, &str),
        peer: Peer,
        context: &RequestContext,
    ) -> Result<(), Failure> {
        let refused = |why: String| Err(Failure::Refused(format!("migration {} is not resolved: {why}", row.id)));
        let (name, host) = (&row.info.name, &row.peer);
        if wish == Wish::RunHere {
            return refused(format!(
                "the guest has run on host {host}, what is kept here is a part of its memory of before that. --discard-here frees it"
            ));
        }
        if peer == Peer::Answers {
            return refused(format!(
                "host {host} answers, and settles it by itself: wait for it, or stop its agent if it cannot"
            ));
        }
        if confirm != name {
            return refused(format!(
                "--confirm says {confirm:?}, the instance is called {name:?}: nothing was done"
            ));
        }
        let outgoing = self.outgoing.find(row.id);
        let answer = match &outgoing {
            Some(outgoing) => outgoing.resolve(wish, context.clone()).await,
            None => None,
        };
        answer.unwrap_or_else(|| refused("it is over".to_owned()))
    }

    /// The guest came here and crashed, and its source does not say whether it has it again.
    async fn resolve_at_destination(
        &self,
        instance: &Instance,
        row: &MigrationRow,
        (wish, confirm): (Wish, &str),
        peer: Peer,
        context: &RequestContext,
    ) -> Result<(), Failure> {
        let mut state = instance.state.lock().await;
        let epoch = check(&state, row, (wish, confirm), Side::Destination, peer)?;
        let audit = context.did("resolve", &instance.id.to_string(), wish.as_str());
        let mut resolved = state.row.clone();
        let Some(epoch) = epoch else {
            let (source, migration) = (row.peer.clone(), row.id);
            self.journal
                .write(RowWrite::Resolved, move |transaction| {
                    InstanceRow::depart(transaction, &resolved, &source, migration)?;
                    audit.add(transaction)
                })
                .await?;
            state.row.restarts.due = None;
            self.instances.remove(instance.id);
            self.remove_folder(instance.id);
            return Ok(());
        };
        become_resolved(&mut resolved, epoch);
        let saved = resolved.clone();
        self.journal
            .write(RowWrite::Resolved, move |transaction| {
                saved.save(transaction)?;
                audit.add(transaction)
            })
            .await?;
        state.row = resolved;
        Ok(())
    }

    /// Boots a guest anew that a person gave to this host, under the epoch that is journalled for it.
    async fn start_resolved(self: &Arc<Self>, instance: &Arc<Instance>) -> Result<(), Failure> {
        let mut state = instance.state.lock().await;
        if state.row.status != Status::Crashed {
            // It was started since, or deleted.
            return Ok(());
        }
        let epoch = state.row.known_epoch;
        self.start(instance, &mut state, Occasion::Start, epoch)
            .await
            .map_err(|failure| {
                Failure::Refused(format!(
                    "the migration is resolved and the guest is this host's, but it could not be started, `ferry start` tries \
                     again: {}",
                    failure.chain()
                ))
            })
    }
}

/// What came of looking for the other agent of a migration.
enum Contact {
    /// It was asked.
    Asked(Peer),
    /// It could not be, and why: it may be up, and have the guest.
    Unasked(String),
}

impl Contact {
    /// What counts: one that cannot be asked is silent where a person says that its host is gone.
    ///
    /// # Errors
    /// Nobody says so.
    fn by_word_of(self, host_is_gone: bool, row: &MigrationRow) -> Result<Peer, Failure> {
        match self {
            Self::Asked(peer) => Ok(peer),
            Self::Unasked(_) if host_is_gone => Ok(Peer::Silent),
            Self::Unasked(why) => Err(Failure::Refused(format!(
                "migration {} is not resolved: whether host {host} has the guest cannot be asked: {why}. Start this agent with --peer \
                 {host}=URL of the agent that has its journal; if that host is gone for good, say so: --host-is-gone",
                row.id,
                host = row.peer
            ))),
        }
    }
}

/// What an instance's row becomes when a person gave the guest to this host. Its epoch is a right that nobody had: from here
/// on every other copy is stale.
pub(crate) fn become_resolved(row: &mut InstanceRow, epoch: Epoch) {
    row.status = Status::Crashed;
    row.reason = Some("its migration was resolved: it is to run here, booted anew".to_owned());
    row.epoch = epoch.0;
    row.known_epoch = epoch.0;
    row.restarts = Default::default();
}

fn check(
    state: &InstanceState,
    row: &MigrationRow,
    (wish, confirm): (Wish, &str),
    side: Side,
    peer: Peer,
) -> Result<Option<Epoch>, Failure> {
    let name = &state.row.spec.name;
    // Of two migrations it is the last one that the doubt is about.
    let is_about_it = match side {
        Side::Source(_) => state.migrating == Some(row.id),
        Side::Destination => {
            state.migrating.is_none()
                && state
                    .arrival
                    .as_ref()
                    .is_some_and(|arrival| arrival.migration == row.id)
        }
    };
    let doubt = Doubt {
        side,
        is_indeterminate: state.row.status == Status::Indeterminate && is_about_it,
        known: Epoch(state.row.known_epoch),
        peer,
    };
    let epoch = doubt.resolve(wish).map_err(|why| {
        let remedy = match why {
            NotResolved::NoDoubt => format!(": instance {name} is {}", state.row.status),
            NotResolved::PeerAnswers => format!(" (host {}): wait for it, or stop its agent if it cannot", row.peer),
            NotResolved::Decided(Decision::Source) => {
                ": the guest goes on here as soon as its disks are free".to_owned()
            }
            NotResolved::Decided(_) => String::new(),
        };
        Failure::Refused(format!("migration {} is not resolved: {why}{remedy}", row.id))
    })?;
    if confirm != name {
        return Err(Failure::Refused(format!(
            "--confirm says {confirm:?}, the instance is called {name:?}: nothing was done"
        )));
    }
    Ok(epoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> MigrationRow {
        MigrationRow {
            id: uuid::Uuid::from_u128(7),
            instance: uuid::Uuid::from_u128(1),
            role: Role::Source,
            peer: "b".to_owned(),
            epoch: 1,
            over: false,
            armed: 1,
            said: None,
            resumed: None,
            user_paused: false,
            options: Default::default(),
            info: MigrationInfo::default(),
            began: 0,
            peer_journal: None,
        }
    }

    #[test]
    fn a_host_that_cannot_be_asked_is_silent_only_by_its_users_word() {
        let unasked = || Contact::Unasked("nobody knows its URL".to_owned());
        let refused = unasked().by_word_of(false, &row()).unwrap_err().chain();
        assert!(
            ["nobody knows its URL", "--peer b=URL", "--host-is-gone"]
                .iter()
                .all(|words| refused.contains(words)),
            "{refused}"
        );
        assert_eq!(unasked().by_word_of(true, &row()).unwrap(), Peer::Silent);
    }

    #[test]
    fn what_an_agent_that_was_asked_does_outweighs_its_users_word() {
        for word in [false, true] {
            let answers = Contact::Asked(Peer::Answers).by_word_of(word, &row());
            assert_eq!(answers.unwrap(), Peer::Answers);
            let silent = Contact::Asked(Peer::Silent).by_word_of(word, &row());
            assert_eq!(silent.unwrap(), Peer::Silent);
        }
    }
}
