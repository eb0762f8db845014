//! A guest waits for pages and none comes: whether its source still has them is asked there.
//!
//! ```text
//!   no page came for a while ─► agent A: ─ it has them ──────► waiting goes on: who has them makes connections
//!           ▲  later each time            │ gone for good ───► the guest is lost
//!           └──────────────────────────── ┴ nothing certain ─► waiting goes on, and that is said once
//! ```
//!
//! Time never decides: a host that is silent may have the pages. Only the source's own word that they are gone does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_proto::agent::v1::{LatePagesReply, LatePagesRequest};

use super::driver::Driver;
use super::handle::Request;
use super::late::LateEnd;
use crate::agent::events::{Action, Subject};
use crate::agent::failure::Failure;
use crate::agent::journal::EventEnd;

/// After so long without a page the source is asked. The VMMs themselves notice within it that the other one is silent, and a link that is
/// lost is made again within it where that is possible.
const QUIET: Duration = Duration::from_secs(5);

/// The pause between two questions grows up to this.
const LONGEST: Duration = Duration::from_secs(30);

/// The pauses between two times that the source is told that the guest is lost. It asks by itself too, if it still serves.
const TELLING: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(500),
    Duration::from_secs(2),
    Duration::from_secs(10),
    Duration::from_secs(30),
];

/// When agent A is to be asked. Pure: time is an argument.
#[derive(Clone, Copy, Debug)]
pub(super) struct Questions {
    /// So many pages were missing at last.
    missing: Option<u64>,
    due: Instant,
    pause: Duration,
    is_asked: bool,
    /// It is not known whether agent A has the pages, and that was said.
    is_in_doubt: bool,
}

impl Questions {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            missing: None,
            due: now + QUIET,
            pause: QUIET,
            is_asked: false,
            is_in_doubt: false,
        }
    }

    /// So many pages are missing. Whether that ends a doubt: some came.
    pub(super) fn heard(&mut self, missing: u64, now: Instant) -> bool {
        if self.missing.replace(missing) == Some(missing) {
            return false;
        }
        (self.due, self.pause) = (now + QUIET, QUIET);
        std::mem::take(&mut self.is_in_doubt)
    }

    /// Whether to ask now. Then [`Self::answered`] follows.
    fn is_due(&mut self, now: Instant) -> bool {
        let is_due = !self.is_asked && now >= self.due;
        self.is_asked |= is_due;
        is_due
    }

    /// It is asked again after a pause that is longer each time.
    fn answered(&mut self, now: Instant) {
        self.is_asked = false;
        self.due = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST);
    }
}

impl Driver {
    /// Asks agent A if it is time to.
    pub(super) fn ask_for_pages(&mut self) {
        if self.row.over || !self.questions.is_due(Instant::now()) {
            return;
        }
        let requests = self.incoming.requests.clone();
        let asked = self.about_pages(String::new());
        // Not waited for here: pages, and connections for them, may come meanwhile.
        tokio::spawn(async move {
            let _ = requests.send(Request::LatePages(asked.await));
        });
    }

    /// What agent A says.
    pub(super) async fn pages_answered(&mut self, answer: Result<LatePagesReply, Failure>) {
        self.questions.answered(Instant::now());
        if self.row.over {
            return;
        }
        let peer = &self.row.peer;
        match answer {
            Ok(reply) if !reply.gone.is_empty() => {
                let why = format!("host {peer} has them no more: {}", reply.gone);
                tracing::info!(migration = %self.row.id, why, "the guest's source has no pages any more");
                self.lost_unless_they_are_here(why).await;
                if let Some(LateEnd::Lost(reason)) = &self.ended_late {
                    self.tell_lost(format!("the guest is lost: {reason}"));
                }
            }
            Ok(reply) if reply.kept => {
                let words = match reply.words.as_str() {
                    "" => String::new(),
                    words => format!(": {words}"),
                };
                tracing::info!(migration = %self.row.id, words, "the source has the pages that the guest waits for");
                if self.questions.is_in_doubt {
                    self.questions.is_in_doubt = false;
                    self.row.info.decision = Some(format!("the guest waits for pages, which host {peer} has{words}"));
                    self.save_late().await;
                }
            }
            Ok(_) => {
                self.doubt(format!("host {peer} does not know what became of them"))
                    .await
            }
            Err(failure) => self.doubt(failure.chain()).await,
        }
    }

    /// Nothing certain is known: the record says why, and an event that it is so, until pages come or their source speaks.
    async fn doubt(&mut self, why: String) {
        tracing::info!(migration = %self.row.id, why, "it is not known whether the source has the pages that the guest waits for");
        let words = format!(
            "the guest waits for pages, and whether host {} has them is not known: {why}",
            self.row.peer
        );
        if self.row.info.decision.as_ref() != Some(&words) {
            self.row.info.decision = Some(words.clone());
            self.save_late().await;
        }
        if std::mem::replace(&mut self.questions.is_in_doubt, true) {
            return;
        }
        let subject = Subject::migration(self.row.instance, &self.row.info.name, self.row.id);
        let context = &self.incoming.context;
        let end = EventEnd::unanswered(words);
        self.agent.record_end(context, Action::AskForPages, subject, end).await;
    }

    /// Tells agent A that the guest is lost, whose migration may be over there.
    fn tell_lost(&self, lost: String) {
        let tellings = TELLING.map(|pause| (pause, self.about_pages(lost.clone())));
        let migration = self.row.id;
        tokio::spawn(async move {
            for (pause, telling) in tellings {
                tokio::time::sleep(pause).await;
                match telling.await {
                    Ok(_) => return,
                    Err(failure) => {
                        tracing::info!(%migration, error = failure.chain(), "the source has not heard that the guest is lost");
                    }
                }
            }
        });
    }

    fn about_pages(&self, lost: String) -> impl Future<Output = Result<LatePagesReply, Failure>> + use<> {
        let request = LatePagesRequest {
            migration: self.row.id.to_string(),
            destination: self.agent.host().to_owned(),
            lost,
        };
        let (agent, context, peer) = (
            Arc::clone(&self.agent),
            self.incoming.context.clone(),
            self.row.peer.clone(),
        );
        async move { agent.compute_rpcapi(&context, &peer)?.late_pages(request).await }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_is_asked_when_no_page_came_for_a_while_and_then_less_and_less_often() {
        let began = Instant::now();
        let mut questions = Questions::new(began);
        let at = |seconds| began + Duration::from_secs(seconds);
        assert!(!questions.is_due(at(4)));
        // 5, then after pauses of 5, 10, 20, 30 and 30 seconds; never twice before an answer.
        for due in [5, 10, 20, 40, 70, 100] {
            assert!(!questions.is_due(at(due) - Duration::from_millis(1)));
            assert!(questions.is_due(at(due)));
            assert!(!questions.is_due(at(due + 1000)));
            questions.answered(at(due));
        }
    }

    #[test]
    fn a_page_that_comes_puts_the_question_off_and_ends_the_doubt() {
        let began = Instant::now();
        let mut questions = Questions::new(began);
        let at = |seconds| began + Duration::from_secs(seconds);
        assert!(!questions.heard(10, at(3)));
        assert!(!questions.is_due(at(7)));
        // Nothing came: that is no reason to wait longer.
        assert!(!questions.heard(10, at(7)));
        assert!(questions.is_due(at(8)));
        questions.answered(at(8));
        questions.is_in_doubt = true;
        assert!(questions.heard(9, at(12)));
        assert!(!questions.is_in_doubt && !questions.is_due(at(16)) && questions.is_due(at(17)));
    }
}
