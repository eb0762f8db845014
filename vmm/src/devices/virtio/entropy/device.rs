//! The source: it has no configuration and no state of its own.

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use super::super::super::DeviceStateError;
use super::super::device::{Broken, Device, Turn, Wake};
use super::super::queue::{Chain, DeviceQueue};
use super::MOST_BYTES;
use crate::memory::GuestMemory;

/// Random bytes.
pub(crate) struct Entropy;

impl Entropy {
    /// Fills the chain, or as much of it as the source gives at once; returns how much.
    fn fill(chain: &Chain, memory: &GuestMemory) -> Result<u32, Broken> {
        let (mut bytes, mut written) = ([0; 4096], 0);
        for span in &chain.writable {
            let mut done = 0;
            while done < span.len && u64::from(written) < MOST_BYTES {
                let part = (span.len - done).min(bytes.len() as u32);
                let room = &mut bytes[..part as usize];
                // The kernel's own pool does not fail once it was seeded, which it was before a host runs guests.
                let given = getrandom(&mut *room, GetRandomFlags::empty()).map_err(Broken::new)?;
                let address = GuestAddress(span.address + u64::from(done));
                let told = memory.tracked().write_slice(&bytes[..given], address);
                told.map_err(Broken::new)?;
                done += given as u32;
                written += given as u32;
            }
        }
        Ok(written)
    }
}

impl Device for Entropy {
    fn kind(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn wake(&mut self, wake: Wake, queues: &mut [DeviceQueue], turn: &Turn<'_>) -> Result<(), Broken> {
        let Wake::Queue(index) = wake else { return Ok(()) };
        queues[index].serve(turn, |chain| Self::fill(chain, turn.memory))
    }

    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), DeviceStateError> {
        if saved.is_empty() {
            Ok(())
        } else {
            Err(DeviceStateError::Undecodable("the entropy source"))
        }
    }
}
