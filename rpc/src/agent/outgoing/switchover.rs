//! Driving `handover::SourceAgent`: what happens becomes its events, its effects are carried out in order.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use ferry_migration::handover::{
    Decision, Ending, Epoch, SourceAgent, SourceEffect, SourceEvent, SourceState, Wish, pause_before_asking_again,
};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::report::Report as Body;
use tokio::sync::mpsc;

use super::begin::{ended, made_up};
use super::calls::{Calls, Outcome, SILENCE};
use super::ending::note_resolved;
use super::handle::PeerNews;
use super::script::{Script, Stop};
use crate::agent::failure::Failure;
use crate::agent::instances::VmmNews;
use crate::agent::journal::{RowWrite, Status};
use crate::agent::resolving::become_resolved;
use crate::agent::steps::SourceStep;
use crate::faults::{self, Moment, Site};

/// How long RUNNING waits for the VMM's word that it sent GO.
const EARLY_NEWS: Duration = Duration::from_secs(1);
/// How long a link that broke waits for B's own word on why: its VMM's end is seen before its agent is heard.
const PEERS_WORD: Duration = Duration::from_millis(300);

impl Script {
    /// From pre-copy to the end, whatever the end is.
    pub(super) async fn switchover(&mut self, mut core: SourceAgent, first: Vec<SourceEffect>) -> Ending {
        let (sender, mut outcomes) = mpsc::unbounded_channel();
        let calls = Calls { sender };
        self.bear_with_peer(core.state());
        let heartbeats = self.heartbeats();
        calls.start(async move { Some(Outcome::PeerLost(heartbeats.await)) });
        let mut guard = None;
        let mut effects = first;
        loop {
            if let Some(ending) = self.carry_out_all(&mut core, effects, &calls).await {
                // What its VMM obeyed is in the record, though nothing came of it any more.
                outcomes.close();
                while let Ok(outcome) = outcomes.try_recv() {
                    if let Outcome::Retuned(retuning) = outcome {
                        self.retuned(retuning).await;
                    }
                }
                return ending;
            }
            let event = loop {
                if let Some(event) = self.next_event(&mut outcomes, &calls).await
                    && !self.is_held(&core, event)
                {
                    break event;
                }
                if matches!(core.state(), SourceState::Copying) {
                    self.journal_report().await;
                }
            };
            effects = core.step(event);
            self.follow(core.state());
            if effects.is_empty() && matches!(event, SourceEvent::Resolved(_)) {
                self.not_resolved("it was decided meanwhile".to_owned());
            }
            tracing::debug!(migration = %self.row.id, ?event, ?effects, "source");
            // From ARM to the end, nothing of the journal is moved around.
            match core.state() {
                SourceState::Copying => guard = None,
                _ if guard.is_none() => guard = Some(self.agent.journal.switchover()),
                _ => {}
            }
        }
    }

    /// The record follows the core through the steps of the switchover; what of it is journalled, an effect journals.
    fn follow(&mut self, state: SourceState) {
        self.bear_with_peer(state);
        match state {
            SourceState::Copying => self.note_step(SourceStep::Copy),
            SourceState::Arming { .. } => self.note_step(SourceStep::Arm),
            SourceState::Granted { .. } => self.note_step(SourceStep::Grant),
            SourceState::Asking { .. } | SourceState::Resuming { .. } if self.reached() < SourceStep::Go => {
                self.note_step(SourceStep::Go);
            }
            // Being called off, or over: the furthest step stays.
            SourceState::Asking { .. }
            | SourceState::Resuming { .. }
            | SourceState::Trading { .. }
            | SourceState::Recalling { .. }
            | SourceState::Ended(_) => {}
        }
    }

    /// While its guest is copied, agent B may be away for as long as the link may. From ARM on it is needed at once.
    fn bear_with_peer(&self, state: SourceState) {
        let window = Duration::from_millis(self.row.options.resume_window_ms);
        let patience = match state {
            SourceState::Copying => SILENCE.max(window),
            _ => SILENCE,
        };
        self.peer_patience.send_replace(patience);
    }

    /// Waits until something happens; none if it means nothing to the core.
    async fn next_event(
        &mut self,
        outcomes: &mut mpsc::UnboundedReceiver<Outcome>,
        calls: &Calls,
    ) -> Option<SourceEvent> {
        if let Some(body) = self.made_up.pop_front() {
            return self.take_report(body, calls).await;
        }
        let mut aborted = self.aborted.clone();
        let aborted = async {
            aborted
                .wait_for(Option::is_some)
                .await
                .ok()
                .and_then(|asked| asked.clone())
        };
        let abort_is_news = !self.abort_seen;
        tokio::select! {
            biased;
            Some(outcome) = outcomes.recv() => self.take_outcome(outcome).await,
            Some(peer_news) = self.peer_news.recv() => self.take_peer_news(peer_news, calls),
            Some(vmm_news) = next(&mut self.news) => match vmm_news {
                VmmNews::Gone => Some(SourceEvent::VmmGone),
                VmmNews::Event(event) => self.take_report(*event, calls).await,
                VmmNews::Standing(standing) => {
                    if self.reconnecting.is_some() && standing.link_lost.is_none() && standing.machine == "sending" {
                        self.made_up.push_back(Body::LinkBack(wire::LinkBack::default()));
                    }
                    self.made_up.extend(made_up(*standing));
                    None
                }
            },
            Some(resolving) = next(&mut self.asked_to_resolve) => {
                let wish = resolving.wish;
                self.resolving = Some(resolving);
                Some(SourceEvent::Resolved(wish))
            }
            Some(retuning) = next(&mut self.asked_to_retune) => {
                let instance = Arc::clone(&self.instance);
                calls.start(async move { retuning.carry_out(instance).await.map(Outcome::Retuned) });
                None
            }
            reason = aborted, if abort_is_news => {
                self.abort_seen = true;
                self.stop.get_or_insert(Stop::Aborted(reason.unwrap_or_default()));
                Some(SourceEvent::Abort)
            }
        }
    }

    /// A test switch: the event is dropped, so that the migration waits here for its abort.
    fn is_held(&self, core: &SourceAgent, event: SourceEvent) -> bool {
        match self.row.options.hold_at.as_str() {
            "running" => matches!(event, SourceEvent::Converged),
            "armed" => matches!(
                (core.state(), event),
                (SourceState::Arming { .. }, SourceEvent::Expecting(_))
            ),
            _ => false,
        }
    }

    async fn take_outcome(&mut self, outcome: Outcome) -> Option<SourceEvent> {
        match outcome {
            Outcome::Event(event) => Some(event),
            Outcome::NotExpected(attempt, reason) => {
                self.stop.get_or_insert(Stop::Failed(reason));
                Some(SourceEvent::ExpectFailed(attempt))
            }
            Outcome::Decided(attempt, decision, part, heard_ns) => {
                if std::mem::take(&mut self.another_answers) {
                    self.row.info.error = None;
                }
                self.note_figures(decision, part, heard_ns);
                Some(SourceEvent::Decided(attempt, decision))
            }
            Outcome::AnotherAnswers(failure) => {
                self.say_another_answers(&failure).await;
                Some(SourceEvent::NoAnswer)
            }
            Outcome::EarlyNews => {
                let news = self.early.take()?;
                self.note_figures(news.decision, news.part, news.heard_ns);
                Some(SourceEvent::Decided(news.attempt, news.decision))
            }
            Outcome::LinkLost => self.lost_link.take().map(|ended| self.copy_ended(*ended)),
            Outcome::Retuned(retuning) => {
                self.retuned(retuning).await;
                None
            }
            Outcome::PeerLost(reason) => {
                self.stop.get_or_insert(Stop::Failed(reason));
                Some(SourceEvent::Abort)
            }
            Outcome::NotResumed(reason) => {
                self.not_resumed(reason).await;
                None
            }
        }
    }

    fn take_peer_news(&mut self, news: PeerNews, calls: &Calls) -> Option<SourceEvent> {
        if news.decision == Decision::Source && !news.reason.is_empty() {
            let reason = format!("host {}: {}", self.row.peer, news.reason);
            self.stop.get_or_insert(Stop::Failed(reason));
        }
        if news.decision == Decision::Running && self.go.is_none() {
            // The VMM's own word is on the way, and with it the figures of the blackout. RUNNING is final all the same.
            self.early = Some(news);
            calls.start(async {
                tokio::time::sleep(EARLY_NEWS).await;
                Some(Outcome::EarlyNews)
            });
            return None;
        }
        self.note_figures(news.decision, news.part, news.heard_ns);
        Some(SourceEvent::Decided(news.attempt, news.decision))
    }

    async fn take_report(&mut self, event: Body, calls: &Calls) -> Option<SourceEvent> {
        match event {
            Body::LinkLost(lost) => {
                self.link_lost(lost, calls).await;
                None
            }
            Body::LinkBack(back) => {
                self.link_back(back).await;
                None
            }
            Body::Progress(progress) => {
                self.note_progress(&progress);
                self.show();
                None
            }
            Body::Converged(_) => Some(SourceEvent::Converged),
            Body::Disarmed(disarmed) => {
                self.note_step(SourceStep::Copy);
                self.row.info.decision = Some(format!("switchover called off: {}", disarmed.reason));
                self.show();
                Some(SourceEvent::Disarmed(
                    disarmed.attempt.map_or(0, |attempt| attempt.attempt),
                ))
            }
            Body::GoSent(go) => {
                if let Some(progress) = &go.progress {
                    self.note_progress(progress);
                }
                let attempt = go.attempt.as_ref().map_or(0, |attempt| attempt.attempt);
                self.go = Some(go);
                if self.early.is_some() {
                    calls.start(async { Some(Outcome::EarlyNews) });
                }
                Some(SourceEvent::GoSent(attempt))
            }
            Body::SendEnded(copy_ended) => {
                self.end_reconnecting(Err(Failure::Unavailable(copy_ended.reason.clone())));
                if copy_ended.kind != "link" || copy_ended.guest.is_some() || self.stop.is_some() {
                    return Some(self.copy_ended(copy_ended));
                }
                self.lost_link = Some(Box::new(copy_ended));
                calls.start(async {
                    tokio::time::sleep(PEERS_WORD).await;
                    Some(Outcome::LinkLost)
                });
                None
            }
            Body::GuestEnded(guest) => {
                self.guest_ended = Some(guest);
                Some(SourceEvent::GuestEnded)
            }
            _ => None,
        }
    }

    fn copy_ended(&mut self, copy_ended: wire::SendEnded) -> SourceEvent {
        if let Some(progress) = &copy_ended.progress {
            self.note_progress(progress);
        }
        self.guest_ended.clone_from(&copy_ended.guest);
        let event = ended(&copy_ended);
        self.stop.get_or_insert(Stop::Failed(copy_ended.reason));
        event
    }

    async fn carry_out_all(
        &mut self,
        core: &mut SourceAgent,
        effects: Vec<SourceEffect>,
        calls: &Calls,
    ) -> Option<Ending> {
        let mut effects = VecDeque::from(effects);
        while let Some(effect) = effects.pop_front() {
            let site = Site::from(&effect);
            faults::reach(site, Moment::Before).await;
            let carried_out = self.carry_out(effect, calls).await;
            faults::reach(site, Moment::After).await;
            match carried_out {
                Ok(None) => {}
                Ok(Some(ending)) => return Some(ending),
                Err(failure) => {
                    let reason = failure.chain();
                    tracing::error!(migration = %self.row.id, reason, ?effect, "the journal failed in a switchover");
                    self.not_resolved(reason.clone());
                    self.stop.get_or_insert(Stop::Failed(reason));
                    effects = core.step(SourceEvent::JournalFailed).into();
                }
            }
        }
        None
    }

    /// One effect. An error is the journal's.
    async fn carry_out(&mut self, effect: SourceEffect, calls: &Calls) -> Result<Option<Ending>, Failure> {
        match effect {
            SourceEffect::JournalArmed(attempt) => {
                self.row.armed = attempt;
                self.row.info.attempts = attempt;
                // From here on the next epoch counts as known: the destination may come to run under it.
                let mut state = self.instance.state.lock().await;
                state.row.known_epoch = state.row.known_epoch.max(self.row.epoch + 1);
                let instance = state.row.clone();
                drop(state);
                self.save_with(RowWrite::OfEffect, instance).await?;
            }
            SourceEffect::AskExpect(attempt) => self.ask_expect(attempt, calls),
            SourceEffect::GiveGrant(attempt) => self.give_grant(attempt, calls),
            SourceEffect::AskTrade(attempt) => self.ask_trade(attempt, true, calls),
            SourceEffect::AskRecall(attempt) => self.ask_trade(attempt, false, calls),
            SourceEffect::AskAfter(pause) => {
                self.questions = 0;
                calls.ask_after(pause);
            }
            SourceEffect::AskAgain => {
                calls.ask_after(pause_before_asking_again(self.questions));
                self.questions = self.questions.saturating_add(1);
            }
            SourceEffect::AskDecision(attempt) => self.ask_decision(attempt, calls),
            SourceEffect::JournalDecision(_, decision) => {
                if decision == Decision::Running {
                    self.note_step(SourceStep::Confirm);
                }
                self.row.said = Some(decision.to_string());
                self.save(RowWrite::OfEffect).await?;
            }
            SourceEffect::JournalResumed(epoch) => self.journal_resumed(epoch).await?,
            SourceEffect::SendPermit(epoch) => self.send_permit(epoch, calls),
            SourceEffect::DestroyCopy => match self.serves_pages().await {
                true => self.become_page_source().await?,
                false => self.destroy_copy().await?,
            },
            SourceEffect::RollBackDestination => self.roll_back_destination(),
            SourceEffect::JournalResolved(wish, epoch) => self.journal_resolved(wish, epoch).await?,
            SourceEffect::SayIndeterminate => self.say_indeterminate().await,
            SourceEffect::Finish(ending) => return Ok(Some(ending)),
        }
        Ok(None)
    }

    /// Both rows or none: a migration's row that says RESUMED without the instance's would have its epoch taken twice.
    async fn journal_resumed(&mut self, epoch: Epoch) -> Result<(), Failure> {
        let mut instance = self.instance.state.lock().await.row.clone();
        (instance.epoch, instance.known_epoch) = (epoch.0, epoch.0);
        let before = self.row.resumed.replace(epoch.0);
        if let Err(failure) = self.save_with(RowWrite::OfEffect, instance).await {
            self.row.resumed = before;
            return Err(failure);
        }
        let mut state = self.instance.state.lock().await;
        (state.row.epoch, state.row.known_epoch) = (epoch.0, epoch.0);
        Ok(())
    }

    /// What a person says, and who it was, in one transaction. Of a guest that is to run here the migration is over with it: the
    /// new epoch makes every other copy stale, the stopped one here too.
    async fn journal_resolved(&mut self, wish: Wish, epoch: Epoch) -> Result<(), Failure> {
        let mut row = self.row.clone();
        note_resolved(&mut row, self.agent.host(), wish);
        let mut state = self.instance.state.lock().await;
        let mut instance = state.row.clone();
        if wish == Wish::RunHere {
            row.resumed = Some(epoch.0);
            row.over = true;
            become_resolved(&mut instance, epoch);
        }
        let audit = self.resolving.as_ref().map(|resolving| {
            let what = format!("{} of migration {}", wish.as_str(), row.id);
            resolving.context.did("resolve", &row.instance.to_string(), &what)
        });
        let (saved, saved_instance) = (row.clone(), instance.clone());
        self.agent
            .journal
            .write(RowWrite::OfEffect, move |transaction| {
                saved.save(transaction)?;
                saved_instance.save(transaction)?;
                audit.map_or(Ok(()), |audit| audit.add(transaction))
            })
            .await?;
        tracing::warn!(migration = %row.id, instance = %row.instance, wish = wish.as_str(), %epoch, "resolved by a person");
        self.row = row;
        state.row = instance;
        drop(state);
        if wish == Wish::DiscardHere {
            self.destroy_copy().await?;
        }
        Ok(())
    }

    fn not_resolved(&mut self, reason: String) {
        if let Some(resolving) = self.resolving.take() {
            resolving.answer(Err(Failure::Refused(format!(
                "migration {} is not resolved: {reason}",
                self.row.id
            ))));
        }
    }

    /// The guest is this host's again and its VMM does not take the permit: somebody else has its disks. Until they are
    /// free it runs nowhere.
    async fn not_resumed(&mut self, reason: String) {
        let reason = format!("the guest is to run on here and cannot yet: {reason}");
        if self.row.info.error.as_ref() == Some(&reason) {
            return;
        }
        tracing::warn!(migration = %self.row.id, instance = %self.row.instance, reason, "trying again until it runs");
        self.row.info.error = Some(reason);
        let here = self.agent.host().to_owned();
        self.become_indeterminate(Some(here)).await;
    }

    /// Whoever answers in the destination's place knows nothing of D: nobody knows, and why is told. Once, until D is.
    async fn say_another_answers(&mut self, failure: &Failure) {
        if std::mem::replace(&mut self.another_answers, true) {
            return;
        }
        let reason = failure.chain();
        tracing::warn!(migration = %self.row.id, instance = %self.row.instance, reason, "this decides nothing");
        self.row.info.error = Some(reason);
        if let Err(failure) = self.save(RowWrite::SourceStatus).await {
            tracing::error!(migration = %self.row.id, error = failure.chain(), "failed to journal who answers");
        }
        let context = &self.outgoing.context;
        self.agent.record_fault(context, self.row.instance, failure).await;
    }

    async fn say_indeterminate(&mut self) {
        if self.row.info.status == "indeterminate" {
            return;
        }
        tracing::warn!(migration = %self.row.id, instance = %self.row.instance, "nobody knows on which host the guest runs");
        self.become_indeterminate(None).await;
    }

    /// It runs nowhere as far as is known; where it is may be known all the same.
    async fn become_indeterminate(&mut self, location: Option<String>) {
        self.row.info.status = "indeterminate".to_owned();
        self.row.info.guest_location = location;
        // Written as it was, beside the record: a person's resolution that could not be written may be there all the same, and half of it
        // must not stay. That nobody knows is told by the record.
        let mut instance = {
            let mut state = self.instance.state.lock().await;
            state.row.status = Status::Indeterminate;
            state.row.clone()
        };
        instance.status = self.row.status_before();
        if let Err(failure) = self.save_with(RowWrite::OfEffect, instance).await {
            tracing::error!(
                error = failure.chain(),
                "failed to journal that the guest is indeterminate"
            );
        }
    }
}

pub(super) async fn next<T>(news: &mut Option<mpsc::UnboundedReceiver<T>>) -> Option<T> {
    match news {
        Some(news) => news.recv().await,
        None => std::future::pending().await,
    }
}
