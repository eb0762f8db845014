//! What a guest has in memory and writes, asked of its VMM.

use std::sync::Arc;
use std::time::Duration;

use ferry_migration::policy::prediction::{Place, Sampled, Writes};
use ferry_migration::{Compression, SampledWay, most_copies};
use ferry_proto::agent::v1::{InstanceSpec, MigrationPrediction, WrittenBy, WrittenPart};
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::vmm::v1::{self as wire};
use tokio::sync::OwnedMutexGuard;

use crate::agent::context::RequestContext;
use crate::agent::failure::Failure;
use crate::agent::instances::{Agent, Instance};
use crate::agent::journal::Status;
use crate::agent::reason::Reason;
use crate::agent::vmm_client::{Vmm, VmmError};

const PAGE: u64 = 4096;

/// The most vCPUs, and parts of memory, of which anything is believed.
const MOST_VCPUS: usize = 1024;
const MOST_PARTS: usize = 256;
const MOST_LOOKS: usize = 64;
const MOST_WAYS: usize = 8;

/// How many of the parts that the guest writes most are told.
const TOLD_PARTS: usize = 5;

/// What was found.
pub(super) struct Sample {
    sampled: wire::Sampled,
    memory_bytes: u64,
    dirty: String,
}

/// A sample that is being taken. When it is not waited for any more, it ends, and only then is it another's turn.
struct Taking {
    vmm: Vmm,
    turn: Option<OwnedMutexGuard<()>>,
}

impl Drop for Taking {
    fn drop(&mut self) {
        let Some(turn) = self.turn.take() else { return };
        let vmm = self.vmm.clone();
        tokio::spawn(async move {
            // Of a VMM that is gone there is nothing to end.
            let _ = vmm.order(Command::EndSample(wire::EndSample {})).await;
            drop(turn);
        });
    }
}

impl Agent {
    /// Has the guest of an instance sampled: one at a time.
    ///
    /// # Errors
    /// There is no guest that could be, or something ended the sample.
    pub(super) async fn sample(
        &self,
        context: &RequestContext,
        instance: &Arc<Instance>,
        sample_ms: u32,
        compress: &str,
    ) -> Result<Sample, Failure> {
        let turn = context.wait(Arc::clone(&instance.sampling).lock_owned()).await?;
        let state = context.wait(instance.state.lock()).await?;
        let InstanceSpec {
            name,
            memory_bytes,
            dirty,
            ..
        } = state.row.spec.clone();
        if !matches!(state.row.status, Status::Running | Status::Paused) {
            let why = format!(
                "instance {name} is {}: there is no guest that could be looked at",
                state.row.status
            );
            return Err(Failure::denied(Reason::InstanceState, why));
        }
        state.check_idle("be sampled")?;
        state.check_whole("be sampled")?;
        let order = wire::Sample {
            epoch: state.row.epoch,
            ms: sample_ms,
            compress: compress.to_owned(),
        };
        let vmm = state.vmm()?.clone();
        // The instance is anyone's meanwhile: what takes the guest away ends the sample.
        drop(state);
        let mut taking = Taking { vmm, turn: Some(turn) };
        let answer = taking.vmm.order(Command::Sample(order)).await;
        // It is over, whatever became of it; of a VMM that is silent nobody knows.
        if !matches!(answer, Err(VmmError::Silent(_))) {
            taking.turn = None;
        }
        match answer.map_err(Failure::vmm("failed to sample the guest"))? {
            Body::Sampled(sampled) => Ok(Sample {
                sampled: believable(sampled, memory_bytes / PAGE),
                memory_bytes,
                dirty,
            }),
            _ => Err(Failure::vmm("failed to sample the guest")(VmmError::OutOfPlace)),
        }
    }
}

/// What can be true of a guest with so many pages: a VMM may say anything.
fn believable(mut sampled: wire::Sampled, pages: u64) -> wire::Sampled {
    sampled.populated_pages = sampled.populated_pages.min(pages);
    sampled.zero_pages = sampled.zero_pages.min(sampled.looked_at_pages);
    sampled.written.truncate(MOST_LOOKS);
    sampled.by_vcpu.truncate(MOST_VCPUS);
    sampled.parts.truncate(MOST_PARTS);
    sampled.tried.truncate(MOST_WAYS);
    for written in &mut sampled.written {
        written.pages = written.pages.min(pages);
        written.after_us = written.after_us.min(u64::from(u32::MAX));
    }
    for part in &mut sampled.parts {
        part.populated_pages = part.populated_pages.min(pages);
        part.written_pages = part.written_pages.min(pages);
    }
    sampled
}

/// A way to compress, if this agent knows it.
fn known(tried: &wire::TriedWay) -> Option<SampledWay> {
    let Ok(Compression::Always(method)) = tried.method.parse() else {
        return None;
    };
    Some(SampledWay {
        method,
        bytes: tried.bytes,
        packed: tried.packed.min(tried.bytes),
        took: Duration::from_micros(tried.took_us),
    })
}

impl Sample {
    /// As the engine has it, with disks that move along.
    pub(super) fn guest(&self, disk_bytes: u64) -> Sampled {
        let wire::Sampled {
            populated_pages,
            written,
            parts,
            ..
        } = &self.sampled;
        let disk_pages = disk_bytes.div_ceil(PAGE);
        let pages = populated_pages.saturating_add(disk_pages);
        let found = written
            .iter()
            .map(|written| (Duration::from_micros(written.after_us), written.pages));
        let all_written: u64 = parts.iter().map(|part| part.written_pages).sum();
        let mut before = 0u64;
        let place = |part: &wire::SampledPart| {
            let place = Place {
                position: before as f64 / pages.max(1) as f64,
                share: part.written_pages as f64 / all_written.max(1) as f64,
            };
            before = before.saturating_add(part.populated_pages);
            place
        };
        Sampled {
            pages,
            disk_pages,
            zero_pages: self
                .zero_share()
                .map_or(0, |share| (*populated_pages as f64 * share) as u64),
            writes: Writes::new(found.collect(), self.memory_bytes / PAGE),
            places: parts.iter().map(place).filter(|place| place.share > 0.0).collect(),
        }
    }

    /// What ways to compress made of some pages; those that this agent does not know are left out.
    pub(super) fn tried(&self) -> Vec<SampledWay> {
        self.sampled.tried.iter().filter_map(known).collect()
    }

    /// What was made of what pages changed that were written again.
    pub(super) fn rewritten(&self) -> Option<SampledWay> {
        self.sampled.rewritten.as_ref().and_then(known)
    }

    /// Of how many pages copies are kept at most for that.
    pub(super) fn most_copies(&self) -> u64 {
        most_copies(self.memory_bytes / PAGE)
    }

    fn zero_share(&self) -> Option<f64> {
        let looked_at = self.sampled.looked_at_pages;
        (looked_at > 0).then(|| self.sampled.zero_pages as f64 / looked_at as f64)
    }

    /// What was found, for users.
    pub(super) fn told(&self, guest: &Sampled) -> MigrationPrediction {
        let wire::Sampled {
            populated_pages,
            written,
            by_vcpu,
            part_bytes,
            parts,
            ..
        } = &self.sampled;
        let sampled_for = written.last().map(|last| Duration::from_micros(last.after_us));
        let per_second = |pages: u64| {
            let seconds = sampled_for.unwrap_or_default().as_secs_f64();
            let bytes = pages as f64 * PAGE as f64;
            if seconds > 0.0 { bytes / seconds } else { 0.0 }
        };
        let mut busiest: Vec<_> = parts.iter().filter(|part| part.written_pages > 0).collect();
        busiest.sort_by_key(|part| (std::cmp::Reverse(part.written_pages), part.address));
        let part = |part: &wire::SampledPart| WrittenPart {
            address: part.address,
            bytes: *part_bytes,
            dirty_bytes_per_s: per_second(part.written_pages),
        };
        let by = |written: &wire::WrittenPages| WrittenBy {
            after_ms: written.after_us as f64 / 1e3,
            bytes: written.pages * PAGE,
        };
        let writes = &guest.writes;
        MigrationPrediction {
            memory_bytes: self.memory_bytes,
            populated_bytes: populated_pages * PAGE,
            zero_share: self.zero_share(),
            dirty: self.dirty.clone(),
            sample_ms: sampled_for.map(|time| time.as_secs_f64() * 1e3),
            written: written.iter().map(by).collect(),
            dirty_bytes_per_s: writes.pages_per_second().map(|pages| pages * PAGE as f64),
            dirty_bytes_per_s_by_vcpu: by_vcpu.iter().map(|&pages| per_second(pages)).collect(),
            dirty_parts: busiest.into_iter().take(TOLD_PARTS).map(part).collect(),
            ..MigrationPrediction::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Sample {
        let part = |number: u64, populated_pages, written_pages| wire::SampledPart {
            address: number * (128 << 20),
            populated_pages,
            written_pages,
        };
        Sample {
            sampled: wire::Sampled {
                populated_pages: 400,
                looked_at_pages: 100,
                zero_pages: 25,
                written: vec![wire::WrittenPages {
                    after_us: 500_000,
                    pages: 50,
                }],
                by_vcpu: vec![30, 20],
                part_bytes: 128 << 20,
                parts: vec![part(0, 100, 10), part(1, 0, 0), part(2, 300, 40)],
                paused: false,
                tried: Vec::new(),
                rewritten: None,
            },
            memory_bytes: 1 << 30,
            dirty: "ring".to_owned(),
        }
    }

    #[test]
    fn a_part_lies_behind_what_is_populated_before_it() {
        let guest = sample().guest(400 * PAGE);
        assert_eq!((guest.pages, guest.disk_pages, guest.zero_pages), (800, 400, 100));
        let places: Vec<_> = guest.places.iter().map(|place| (place.position, place.share)).collect();
        assert_eq!(places, [(0.0, 0.2), (0.125, 0.8)]);
    }

    #[test]
    fn rates_are_told_by_vcpu_and_the_busiest_part_comes_first() {
        let sample = sample();
        let told = sample.told(&sample.guest(0));
        assert_eq!(told.dirty_bytes_per_s, Some(100.0 * PAGE as f64));
        assert_eq!(told.dirty_bytes_per_s_by_vcpu, [60.0 * PAGE as f64, 40.0 * PAGE as f64]);
        let parts: Vec<_> = told.dirty_parts.iter().map(|part| part.address >> 20).collect();
        assert_eq!(parts, [256, 0]);
    }

    #[test]
    fn what_a_vmm_claims_is_no_more_than_can_be() {
        let hostile = wire::Sampled {
            populated_pages: u64::MAX,
            looked_at_pages: 1,
            zero_pages: u64::MAX,
            written: vec![
                wire::WrittenPages {
                    after_us: u64::MAX,
                    pages: u64::MAX,
                };
                1000
            ],
            by_vcpu: vec![u64::MAX; 100_000],
            part_bytes: u64::MAX,
            parts: vec![
                wire::SampledPart {
                    address: u64::MAX,
                    populated_pages: u64::MAX,
                    written_pages: u64::MAX,
                };
                100_000
            ],
            paused: true,
            tried: vec![
                wire::TriedWay {
                    method: "lz4".to_owned(),
                    bytes: 1,
                    packed: u64::MAX,
                    took_us: u64::MAX,
                };
                100_000
            ],
            rewritten: Some(wire::TriedWay {
                method: "lz4".to_owned(),
                bytes: 1,
                packed: u64::MAX,
                took_us: u64::MAX,
            }),
        };
        let sample = Sample {
            sampled: believable(hostile, 10),
            memory_bytes: 10 * PAGE,
            dirty: "log".to_owned(),
        };
        let guest = sample.guest(u64::MAX);
        assert_eq!(guest.zero_pages, 10);
        let told = sample.told(&guest);
        assert_eq!(told.populated_bytes, 10 * PAGE);
        assert!(told.dirty_parts.len() == TOLD_PARTS && told.dirty_bytes_per_s_by_vcpu.len() == MOST_VCPUS);
        assert!(told.dirty_bytes_per_s_by_vcpu.iter().all(|rate| rate.is_finite()));
        let tried = sample.tried();
        assert!(tried.len() == MOST_WAYS && tried.iter().all(|way| way.packed <= way.bytes));
    }
}
