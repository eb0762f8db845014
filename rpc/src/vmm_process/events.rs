//! Everything that can happen to a VMM process, and the threads that wait for an agent.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Duration;

use ferry_migration::destination::{DestinationError, DestinationReport, Loaded};
use ferry_migration::postcopy::{ServeReport, Served};
use ferry_migration::source::{SourceOutcome, SourceReport};
use ferry_proto::vmm::v1::Order;

use super::guest::{LocalGuest, RestoredMachine};
use super::jail;
use super::snapshot::Snapshotted;
use crate::vmm_channel;

/// What the machine's owner waits for.
pub(super) enum Event {
    /// An agent connected; what an earlier connection still held is void.
    Connected(UnixStream, Connection),
    /// An order came over this connection.
    Order(Connection, Box<Order>, Vec<OwnedFd>),
    /// This connection ended.
    Disconnected(Connection),
    /// The guest put something into its inbox.
    Guest,
    /// The next look of a sample is due.
    Sample,
    /// The migration out of here tells how far it is.
    SendReport(Box<SourceReport>),
    /// The migration out of here is over, and gives the guest back.
    SendOutcome(Box<SourceOutcome<LocalGuest>>),
    /// The source of late pages tells how far it is.
    ServeReport(ServeReport),
    /// It serves no more.
    Served(Served),
    /// The migration into here tells how far it is.
    LoadReport(DestinationReport),
    /// The migration into here is over.
    LoadOutcome(Box<Result<Loaded<RestoredMachine>, DestinationError>>),
    /// The snapshot is over, and gives the guest back.
    SnapshotOutcome(Snapshotted),
    /// The machine was restored from a snapshot, or that failed.
    RestoreOutcome(anyhow::Result<Box<LocalGuest>>),
}

/// The number of an agent's connection; later ones are larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Connection(u64);

/// How long a report may wait for an agent that does not read; then its connection is dropped.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

/// Accepts agents for ever, each connection read by a thread of its own.
pub(super) fn accept_agents(listener: UnixListener, events: Sender<Event>) -> io::Result<()> {
    let accept = move || {
        jail::narrow(jail::Kind::Control);
        for number in 1.. {
            let socket = match listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) => {
                    tracing::warn!(%error, "failed to accept an agent");
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            if let Err(error) = serve_agent(socket, Connection(number), events.clone()) {
                tracing::warn!(%error, "failed to serve an agent");
            }
        }
    };
    thread::Builder::new().name("accept".to_owned()).spawn(accept).map(drop)
}

fn serve_agent(socket: UnixStream, connection: Connection, events: Sender<Event>) -> io::Result<()> {
    socket.set_write_timeout(Some(SEND_TIMEOUT))?;
    let reader = socket.try_clone()?;
    // The owner is gone only when the process is ending.
    let _ = events.send(Event::Connected(socket, connection));
    let read = move || {
        loop {
            match vmm_channel::receive::<Order>(&reader) {
                Ok(Some((order, descriptors))) => {
                    if events
                        .send(Event::Order(connection, Box::new(order), descriptors))
                        .is_err()
                    {
                        return;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::info!(%error, "the agent's connection ended");
                    break;
                }
            }
        }
        let _ = events.send(Event::Disconnected(connection));
    };
    thread::Builder::new().name("orders".to_owned()).spawn(read).map(drop)
}
