//! How much memory a guest is asked to do without, and how much it does without.

use std::time::Duration;

use ferry_proto::InvalidField;
use ferry_proto::agent::v1::{Balloon, InstanceInfo, InstanceSpec};
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::{self as wire};

use super::instance::Agent;
use super::spec::LEAST_MEMORY;
use crate::agent::context::RequestContext;
use crate::agent::failure::Failure;
use crate::agent::journal::Status;
use crate::agent::vmm_client::Vmm;

/// A VMM says at once how full the balloon is, or it is not waited for: what else is known of an instance is told anyway.
const ANSWER_TIME: Duration = Duration::from_millis(500);

const PAGE: u64 = 4096;

impl Agent {
    /// Asks the guest to have so much memory. It does so in its own time.
    pub(crate) async fn balloon_instance(
        &self,
        context: &RequestContext,
        name: &str,
        memory_bytes: u64,
    ) -> Result<InstanceInfo, Failure> {
        let instance = self.instance(name).await?;
        let state = context.wait(instance.state.lock()).await?;
        state.check_idle("be given another amount of memory")?;
        state.check_whole("be given another amount of memory")?;
        self.expect_status(&state, Status::Running)?;
        let wanted_pages = pages_to_give_up(&state.row.spec, memory_bytes)?;
        let vmm = state.vmm()?.clone();
        let order = wire::SetBalloon {
            epoch: state.row.epoch,
            wanted_pages,
        };
        vmm.order(Command::SetBalloon(order))
            .await
            .map_err(Failure::vmm("failed to ask the guest for memory"))?;
        let mut info = state.info(self.host());
        // Others are not to wait for what is only told.
        drop(state);
        info.balloon = balloon_of(&vmm, info.memory_bytes).await;
        Ok(info)
    }

    /// An instance with what its VMM says of its balloon, and what was done to it.
    pub(crate) async fn show_instance(&self, name: &str) -> Result<InstanceInfo, Failure> {
        let instance = self.instance(name).await?;
        let (mut info, vmm) = {
            let state = instance.state.lock().await;
            (state.info(self.host()), state.vmm.clone())
        };
        if let Some(vmm) = vmm {
            info.balloon = balloon_of(&vmm, info.memory_bytes).await;
        }
        (info.events, info.fault) = self.history(instance.id).await?;
        Ok(info)
    }
}

/// How many pages a guest gives up that is to have so much memory.
fn pages_to_give_up(spec: &InstanceSpec, memory_bytes: u64) -> Result<u32, Failure> {
    let invalid = |problem: String| {
        Err(Failure::from(InvalidField {
            field: "memory_bytes",
            problem,
        }))
    };
    let refused = |problem: String| Err(Failure::Refused(format!("instance {} {problem}", spec.name)));
    if memory_bytes < LEAST_MEMORY || !memory_bytes.is_multiple_of(PAGE) {
        return invalid(format!("{memory_bytes} is below 4 MiB or no multiple of {PAGE}"));
    }
    if memory_bytes > spec.memory_bytes {
        return refused(format!(
            "has {} bytes of memory in all: it cannot be given {memory_bytes}",
            spec.memory_bytes
        ));
    }
    if spec.hugepages {
        return refused(
            "has its memory from the pool of huge pages, of which a guest can give no part back".to_owned(),
        );
    }
    match u32::try_from((spec.memory_bytes - memory_bytes) / PAGE) {
        Ok(pages) => Ok(pages),
        Err(_) => refused("cannot give up more than 16 TiB".to_owned()),
    }
}

async fn balloon_of(vmm: &Vmm, memory_bytes: u64) -> Option<Balloon> {
    let balloon = vmm.glance(ANSWER_TIME).await?.balloon?;
    Some(in_bytes(balloon, memory_bytes))
}

/// Guests and their state may say any number: nobody gives up more than there is.
fn in_bytes(balloon: wire::Balloon, memory_bytes: u64) -> Balloon {
    let without = |pages: u32| memory_bytes.saturating_sub(u64::from(pages) * PAGE);
    Balloon {
        target_bytes: without(balloon.wanted_pages),
        actual_bytes: without(balloon.actual_pages),
        driver: balloon.driver,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> InstanceSpec {
        InstanceSpec {
            name: "web".to_owned(),
            memory_bytes: 256 << 20,
            ..InstanceSpec::default()
        }
    }

    #[test]
    fn what_is_not_to_be_had_is_given_up() {
        assert_eq!(pages_to_give_up(&spec(), 256 << 20).unwrap(), 0);
        assert_eq!(pages_to_give_up(&spec(), 255 << 20).unwrap(), 256);
    }

    #[test]
    fn amounts_that_cannot_be_are_named() {
        let told = |spec: &InstanceSpec, bytes| pages_to_give_up(spec, bytes).unwrap_err().chain();
        assert!(told(&spec(), 257 << 20).contains("web has 268435456 bytes"));
        assert!(told(&spec(), (4 << 20) - PAGE).contains("memory_bytes"));
        assert!(told(&spec(), (64 << 20) + 1).contains("memory_bytes"));
        let huge = InstanceSpec {
            hugepages: true,
            ..spec()
        };
        assert!(told(&huge, 128 << 20).contains("huge pages"));
        let large = InstanceSpec {
            memory_bytes: 32 << 40,
            ..spec()
        };
        assert!(told(&large, 1 << 30).contains("16 TiB"));
    }

    #[test]
    fn a_guest_that_claims_anything_has_given_up_all_at_most() {
        let told = wire::Balloon {
            wanted_pages: 256,
            actual_pages: u32::MAX,
            driver: true,
        };
        let found = in_bytes(told, 256 << 20);
        assert_eq!((found.target_bytes, found.actual_bytes), (255 << 20, 0));
    }
}
