//! A disk (virtio 1.2, 5.2): requests of one size, so many at a time.

use core::ptr;

use super::queue::{Descriptor, Queue};
use super::transport::Transport;
use super::{Done, Outcome};
use crate::cmdline::Options;
use crate::device_work::{DISK_DESCRIPTORS, Io, MAX_DEPTH, STAMPED_BYTES, disk_stamp};
use crate::memory::Memory;
use crate::rng::Rng;

const KIND: u32 = 2;
/// VIRTIO_BLK_F_FLUSH, taken so that a VMM need not make each write last before it answers: some do for drivers that do not flush, some did not.
const FLUSH: u64 = 1 << 9;

const SECTOR: u64 = 512;

/// Request types, and the status of one that was carried out.
const IN: u32 = 0;
const OUT: u32 = 1;
const OK: u8 = 0;

/// `struct virtio_blk_req` without its data, which lies elsewhere.
#[repr(C)]
struct Request {
    kind: u32,
    reserved: u32,
    sector: u64,
    status: u8,
}

const HEADER_BYTES: u32 = 16;
const REQUEST_BYTES: u64 = size_of::<Request>() as u64;

/// A disk that is ready for requests.
pub struct Block {
    queue: Queue,
    io: Io,
    check: bool,
    block_bytes: u64,
    /// Blocks of the disk.
    blocks: u64,
    requests: u64,
    data: u64,
    rng: Rng,
    next: u64,
    /// The block of each request in flight.
    asked: [u64; MAX_DEPTH as usize],
}

impl Block {
    /// Finds the disk and makes it ready.
    pub fn start(options: &Options, memory: &mut Memory) -> Result<Self, &'static str> {
        let devices = &options.devices;
        let transport = Transport::find(KIND, devices.device, memory)?;
        transport.negotiate(FLUSH)?;
        let queue = transport.set_up_queue(0, MAX_DEPTH, memory)?;
        if queue.size() / DISK_DESCRIPTORS < devices.depth {
            return Err("depth= is more than the disk's queue has room for");
        }
        let sectors = u64::from(transport.config(0)) | u64::from(transport.config(4)) << 32;
        let block_bytes = devices.block_kib * 1024;
        let blocks = sectors / (block_bytes / SECTOR);
        if blocks == 0 {
            return Err("the disk is smaller than one block");
        }
        let depth = u64::from(devices.depth);
        let mut take = |bytes| memory.take_zeroed(bytes).ok_or("no memory for the disk's requests");
        let mut this = Self {
            queue,
            io: devices.io,
            check: options.check,
            block_bytes,
            blocks,
            requests: take(depth * REQUEST_BYTES)?,
            data: take(depth * block_bytes)?,
            rng: Rng::new(options.seed, DISK_STREAM),
            next: 0,
            asked: [0; MAX_DEPTH as usize],
        };
        (0..devices.depth).for_each(|slot| this.lay_out(slot));
        transport.start();
        Ok(this)
    }

    /// All of a request that stays as it is.
    fn lay_out(&mut self, slot: u16) {
        let (request, data) = (self.request(slot), self.data(slot));
        let kind = if self.io.writes() { OUT } else { IN };
        // SAFETY: both lie in memory that was taken for them, and the device has not started.
        unsafe {
            (&raw mut (*request).kind).write_volatile(kind);
            for word in 0..self.block_bytes / 8 {
                (data as *mut u64).add(word as usize).write_volatile(self.rng.word());
            }
        }
        let head = slot * DISK_DESCRIPTORS;
        let mut piece = |number: u16, address, bytes, flags| {
            let next = head + number + 1;
            let flags = flags | if number < 2 { Descriptor::NEXT } else { 0 };
            let descriptor = Descriptor {
                address,
                bytes,
                flags,
                next,
            };
            self.queue.describe(head + number, descriptor);
        };
        let data_flags = if kind == IN { Descriptor::WRITE } else { 0 };
        piece(0, request as u64, HEADER_BYTES, 0);
        piece(1, data, self.block_bytes as u32, data_flags);
        piece(2, request as u64 + u64::from(HEADER_BYTES), 1, Descriptor::WRITE);
    }

    /// Offers the request of this number, for the next block.
    pub fn offer(&mut self, slot: u16) {
        let block = match self.io.is_random() {
            true => self.rng.below(self.blocks),
            false => {
                let block = self.next;
                self.next = (block + 1) % self.blocks;
                block
            }
        };
        self.asked[usize::from(slot)] = block;
        if self.io.writes() {
            for page in 0..self.pages() {
                *self.stamp(slot, page) = disk_stamp(block * self.pages() + page);
            }
        }
        let request = self.request(slot);
        // SAFETY: the request is this driver's until it is offered.
        unsafe {
            (&raw mut (*request).sector).write_volatile(block * (self.block_bytes / SECTOR));
            (&raw mut (*request).status).write_volatile(!OK);
        }
        self.queue.offer(slot * DISK_DESCRIPTORS);
    }

    pub fn publish(&mut self) {
        self.queue.publish();
    }

    pub fn take_done(&mut self) -> Option<Done> {
        let (head, _) = self.queue.take_done()?;
        let slot = head / DISK_DESCRIPTORS;
        // SAFETY: the device is done with the request.
        let status = unsafe { (&raw const (*self.request(slot)).status).read_volatile() };
        let outcome = match status {
            OK if self.is_right(slot) => Outcome::Good,
            OK => Outcome::Wrong,
            _ => Outcome::Failed,
        };
        Some(Done {
            slot,
            bytes: self.block_bytes,
            outcome,
        })
    }

    /// Whether the first and the last page that were read are those that were asked for.
    fn is_right(&mut self, slot: u16) -> bool {
        if self.io.writes() || !self.check {
            return true;
        }
        let first = self.asked[usize::from(slot)] * self.pages();
        let last = self.pages() - 1;
        *self.stamp(slot, 0) == disk_stamp(first) && *self.stamp(slot, last) == disk_stamp(first + last)
    }

    fn pages(&self) -> u64 {
        self.block_bytes / STAMPED_BYTES
    }

    fn stamp(&mut self, slot: u16, page: u64) -> &mut u64 {
        let address = self.data(slot) + page * STAMPED_BYTES;
        // SAFETY: the word lies in this request's data, which the device does not have now.
        unsafe { &mut *ptr::with_exposed_provenance_mut(address as usize) }
    }

    fn request(&self, slot: u16) -> *mut Request {
        (self.requests + u64::from(slot) * REQUEST_BYTES) as *mut Request
    }

    fn data(&self, slot: u16) -> u64 {
        self.data + u64::from(slot) * self.block_bytes
    }
}

/// The stream of blocks differs from those of pages.
const DISK_STREAM: u64 = 1 << 32;
