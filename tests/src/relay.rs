//! A man in the middle: between one agent and another's two ports, it changes what passes.
//!
//! The caller's agent is told the relay's address as its peer's. The peer names its data port in an answer; the relay puts
//! its own there instead, of the same length, so page streams come by too. What is honest, it passes on as it is.

mod carried;
mod data_port;

use std::io::{self, ErrorKind};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use self::carried::CarriedStream;
use crate::host::{Host, free_port};
use crate::messages::Speaker;
use crate::passing::{find, pump};
use crate::tampering::{Cut, Tampering};
use crate::waiting::{CALL, until};

/// The relay. Dropping it hangs up everything that goes through it and ends its threads.
pub struct Relay {
    port: u16,
    shared: Arc<Shared>,
    acceptors: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    over: AtomicBool,
    peer: u16,
    peer_data: u16,
    data_port: u16,
}

struct State {
    tampering: Tampering,
    done: bool,
    released: bool,
    /// Times that what is to be held back went by.
    passed: u32,
    connections: Vec<TcpStream>,
    /// Those that are page streams or control streams, in the order in which they were made.
    streams: Vec<Stream>,
    /// How many connections there were.
    made: u64,
    /// How many other links were asked for while nothing is let through.
    in_vain: u64,
    /// No page streams are let through.
    is_cut: bool,
    /// None to the data port are.
    is_closed: bool,
    /// Nothing at all is.
    is_cut_off: bool,
    threads: Vec<JoinHandle<()>>,
}

/// A connection to the data port, or one by which a stream goes over gRPC.
struct Stream {
    number: u64,
    /// By its claim: 0 is the first link's control stream.
    index: Option<u16>,
    ends: [TcpStream; 2],
}

impl Stream {
    fn cut(&self) {
        for end in &self.ends {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

impl Relay {
    /// A relay before this host's two ports.
    ///
    /// # Errors
    /// If no port is free.
    pub fn before(host: &Host, tampering: Tampering) -> Result<Self> {
        let (api, port) = listen()?;
        let (data, data_port) = listen()?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                tampering,
                done: false,
                released: false,
                passed: 0,
                connections: Vec::new(),
                streams: Vec::new(),
                made: 0,
                in_vain: 0,
                is_cut: false,
                is_closed: false,
                is_cut_off: false,
                threads: Vec::new(),
            }),
            over: AtomicBool::new(false),
            peer: host.port,
            peer_data: host.data_port,
            data_port,
        });
        ensure!(
            shared.told_address().len() == shared.own_address().len(),
            "the relay's port has as many digits as the one that it stands for"
        );
        let acceptors = vec![
            accept(Arc::clone(&shared), api, Shared::relay_api),
            accept(Arc::clone(&shared), data, Shared::relay_data),
        ];
        Ok(Self {
            port,
            shared,
            acceptors,
        })
    }

    /// Where the caller's agent finds its peer.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Whether it has done what it was told to do.
    #[must_use]
    pub fn has_tampered(&self) -> bool {
        self.shared.lock().done
    }

    /// Waits until it has done what it was told to do.
    ///
    /// # Errors
    /// If what it waits for does not pass.
    pub fn wait_tampered(&self) -> Result<()> {
        until("the relay does its work", CALL, || {
            Ok(self.has_tampered().then_some(()))
        })
    }

    /// Cuts every page stream, and lets no other through until [`Relay::heal`].
    pub fn cut(&self) {
        self.shared.cut(&Cut::All);
    }

    /// Lets nothing more through to the data port, as a firewall before it: streams over gRPC go on.
    pub fn close_data_port(&self) {
        self.shared.lock().is_closed = true;
    }

    /// Waits until another link was tried so many times more while nothing is let through. Each time its connections are made all at once.
    ///
    /// # Errors
    /// If nobody tries.
    pub fn wait_tried_in_vain(&self, more: u64) -> Result<()> {
        let before = self.shared.lock().in_vain;
        until("another link is tried in vain", CALL, || {
            Ok((self.shared.lock().in_vain >= before + more).then_some(()))
        })
    }

    /// Cuts one page stream of the first link, by its index.
    ///
    /// # Errors
    /// If there is no such stream.
    pub fn cut_stream(&self, index: u16) -> Result<()> {
        let state = self.shared.lock();
        // The control stream is number 0.
        let mut streams = state.streams.iter();
        let stream = streams.find(|stream| stream.index.and_then(|claimed| claimed.checked_sub(1)) == Some(index));
        stream.context("no such stream came by")?.cut();
        Ok(())
    }

    /// Cuts everything, page streams and calls of the caller's agent alike, and lets nothing through until [`Relay::heal`].
    pub fn cut_off(&self) {
        let mut state = self.shared.lock();
        state.is_cut_off = true;
        state.streams.clear();
        for connection in state.connections.drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Lets everything through again.
    pub fn heal(&self) {
        let mut state = self.shared.lock();
        state.is_cut = false;
        state.is_cut_off = false;
    }

    /// Passes on what it held back.
    pub fn release(&self) {
        self.shared.lock().released = true;
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        for acceptor in self.acceptors.drain(..) {
            let _ = acceptor.join();
        }
        let (connections, threads) = {
            let mut state = self.shared.lock();
            (
                std::mem::take(&mut state.connections),
                std::mem::take(&mut state.threads),
            )
        };
        for connection in connections {
            let _ = connection.shutdown(Shutdown::Both);
        }
        for thread in threads {
            let _ = thread.join();
        }
    }
}

/// The field `rpc_version` of a request to prepare, as far as its major number is not told.
const RPC_VERSION: &[u8] = b"R\x034.3";
const OTHER_RPC_VERSION: &[u8] = b"R\x039.3";
/// A preparation is asked for once to learn which images are missing, and once more when they are there.
const PREPARES: u32 = 2;
/// The tag of `PreLiveMigrationReply.data_address`: field 2, a length and so many bytes.
const PREPARED_ADDRESS: u8 = 2 << 3 | 2;
/// And of `LateLinkReply.data_address`.
const LATE_LINK_ADDRESS: u8 = 3 << 3 | 2;
/// More connections at once than any scenario makes.
const MOST_CONNECTIONS: usize = 256;
/// Ports that are tried before it is given up.
const TRIES: usize = 8;
/// How often a thread that waits for something else than bytes looks again.
const PAUSE: Duration = Duration::from_millis(2);

fn listen() -> Result<(TcpListener, u16)> {
    // A port that was free a moment ago may be somebody else's by now: scenarios of other processes look for some too.
    for _ in 0..TRIES {
        let port = free_port()?;
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
            listener.set_nonblocking(true)?;
            return Ok((listener, port));
        }
    }
    bail!("failed to listen: each of {TRIES} free ports was taken before it could be used")
}

fn accept(
    shared: Arc<Shared>,
    listener: TcpListener,
    relay: fn(&Arc<Shared>, TcpStream) -> io::Result<()>,
) -> JoinHandle<()> {
    thread::spawn(move || {
        while !shared.over.load(Ordering::Relaxed) {
            let Ok((caller, _)) = listener.accept() else {
                thread::sleep(PAUSE);
                continue;
            };
            // The peer may be down: then its caller is hung up on.
            let _ = caller
                .set_nonblocking(false)
                .and_then(|()| caller.set_nodelay(true))
                .and_then(|()| relay(&shared, caller));
        }
    })
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn told_address(&self) -> String {
        format!("127.0.0.1:{}", self.peer_data)
    }

    fn own_address(&self) -> String {
        format!("127.0.0.1:{}", self.data_port)
    }

    fn connect(&self, caller: &TcpStream, port: u16) -> io::Result<TcpStream> {
        let callee = TcpStream::connect(("127.0.0.1", port))?;
        callee.set_nodelay(true)?;
        let mut state = self.lock();
        if state.is_cut_off {
            return Err(ErrorKind::ConnectionAborted.into());
        }
        if state.connections.len() >= 2 * MOST_CONNECTIONS {
            return Err(ErrorKind::QuotaExceeded.into());
        }
        state.connections.push(caller.try_clone()?);
        state.connections.push(callee.try_clone()?);
        Ok(callee)
    }

    fn spawn(&self, work: impl FnOnce() + Send + 'static) {
        self.lock().threads.push(thread::spawn(work));
    }

    /// What is to be done, unless it was done.
    fn tampering(&self) -> Tampering {
        let state = self.lock();
        if state.done {
            Tampering::None
        } else {
            state.tampering.clone()
        }
    }

    fn done(&self) {
        self.lock().done = true;
    }

    fn relay_api(self: &Arc<Self>, caller: TcpStream) -> io::Result<()> {
        let callee = self.connect(&caller, self.peer)?;
        let number = {
            let mut state = self.lock();
            state.made += 1;
            state.made
        };
        let (from, to, shared) = (caller.try_clone()?, callee.try_clone()?, Arc::clone(self));
        let mut said = CarriedStream::new(number, Speaker::Source);
        self.spawn(move || {
            pump(&from, &to, |bytes| {
                if !said.is_stream() {
                    shared.change_request(bytes);
                }
                shared.look(&mut said, bytes, [&from, &to]);
            });
        });
        let shared = Arc::clone(self);
        let mut said = CarriedStream::new(number, Speaker::Destination);
        self.spawn(move || {
            pump(&callee, &caller, |bytes| {
                if !said.is_stream() {
                    shared.change_answer(bytes);
                }
                shared.look(&mut said, bytes, [&caller, &callee]);
            });
        });
        Ok(())
    }

    fn change_request(&self, bytes: &mut [u8]) {
        let Some(at) = find(bytes, RPC_VERSION) else { return };
        match self.tampering() {
            Tampering::RpcVersion => {
                bytes[at..at + OTHER_RPC_VERSION.len()].copy_from_slice(OTHER_RPC_VERSION);
                self.done();
            }
            Tampering::HoldPrepare => self.hold(),
            _ => {}
        }
    }

    fn change_answer(&self, bytes: &mut [u8]) {
        let told = self.told_address();
        let mut behind = 0;
        // Several answers may have come at once.
        while let Some(at) = find(&bytes[behind..], told.as_bytes()).map(|found| behind + found) {
            self.change_address(bytes, at);
            behind = at + told.len();
        }
    }

    /// The data port's address is there in an answer.
    fn change_address(&self, bytes: &mut [u8], at: usize) {
        if bytes[..at].ends_with(&[LATE_LINK_ADDRESS, self.told_address().len() as u8]) {
            let mut state = self.lock();
            state.in_vain += u64::from(state.is_cut);
        }
        // Connections that are made after a cut come by as well: they are to be refused until it is healed.
        let cuts = match &self.lock().tampering {
            cuts @ Tampering::CutsAt { .. } => Some(cuts.clone()),
            _ => None,
        };
        match cuts.unwrap_or_else(|| self.tampering()) {
            Tampering::Message { .. }
            | Tampering::Frame { .. }
            | Tampering::Pages { .. }
            | Tampering::Messages(_)
            | Tampering::CutsAt { .. }
            | Tampering::Cuts => {
                let own = self.own_address();
                bytes[at..at + own.len()].copy_from_slice(own.as_bytes());
            }
            // What a host says of itself has the address too, in another field.
            Tampering::HoldPrepared if bytes[..at].ends_with(&[PREPARED_ADDRESS, self.told_address().len() as u8]) => {
                self.hold();
            }
            _ => {}
        }
    }

    /// Holds back what comes by for the last time.
    fn hold(&self) {
        {
            let mut state = self.lock();
            state.passed += 1;
            if state.passed < PREPARES {
                return;
            }
            state.done = true;
        }
        while !self.lock().released && !self.over.load(Ordering::Relaxed) {
            thread::sleep(PAUSE);
        }
    }

    fn relay_data(self: &Arc<Self>, caller: TcpStream) -> io::Result<()> {
        let callee = self.connect(&caller, self.peer_data)?;
        let ends = [caller.try_clone()?, callee.try_clone()?];
        let number = {
            let mut state = self.lock();
            if state.is_cut || state.is_closed {
                let _ = caller.shutdown(Shutdown::Both);
                return Ok(());
            }
            state.made += 1;
            let (number, index) = (state.made, None);
            state.streams.push(Stream { number, index, ends });
            number
        };
        let shared = Arc::clone(self);
        self.spawn(move || {
            if shared.relay_connection(number, &caller, &callee).is_err() {
                let _ = caller.shutdown(Shutdown::Both);
                let _ = callee.shutdown(Shutdown::Both);
            }
        });
        Ok(())
    }

    fn cut(&self, cut: &Cut) {
        let mut state = self.lock();
        match cut {
            Cut::All => {
                state.is_cut = true;
                state.streams.drain(..).for_each(|stream| stream.cut());
            }
            Cut::Streams(indexes) => {
                let is_meant = |stream: &&Stream| {
                    let index = stream.index.and_then(|index| index.checked_sub(1));
                    index.is_some_and(|index| indexes.contains(&index))
                };
                state.streams.iter().filter(is_meant).for_each(Stream::cut);
            }
        }
    }
}
