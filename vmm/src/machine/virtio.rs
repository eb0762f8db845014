//! The machine's virtio devices: made on their backends, put into their slots, connected to KVM.

use std::io;

use super::{Backends, MachineError};
use crate::arch::x86_64::layout::{VIRTIO_SLOTS, virtio_slot};
use crate::devices::{
    Balloon, BalloonLevel, Block, CardTraffic, Device, Entropy, HintDesk, InterruptFd, MmioDevice, Net, WrittenBlocks,
};
use crate::kvm::Vm;
use crate::memory::GuestMemory;
use crate::threads::ThreadHook;

/// Devices that answer once their guest runs.
pub(super) struct Connected {
    /// In the order of their slots.
    pub(super) devices: Vec<MmioDevice>,
    /// Which blocks of each disk its guest writes.
    pub(super) written: Vec<WrittenBlocks>,
    /// When frames passed each network card.
    pub(super) traffic: Vec<CardTraffic>,
    /// How much memory the guest has given up.
    pub(super) balloon: BalloonLevel,
    /// Where the guest is asked for pages that are free.
    pub(super) hints: HintDesk,
}

/// What the balloon is called.
pub(super) const BALLOON: &str = "balloon0";

/// Makes the disks, the network cards, and what every machine has: an entropy source and a balloon.
///
/// # Errors
///
/// Names the device that cannot be had, or says that there are too many.
pub(super) fn connect(
    vm: &Vm,
    memory: &GuestMemory,
    backends: Backends,
    threads: &ThreadHook,
) -> Result<Connected, MachineError> {
    let Backends { disks, nics } = backends;
    let asked = disks.len() + nics.len() + 2;
    if asked > VIRTIO_SLOTS {
        let limit = VIRTIO_SLOTS;
        return Err(MachineError::TooManyDevices { asked, limit });
    }
    let (mut written, mut traffic) = (Vec::new(), Vec::new());
    let mut devices: Vec<(String, Box<dyn Device>)> = Vec::new();
    for (index, disk) in disks.into_iter().enumerate() {
        let name = format!("disk{index}");
        let block = Block::new(disk).map_err(failed(&name))?;
        written.push(block.written());
        devices.push((name, Box::new(block)));
    }
    for (index, nic) in nics.into_iter().enumerate() {
        let net = Net::new(nic);
        traffic.push(net.traffic());
        devices.push((format!("nic{index}"), Box::new(net)));
    }
    devices.push(("rng0".to_owned(), Box::new(Entropy)));
    let device = Balloon::default();
    let (balloon, hints) = (device.level(), device.hints());
    devices.push((BALLOON.to_owned(), Box::new(device)));
    let place = |(number, (name, device))| connect_one(vm, memory, threads, number, name, device);
    Ok(Connected {
        devices: devices.into_iter().enumerate().map(place).collect::<Result<_, _>>()?,
        written,
        traffic,
        balloon,
        hints,
    })
}

fn connect_one(
    vm: &Vm,
    memory: &GuestMemory,
    threads: &ThreadHook,
    number: usize,
    name: String,
    device: Box<dyn Device>,
) -> Result<MmioDevice, MachineError> {
    let slot = virtio_slot(number);
    let interrupt = InterruptFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed(&name))?;
    vm.connect_interrupt(&interrupt, slot.irq)?;
    let device = MmioDevice::new(name.clone(), device, interrupt, memory.clone(), threads).map_err(failed(&name))?;
    for (queue, bell) in device.doorbells().iter().enumerate() {
        vm.connect_doorbell(bell, slot.address + MmioDevice::DOORBELL, queue as u32)?;
    }
    Ok(device)
}

fn failed(device: &str) -> impl FnOnce(io::Error) -> MachineError {
    let device = device.to_owned();
    move |source| MachineError::Device { device, source }
}
