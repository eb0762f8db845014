//! Two agents on this machine, a probe guest, and what it and its readers live through: what `demo`, `bench` and `selftest` share.
//!
//! A [`Lab`] owns a temporary directory, two agent processes and whatever they start; it takes all of it down again,
//! however the work ends. Every figure is measured: by the agents, by the guest (in its heartbeats), or by the reader of
//! its heartbeats here.

mod felt;
mod gate;
mod hosts;
mod journey;
mod processes;
mod reader;
mod record;

use std::time::Duration;

use ferry_proto::agent::v1::{InstanceInfo, InstanceSpec};
use tokio::signal::unix::{SignalKind, signal};

use super::failure::{Exit, Failure};

pub(super) use self::felt::Stretch;
pub(super) use self::gate::Gate;
pub(super) use self::hosts::{Lab, ProbeGuest};
pub(super) use self::journey::{Move, MoveOrder};
pub(super) use self::record::Beat;

/// What the guest in a lab is made of.
#[derive(Debug, Clone)]
pub(super) struct GuestPlan {
    pub(super) name: String,
    pub(super) memory_bytes: u64,
    pub(super) vcpus: u32,
    pub(super) dirty: String,
    /// The probe's command line.
    pub(super) cmdline: String,
    /// How long filling its memory may take.
    pub(super) patience: Duration,
}

impl GuestPlan {
    fn spec(&self, kernel: String) -> InstanceSpec {
        InstanceSpec {
            name: self.name.clone(),
            memory_bytes: self.memory_bytes,
            vcpus: self.vcpus,
            cpu: "host".to_owned(),
            dirty: self.dirty.clone(),
            kernel,
            initrd: String::new(),
            cmdline: told_the_clock(&self.cmdline),
            hugepages: false,
            restart: String::new(),
            disks: Vec::new(),
            nics: Vec::new(),
        }
    }
}

/// The probe's command line with what its clock runs at: not every host lets a guest find that in CPUID, and measuring it
/// against the PIT goes wrong on a busy one.
fn told_the_clock(cmdline: &str) -> String {
    match ferry_vmm::host() {
        Ok(host) if host.tsc_khz > 0 => format!("{cmdline} tsc_khz={}", host.tsc_khz),
        _ => cmdline.to_owned(),
    }
}

/// Does some work in a lab and takes the lab down, whatever came of the work; SIGINT, SIGTERM and SIGHUP end it early.
///
/// # Errors
/// What the work returned, the interruption, or, after work that went well, what could not be taken down.
pub(super) async fn in_a_lab<T>(work: impl AsyncFnOnce(&mut Lab) -> Result<T, Failure>) -> Result<T, Failure> {
    let interrupted = interrupted()?;
    let mut lab = Lab::new()?;
    let outcome = tokio::select! {
        outcome = work(&mut lab) => outcome,
        () = interrupted => Err(Failure::new(Exit::Interrupted, "interrupted; guest, agents and files are removed")),
    };
    if let Err(failure) = &outcome
        && failure.exit != Exit::Interrupted
    {
        lab.tell_logs();
    }
    let closed = lab.close().await;
    let result = outcome?;
    closed.map(|()| result)
}

/// Completes when this process is asked to end. From the call on, such signals do nothing else.
pub(super) fn interrupted() -> Result<impl Future<Output = ()>, Failure> {
    let listen =
        |kind| signal(kind).map_err(|error| Failure::new(Exit::Failed, format!("listen for signals: {error}")));
    let mut signals = (
        listen(SignalKind::interrupt())?,
        listen(SignalKind::terminate())?,
        listen(SignalKind::hangup())?,
    );
    Ok(async move {
        tokio::select! {
            _ = signals.0.recv() => {}
            _ = signals.1.recv() => {}
            _ = signals.2.recv() => {}
        }
    })
}

/// Where an instance runs, over both hosts.
fn runners(instances: &[InstanceInfo]) -> Vec<&str> {
    instances
        .iter()
        .filter(|info| info.status == "running")
        .map(|info| info.host.as_str())
        .collect()
}
