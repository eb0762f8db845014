//! The machine and a snapshot: written to files, or built from them, on a thread that takes it by value.
//!
//! The files are the agent's: this process gets them open, and knows no path. What they are and how they are laid out says
//! `docs/snapshot.md`.

mod files;
mod restoring;
mod taking;

use std::os::fd::OwnedFd;
use std::thread;

use anyhow::Context;
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::vmm::v1::{self as wire};

use self::files::Files;
use self::restoring::Origin;
use super::events::Event;
use super::guest::LocalGuest;
use super::jail;
use super::migrating::Loading;
use super::vmm::{Holding, Vmm};

/// A guest after its snapshot, and what became of the files.
pub(super) struct Snapshotted {
    guest: Box<LocalGuest>,
    /// Why the guest, which ran, does not run any more.
    stuck: Option<String>,
    ended: wire::SnapshotEnded,
}

impl Vmm {
    /// Begins to write the guest to the files that came with the order.
    pub(super) fn snapshot(&mut self, order: &wire::Snapshot, descriptors: Vec<OwnedFd>) -> anyhow::Result<Body> {
        self.check_user_order(order.epoch)?;
        let files = Files::new(descriptors)?;
        let events = self.events.clone();
        let (hand_in, guest) = std::sync::mpsc::sync_channel::<Box<LocalGuest>>(1);
        let run = move || {
            jail::narrow(jail::Kind::Snapshot);
            let Ok(guest) = guest.recv() else { return };
            let _ = events.send(Event::SnapshotOutcome(taking::take(guest, &files)));
        };
        // The guest is given to a thread that exists: if none can be had, it stays here.
        thread::Builder::new()
            .name("snapshot".to_owned())
            .spawn(run)
            .context("failed to start a thread")?;
        self.end_sample("a snapshot of the guest began");
        let Holding::Here(guest) = std::mem::replace(&mut self.holding, Holding::Snapshotting) else {
            anyhow::bail!("the guest is gone");
        };
        anyhow::ensure!(hand_in.send(guest).is_ok(), "the snapshot's thread ended");
        self.standing.snapshot_ended = None;
        Ok(Body::Done(wire::Done {}))
    }

    /// The guest is back from its snapshot.
    pub(super) fn snapshot_outcome(&mut self, outcome: Snapshotted) {
        let Snapshotted { guest, stuck, ended } = outcome;
        tracing::info!(error = ended.error, paused_ms = ended.paused_ms, "the snapshot ended");
        self.holding = Holding::Here(guest);
        self.standing.snapshot_ended = Some(ended.clone());
        self.report(0, Body::SnapshotEnded(ended));
        match stuck {
            Some(reason) => self.ended(ferry_migration::guest::GuestEnd::Crashed(reason)),
            // What the guest said while nobody looked.
            None => drop(self.events.send(Event::Guest)),
        }
    }

    /// Begins to fill the empty machine from the files that came with the order.
    pub(super) fn restore(&mut self, order: &wire::Restore, descriptors: Vec<OwnedFd>) -> anyhow::Result<Body> {
        anyhow::ensure!(
            matches!(self.holding, Holding::Blank(_)),
            "the machine is {}",
            self.machine_word()
        );
        let (files, origin) = (Files::new(descriptors)?, Origin::from_wire(order)?);
        let Holding::Blank(blank) = std::mem::replace(&mut self.holding, Holding::Loading(Loading { orders: None }))
        else {
            anyhow::bail!("the machine is gone");
        };
        let events = self.events.clone();
        let run = move || {
            jail::narrow(jail::Kind::Snapshot);
            let restored = restoring::restore(*blank, &files, &origin);
            let _ = events.send(Event::RestoreOutcome(restored.map(Box::new)));
        };
        thread::Builder::new()
            .name("restore".to_owned())
            .spawn(run)
            .context("failed to start a thread")?;
        Ok(Body::Done(wire::Done {}))
    }

    /// The machine is the guest of the snapshot now, and waits for its permit; or nothing is left of it.
    pub(super) fn restore_outcome(&mut self, outcome: anyhow::Result<Box<LocalGuest>>) {
        match outcome {
            Ok(guest) => {
                self.holding = Holding::Here(guest);
                self.report(0, Body::Restored(wire::Restored {}));
            }
            Err(error) => {
                let reason = format!("{error:#}");
                tracing::info!(reason, "the snapshot could not be restored");
                self.holding = Holding::Nothing;
                self.report(0, Body::LoadFailed(wire::LoadFailed { reason }));
            }
        }
    }
}
