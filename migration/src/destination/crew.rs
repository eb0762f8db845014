//! The destination's threads.

use std::sync::mpsc::{Receiver, SyncSender};
use std::thread::{self, Scope};
use std::time::Duration;

use ferry_proto::stream::v1;

use crate::compress::Codecs;
use crate::destination::hearing::{Event, Outbox};
use crate::destination::receiver::Receiver as PageReceiver;
use crate::destination::{DestinationError, Shared};
use crate::guest::GuestMemory;
use crate::link::{self, Outgoing, Sockets};
use crate::wire::StreamIdentity;

/// Starts the threads.
pub(super) struct Crew<'scope, 'env, M> {
    pub(super) scope: &'scope Scope<'scope, 'env>,
    pub(super) sockets: &'scope Sockets,
    pub(super) shared: &'scope Shared,
    pub(super) memory: &'scope M,
    pub(super) events: SyncSender<Event>,
}

impl<'scope, M: GuestMemory> Crew<'scope, '_, M> {
    pub(super) fn start_control(
        &self,
        outbox: &Outbox,
        outgoing: Receiver<Outgoing<v1::FromDestination>>,
        heartbeat: Duration,
    ) -> Result<(), DestinationError> {
        let (sockets, outbox, events) = (self.sockets, outbox.clone(), self.events.clone());
        self.spawn("ferry-control-in".into(), move || {
            let deliver = |message| events.send(Event::Said(message)).is_ok();
            if let Err(error) = link::read_control(sockets, &outbox, deliver) {
                let _ = events.send(Event::ControlLost(error));
            }
        })?;
        let events = self.events.clone();
        self.spawn("ferry-control-out".into(), move || {
            if let Err(error) = link::write_control(sockets, &outgoing, heartbeat) {
                let _ = events.send(Event::ControlLost(error));
            }
        })
    }

    pub(super) fn start_receivers(&self, identity: &StreamIdentity, codecs: Codecs) -> Result<(), DestinationError> {
        let Self {
            sockets,
            shared,
            memory,
            ..
        } = *self;
        for (stream, socket) in (0u16..).zip(&sockets.pages) {
            let Shared {
                received,
                whole,
                backing,
                delivered,
                digests,
                round,
                before: _,
                late_streams: _,
            } = shared;
            let delivered = &delivered[usize::from(stream)];
            let receiver = PageReceiver {
                stream,
                socket,
                sockets,
                memory,
                received,
                whole,
                backing,
                delivered,
                digests: digests.get(),
                codecs,
                round,
            };
            let (events, identity) = (self.events.clone(), *identity);
            self.spawn(format!("ferry-receive-{stream}"), move || {
                // Nobody listens once the migration is over.
                let error = receiver.run(&identity, || drop(events.send(Event::Arrived))).err();
                let _ = events.send(Event::StreamEnded { stream, error });
            })?;
        }
        Ok(())
    }

    fn spawn(&self, name: String, work: impl FnOnce() + Send + 'scope) -> Result<(), DestinationError> {
        let spawned = thread::Builder::new().name(name).spawn_scoped(self.scope, work);
        spawned.map(drop).map_err(|cause| DestinationError::Host {
            step: "start a thread",
            cause,
        })
    }
}
