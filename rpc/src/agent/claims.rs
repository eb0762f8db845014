//! What guests claim of this host, and what may be claimed: Nova's claims and allocation ratios.
//!
//! An instance claims its memory and vCPUs while a VMM runs for it, or while one may come to: running, paused, on its way
//! here, or indeterminate. A migration into here holds its claim from PREPARE on, and gives it back when it is forgotten.

use std::time::Duration;

use ferry_proto::agent::v1::InstanceSpec;
use tokio::time::{Instant, timeout_at};

use super::failure::Failure;
use super::host;
use super::instances::Agent;
use super::journal::Status;
use super::reason::Reason;

/// How long instances are waited for, all together, that somebody works on: a look takes no time, but a start or the making of a machine takes
/// seconds, and other hosts take one that does not answer for down.
const PATIENCE: Duration = Duration::from_millis(200);

/// Memory and processors, of what is claimed or of what may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Claims {
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u32,
}

/// How many times what is there may be claimed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AllocationRatios {
    /// Of the host's memory; Nova's default is 1.5.
    pub ram: f64,
    /// Of its processors; Nova's default is 16.
    pub cpu: f64,
}

impl Default for AllocationRatios {
    fn default() -> Self {
        Self { ram: 1.5, cpu: 16.0 }
    }
}

impl AllocationRatios {
    fn of(self, memory_bytes: u64, cpus: usize) -> Claims {
        Claims {
            memory_bytes: (memory_bytes as f64 * self.ram) as u64,
            vcpus: (cpus as f64 * self.cpu) as u32,
        }
    }
}

impl Claims {
    /// What an instance claims while it claims anything.
    pub(crate) fn of(spec: &InstanceSpec) -> Self {
        Self {
            memory_bytes: spec.memory_bytes,
            vcpus: spec.vcpus,
        }
    }

    fn and(self, other: Self) -> Self {
        Self {
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
            vcpus: self.vcpus.saturating_add(other.vcpus),
        }
    }

    /// What an instance lacks beside what is claimed: all that is short, and how much of it is there.
    fn lacks(self, limit: Self, spec: &InstanceSpec, host: &str) -> Vec<Failure> {
        let with = self.and(Self::of(spec));
        let mut lacks = Vec::new();
        if with.memory_bytes > limit.memory_bytes {
            lacks.push(Failure::denied(
                Reason::Memory,
                format!(
                    "host {host} has {} MiB of memory for guests, {} MiB of it claimed: the instance wants {} MiB",
                    limit.memory_bytes >> 20,
                    self.memory_bytes >> 20,
                    spec.memory_bytes >> 20
                ),
            ));
        }
        if with.vcpus > limit.vcpus {
            lacks.push(Failure::denied(
                Reason::Vcpus,
                format!(
                    "host {host} has {} vCPUs for guests, {} of them claimed: the instance wants {}",
                    limit.vcpus, self.vcpus, spec.vcpus
                ),
            ));
        }
        lacks
    }
}

impl Agent {
    /// What may be claimed here.
    pub(crate) fn claims_limit(&self) -> Claims {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.config.allocation.of(host::meminfo("MemTotal"), cpus)
    }

    /// What is claimed here, or promised to those that are being prepared.
    pub(crate) async fn claimed(&self) -> Claims {
        let deadline = Instant::now() + PATIENCE;
        let mut claims = Claims::default();
        let mut promises = self.reservations.promises();
        for instance in self.instances.all() {
            promises.retain(|promise| promise.instance != instance.id);
            // One that is worked on is about to claim, or still does.
            let is_off = timeout_at(deadline, instance.state.lock())
                .await
                .is_ok_and(|state| matches!(state.row.status, Status::Stopped | Status::Crashed));
            if !is_off {
                claims = claims.and(instance.claim);
            }
        }
        promises
            .iter()
            .fold(claims, |claims, promise| claims.and(Claims::of(&promise.spec)))
    }

    /// Whether an instance that comes here may claim what it needs.
    ///
    /// # Errors
    /// Says what is short.
    pub(crate) async fn check_claim(&self, spec: &InstanceSpec) -> Result<(), Failure> {
        self.lacks(spec).await.into_iter().next().map_or(Ok(()), Err)
    }

    /// All that is short for an instance that comes here.
    pub(crate) async fn lacks(&self, spec: &InstanceSpec) -> Vec<Failure> {
        self.claimed().await.lacks(self.claims_limit(), spec, self.host())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(memory_bytes: u64, vcpus: u32) -> InstanceSpec {
        InstanceSpec {
            memory_bytes,
            vcpus,
            ..InstanceSpec::default()
        }
    }

    #[test]
    fn what_is_short_is_said() {
        let limit = AllocationRatios::default().of(8 << 30, 1);
        let claimed = Claims::of(&spec(10 << 30, 8));
        let lacks = |spec: &InstanceSpec| -> Vec<_> {
            let lacks = claimed.lacks(limit, spec, "b");
            lacks.iter().filter_map(Failure::reason).collect()
        };
        assert_eq!(lacks(&spec(2 << 30, 8)), []);
        assert_eq!(lacks(&spec((2 << 30) + 1, 8)), [Reason::Memory]);
        assert_eq!(lacks(&spec(1 << 30, 9)), [Reason::Vcpus]);
        assert_eq!(lacks(&spec(3 << 30, 9)), [Reason::Memory, Reason::Vcpus]);
    }
}
