//! A saved device as a peer or a disk may hand it over, and what the guest's memory holds there.

use ferry_proto::state::v1 as saved;
use prost::Message;

use super::guest::{Reader, memory, moved, with_registers};

/// After the first byte: how many bytes of memory follow, those, and the saved device. One that is taken works, rests, and moves on.
pub(crate) fn restore(bytes: &[u8]) {
    let mut input = Reader(bytes);
    let Some((which, len)) = input.byte().zip(input.half()) else {
        return;
    };
    let Some(filling) = input.take(len.into()) else { return };
    let Ok(state) = saved::VirtioDevice::decode(input.0) else {
        return;
    };
    let memory = memory(filling);
    let device = with_registers(which, &memory);
    let before = device.save();
    if device.restore(&state).is_err() {
        assert_eq!(
            device.save(),
            before,
            "a device that was refused its state is what it was"
        );
        return;
    }
    drop(moved(&device, which, &memory));
    device.arrived();
    device.go_on();
    moved(&device, which, &memory);
}

#[cfg(test)]
mod tests {
    use ferry_fuzz_inputs::feed;

    use super::super::super::golden;
    use super::super::guest::{MEMORY, device};
    use super::super::rings::tests::samples as layouts;
    use super::*;

    /// The golden states, whose rings are elsewhere, and the same with their rings where the memory has some.
    fn samples() -> Vec<Vec<u8>> {
        let mut samples = Vec::new();
        for layout in &layouts()[..4] {
            let kind = device(layout[0]).kind();
            for golden in golden::states().into_iter().filter(|state| state.kind == kind) {
                samples.push(sample(layout, &golden));
                let mut here = golden;
                let transport = here.transport.as_mut().expect("a transport");
                for (queue, base) in transport.queues.iter_mut().zip((0..MEMORY).step_by(0x400)) {
                    (queue.size, queue.next_available, queue.next_used) = (16, 0, 0);
                    (queue.descriptors, queue.driver, queue.device) = (base, base + 0x100, base + 0x200);
                }
                samples.push(sample(layout, &here));
            }
        }
        samples
    }

    fn sample(layout: &[u8], state: &saved::VirtioDevice) -> Vec<u8> {
        let mut bytes = vec![layout[0]];
        bytes.extend((layout.len() as u16 - 1).to_le_bytes());
        bytes.extend(&layout[1..]);
        state.encode(&mut bytes).expect("a vector takes everything");
        bytes
    }

    #[test]
    fn no_saved_device_harms_the_host() {
        feed("virtio_saved", &samples(), restore);
    }
}
