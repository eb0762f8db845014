//! What a user asks of a guest that is here.

use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_vmm::ButtonPress;

use super::super::guest::Reset;
use super::{Holding, Vmm};

impl Vmm {
    pub(super) fn pause(&mut self, epoch: u64) -> anyhow::Result<Body> {
        self.check_user_order(epoch)?;
        if let Holding::Here(guest) = &mut self.holding {
            guest.machine.pause()?;
            self.user_paused = true;
        }
        Ok(Body::Done(wire::Done {}))
    }

    pub(super) fn resume(&mut self, epoch: u64) -> anyhow::Result<Body> {
        self.check_user_order(epoch)?;
        if let Holding::Here(guest) = &mut self.holding {
            guest.machine.run()?;
            self.user_paused = false;
        }
        Ok(Body::Done(wire::Done {}))
    }

    pub(super) fn reboot(&mut self) -> anyhow::Result<Body> {
        self.check_user_order(self.permits.had().0)?;
        self.late.check_whole()?;
        if let Holding::Here(guest) = &mut self.holding
            && let Reset::NotYet(why) = guest.reset()?
        {
            return Err(anyhow::Error::new(why).context("the guest cannot be reset now, ask again"));
        }
        Ok(Body::Done(wire::Done {}))
    }

    pub(super) fn press_power_button(&mut self, epoch: u64) -> anyhow::Result<Body> {
        if let Holding::Ended = self.holding {
            // What was asked for has come, or worse: the word of it is on its way.
            return Ok(Body::Pressed(wire::Pressed { guest_listens: true }));
        }
        self.check_user_order(epoch)?;
        let guest_listens = match &self.holding {
            Holding::Here(guest) => guest.machine.press_power_button()? == ButtonPress::Told,
            _ => false,
        };
        tracing::info!(guest_listens, "the power button was pressed");
        Ok(Body::Pressed(wire::Pressed { guest_listens }))
    }

    pub(super) fn profile(&self) -> anyhow::Result<Body> {
        match &self.holding {
            Holding::Here(guest) => Ok(Body::Profiled(wire::Profiled {
                profile: guest.machine.profile().to_bytes(),
            })),
            _ => anyhow::bail!("the guest is {}", self.machine_word()),
        }
    }

    pub(super) fn set_balloon(&mut self, order: wire::SetBalloon) -> anyhow::Result<Body> {
        self.check_user_order(order.epoch)?;
        self.late.check_whole()?;
        if let Holding::Here(guest) = &mut self.holding {
            guest.machine.want_balloon(order.wanted_pages)?;
        }
        Ok(Body::Done(wire::Done {}))
    }

    /// A user's order goes to a guest that is here, under the epoch that it has, while no grant binds it.
    pub(in crate::vmm_process) fn check_user_order(&self, epoch: u64) -> anyhow::Result<()> {
        anyhow::ensure!(
            matches!(self.holding, Holding::Here(_)),
            "the guest is {}",
            self.machine_word()
        );
        anyhow::ensure!(!self.grants.binds(), "a switchover is in progress");
        let had = self.permits.had().0;
        anyhow::ensure!(
            had == epoch && had > 0,
            "the guest runs under epoch {had}, the order is for {epoch}"
        );
        Ok(())
    }

    pub(super) fn console_input(&mut self, bytes: &[u8]) -> anyhow::Result<Body> {
        let Some(console) = &self.console else {
            anyhow::bail!("the guest is {}", self.machine_word())
        };
        let accepted = console.push(bytes);
        anyhow::ensure!(
            accepted == bytes.len(),
            "the guest's console took {accepted} of {} bytes",
            bytes.len()
        );
        Ok(Body::Done(wire::Done {}))
    }
}
