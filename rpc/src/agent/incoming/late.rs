//! A guest that is this host's and lacks pages: from RUNNING until the last one is here, or none is needed any more.
//!
//! Its VMM takes them in by itself. This task only brings it connections when agent A has made some, asks A for pages that do not come
//! ([`asking`](super::asking)), and says what became of the guest.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use ferry_migration::handover::{Decision, Ended};
use ferry_proto::agent::v1::{LateLinkReply, LateLinkRequest, MigrationInfo};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report;
use tokio::sync::oneshot;

use super::asking::Questions;
use super::driver::Driver;
use crate::agent::instances::VmmNews;
use crate::agent::journal::{RowWrite, Status};
use crate::agent::steps::POST_COPY;

/// Indexes of connections from here on are those of later sessions of late pages: above all of the first connections.
pub(super) const FIRST_LATE: u16 = 1024;

/// Indexes of one session.
pub(super) const OF_A_SESSION: u16 = 256;

/// How a guest ended whose pages were lost.
const LOST: &str = "lost";

/// How often it is looked whether the guest still is what it was: whoever ends it need not say so here.
pub(super) const LOOK: Duration = Duration::from_millis(200);

/// The connections of the session that is being made, or of another link of the copy before GO.
#[derive(Debug, Default)]
pub(super) struct LateSession {
    /// Its first index; 0: none was asked for.
    first: u16,
    streams: u16,
    purpose: Use,
    connections: BTreeMap<u16, OwnedFd>,
}

/// What further connections are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Use {
    /// Late pages.
    #[default]
    Late,
    /// The copy before GO, and with it so many streams for late pages.
    Copy { late_streams: u32 },
}

impl LateSession {
    /// The next one, of so many page streams. What came for the one before is thrown away.
    pub(super) fn next(&mut self, streams: u16, purpose: Use) -> u16 {
        let after = self
            .first
            .checked_add(OF_A_SESSION)
            .filter(|first| first.checked_add(OF_A_SESSION).is_some());
        let first = match self.first {
            0 => FIRST_LATE,
            _ => after.unwrap_or(FIRST_LATE),
        };
        *self = Self {
            first,
            streams: streams.min(OF_A_SESSION - 1),
            purpose,
            connections: BTreeMap::new(),
        };
        first
    }

    /// Takes a connection. All of them, in order, once the last one is here.
    fn take(&mut self, index: u16, connection: OwnedFd) -> Option<Vec<OwnedFd>> {
        let place = index.checked_sub(self.first)?;
        if self.first == 0 || place > self.streams {
            return None;
        }
        self.connections.insert(place, connection);
        let whole = self.connections.len() > usize::from(self.streams);
        whole.then(|| std::mem::take(&mut self.connections).into_values().collect())
    }
}

/// How a guest ended that lacked pages.
#[derive(Clone, Debug)]
pub(super) enum LateEnd {
    /// Its pages were lost, and it with them.
    Lost(String),
    /// By itself, or by its user.
    Gone(String),
}

impl Driver {
    /// VMM B says that so many pages come late.
    pub(super) fn expect_late(&mut self, pages: u64) {
        if pages > 0 {
            self.late.get_or_insert_with(|| wire::Late {
                what: "progress".to_owned(),
                pages,
                missing_pages: pages,
                ..wire::Late::default()
            });
        }
    }

    /// Whether the guest that is adopted lacks pages.
    pub(super) fn lacks_pages(&self) -> bool {
        let lacks = |late: &wire::Late| late.pages > 0 && late.what != "all-here";
        self.row.status_before() != Status::Stopped && self.late.as_ref().is_some_and(lacks)
    }

    /// The guest is this host's from now on; the migration is over when it has all of its memory.
    pub(super) async fn adopted_without_its_pages(&mut self) {
        if std::mem::replace(&mut self.is_adopted, true) {
            return;
        }
        tracing::info!(instance = %self.row.instance, "the guest arrived, and pages of it are on their way");
        self.row.info.status = POST_COPY.to_owned();
        self.row.info.guest_location = Some(self.agent.host().to_owned());
        self.questions = Questions::new(Instant::now());
        self.save_late().await;
        if self.late.as_ref().is_some_and(|late| late.what == "failed") {
            self.lose("its VMM could not take pages in".to_owned()).await;
        }
    }

    /// What the VMM says of late pages, from its loading on.
    pub(super) async fn late_news(&mut self, late: wire::Late) {
        let what = late.what.clone();
        note_late(&mut self.row.info, &late);
        let reason = late.reason.clone();
        let ends_doubt = self.questions.heard(late.missing_pages, Instant::now());
        self.late = Some(late);
        if !self.is_adopted {
            return;
        }
        match what.as_str() {
            "all-here" => self.row.over = true,
            "failed" => self.lose(reason).await,
            "progress" if ends_doubt => {
                self.row.info.decision = None;
                self.save_late().await;
            }
            "link-lost" => {
                self.row.info.decision = Some(format!("the guest waits for pages: {reason}"));
                self.save_late().await;
            }
            _ => {}
        }
    }

    /// News of the guest itself are its instance's.
    pub(super) async fn news_of_adopted(&mut self, news: VmmNews) {
        let late = match &news {
            VmmNews::Standing(standing) => standing.late.clone(),
            VmmNews::Event(_) | VmmNews::Gone => None,
        };
        let mut state = self.instance.state.lock().await;
        self.agent.instance_news(&mut state, news).await;
        drop(state);
        if let Some(late) = late {
            self.late_news(late).await;
        }
        self.look_at_guest().await;
    }

    /// Looks whether the guest still is the one that lacks pages. One that ended, or was started anew, needs none.
    pub(super) async fn look_at_guest(&mut self) {
        if self.is_over_late() {
            return;
        }
        let state = self.instance.state.lock().await;
        let is_here = self.agent.instances.by_id(self.row.instance).is_some();
        let why = match state.row.status {
            _ if !is_here => Some("the instance was deleted".to_owned()),
            Status::Running | Status::Paused if state.row.epoch == self.row.epoch + 1 && state.vmm.is_some() => None,
            Status::Running | Status::Paused => Some("the guest was started anew".to_owned()),
            status => Some(format!("the guest is {status}")),
        };
        drop(state);
        if let Some(why) = why {
            self.ended_late = Some(LateEnd::Gone(why));
            self.row.over = true;
        }
    }

    fn is_over_late(&self) -> bool {
        self.row.over || !self.is_adopted
    }

    /// Agent A asks whether more pages are needed, or says that it has them no more.
    pub(super) async fn late_link(&mut self, request: LateLinkRequest, reply: oneshot::Sender<LateLinkReply>) {
        if request.copying {
            return self.another_link(&request, reply);
        }
        self.look_at_guest().await;
        if !request.lost.is_empty() && !self.is_over_late() {
            self.lost_unless_they_are_here(request.lost.clone()).await;
        }
        let mut answer = LateLinkReply::default();
        if self.core.decision() == Some(Decision::Running) && self.row.over {
            let mut info = self.row.info.clone();
            self.note_end(&mut info);
            answer = reply_of(&info);
        } else if request.lost.is_empty() {
            let streams = u16::try_from(request.streams).unwrap_or(OF_A_SESSION);
            answer.needed = true;
            answer.secret = self.incoming.secret.to_vec();
            answer.data_address.clone_from(&self.agent.data_address);
            answer.first_index = self.late_session.next(streams, Use::Late).into();
        } else {
            // It is not adopted yet, or its last pages may be on their way: A asks again.
            return;
        }
        let _ = reply.send(answer);
    }

    /// Agent A has the pages no more: the guest is lost, unless they are here.
    pub(super) async fn lost_unless_they_are_here(&mut self, reason: String) {
        // What was sent before may still be on its way; the VMM will say that the session is lost, and it is asked again. So it is where the
        // VMM does not answer: one that is dead is noticed elsewhere. And the last pages may have outlived who sent them.
        let is_lost = |late: &wire::Late| late.what == "link-lost" && late.missing_pages > 0;
        if self.ask_how_late().await.as_ref().is_some_and(is_lost) {
            self.lose(reason).await;
        }
    }

    /// Has the VMM say how late pages are, which may be on its way here already. `None`: it does not answer.
    async fn ask_how_late(&mut self) -> Option<wire::Late> {
        let vmm = self.instance.state.lock().await.vmm.clone()?;
        let Ok(Report::Standing(standing)) = vmm.order(Command::Ping(wire::Ping {})).await else {
            return None;
        };
        let late = standing.late?;
        self.late_news(late.clone()).await;
        Some(late)
    }

    /// A connection of a later session.
    pub(super) async fn late_connected(&mut self, index: u16, connection: OwnedFd) {
        let Some(descriptors) = self.late_session.take(index, connection) else {
            return;
        };
        let vmm = self.instance.state.lock().await.vmm.clone();
        let Some(vmm) = vmm else { return };
        let migration = self.row.id.to_string();
        let link = match self.late_session.purpose {
            Use::Late => Command::LateLink(wire::LateLink { migration }),
            Use::Copy { late_streams } => Command::Reconnect(wire::Reconnect {
                migration,
                late_streams,
            }),
        };
        match vmm.order_with(link, descriptors).await {
            Ok(_) => {
                tracing::info!(migration = %self.row.id, "the VMM has other connections");
                if self.row.info.decision.take().is_some() && self.is_adopted {
                    self.save_late().await;
                }
            }
            // The source notices that nobody reads them, and asks.
            Err(error) => tracing::info!(migration = %self.row.id, %error, "the VMM did not take other connections"),
        }
    }

    /// Without its pages the guest is lost: it crashed here, and its restart policy decides.
    async fn lose(&mut self, reason: String) {
        if self.is_over_late() {
            return;
        }
        let mut state = self.instance.state.lock().await;
        let words = format!("pages of its memory are lost: {reason}");
        tracing::error!(instance = %self.row.instance, words, "the guest is lost");
        self.agent.end(&mut state, Ended::Crashed, words).await;
        let has_ended = state.vmm.is_none();
        drop(state);
        // A VMM that does not die is tried again: whoever brought the news asks again.
        if has_ended {
            self.ended_late = Some(LateEnd::Lost(reason));
            self.row.over = true;
        }
    }

    /// The last lines: what the record says of late pages, and nobody waits for them any more.
    pub(super) async fn end_late(&mut self) {
        if !self.is_adopted {
            return;
        }
        let mut state = self.instance.state.lock().await;
        (state.late, state.news) = (None, None);
        drop(state);
        let mut info = std::mem::take(&mut self.row.info);
        self.note_end(&mut info);
        self.row.info = info;
    }

    fn note_end(&self, info: &mut MigrationInfo) {
        info.decision = None;
        match &self.ended_late {
            None => info.late_missing = info.late_missing.map(|_| 0),
            Some(LateEnd::Gone(why)) => info.error = Some(why.clone()),
            Some(LateEnd::Lost(reason)) => {
                info.status = "error".to_owned();
                info.guest_ended = Some(LOST.to_owned());
                info.error = Some(format!("the guest is lost: {reason}"));
            }
        }
    }

    pub(super) async fn save_late(&mut self) {
        let row = self.row.clone();
        let saved = self
            .agent
            .journal
            .write(RowWrite::DestinationStatus, move |transaction| row.save(transaction))
            .await;
        if let Err(error) = saved {
            tracing::error!(migration = %self.row.id, %error, "failed to journal how late pages are");
        }
    }
}

fn note_late(info: &mut MigrationInfo, late: &wire::Late) {
    info.late_pages = Some(late.pages);
    info.late_missing = Some(late.missing_pages);
    if late.what == "all-here" {
        info.late_ms = Some(late.took_ms);
        info.late_waits_log2_us.clone_from(&late.waits);
        info.late_longest_wait_ms = Some(late.longest_wait_ms);
        info.late_median_wait_ms = late.median_wait_ms;
        info.late_round_trip_ms = late.round_trip_ms;
        info.late_verified = late.verified_pages;
        info.late_sent_again = late.verified_pages.map(|_| late.sent_again_pages);
    }
}

/// What agent A is told of a migration whose pages are needed no more.
pub(super) fn reply_of(info: &MigrationInfo) -> LateLinkReply {
    LateLinkReply {
        late_pages: info.late_pages,
        late_ms: info.late_ms,
        late_waits_log2_us: info.late_waits_log2_us.clone(),
        late_longest_wait_ms: info.late_longest_wait_ms,
        late_median_wait_ms: info.late_median_wait_ms,
        late_round_trip_ms: info.late_round_trip_ms,
        late_verified: info.late_verified,
        late_sent_again: info.late_sent_again,
        ended: info.error.clone().unwrap_or_default(),
        lost: info.guest_ended.as_deref() == Some(LOST),
        ..LateLinkReply::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    #[test]
    fn connections_of_an_earlier_session_are_thrown_away() {
        let mut session = LateSession::default();
        assert!(session.take(FIRST_LATE, descriptor()).is_none());
        let first = session.next(1, Use::Late);
        assert!(session.take(first, descriptor()).is_none());
        let second = session.next(1, Use::Late);
        assert_ne!(first, second);
        assert!(session.take(first + 1, descriptor()).is_none());
        assert!(session.take(second + 1, descriptor()).is_none());
        assert_eq!(session.take(second, descriptor()).map(|all| all.len()), Some(2));
    }

    #[test]
    fn sessions_never_run_out() {
        let mut session = LateSession::default();
        for _ in 0..2000 {
            let first = session.next(u16::MAX, Use::Copy { late_streams: 0 });
            assert!(first >= FIRST_LATE && first.checked_add(OF_A_SESSION).is_some());
        }
    }
}
