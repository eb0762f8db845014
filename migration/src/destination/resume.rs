//! Going on over another link after one was lost while the source's guest ran: what is here is kept, and the source hears of it.

use std::sync::atomic::Ordering;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::{Duration, Instant};

use ferry_proto::stream::v1::{self, from_destination::Message as Reply, from_source::Message as Said};

use crate::compress::Codecs;
use crate::destination::crew::Crew;
use crate::destination::hearing::Hearing;
use crate::destination::{Asked, DestinationError, DestinationOrder, DestinationReport};
use crate::error_chain;
use crate::guest::GuestMemory;
use crate::link::Link;
use crate::wire::{StreamIdentity, holding_to_wire};

/// How long at a time nothing but another link is listened for.
const TICK: Duration = Duration::from_millis(20);

/// What outlives a link, beside what was received.
pub(super) struct Kept {
    /// While the source's guest runs, up to which attempt all were called off. `None`: it stands still, and no other link can help.
    pub(super) copying: Option<u32>,
    /// The population map is here.
    pub(super) begun: bool,
    /// The session of the newest link.
    session: Option<u32>,
    /// The session in which the pages came that count as whole.
    held_session: u32,
    /// What pages may be compressed with on the newest link.
    pub(super) codecs: Codecs,
    /// A link that came while another one was in use.
    pub(super) next: Option<Box<Link>>,
    /// Since when there is no link on which pages come.
    lost: Option<Instant>,
}

impl Kept {
    pub(super) fn new() -> Self {
        Self {
            copying: Some(0),
            begun: false,
            session: None,
            held_session: 0,
            codecs: Codecs::default(),
            next: None,
            lost: None,
        }
    }

    /// Whether another link may follow after this one ended so.
    pub(super) fn may_resume(&self, asked: &Asked<'_>, error: &DestinationError) -> bool {
        !asked.parameters.resume_window.is_zero() && self.copying.is_some() && error.is_lost_link()
    }

    /// Takes a link with this session up.
    ///
    /// # Errors
    /// It is none that can come now: late words of an earlier link must not be taken for those of a newer one.
    pub(super) fn take_up(&mut self, session: u32) -> Result<(), DestinationError> {
        if self.session.is_some_and(|newest| session <= newest) {
            return Err(DestinationError::Misbehaved(format!(
                "a link of session {session} came after one of session {:?}",
                self.session
            )));
        }
        self.session = Some(session);
        Ok(())
    }

    /// Waits for another link: for as long as its user allows, and longer by what the source may need to notice the loss.
    pub(super) fn another_link(&mut self, asked: &Asked<'_>, lost: DestinationError) -> Result<Link, DestinationError> {
        let window = asked.parameters.resume_window + asked.parameters.liveness.silence;
        let since = *self.lost.get_or_insert_with(Instant::now);
        if let Some(link) = self.next.take() {
            return Ok(*link);
        }
        tracing::info!(error = error_chain(&lost), "the link from the source is lost");
        asked.report(DestinationReport::LinkLost {
            reason: error_chain(&lost),
            patience: window.saturating_sub(since.elapsed()),
        });
        while since.elapsed() < window {
            match asked.orders.recv_timeout(TICK) {
                Ok(DestinationOrder::Reconnect(link)) => return Ok(*link),
                Ok(DestinationOrder::Abort { reason }) => return Err(DestinationError::Aborted(reason)),
                Err(RecvTimeoutError::Timeout) => {}
                // Nobody can bring one; the window holds all the same.
                Err(RecvTimeoutError::Disconnected) => thread::sleep(TICK),
            }
        }
        let lost = Box::new(lost);
        Err(DestinationError::LinkStaysLost { window, lost })
    }

    /// The reply to a `Hello`, with what the source must know to go on.
    pub(super) fn reply<M: GuestMemory>(&self, protocol: u32, crew: &Crew<'_, '_, M>) -> v1::HelloReply {
        let codecs = self.codecs.to_wire();
        if self.session == Some(0) {
            return v1::HelloReply {
                protocol,
                codecs,
                ..v1::HelloReply::default()
            };
        }
        v1::HelloReply {
            protocol,
            refusals: Vec::new(),
            begun: self.begun,
            round: crew.shared.round.load(Ordering::Acquire),
            held_session: self.held_session,
            codecs,
        }
    }

    /// Tells the source what is here of the open round, and counts anew once it has taken that in. No thread receives pages yet.
    pub(super) fn go_on<M: GuestMemory>(
        &mut self,
        identity: &StreamIdentity,
        hearing: &mut Hearing<'_>,
        crew: &Crew<'_, '_, M>,
    ) -> Result<(), DestinationError> {
        for part in holding_to_wire(&crew.shared.whole.to_set()) {
            hearing.say(Reply::Holding(part));
        }
        let Said::Proceed(v1::Proceed {}) = hearing.message()? else {
            return Err(DestinationError::Misbehaved(
                "it did not wait for what is here".to_owned(),
            ));
        };
        crew.shared.whole.clear();
        self.held_session = identity.session;
        self.lost = None;
        hearing.asked.report(DestinationReport::Resumed);
        Ok(())
    }
}
