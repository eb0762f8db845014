//! The host's side of the network cards: a network of the bench's own, with one tap in it.

use std::fs;
use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::thread::UnshareFlags;

/// The tap that the contenders open, one after the other.
pub(super) const TAP: &str = "bench0";

/// The card's address.
pub(super) const MAC: &str = "02:00:5e:10:00:02";

const HOST: &str = "198.51.100.1";
const GUEST: &str = "198.51.100.2";

/// Headers before a datagram's bytes: Ethernet, IPv4, UDP.
const HEADERS: usize = 14 + 20 + 8;

/// Does `work` on a thread in a network namespace of its own, in which a tap is ready. Whatever is started there is in it, and the kernel
/// removes it with its last process, however that ends.
///
/// # Errors
/// If there can be none, or what `work` says.
pub(super) fn with_network<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    in_network_of_its_own(|| {
        set_up().context("failed to set up the network")?;
        work()
    })
}

/// The same with nothing in the network but `lo`.
///
/// # Errors
/// If there can be none, or what `work` says.
pub(in crate::bench) fn in_network_of_its_own<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            unshare_network().context("failed to make a network namespace (this needs root)")?;
            // Nobody else's frames: the kernel looks for routers by IPv6 of its own accord. A kernel without IPv6 has no such file.
            let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
            ip("link set lo up").context("failed to set up the network")?;
            work()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[expect(
    deprecated,
    reason = "its successor is unsafe for the sake of other flags than this one"
)]
fn unshare_network() -> rustix::io::Result<()> {
    rustix::thread::unshare(UnshareFlags::NEWNET)
}

fn set_up() -> Result<()> {
    ip(&format!("tuntap add {TAP} mode tap vnet_hdr"))?;
    ip(&format!("link set {TAP} up"))?;
    ip(&format!("address add {HOST}/24 dev {TAP}"))?;
    // The guest answers no questions for its address.
    ip(&format!("neighbour add {GUEST} lladdr {MAC} dev {TAP} nud permanent"))
}

/// Calls `ip`.
///
/// # Errors
/// What it says.
pub(in crate::bench) fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.context("failed to call ip, of iproute2")?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`ip {arguments}`: {}", told.trim());
    Ok(())
}

/// How many frames came out of the tap so far, by the kernel's count.
///
/// # Errors
/// If the kernel does not tell.
pub(super) fn frames_from_guest() -> Result<u64> {
    // Not /sys or /proc/self: those show the process's first network.
    let text = fs::read_to_string("/proc/thread-self/net/dev").context("failed to read the interfaces' counts")?;
    let mut lines = text.lines().filter_map(|line| line.trim().split_once(':'));
    let counts = lines.find(|(name, _)| *name == TAP).map(|(_, counts)| counts);
    let packets = counts.and_then(|counts| counts.split_ascii_whitespace().nth(1)?.parse().ok());
    packets.with_context(|| format!("no counts of {TAP}"))
}

/// Sends datagrams to the guest as fast as they are taken, on a thread of its own. Dropping it ends that.
pub(super) struct Sender {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sender {
    /// Begins to send frames of so many bytes.
    ///
    /// # Errors
    /// If there can be no socket.
    pub(super) fn start(frame_bytes: usize) -> Result<Self> {
        let socket = UdpSocket::bind((HOST, 0)).context("failed to make a socket")?;
        socket
            .connect((GUEST, 9))
            .context("failed to reach the guest's network")?;
        // A socket waits for room: of a guest that takes nothing, or is gone, this hears.
        socket.set_write_timeout(Some(Duration::from_millis(100)))?;
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        let thread = thread::spawn(move || {
            let datagram = vec![0x5a; frame_bytes - HEADERS];
            while !told.load(Ordering::Relaxed) {
                // A frame that nobody takes is lost: the guest counts what comes.
                let _ = socket.send(&datagram);
            }
        });
        Ok(Self {
            over,
            thread: Some(thread),
        })
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
