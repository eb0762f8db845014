//! What of a guest moves page by page, as the engine wants to see it: its memory, and the disks that are copied with it.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use ferry_migration::PageSet;
use ferry_migration::guest::{AbsentPages, FrameRun, GuestError, GuestMemory, MemoryShape, Population, Region};
use ferry_vmm::{PAGE_SIZE, WrittenBlocks};

use super::copied::CopiedDisk;

/// One guest's memory and copied disks, with their shape in the engine's terms.
pub(super) struct SharedMemory {
    memory: ferry_vmm::GuestMemory,
    disks: Vec<CopiedDisk>,
    /// What the guest writes to each of these disks, where it is sent.
    written: Vec<WrittenBlocks>,
    shape: MemoryShape,
}

impl SharedMemory {
    /// Wraps `memory` and the disks that are copied with it.
    pub(super) fn new(memory: ferry_vmm::GuestMemory, disks: Vec<CopiedDisk>) -> Self {
        let region = |region: &ferry_vmm::MemoryRegion| Region {
            start_frame: region.start / PAGE_SIZE,
            frames: region.len / PAGE_SIZE,
        };
        let regions = memory.shape().regions.iter().map(region);
        let regions = regions.chain(disks.iter().map(CopiedDisk::region)).collect();
        let shape = MemoryShape::new(regions).expect("a machine's memory is in order, and disks come after it");
        Self {
            memory,
            disks,
            written: Vec::new(),
            shape,
        }
    }

    /// The same of a guest that writes to these disks meanwhile, in their order.
    pub(super) fn written(self, written: Vec<WrittenBlocks>) -> Self {
        Self { written, ..self }
    }

    /// What the host has populated of memory, and where the disks have data.
    pub(super) fn populated(&self) -> Result<Population, GuestError> {
        let found = self.memory.populated().map_err(GuestError::new)?;
        let runs = |runs: Vec<ferry_vmm::FrameRun>| runs.into_iter().map(to_engine).collect::<Vec<_>>();
        let mut populated = runs(found.runs);
        for disk in &self.disks {
            populated.extend(disk.extents(disk.region().run()).map_err(GuestError::new)?);
        }
        Ok(Population {
            populated,
            huge: runs(found.huge),
        })
    }

    /// The disk that this run is of; memory's runs have none.
    fn disk(&self, run: FrameRun) -> Option<&CopiedDisk> {
        self.disks.iter().find(|disk| disk.holds(run))
    }
}

impl GuestMemory for SharedMemory {
    fn shape(&self) -> &MemoryShape {
        &self.shape
    }

    fn is_blank(&self, region: Region) -> bool {
        self.disk(region.run()).is_none_or(CopiedDisk::is_blank)
    }

    fn is_disk(&self, region: Region) -> bool {
        CopiedDisk::is_disk(region.run())
    }

    fn send(&self, socket: BorrowedFd<'_>, prefix: &[u8], runs: &[FrameRun]) -> io::Result<()> {
        // Runs ascend, and disks come after memory.
        let (memory, disks) = runs.split_at(runs.partition_point(|&run| !CopiedDisk::is_disk(run)));
        self.memory.send(socket, prefix, &all_to_vmm(memory))?;
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        disks
            .iter()
            .try_for_each(|&run| self.disk(run).ok_or_else(outside)?.send(socket, run))
    }

    fn sent(&self, runs: &[FrameRun]) {
        let all: u64 = runs.iter().map(|run| run.count).sum();
        for (disk, written) in self.disks.iter().zip(&self.written) {
            let own = runs.iter().filter(|&&run| disk.holds(run)).map(|run| run.count).sum();
            // All disks together have the share of one.
            written.sent(own, (all - own) / self.disks.len() as u64);
        }
    }

    fn receive(&self, socket: BorrowedFd<'_>, runs: &[FrameRun]) -> io::Result<()> {
        let (memory, disks) = runs.split_at(runs.partition_point(|&run| !CopiedDisk::is_disk(run)));
        self.memory.receive(socket, &all_to_vmm(memory))?;
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        disks
            .iter()
            .try_for_each(|&run| self.disk(run).ok_or_else(outside)?.receive(socket, run))
    }

    fn read_pages(&self, runs: &[FrameRun], bytes: &mut [u8]) -> Result<(), GuestError> {
        let (memory, disks) = runs.split_at(runs.partition_point(|&run| !CopiedDisk::is_disk(run)));
        let (in_memory, mut rest) = bytes.split_at_mut(bytes_of(memory));
        let read = self.memory.read_pages(&all_to_vmm(memory), in_memory);
        read.map_err(GuestError::new)?;
        for &run in disks {
            let (part, after) = rest.split_at_mut(run.bytes() as usize);
            let disk = self
                .disk(run)
                .ok_or_else(|| GuestError::new("no such disk is copied"))?;
            disk.read(run, part).map_err(GuestError::new)?;
            rest = after;
        }
        Ok(())
    }

    fn write_pages(&self, runs: &[FrameRun], bytes: &[u8]) -> Result<(), GuestError> {
        let (memory, disks) = runs.split_at(runs.partition_point(|&run| !CopiedDisk::is_disk(run)));
        let (in_memory, mut rest) = bytes.split_at(bytes_of(memory));
        let written = self.memory.write_pages(&all_to_vmm(memory), in_memory);
        written.map_err(GuestError::new)?;
        for &run in disks {
            let (part, after) = rest.split_at(run.bytes() as usize);
            let disk = self
                .disk(run)
                .ok_or_else(|| GuestError::new("no such disk is copied"))?;
            disk.write(run, part).map_err(GuestError::new)?;
            rest = after;
        }
        Ok(())
    }

    fn zero_pages(&self, run: FrameRun, found: &mut Vec<FrameRun>) -> Result<(), GuestError> {
        if let Some(disk) = self.disk(run) {
            return disk.zero_runs(run, found).map_err(GuestError::new);
        }
        let mut zeroes = Vec::new();
        self.memory
            .zero_pages(to_vmm(run), &mut zeroes)
            .map_err(GuestError::new)?;
        found.extend(zeroes.into_iter().map(to_engine));
        Ok(())
    }

    fn write_zeroes(&self, run: FrameRun) -> Result<(), GuestError> {
        match self.disk(run) {
            Some(disk) => disk.write_zeroes(run).map_err(GuestError::new),
            None => self.memory.write_zeroes(to_vmm(run)).map_err(GuestError::new),
        }
    }

    fn digest(&self, run: FrameRun) -> Result<u128, GuestError> {
        match self.disk(run) {
            Some(disk) => disk.digest(run).map_err(GuestError::new),
            None => self.memory.digest(to_vmm(run)).map_err(GuestError::new),
        }
    }

    fn page_digests(&self, run: FrameRun, digests: &mut Vec<u64>) -> Result<(), GuestError> {
        match self.disk(run) {
            Some(disk) => disk.block_digests(run, digests).map_err(GuestError::new),
            None => self.memory.page_digests(to_vmm(run), digests).map_err(GuestError::new),
        }
    }

    fn advise_huge(&self, run: FrameRun) -> Result<(), GuestError> {
        match self.disk(run) {
            Some(_) => Ok(()),
            None => self.memory.advise_huge(to_vmm(run)).map_err(GuestError::new),
        }
    }

    fn populate(&self, run: FrameRun) -> Result<(), GuestError> {
        match self.disk(run) {
            // Room for it was looked for before; taking it here would fill its holes.
            Some(_) => Ok(()),
            None => self.memory.populate(to_vmm(run)).map_err(GuestError::new),
        }
    }

    fn set_turns(&self, length: Option<Duration>) -> io::Result<bool> {
        ferry_vmm::set_turns(length)
    }

    fn make_durable(&self) -> Result<(), GuestError> {
        self.disks
            .iter()
            .try_for_each(|disk| disk.sync().map_err(GuestError::new))
    }

    fn check_late(&self) -> Result<(), GuestError> {
        self.memory.check_watchable().map_err(GuestError::new)
    }

    fn late_unit(&self) -> u64 {
        self.memory.frames_together()
    }

    fn await_late(&self, missing: &PageSet) -> Result<Box<dyn AbsentPages>, GuestError> {
        let watched = self.memory.watch(missing.runs().map(to_vmm)).map_err(GuestError::new)?;
        Ok(Box::new(Watched(watched)))
    }
}

/// Memory that waits for pages.
struct Watched(ferry_vmm::AbsentPages);

impl AbsentPages for Watched {
    fn touched(&self, patience: Duration, frames: &mut Vec<u64>) -> Result<(), GuestError> {
        self.0.touched(patience, frames).map_err(GuestError::new)
    }

    fn supply(&self, runs: &[FrameRun], contents: &[u8]) -> Result<(), GuestError> {
        self.0.supply(&all_to_vmm(runs), contents).map_err(GuestError::new)
    }

    fn supply_zeroes(&self, run: FrameRun) -> Result<(), GuestError> {
        self.0.supply_zeroes(to_vmm(run)).map_err(GuestError::new)
    }

    fn end(&self) -> Result<(), GuestError> {
        self.0.stop_watching().map_err(GuestError::new)
    }

    fn make_huge(&self, block: FrameRun) -> Result<bool, GuestError> {
        self.0.make_huge(to_vmm(block)).map_err(GuestError::new)
    }
}

/// A run in the VMM's terms.
pub(super) fn to_vmm(run: FrameRun) -> ferry_vmm::FrameRun {
    ferry_vmm::FrameRun {
        first: run.first,
        count: run.count,
    }
}

pub(super) fn to_engine(run: ferry_vmm::FrameRun) -> FrameRun {
    FrameRun {
        first: run.first,
        count: run.count,
    }
}

fn bytes_of(runs: &[FrameRun]) -> usize {
    runs.iter().map(|run| run.bytes() as usize).sum()
}

fn all_to_vmm(runs: &[FrameRun]) -> Vec<ferry_vmm::FrameRun> {
    runs.iter().copied().map(to_vmm).collect()
}
