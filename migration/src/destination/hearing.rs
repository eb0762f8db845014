//! What the script hears while it waits, and what it looks after meanwhile: orders and the peer.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use ferry_proto::stream::v1::{self, from_destination, from_source};

use crate::destination::receiver::{Arrival, Delivered, ReceiveError};
use crate::destination::{Asked, DestinationError, DestinationOrder};
use crate::error_chain;
use crate::link::{FAREWELL, Link, Outgoing, Sockets};
use crate::wire::{ControlError, StreamTotals};

/// How long the script waits at most before it looks at its orders again.
const TICK: Duration = Duration::from_millis(20);

/// How long the reason for a cut connection may take to be read, once the cut was noticed.
const REASON: Duration = Duration::from_millis(200);

/// Messages that may wait while pages are awaited; the source never sends so many.
const MAX_BACKLOG: usize = 16;

/// And their bytes: two of the longest, a state that was called off and the next one.
const MAX_BACKLOG_BYTES: usize = 16 << 20;

/// What the threads tell the script.
#[derive(Debug)]
pub(super) enum Event {
    /// The source said something.
    Said(v1::FromSource),
    /// The control stream cannot be used any more.
    ControlLost(ControlError),
    /// A page stream ended, between frames if without an error.
    StreamEnded { stream: u16, error: Option<ReceiveError> },
    /// The frames that were asked for are here.
    Arrived,
}

pub(super) type Outbox = Sender<Outgoing<v1::FromDestination>>;

/// The script's ears and mouth.
pub(super) struct Hearing<'a> {
    events: Receiver<Event>,
    pub(super) outbox: Outbox,
    sockets: &'a Sockets,
    pub(super) asked: Asked<'a>,
    /// Said while pages were awaited.
    backlog: VecDeque<from_source::Message>,
    /// A link that the source made in place of this one.
    next: Option<Box<Link>>,
}

impl<'a> Hearing<'a> {
    pub(super) fn new(events: Receiver<Event>, outbox: Outbox, sockets: &'a Sockets, asked: Asked<'a>) -> Self {
        Self {
            events,
            outbox,
            sockets,
            asked,
            backlog: VecDeque::new(),
            next: None,
        }
    }

    /// Says something to the source; never blocks. If it cannot arrive, an event tells.
    pub(super) fn say(&self, message: from_destination::Message) {
        let _ = self
            .outbox
            .send(Outgoing::Say(v1::FromDestination { message: Some(message) }));
    }

    /// Waits for the next message.
    pub(super) fn message(&mut self) -> Result<from_source::Message, DestinationError> {
        loop {
            if let Some(message) = self.backlog.pop_front() {
                return Ok(message);
            }
            self.listen()?;
        }
    }

    /// Waits until each stream delivered what `expected` lists for it.
    ///
    /// # Errors
    /// [`DestinationError::Misbehaved`] if a stream delivered something else.
    pub(super) fn await_totals(
        &mut self,
        delivered: &[Delivered],
        expected: &[StreamTotals],
    ) -> Result<(), DestinationError> {
        if expected.len() != delivered.len() {
            let what = format!(
                "totals of {} page streams where there are {}",
                expected.len(),
                delivered.len()
            );
            return Err(DestinationError::Misbehaved(what));
        }
        let awaited = delivered
            .iter()
            .zip(expected)
            .filter(|(stream, totals)| stream.want(totals.frames) == Arrival::Awaited);
        for _ in 0..awaited.count() {
            while !self.listen()? {}
        }
        for (index, (stream, &expected)) in delivered.iter().zip(expected).enumerate() {
            let found = stream.totals();
            if found != expected {
                let what = format!("page stream {index} carried {found:?} where {expected:?} are listed");
                return Err(DestinationError::Misbehaved(what));
            }
        }
        Ok(())
    }

    /// Hears one thing, or looks around. True if pages arrived.
    fn listen(&mut self) -> Result<bool, DestinationError> {
        self.look_around()?;
        match self.events.recv_timeout(TICK) {
            Ok(Event::Arrived) => return Ok(true),
            Ok(Event::Said(message)) => self.take(message)?,
            Ok(Event::ControlLost(error)) => return Err(DestinationError::ControlLost(error)),
            Ok(Event::StreamEnded { stream, error }) => return Err(self.reason_for(stream, error)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(DestinationError::ControlLost(ControlError::Closed));
            }
        }
        Ok(false)
    }

    fn take(&mut self, message: v1::FromSource) -> Result<(), DestinationError> {
        match message.message {
            Some(from_source::Message::Abort(abort)) => Err(DestinationError::AbortedBySource(abort.reason)),
            Some(message)
                if self.backlog.len() < MAX_BACKLOG
                    && self.backlog_bytes() + message.encoded_len() <= MAX_BACKLOG_BYTES =>
            {
                self.backlog.push_back(message);
                Ok(())
            }
            Some(_) => Err(DestinationError::Misbehaved("it talks on without waiting".to_owned())),
            None => Err(DestinationError::Misbehaved("it sent an empty message".to_owned())),
        }
    }

    fn backlog_bytes(&self) -> usize {
        self.backlog.iter().map(from_source::Message::encoded_len).sum()
    }

    /// A link that the source made in place of this one, if it did.
    pub(super) fn take_next(&mut self) -> Option<Box<Link>> {
        self.next.take()
    }

    fn look_around(&mut self) -> Result<(), DestinationError> {
        match self.asked.orders.try_recv() {
            Ok(DestinationOrder::Abort { reason }) => return Err(DestinationError::Aborted(reason)),
            // The source has given up the one in use, whether that is known here or not.
            Ok(DestinationOrder::Reconnect(link)) => {
                self.next = Some(link);
                return Err(DestinationError::Replaced);
            }
            Err(_) => {}
        }
        let silence = self.sockets.silence();
        if silence >= self.asked.parameters.liveness.silence {
            return Err(DestinationError::Silent(silence));
        }
        Ok(())
    }

    /// Why a page stream ended: the source's own words if they arrive in time, otherwise what was noticed.
    fn reason_for(&mut self, stream: u16, error: Option<ReceiveError>) -> DestinationError {
        let cause = match error {
            Some(ReceiveError::Guest(cause)) => {
                return DestinationError::Guest {
                    step: "take in what arrives",
                    cause,
                };
            }
            Some(ReceiveError::Frame(cause)) if !cause.is_connection() => {
                return DestinationError::Frame { stream, cause };
            }
            Some(ReceiveError::Frame(cause)) => Some(cause),
            None => None,
        };
        let deadline = Instant::now() + REASON;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(Event::Said(message)) => {
                    if let Err(aborted @ DestinationError::AbortedBySource(_)) = self.take(message) {
                        return aborted;
                    }
                }
                Ok(Event::ControlLost(_)) | Err(_) => return DestinationError::StreamLost { stream, cause },
                Ok(Event::StreamEnded { .. } | Event::Arrived) => {}
            }
        }
    }

    /// Tells the source why the migration ended, if it can still be told, and waits a moment until it hung up.
    pub(super) fn farewell(&mut self, error: &DestinationError) {
        let reasons = match error {
            // What was heard made no sense; what is said may be heard all the same. Nobody listens to the source any more: all of the farewell is waited.
            DestinationError::ControlLost(cause) if !cause.is_connection() => vec![error_chain(error)],
            DestinationError::AbortedBySource(_) | DestinationError::Silent(_) | DestinationError::ControlLost(_) => {
                return;
            }
            // GO was sent: the source does not listen any more, and its agent hears from ours.
            DestinationError::ManifestRefused(_) | DestinationError::Restore(_) => return,
            // Told in the handshake's reply.
            DestinationError::Incompatible(_) => Vec::new(),
            error => vec![error_chain(error)],
        };
        if !reasons.is_empty() {
            self.say(from_destination::Message::Refused(v1::Refused { reasons }));
        }
        let _ = self.outbox.send(Outgoing::HangUp);
        self.sockets.cut_pages();
        let deadline = Instant::now() + FAREWELL;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(Event::ControlLost(_)) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }
}
