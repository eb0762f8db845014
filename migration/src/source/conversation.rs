//! What the script hears over one link while it waits, and what it looks after meanwhile: the guest, orders, the clock, the peer.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use ferry_proto::stream::v1::{self, from_destination, from_source};

use crate::error_chain;
use crate::guest::{GuestCondition, SourceGuest};
use crate::link::{FAREWELL, Outgoing, Sockets};
use crate::precopy::{Bandwidth, SendError};
use crate::source::lasting::Lasting;
use crate::source::{Asked, SourceError, Stop};
use crate::wire::{ControlError, StreamIdentity};

/// How long the script waits at most before it looks after the guest and its orders again.
pub(super) const TICK: Duration = Duration::from_millis(10);

/// How long the reason for a cut connection may take to be read, once the cut was noticed.
const REASON: Duration = Duration::from_millis(200);

/// What the threads tell the script.
#[derive(Debug)]
pub(super) enum Event {
    /// The destination said something.
    Said(v1::FromDestination),
    /// The control stream cannot be used any more.
    ControlLost(ControlError),
    /// A page stream cannot be used any more.
    StreamFailed { stream: u16, error: SendError },
    /// The last pages of the open round were written to their streams.
    RoundSent,
}

/// What the script waits for.
#[derive(Debug)]
pub(super) enum Heard {
    HelloReply(v1::HelloReply),
    PopulationReady,
    BarrierReached(u32),
    RoundSent,
    Compared(v1::Compared),
    Holding(v1::Holding),
}

impl Heard {
    /// What it is, without what the peer put into it.
    fn kind(&self) -> &'static str {
        match self {
            Self::HelloReply(_) => "hello reply",
            Self::PopulationReady => "population ready",
            Self::BarrierReached(_) => "barrier reached",
            Self::RoundSent => "round sent",
            Self::Compared(_) => "compared",
            Self::Holding(_) => "holding",
        }
    }
}

pub(super) type Outbox = Sender<Outgoing<v1::FromSource>>;

/// The script's ears and mouth.
pub(super) struct Conversation<'a> {
    events: Receiver<Event>,
    pub(super) outbox: Outbox,
    sockets: &'a Sockets,
    pub(super) asked: Asked<'a>,
    pub(super) lasting: &'a Lasting<'a>,
    bandwidth: &'a Bandwidth,
    /// Which link it goes over, from 0.
    pub(super) session: u32,
}

impl<'a> Conversation<'a> {
    pub(super) fn new(
        events: Receiver<Event>,
        outbox: Outbox,
        sockets: &'a Sockets,
        lasting: &'a Lasting<'a>,
        bandwidth: &'a Bandwidth,
        session: u32,
    ) -> Self {
        Self {
            events,
            outbox,
            sockets,
            asked: lasting.asked,
            lasting,
            bandwidth,
            session,
        }
    }

    /// Who this migration is, as every stream says first.
    pub(super) fn identity(&self) -> StreamIdentity {
        let parameters = self.asked.parameters;
        StreamIdentity {
            instance: parameters.instance,
            migration: parameters.migration,
            epoch: parameters.epoch,
            streams: self.sockets.streams(),
            session: self.session,
        }
    }

    /// The round trip of the control stream, if one was measured.
    pub(super) fn round_trip(&self) -> Option<Duration> {
        self.sockets.round_trip()
    }

    /// Says something to the destination; never blocks. If it cannot arrive, an event tells.
    pub(super) fn say(&self, message: from_source::Message) {
        let _ = self
            .outbox
            .send(Outgoing::Say(v1::FromSource { message: Some(message) }));
    }

    /// Nothing more will be said; what was said goes out.
    pub(super) fn end(&self) {
        let _ = self.outbox.send(Outgoing::End);
    }

    /// Waits for what `pick` accepts while the guest runs; anything else that is heard is misbehaviour.
    pub(super) fn wait_for<T>(
        &mut self,
        guest: &mut impl SourceGuest,
        mut pick: impl FnMut(Heard) -> Result<T, Heard>,
    ) -> Result<T, Stop> {
        loop {
            self.look_after(guest)?;
            if let Some(heard) = self.next(TICK)? {
                return pick(heard).map_err(|other| unexpected(&other).into());
            }
        }
    }

    /// Looks after the running guest and everything that can end the migration.
    pub(super) fn look_after(&mut self, guest: &mut impl SourceGuest) -> Result<(), Stop> {
        if let GuestCondition::Ended(end) = guest.poll() {
            return Err(Stop::GuestEnded(end));
        }
        self.look_around()
    }

    /// Looks at everything but the guest that can end the migration.
    pub(super) fn look_around(&mut self) -> Result<(), Stop> {
        self.obey()?;
        self.lasting.look_at_clock()?;
        let silence = self.sockets.silence();
        if silence >= self.asked.parameters.liveness.silence {
            return Err(SourceError::Silent(silence).into());
        }
        Ok(())
    }

    /// Obeys an order, if there is one.
    pub(super) fn obey(&self) -> Result<(), Stop> {
        match self.asked.orders.try_recv() {
            Ok(order) => self.lasting.obey(order, Some(self.bandwidth)),
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => Ok(()),
        }
    }

    /// The next thing that is heard within `wait`.
    pub(super) fn next(&mut self, wait: Duration) -> Result<Option<Heard>, Stop> {
        let event = match self.events.recv_timeout(wait) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => return Ok(None),
            // Senders outlive the script; were they gone, the link would be too.
            Err(RecvTimeoutError::Disconnected) => return Err(SourceError::ControlLost(ControlError::Closed).into()),
        };
        match event {
            Event::RoundSent => Ok(Some(Heard::RoundSent)),
            Event::Said(message) => understand(message).map(Some).map_err(Stop::from),
            Event::ControlLost(error) => Err(self.reason_for(SourceError::ControlLost(error)).into()),
            Event::StreamFailed {
                stream,
                error: SendError::Connection(cause),
            } => Err(self.reason_for(SourceError::StreamLost { stream, cause }).into()),
            Event::StreamFailed {
                error: SendError::Guest(cause),
                ..
            } => Err(SourceError::Guest {
                step: "read or re-arm what is copied",
                cause,
            }
            .into()),
        }
    }

    /// Why a connection broke: the destination's own words if they arrive in time, otherwise what was noticed.
    fn reason_for(&mut self, noticed: SourceError) -> SourceError {
        if matches!(noticed, SourceError::ControlLost(_)) {
            return noticed;
        }
        let deadline = Instant::now() + REASON;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(Event::Said(message)) => {
                    if let Err(refused @ SourceError::Refused(_)) = understand(message) {
                        return refused;
                    }
                }
                Ok(Event::ControlLost(_)) | Err(_) => return noticed,
                Ok(Event::StreamFailed { .. } | Event::RoundSent) => {}
            }
        }
    }

    /// Tells the destination why the migration ended, if it can still be told, and waits a moment until it hung up.
    pub(super) fn farewell(&mut self, stop: &Stop) {
        let reason = match stop {
            // What was heard made no sense; what is said may be heard all the same.
            Stop::Error(error @ SourceError::ControlLost(cause)) if !cause.is_connection() => error_chain(error),
            Stop::Error(
                SourceError::ControlLost(_)
                | SourceError::Silent(_)
                | SourceError::Refused(_)
                | SourceError::Incompatible(_),
            )
            // Another link may be made, over which nothing is over.
            | Stop::LinkLost(_) => return,
            Stop::Error(error) => error_chain(error),
            Stop::GuestEnded(_) => "guest stopped".to_owned(),
        };
        self.say(from_source::Message::Abort(v1::Abort { reason }));
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

pub(super) fn unexpected(heard: &Heard) -> SourceError {
    SourceError::Misbehaved(format!("unexpected: {}", heard.kind()))
}

fn understand(message: v1::FromDestination) -> Result<Heard, SourceError> {
    use from_destination::Message;
    match message.message {
        Some(Message::HelloReply(reply)) => Ok(Heard::HelloReply(reply)),
        Some(Message::PopulationReady(v1::PopulationReady {})) => Ok(Heard::PopulationReady),
        Some(Message::BarrierReached(reached)) => Ok(Heard::BarrierReached(reached.round)),
        Some(Message::Compared(compared)) => Ok(Heard::Compared(compared)),
        Some(Message::Holding(part)) => Ok(Heard::Holding(part)),
        Some(Message::Refused(refused)) => Err(SourceError::Refused(refused.reasons)),
        Some(Message::Missing(_) | Message::AllHere(_)) => {
            Err(SourceError::Misbehaved("it wants late pages before GO".to_owned()))
        }
        Some(Message::Ping(_) | Message::Pong(_)) | None => {
            Err(SourceError::Misbehaved("it sent an empty message".to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_expected_is_told_by_its_kind_alone() {
        let part = v1::Holding {
            runs: vec![1; 100_000],
            last: true,
        };
        let told = unexpected(&Heard::Holding(part)).to_string();
        assert_eq!(told, "the destination misbehaved: unexpected: holding");
    }
}
