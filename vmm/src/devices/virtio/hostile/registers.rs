//! What a hostile guest writes to a device's registers, its memory, and its doorbells, in any order, while the machine moves again and again.

use vm_memory::{Bytes, GuestAddress};

use super::super::registers::offset;
use super::guest::{MEMORY, Reader, memory, moved, rest, with_registers};

/// The registers that an input can name by a number: all that a driver writes or reads, and one behind the last.
const REGISTERS: [u64; 24] = [
    offset::STATUS,
    offset::DRIVER_FEATURES_SELECT,
    offset::DRIVER_FEATURES,
    offset::QUEUE_SELECT,
    offset::QUEUE_SIZE,
    offset::QUEUE_DESCRIPTORS,
    offset::QUEUE_DESCRIPTORS + 4,
    offset::QUEUE_DRIVER,
    offset::QUEUE_DRIVER + 4,
    offset::QUEUE_DEVICE,
    offset::QUEUE_DEVICE + 4,
    offset::QUEUE_READY,
    offset::QUEUE_NOTIFY,
    offset::INTERRUPT_ACK,
    offset::DEVICE_FEATURES_SELECT,
    offset::DEVICE_FEATURES,
    offset::QUEUE_SIZE_MAX,
    offset::INTERRUPT_STATUS,
    offset::CONFIG_GENERATION,
    offset::DEVICE_ID,
    offset::CONFIG,
    offset::CONFIG + 4,
    offset::CONFIG + 8,
    offset::CONFIG + 60,
];

/// The most that one input does: more shows nothing new.
const MOST_STEPS: usize = 64;

/// Steps of a guest and of those who move it, one after the other; whatever they are, the device comes to rest in the end and moves.
pub(crate) fn program(bytes: &[u8]) {
    let Some((&which, bytes)) = bytes.split_first() else {
        return;
    };
    let (memory, mut input) = (memory(&[]), Reader(bytes));
    let mut device = with_registers(which, &memory);
    device.go_on();
    for _ in 0..MOST_STEPS {
        let Some(step) = Step::read(&mut input) else { break };
        match step {
            Step::Write(at, data) => device.write(at, data),
            Step::Read(at, len) => device.read(at, &mut vec![0; len]),
            Step::Put(address, bytes) => {
                let address = GuestAddress(u64::from(address) % (MEMORY - 256));
                memory.tracked().write_slice(bytes, address).expect("it lies in memory");
            }
            Step::Rest => {
                rest(&device);
                device.go_on();
            }
            Step::Move => {
                device = moved(&device, which, &memory);
                device.arrived();
                device.go_on();
            }
        }
    }
    moved(&device, which, &memory);
}

enum Step<'a> {
    Write(u64, &'a [u8]),
    Read(u64, usize),
    /// The guest writes so many bytes to its own memory.
    Put(u32, &'a [u8]),
    /// The machine stands still, and goes on.
    Rest,
    Move,
}

impl<'a> Step<'a> {
    fn read(input: &mut Reader<'a>) -> Option<Self> {
        let register = |number: u8| REGISTERS[usize::from(number) % REGISTERS.len()];
        Some(match input.byte()? {
            number @ 0..=0x7f => Self::Write(register(number), input.take(4)?),
            number @ 0x80..=0xbf => Self::Read(register(number & 0x3f), 4),
            0xc0..=0xcf => {
                let (at, len) = (input.half()?, input.byte()? % 9);
                Self::Write(at.into(), input.take(len.into())?)
            }
            0xd0..=0xd7 => Self::Read(input.half()?.into(), (input.byte()? % 17).into()),
            0xd8..=0xf7 => {
                let (address, len) = (input.word()?, input.byte()?);
                Self::Put(address, input.take(len.into())?)
            }
            0xf8..=0xfb => Self::Rest,
            _ => Self::Move,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use ferry_fuzz_inputs::feed;

    use super::super::super::registers::{RING_EVENT_IDX, VERSION_1, status};
    use super::super::guest::device;
    use super::super::rings::tests::samples as layouts;
    use super::*;

    fn write(steps: &mut Vec<u8>, at: u64, value: u32) {
        let number = REGISTERS
            .iter()
            .position(|register| *register == at)
            .expect("a register that has a number");
        steps.push(number as u8);
        steps.extend(value.to_le_bytes());
    }

    /// A driver that sets its device up over the rings that such a layout has, moves, and goes on.
    fn driver(layout: &[u8]) -> Vec<u8> {
        let which = layout[0];
        let queues = device(which).queue_sizes().len() as u32;
        let features = device(which).features() | VERSION_1 | RING_EVENT_IDX;
        let mut steps = vec![which];
        for (index, part) in layout[1..]
            .chunks(128)
            .enumerate()
            .filter(|(_, part)| part.iter().any(|byte| *byte != 0))
        {
            steps.push(0xd8);
            steps.extend((index as u32 * 128).to_le_bytes());
            steps.push(part.len() as u8);
            steps.extend(part);
        }
        write(&mut steps, offset::STATUS, 3);
        for half in 0..2 {
            write(&mut steps, offset::DRIVER_FEATURES_SELECT, half);
            write(&mut steps, offset::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        write(&mut steps, offset::STATUS, 3 | status::FEATURES_OK);
        for queue in 0..queues {
            let base = queue * 0x400;
            write(&mut steps, offset::QUEUE_SELECT, queue);
            write(&mut steps, offset::QUEUE_SIZE, 16);
            write(&mut steps, offset::QUEUE_DESCRIPTORS, base);
            write(&mut steps, offset::QUEUE_DRIVER, base + 0x100);
            write(&mut steps, offset::QUEUE_DEVICE, base + 0x200);
            write(&mut steps, offset::QUEUE_READY, 1);
        }
        write(&mut steps, offset::STATUS, 3 | status::FEATURES_OK | status::DRIVER_OK);
        (0..queues).for_each(|queue| write(&mut steps, offset::QUEUE_NOTIFY, queue));
        steps.push(0xff);
        write(&mut steps, offset::INTERRUPT_ACK, 3);
        write(&mut steps, offset::QUEUE_NOTIFY, 0);
        write(&mut steps, offset::STATUS, 0);
        steps
    }

    /// For each device.
    pub(in super::super) fn samples() -> Vec<Vec<u8>> {
        layouts()[..4].iter().map(|layout| driver(layout)).collect()
    }

    #[test]
    fn no_driver_harms_the_host_or_keeps_its_guest_from_moving() {
        feed("virtio_registers", &samples(), program);
    }
}
