//! The card: what it offers, and who does the work.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use super::super::super::DeviceStateError;
use super::super::device::{Broken, Device, Interest, Turn, Wake};
use super::super::queue::DeviceQueue;
use super::control::{self, Answer};
use super::limit::Bucket;
use super::receive::{self, Addressee, Room};
use super::traffic::CardTraffic;
use super::transmit::{self, Sent};
use super::{CONTROL, RECEIVE, TRANSMIT, feature, state};
use crate::machine::NicBackend;

/// A network card on a tap.
pub(crate) struct Net {
    tap: OwnedFd,
    mac: [u8; 6],
    features: u64,
    /// The guest is to make itself known in the network (VIRTIO_NET_S_ANNOUNCE), and has not said that it did.
    announce: bool,
    config_changed: bool,
    interest: Interest,
    /// What bounds the sending, and what the receiving. They know nothing of the driver: a guest that resets its card gains nothing.
    transmit_limit: Option<Bucket>,
    receive_limit: Option<Bucket>,
    /// Whether frames of the guest's, or of the tap's, wait for their bucket to open.
    transmit_waits: bool,
    receive_waits: bool,
    traffic: CardTraffic,
}

impl Net {
    /// A card on what was opened.
    pub(crate) fn new(backend: NicBackend) -> Self {
        let NicBackend { tap, mac, rate } = backend;
        let limit = || rate.map(|rate| Bucket::new(rate, Instant::now()));
        Self {
            tap,
            mac,
            features: 0,
            announce: false,
            config_changed: false,
            interest: Interest::default(),
            transmit_limit: limit(),
            receive_limit: limit(),
            transmit_waits: false,
            receive_waits: false,
            traffic: CardTraffic::default(),
        }
    }

    /// When frames passed it.
    pub(crate) fn traffic(&self) -> CardTraffic {
        self.traffic.clone()
    }

    fn receive(&mut self, queues: &mut [DeviceQueue], turn: &Turn<'_>) -> Result<(), Broken> {
        let limit = &mut self.receive_limit;
        let addressee = Addressee {
            mac: self.mac,
            traffic: &self.traffic,
        };
        let (tap, queue) = (self.tap.as_fd(), &mut queues[RECEIVE]);
        let room = receive::frames(tap, queue, self.features, limit, &addressee, turn)?;
        self.receive_waits = room == Room::Limited;
        // Without room, frames wait in the tap until the guest rings.
        self.interest.readable = room == Room::Left;
        Ok(())
    }

    fn transmit(&mut self, queues: &mut [DeviceQueue], turn: &Turn<'_>) -> Result<(), Broken> {
        let limit = &mut self.transmit_limit;
        let (tap, queue) = (self.tap.as_fd(), &mut queues[TRANSMIT]);
        let sent = transmit::frames(tap, queue, limit, &self.traffic, turn)?;
        self.transmit_waits = sent == Sent::Limited;
        self.interest.writable = sent == Sent::TapIsFull;
        Ok(())
    }
}

impl Device for Net {
    fn kind(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        feature::MAC
            | feature::STATUS
            | feature::MRG_RXBUF
            | feature::CTRL_VQ
            | feature::GUEST_ANNOUNCE
            | feature::CSUM
            | feature::HOST_TSO4
            | feature::HOST_TSO6
            | feature::HOST_ECN
            | feature::GUEST_CSUM
            | feature::GUEST_TSO4
            | feature::GUEST_TSO6
            | feature::GUEST_ECN
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256, 16]
    }

    /// `struct virtio_net_config` (virtio 1.2, 5.1.4): address, status, pairs of queues.
    fn config(&self) -> Vec<u8> {
        const LINK_UP: u16 = 1;
        const ANNOUNCE: u16 = 2;
        let status = LINK_UP | if self.announce { ANNOUNCE } else { 0 };
        let mut config = self.mac.to_vec();
        config.extend(status.to_le_bytes());
        config.extend(1u16.to_le_bytes());
        config
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        let offload = [
            (feature::GUEST_CSUM, tap::CSUM),
            (feature::GUEST_TSO4, tap::TSO4),
            (feature::GUEST_TSO6, tap::TSO6),
            (feature::GUEST_ECN, tap::TSO_ECN),
        ]
        .into_iter()
        .filter(|(feature, _)| features & feature != 0)
        .fold(0, |all, (_, flag)| all | flag);
        if let Err(error) = crate::tap::Tap::set_offload(self.tap.as_fd(), offload) {
            tracing::warn!(%error, "the tap does not do what the guest was offered: frames may arrive without checksums");
        }
    }

    fn reset(&mut self) {
        self.features = 0;
        self.announce = false;
        self.interest = Interest::default();
        (self.transmit_waits, self.receive_waits) = (false, false);
    }

    fn wake(&mut self, wake: Wake, queues: &mut [DeviceQueue], turn: &Turn<'_>) -> Result<(), Broken> {
        match wake {
            Wake::Queue(RECEIVE) => self.receive(queues, turn),
            Wake::Queue(TRANSMIT) => self.transmit(queues, turn),
            Wake::Queue(_) => {
                let answered = control::commands(&mut queues[CONTROL], turn, self.announce)?;
                if answered == Answer::Announced {
                    self.announce = false;
                    self.config_changed = true;
                }
                Ok(())
            }
            Wake::Backend => {
                if self.interest.writable {
                    self.transmit(queues, turn)?;
                }
                self.receive(queues, turn)
            }
            Wake::Timer => {
                if self.transmit_waits {
                    self.transmit(queues, turn)?;
                }
                if self.receive_waits {
                    self.receive(queues, turn)?;
                }
                Ok(())
            }
        }
    }

    fn backend(&self) -> Option<BorrowedFd<'_>> {
        Some(self.tap.as_fd())
    }

    fn interest(&self) -> Interest {
        self.interest
    }

    fn due(&self) -> Option<Instant> {
        let opens = |waits: bool, limit: &Option<Bucket>| limit.as_ref().filter(|_| waits)?.opens();
        let (transmit, receive) = (
            opens(self.transmit_waits, &self.transmit_limit),
            opens(self.receive_waits, &self.receive_limit),
        );
        transmit.into_iter().chain(receive).min()
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    fn arrived(&mut self) {
        if self.features & feature::GUEST_ANNOUNCE != 0 {
            self.announce = true;
            self.config_changed = true;
        }
    }

    fn save(&self) -> Vec<u8> {
        state::to_saved(self.mac, self.announce)
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), DeviceStateError> {
        (self.mac, self.announce) = state::from_saved(saved)?;
        Ok(())
    }
}

/// What a tap may leave to its reader (`TUN_F_*` of `linux/if_tun.h`).
mod tap {
    pub(super) const CSUM: u32 = 1;
    pub(super) const TSO4: u32 = 2;
    pub(super) const TSO6: u32 = 4;
    pub(super) const TSO_ECN: u32 = 8;
}
