//! POSTCOPY: the guest is the destination's and runs there, and pages of its memory are still here.
//!
//! ```text
//!   RUNNING ─► VMM A drops its vCPUs ─► POSTCOPY journalled, the instance has left ─► serving ─ the last page is there ─► over, freed
//!                                                                        │   ▲
//!                                        connections lost: B is asked ───┘   └─ others, as long as B needs pages
//!                                        VMM A lost: B is told, or asks, and its guest is lost with it
//! ```
//!
//! Nothing is decided here: D is RUNNING. VMM A serves by itself; an agent that ends meanwhile, at either host, changes nothing.

use std::sync::Arc;
use std::time::Duration;

use ferry_migration::handover::{Decision, Ending, RestartPolicy, Wish};
use ferry_proto::agent::v1::{InstanceSpec, LateLinkReply, LateLinkRequest, MigrationInfo};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report as Body;
use tokio::sync::mpsc;

use super::calls::order_until_answered;
use super::ending::note_resolved;
use super::handle::Resolving;
use super::late_pages::note_lost;
use super::script::Script;
use super::streams::late_streams;
use super::switchover::next;
use crate::agent::backends::room;
use crate::agent::failure::Failure;
use crate::agent::instances::{Agent, Instance, VmmNews};
use crate::agent::journal::{InstanceRow, MigrationRow, RowWrite, Status};
use crate::agent::spawn;
use crate::agent::steps::SourceStep;
use crate::agent::vmm_client::{Vmm, VmmError};

/// The pauses between two times that the destination is asked for other connections; the last one for ever.
const PAUSES: [Duration; 5] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
];

/// How long the destination's own figures are waited for, once it has every page.
const FIGURES: Duration = Duration::from_secs(3);

/// What ends serving.
enum End {
    /// The destination needs no more pages. What it says of that, if it said something.
    NotNeeded(Option<Box<LateLinkReply>>),
    /// The pages are lost, and with them the guest.
    Lost(String),
    /// A person said that nobody will ever need them: the destination does not come back.
    Discarded,
}

impl Script {
    /// Whether the destination's guest needs pages of the copy here: its VMM says so, and drops all but the memory. One that is dead cannot
    /// say; the destination can.
    pub(super) async fn serves_pages(&mut self) -> bool {
        if !self.row.may_be_late() {
            return false;
        }
        loop {
            let reason = match order_until_answered(&self.instance, Command::ServePages(wire::ServePages {})).await {
                Some(Ok(_)) | None => return true,
                Some(Err(reason)) => reason,
            };
            // One that was stopped right after GO may hear of this before it has seen its own sending end.
            match order_until_answered(&self.instance, Command::Ping(wire::Ping {})).await {
                Some(Ok(Body::Standing(standing))) if may_come_to_serve(&standing) => {
                    tracing::info!(migration = %self.row.id, reason, "the VMM does not serve pages yet");
                    tokio::time::sleep(PAUSES[0]).await;
                }
                Some(_) => {
                    tracing::debug!(migration = %self.row.id, reason, "no page comes late");
                    return false;
                }
                None => return true,
            }
        }
    }

    /// POSTCOPY is journalled: the instance has left, and its memory stays for the destination.
    pub(super) async fn become_page_source(&mut self) -> Result<(), Failure> {
        let before = self.row.info.clone();
        self.note_step(SourceStep::Serve);
        self.row.info.guest_location = Some(self.row.peer.clone());
        let instance = self.instance.state.lock().await.row.clone();
        let (row, host, migration) = (self.row.clone(), self.row.peer.clone(), self.row.id);
        let written = self.agent.journal.write(RowWrite::Serving, move |transaction| {
            InstanceRow::depart(transaction, &instance, &host, migration)?;
            row.save(transaction)
        });
        if let Err(error) = written.await {
            self.row.info = before;
            return Err(error.into());
        }
        self.agent.instances.remove(self.row.instance);
        self.serving = true;
        self.show();
        Ok(())
    }

    /// Looks after the page source until it is not needed any more, and frees it.
    pub(super) async fn serve_pages(&mut self) {
        let end = self.until_over().await;
        self.free().await;
        if matches!(end, End::Discarded) {
            return;
        }
        self.arrived();
        match end {
            End::Discarded => {}
            End::NotNeeded(reply) => reply.iter().for_each(|reply| note_reply(&mut self.row.info, reply)),
            End::Lost(reason) => {
                tracing::error!(migration = %self.row.id, reason, "a guest is lost with the pages that it lacked");
                note_lost(&mut self.row.info, &self.row.peer, &reason);
            }
        }
    }

    /// Serves until that ends by itself or by a person's word, which is journalled before anything is freed. How fast is for its user to say.
    async fn until_over(&mut self) -> End {
        if self.row.said.as_deref() == Some(Wish::DiscardHere.as_str()) {
            return End::Discarded;
        }
        let (mut asked, mut retunings) = (self.asked_to_resolve.take(), self.asked_to_retune.take());
        loop {
            let resolving = tokio::select! {
                end = self.until_not_needed_or_lost() => return end,
                Some(resolving) = next(&mut asked) => resolving,
                Some(retuning) = next(&mut retunings) => {
                    if let Some(retuning) = retuning.carry_out(Arc::clone(&self.instance)).await {
                        self.retuned(retuning).await;
                        self.show();
                    }
                    continue;
                }
            };
            match self.journal_discarded(&resolving).await {
                Ok(()) => {
                    self.resolving = Some(resolving);
                    return End::Discarded;
                }
                Err(failure) => resolving.answer(Err(failure)),
            }
        }
    }

    async fn until_not_needed_or_lost(&mut self) -> End {
        let told_before = self.outgoing.pages_lost.borrow().clone();
        if let Some(reason) = told_before {
            return self.tell_lost(reason).await;
        }
        match self.until_not_needed().await {
            End::Lost(reason) => self.tell_lost(reason).await,
            end => end,
        }
    }

    async fn journal_discarded(&mut self, resolving: &Resolving) -> Result<(), Failure> {
        let mut row = self.row.clone();
        note_resolved(&mut row, self.agent.host(), resolving.wish);
        let audit = resolving
            .context
            .did("resolve", &row.instance.to_string(), resolving.wish.as_str());
        let saved = row.clone();
        self.agent
            .journal
            .write(RowWrite::Resolved, move |transaction| {
                saved.save(transaction)?;
                audit.add(transaction)
            })
            .await?;
        self.row = row;
        self.show();
        Ok(())
    }

    async fn until_not_needed(&mut self) -> End {
        let vmm = self.instance.state.lock().await.vmm.clone();
        let Some(vmm) = vmm.filter(|vmm| !vmm.is_dead()) else {
            return End::Lost("the VMM that kept its memory is gone".to_owned());
        };
        // What it said while nobody listened.
        let standing = match order_until_answered(&self.instance, Command::Ping(wire::Ping {})).await {
            Some(Ok(Body::Standing(standing))) => standing.late,
            _ => None,
        };
        drop(vmm);
        let mut said = standing;
        loop {
            if let Some(late) = said.take()
                && let Some(end) = self.take_late(late).await
            {
                return end;
            }
            tokio::select! {
                biased;
                news = next(&mut self.news) => match news {
                    None | Some(VmmNews::Gone) => {
                        return End::Lost(format!("on host {} {}", self.agent.host(), self.obituary().await));
                    }
                    Some(VmmNews::Event(event)) => if let Body::Late(late) = *event {
                        said = Some(late);
                    },
                    Some(VmmNews::Standing(standing)) => said = standing.late,
                },
            }
        }
    }

    async fn obituary(&self) -> String {
        self.instance.state.lock().await.vmm_obituary().await
    }

    /// What the page source says. Where it ends that, how.
    async fn take_late(&mut self, late: wire::Late) -> Option<End> {
        self.note_late(&late);
        match late.what.as_str() {
            "served" => Some(End::NotNeeded(self.figures().await)),
            "link-lost" => self.connect_again(late.reason).await,
            _ => None,
        }
    }

    fn note_late(&mut self, late: &wire::Late) {
        let info = &mut self.row.info;
        info.late_pages = Some(late.pages);
        info.late_missing = Some(late.missing_pages);
        info.late_bytes = Some(late.bytes_sent);
        info.remaining_pages = late.missing_pages;
        self.show();
    }

    /// The session is lost: as long as the destination needs pages, there are others.
    async fn connect_again(&mut self, reason: String) -> Option<End> {
        tracing::info!(migration = %self.row.id, reason, "the connections for late pages are lost");
        self.row.info.decision = Some(format!("other connections for late pages are made: {reason}"));
        self.show();
        let mut pauses = PAUSES.into_iter();
        loop {
            match self.try_to_connect().await {
                Ok(None) => {
                    self.row.info.decision = None;
                    self.show();
                    return None;
                }
                Ok(Some(end)) => return Some(end),
                Err(failure) => {
                    tracing::info!(migration = %self.row.id, error = failure.chain(), "no connections for late pages yet");
                    self.row.info.decision = Some(format!("the guest waits for pages: {}", failure.chain()));
                    self.show();
                }
            }
            tokio::time::sleep(pauses.next().unwrap_or(PAUSES[PAUSES.len() - 1])).await;
        }
    }

    async fn try_to_connect(&mut self) -> Result<Option<End>, Failure> {
        let vmm = self.instance.state.lock().await.vmm.clone();
        let Some(vmm) = vmm.filter(|vmm| !vmm.is_dead()) else {
            let why = format!("on host {} {}", self.agent.host(), self.obituary().await);
            return Ok(Some(End::Lost(why)));
        };
        let reply = self.late_link(String::new()).await?;
        if reply.lost {
            // It found out by itself: pages came damaged, or it could not take them in.
            return Ok(Some(End::Lost(reply.ended)));
        }
        if !reply.needed {
            return Ok(Some(End::NotNeeded(Some(Box::new(reply)))));
        }
        let first = u16::try_from(reply.first_index).ok();
        let indexes = first.and_then(|first| Some(first..first.checked_add(late_streams(self.streams()) + 1)?));
        let indexes = indexes.ok_or_else(|| {
            let index = reply.first_index;
            Failure::Unavailable(format!(
                "host {} wants connections from index {index} on",
                self.row.peer
            ))
        })?;
        let connections = self.connect(&reply.data_address, &reply.secret, indexes).await?;
        let link = Command::LateLink(wire::LateLink {
            migration: self.row.id.to_string(),
        });
        match vmm.order_with(link, connections).await {
            Ok(_) => Ok(None),
            Err(VmmError::Refused(reason)) => Ok(Some(End::Lost(reason))),
            Err(error) => Err(Failure::vmm("failed to hand the connections over")(error)),
        }
    }

    async fn late_link(&self, lost: String) -> Result<LateLinkReply, Failure> {
        let request = LateLinkRequest {
            migration: self.row.id.to_string(),
            source: self.agent.host().to_owned(),
            lost,
            streams: late_streams(self.streams()).into(),
            copying: false,
            late_streams: 0,
            journal: String::new(),
        };
        let compute = self.agent.compute_rpcapi(&self.outgoing.context, &self.row.peer)?;
        compute.late_link(request, self.row.peer_journal).await
    }

    /// What the destination measured, if it says so in time.
    async fn figures(&self) -> Option<Box<LateLinkReply>> {
        let asking = async {
            loop {
                match self.late_link(String::new()).await {
                    Ok(reply) if !reply.needed => return Box::new(reply),
                    _ => tokio::time::sleep(PAUSES[0]).await,
                }
            }
        };
        tokio::time::timeout(FIGURES, asking).await.ok()
    }

    /// Tells the destination that its guest's pages are lost, until it has heard it or asked by itself. It may have had all of them.
    async fn tell_lost(&mut self, reason: String) -> End {
        self.outgoing.pages_lost.send_replace(Some(reason.clone()));
        let mut heard = self.outgoing.guest_lost.subscribe();
        tokio::select! {
            biased;
            // The handle holds the sender, so this cannot fail before it is said.
            said = heard.wait_for(Option::is_some) => End::Lost(said.ok().and_then(|said| said.clone()).unwrap_or(reason)),
            end = self.until_told(&reason) => end,
        }
    }

    async fn until_told(&mut self, reason: &str) -> End {
        let mut pauses = PAUSES.into_iter();
        loop {
            match self.late_link(reason.to_owned()).await {
                Ok(reply) if reply.lost => return End::Lost(reply.ended),
                Ok(reply) => return End::NotNeeded(Some(Box::new(reply))),
                Err(failure) => {
                    self.row.info.decision = Some(format!("the guest is to be called lost: {}", failure.chain()));
                    self.show();
                }
            }
            tokio::time::sleep(pauses.next().unwrap_or(PAUSES[PAUSES.len() - 1])).await;
        }
    }

    /// The memory goes, and what is left of the instance.
    async fn free(&mut self) {
        let vmm = self.instance.state.lock().await.vmm.take();
        if let Some(vmm) = vmm {
            self.end_left_vmm(&vmm).await;
        }
        self.agent.remove_folder(self.row.instance);
        if self.row.said.as_deref() == Some(Decision::Running.as_str()) {
            // Their contents came before the guest was handed over, and go on changing there.
            room::remove(&self.row.info.copied_disks, self.row.instance, self.agent.host());
        }
    }
}

/// Whether a VMM that sent GO, and serves no pages, may have to. Its engine says whether any page comes late when it ends.
fn may_come_to_serve(standing: &wire::Standing) -> bool {
    match standing.machine.as_str() {
        "sending" => true,
        "parked" => standing.late.is_some(),
        _ => false,
    }
}

fn note_reply(info: &mut MigrationInfo, reply: &LateLinkReply) {
    info.late_pages = reply.late_pages.or(info.late_pages);
    info.late_missing = reply.ended.is_empty().then_some(0).or(info.late_missing);
    info.late_ms = reply.late_ms;
    info.late_waits_log2_us.clone_from(&reply.late_waits_log2_us);
    info.late_longest_wait_ms = reply.late_longest_wait_ms;
    info.late_median_wait_ms = reply.late_median_wait_ms;
    info.late_round_trip_ms = reply.late_round_trip_ms;
    info.late_verified = reply.late_verified;
    info.late_sent_again = reply.late_sent_again;
    if !reply.ended.is_empty() {
        info.decision = Some(format!("the last pages were not needed: {}", reply.ended));
    }
}

/// Goes on serving after a restart of the agent. The instance has left: nobody finds it here.
pub(crate) async fn recover_serving(agent: &Arc<Agent>, row: MigrationRow) {
    let context = agent.context_of(row.id).await;
    let instance = Instance::apart(departed(&row, agent));
    let mut script = Script::new(agent, context, row, Arc::clone(&instance), None);
    let (sender, news) = mpsc::unbounded_channel();
    script.news = Some(news);
    script.serving = true;
    script.row.info.restarted_in = Some(SourceStep::Serve.to_string());
    instance.state.lock().await.news = Some(sender);
    let agent = Arc::clone(agent);
    // One that is there and silent is waited for.
    tokio::spawn(async move {
        match Vmm::find(&agent.folder(instance.id).join(spawn::SOCKET)).await {
            Some((vmm, _, events)) => agent.attach(&instance, &mut *instance.state.lock().await, vmm, events),
            None => tracing::info!(instance = %instance.id, "the VMM that kept the memory of a guest is gone"),
        }
        script.finish(Ending::Arrived).await;
    });
}

/// All that is known here of an instance that has left.
fn departed(row: &MigrationRow, agent: &Agent) -> InstanceRow {
    InstanceRow {
        id: row.instance,
        status: Status::Stopped,
        epoch: row.epoch,
        known_epoch: row.epoch + 1,
        spec: InstanceSpec {
            name: row.info.name.clone(),
            restart: RestartPolicy::Never.as_str().to_owned(),
            ..InstanceSpec::default()
        },
        migration: Some(row.id),
        reason: None,
        boot_id: agent.boot_id.clone(),
        restarts: Default::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmm_that_has_not_seen_its_sending_end_may_come_to_serve() {
        let standing = |machine: &str, late: Option<wire::Late>| wire::Standing {
            machine: machine.to_owned(),
            late,
            ..wire::Standing::default()
        };
        assert!(may_come_to_serve(&standing("sending", None)));
        // It ended between the refusal and the question.
        assert!(may_come_to_serve(&standing("parked", Some(wire::Late::default()))));
        assert!(!may_come_to_serve(&standing("parked", None)));
        assert!(!may_come_to_serve(&standing("running", Some(wire::Late::default()))));
    }
}
