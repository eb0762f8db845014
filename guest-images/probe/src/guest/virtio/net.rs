//! A network card (virtio 1.2, 5.1): frames of one size to nobody, or whatever comes.

use core::ptr;

use super::queue::{Descriptor, Queue};
use super::transport::Transport;
use super::{Done, Outcome};
use crate::cmdline::Options;
use crate::device_work::{Direction, LARGEST_USUAL_FRAME, MAX_DEPTH};
use crate::memory::Memory;

const KIND: u32 = 1;

/// The queues of the only pair.
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;

/// Features (virtio 1.2, 5.1.3).
const CSUM: u64 = 1;
const HOST_TSO4: u64 = 1 << 11;
const MRG_RXBUF: u64 = 1 << 15;

/// `struct virtio_net_hdr_v1`, before each frame.
const HEADER_BYTES: u32 = 12;
const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;

/// What Linux gives a card to receive into, more or less.
const BUFFER_BYTES: u32 = 2048;

/// Headers of a frame that is cut into segments: Ethernet, IPv4, TCP; and what fits behind them on an Ethernet.
const ETHERNET: usize = 14;
const IPV4: usize = 20;
const TCP: usize = 20;
const HEADERS: usize = ETHERNET + IPV4 + TCP;
const SEGMENT: u16 = 1460;

/// Who sends and who is to receive: addresses of no vendor. The host, whose address is another one, drops the frames.
const ADDRESSES: [u8; 12] = [0x02, 0, 0, 0, 0, 0x01, 0x02, 0, 0, 0, 0, 0x02];

/// The first of the two Ethernet types for local experiments (IEEE 802), and IPv4's.
const EXPERIMENT: [u8; 2] = [0x88, 0xb5];
const TYPE_IPV4: [u8; 2] = [0x08, 0x00];

/// A card that is ready for frames.
pub struct Net {
    queue: Queue,
    // The other direction's queue is there and stays empty.
    _other: Queue,
    direction: Direction,
    packet: u32,
}

impl Net {
    /// Finds the card and makes it ready.
    pub fn start(options: &Options, memory: &mut Memory) -> Result<Self, &'static str> {
        let devices = &options.devices;
        let transport = Transport::find(KIND, devices.device, memory)?;
        let is_large = devices.direction == Direction::Send && devices.packet > LARGEST_USUAL_FRAME;
        let offload = if is_large { CSUM | HOST_TSO4 } else { 0 };
        let settled = transport.negotiate(MRG_RXBUF | offload)?;
        if settled & offload != offload {
            return Err("the card does not cut large frames into segments");
        }
        let receive = transport.set_up_queue(RECEIVE, MAX_DEPTH, memory)?;
        let transmit = transport.set_up_queue(TRANSMIT, MAX_DEPTH, memory)?;
        let (queue, other) = match devices.direction {
            Direction::Send => (transmit, receive),
            Direction::Receive => (receive, transmit),
        };
        if queue.size() < devices.depth {
            return Err("depth= is more than the card's queue has room for");
        }
        let mut this = Self {
            queue,
            _other: other,
            direction: devices.direction,
            packet: devices.packet,
        };
        for slot in 0..devices.depth {
            this.lay_out(slot, memory)?;
        }
        transport.start();
        Ok(this)
    }

    fn lay_out(&mut self, slot: u16, memory: &mut Memory) -> Result<(), &'static str> {
        let (bytes, flags) = match self.direction {
            Direction::Send => (HEADER_BYTES + self.packet, 0),
            Direction::Receive => (BUFFER_BYTES, Descriptor::WRITE),
        };
        let address = memory.take_zeroed(bytes.into()).ok_or("no memory for frames")?;
        if self.direction == Direction::Send {
            let mut front = [0; HEADER_BYTES as usize + HEADERS];
            self.write_headers(&mut front);
            // SAFETY: the buffer was just taken and holds at least as much: no frame is shorter than its headers.
            unsafe { ptr::copy_nonoverlapping(front.as_ptr(), address as *mut u8, front.len()) };
        }
        let descriptor = Descriptor {
            address,
            bytes,
            flags,
            next: 0,
        };
        self.queue.describe(slot, descriptor);
        Ok(())
    }

    /// The headers of a frame to send: a usual one is an experiment, a larger one looks like a piece of a TCP connection.
    fn write_headers(&self, front: &mut [u8; HEADER_BYTES as usize + HEADERS]) {
        let (header, frame) = front.split_at_mut(HEADER_BYTES as usize);
        frame[..12].copy_from_slice(&ADDRESSES);
        if self.packet <= LARGEST_USUAL_FRAME {
            frame[12..14].copy_from_slice(&EXPERIMENT);
            return;
        }
        header[0] = NEEDS_CSUM;
        header[1] = GSO_TCPV4;
        header[2..4].copy_from_slice(&(HEADERS as u16).to_le_bytes());
        header[4..6].copy_from_slice(&SEGMENT.to_le_bytes());
        // Where the checksum begins, and where from there it is put.
        header[6..8].copy_from_slice(&((ETHERNET + IPV4) as u16).to_le_bytes());
        header[8..10].copy_from_slice(&16_u16.to_le_bytes());
        frame[12..14].copy_from_slice(&TYPE_IPV4);
        let ip = &mut frame[ETHERNET..];
        // Version and length of the header, length of the packet, time to live, TCP.
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&((self.packet as usize - ETHERNET) as u16).to_be_bytes());
        ip[8] = 64;
        ip[9] = 6;
        ip[12..20].copy_from_slice(&[192, 0, 2, 2, 192, 0, 2, 1]);
        let tcp = &mut ip[IPV4..];
        // Length of the header in words, ACK.
        tcp[12] = 5 << 4;
        tcp[13] = 0x10;
    }

    /// Offers the frame or buffer of this number.
    pub fn offer(&mut self, slot: u16) {
        self.queue.offer(slot);
    }

    pub fn publish(&mut self) {
        self.queue.publish();
    }

    pub fn take_done(&mut self) -> Option<Done> {
        let (slot, written) = self.queue.take_done()?;
        let bytes = match self.direction {
            Direction::Send => self.packet,
            Direction::Receive => written.saturating_sub(HEADER_BYTES),
        };
        let outcome = match bytes == self.packet {
            true => Outcome::Good,
            false => Outcome::Foreign,
        };
        Some(Done {
            slot,
            bytes: bytes.into(),
            outcome,
        })
    }
}
