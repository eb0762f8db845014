//! Guest memory of the VMM, as the engine wants to see it.

use std::io;
use std::os::fd::BorrowedFd;

use ferry_migration::guest::{FrameRun, GuestError, GuestMemory, MemoryShape, Population, Region};
use ferry_vmm::PAGE_SIZE;

/// One guest's memory with its shape in the engine's terms.
pub(super) struct SharedMemory {
    memory: ferry_vmm::GuestMemory,
    shape: MemoryShape,
}

impl SharedMemory {
    /// Wraps `memory`.
    pub(super) fn new(memory: ferry_vmm::GuestMemory) -> Self {
        let region = |region: &ferry_vmm::MemoryRegion| Region {
            start_frame: region.start / PAGE_SIZE,
            frames: region.len / PAGE_SIZE,
        };
        let regions = memory.shape().regions.iter().map(region).collect();
        let shape = MemoryShape::new(regions).expect("a machine's memory is in order and not empty");
        Self { memory, shape }
    }

    /// What the host has populated of it.
    pub(super) fn populated(&self) -> Result<Population, GuestError> {
        let found = self.memory.populated().map_err(GuestError::new)?;
        let runs = |runs: Vec<ferry_vmm::FrameRun>| runs.into_iter().map(to_engine).collect();
        Ok(Population {
            populated: runs(found.runs),
            huge: runs(found.huge),
        })
    }
}

impl GuestMemory for SharedMemory {
    fn shape(&self) -> &MemoryShape {
        &self.shape
    }

    fn send(&self, socket: BorrowedFd<'_>, prefix: &[u8], runs: &[FrameRun]) -> io::Result<()> {
        self.memory.send(socket, prefix, &all_to_vmm(runs))
    }

    fn receive(&self, socket: BorrowedFd<'_>, runs: &[FrameRun]) -> io::Result<()> {
        self.memory.receive(socket, &all_to_vmm(runs))
    }

    fn zero_pages(&self, run: FrameRun, found: &mut Vec<FrameRun>) -> Result<(), GuestError> {
        let mut zeroes = Vec::new();
        self.memory
            .zero_pages(to_vmm(run), &mut zeroes)
            .map_err(GuestError::new)?;
        found.extend(zeroes.into_iter().map(to_engine));
        Ok(())
    }

    fn write_zeroes(&self, run: FrameRun) -> Result<(), GuestError> {
        self.memory.write_zeroes(to_vmm(run)).map_err(GuestError::new)
    }

    fn digest(&self, run: FrameRun) -> Result<u128, GuestError> {
        self.memory.digest(to_vmm(run)).map_err(GuestError::new)
    }

    fn advise_huge(&self, run: FrameRun) -> Result<(), GuestError> {
        self.memory.advise_huge(to_vmm(run)).map_err(GuestError::new)
    }

    fn populate(&self, run: FrameRun) -> Result<(), GuestError> {
        self.memory.populate(to_vmm(run)).map_err(GuestError::new)
    }
}

/// A run in the VMM's terms.
pub(super) fn to_vmm(run: FrameRun) -> ferry_vmm::FrameRun {
    ferry_vmm::FrameRun {
        first: run.first,
        count: run.count,
    }
}

fn to_engine(run: ferry_vmm::FrameRun) -> FrameRun {
    FrameRun {
        first: run.first,
        count: run.count,
    }
}

fn all_to_vmm(runs: &[FrameRun]) -> Vec<ferry_vmm::FrameRun> {
    runs.iter().copied().map(to_vmm).collect()
}
