//! A guest's right to run, from its agent.

use std::fs::File;
use std::io;

use ferry_migration::guest::GuestEnd;
use ferry_migration::handover::{Epoch, Permit};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::wire_uuid;

use super::super::convert::monotonic_ns;
use super::super::guest::LocalGuest;
use super::{Holding, Vmm};

impl Vmm {
    /// The one place where a guest gets the right to run.
    pub(super) fn permit(&mut self, permit: &wire::Permit) -> anyhow::Result<Body> {
        let permit = Permit {
            instance: wire_uuid("permit.instance", &permit.instance)?,
            epoch: Epoch(permit.epoch),
            paused: permit.paused,
        };
        match &self.holding {
            Holding::Here(_) | Holding::Ready(_) | Holding::Parked(_) => {}
            _ => anyhow::bail!("no guest waits for a permit here: {}", self.machine_word()),
        }
        self.permits.check(permit)?;
        // Refused with its reason where somebody else has them, the permit not taken: it may come again.
        self.lock_disks(permit.epoch)?;
        self.permits.take(permit)?;
        self.user_paused = permit.paused;
        let has_moved = matches!(self.holding, Holding::Ready(_));
        let guest = match std::mem::replace(&mut self.holding, Holding::Nothing) {
            Holding::Here(guest) => guest,
            Holding::Ready(ready) => {
                // Written before the first KVM_RUN; without it nobody could tell a crash from a guest that never ran.
                if let Err(error) = self.leave_mark() {
                    self.holding = Holding::Ready(ready);
                    anyhow::bail!(
                        "failed to write the started mark {}: {error}",
                        self.started_mark.display()
                    );
                }
                Box::new(ready.into_guest())
            }
            Holding::Parked(parked) => match parked.resume(permit) {
                Ok(mut guest) => {
                    self.late.stop_serving();
                    self.standing.late = None;
                    self.grants.superseded();
                    ferry_migration::guest::SourceGuest::stop_tracking(&mut guest);
                    Box::new(guest)
                }
                Err((parked, reason)) => {
                    parked.guest().disks.unlock();
                    self.holding = Holding::Parked(parked);
                    anyhow::bail!(reason);
                }
            },
            other => {
                self.holding = other;
                anyhow::bail!("no guest waits for a permit here");
            }
        };
        let answer = self.start(guest, permit);
        if let Holding::Here(guest) = &self.holding {
            if has_moved {
                guest.announcer.announce();
            }
            guest.disks.note_epoch(permit.epoch);
        }
        answer
    }

    /// A guest that is to run has its disks: one that arrived took them when it was restored.
    fn lock_disks(&self, epoch: Epoch) -> anyhow::Result<()> {
        match &self.holding {
            Holding::Here(guest) => guest.disks.lock_patiently(epoch)?,
            Holding::Parked(parked) => parked.guest().disks.lock_patiently(epoch)?,
            _ => {}
        }
        Ok(())
    }

    fn leave_mark(&self) -> io::Result<()> {
        File::create(&self.started_mark).map(drop)
    }

    fn start(&mut self, mut guest: Box<LocalGuest>, permit: Permit) -> anyhow::Result<Body> {
        self.console = Some(guest.console_input());
        self.balloon = Some(guest.machine.balloon());
        self.traffic = guest.machine.traffic().to_vec();
        if !permit.paused
            && let Err(error) = guest.machine.run()
        {
            // The epoch is taken, so this is a crash and not a refusal.
            self.ended(GuestEnd::Crashed(format!("failed to enter the guest: {error}")));
            return Ok(Body::Done(wire::Done {}));
        }
        self.holding = Holding::Here(guest);
        let started = wire::Started {
            epoch: permit.epoch.0,
            entered_ns: monotonic_ns(),
        };
        self.standing.started = Some(started);
        self.standing.ready = None;
        self.standing.last_go = None;
        self.report(0, Body::Started(started));
        tracing::info!(
            epoch = permit.epoch.0,
            paused = permit.paused,
            "the guest has its permit"
        );
        Ok(Body::Done(wire::Done {}))
    }
}
