//! The devices, as code of ACPI's machine language.

use super::super::board::Board;
use super::super::layout::{
    GENERATION_ID, GENERATION_IRQ, PANIC_PORT, SERIAL_IRQ, SERIAL_PORT, VIRTIO_SLOT_BYTES, virtio_slot,
};
use super::aml::{
    device, edge_interrupt, eisa_id, integer, memory, method, name, notify, package, ports, resources, scope, string,
};

/// What the differentiated system description table contains after its header.
pub(super) fn definitions(board: Board) -> Vec<u8> {
    let mut devices = vec![serial_port(), panic_device(), generation_counter(), event_device()];
    devices.extend((0..board.virtio_devices).map(virtio_device));
    [soft_off(), scope(*b"_SB_", &devices)].concat()
}

/// The only sleeping state: the power control register switches off whatever kind of sleep is asked for.
fn soft_off() -> Vec<u8> {
    name(*b"_S5_", &package(&[integer(0), integer(0), integer(0), integer(0)]))
}

fn serial_port() -> Vec<u8> {
    device(
        *b"COM1",
        &[
            name(*b"_HID", &eisa_id(*b"PNP0501")),
            name(*b"_UID", &integer(0)),
            name(
                *b"_CRS",
                &resources(&[ports(SERIAL_PORT, 8), edge_interrupt(SERIAL_IRQ)]),
            ),
        ],
    )
}

/// `docs/specs/pvpanic.rst` of QEMU.
fn panic_device() -> Vec<u8> {
    device(
        *b"PEVT",
        &[
            name(*b"_HID", &string("QEMU0001")),
            name(*b"_CRS", &resources(&[ports(PANIC_PORT, 1)])),
        ],
    )
}

/// Microsoft's "Virtual Machine Generation ID": where the id lies.
fn generation_counter() -> Vec<u8> {
    device(
        GENERATION_COUNTER,
        &[
            name(*b"_HID", &string("VMGENCTR")),
            name(*b"_CID", &string("VM_Gen_Counter")),
            name(*b"_DDN", &string("VM_Gen_Counter")),
            name(
                *b"ADDR",
                &package(&[integer(GENERATION_ID & 0xffff_ffff), integer(GENERATION_ID >> 32)]),
            ),
        ],
    )
}

/// The generic event device (ACPI 6.5, 5.6.9): its one interrupt says that the generation id changed.
fn event_device() -> Vec<u8> {
    const CHANGED: u8 = 0x80;
    device(
        *b"GED_",
        &[
            name(*b"_HID", &string("ACPI0013")),
            name(*b"_CRS", &resources(&[edge_interrupt(GENERATION_IRQ)])),
            method(*b"_EVT", 1, &[notify(GENERATION_COUNTER, CHANGED)]),
        ],
    )
}

const GENERATION_COUNTER: [u8; 4] = *b"VGEN";

/// A virtio-mmio device, by the name under which Linux looks for them.
fn virtio_device(number: usize) -> Vec<u8> {
    let slot = virtio_slot(number);
    let digit =
        |value: usize| char::from_digit(value as u32 % 16, 16).map_or(b'0', |digit| digit.to_ascii_uppercase() as u8);
    device(
        [b'V', b'R', digit(number / 16), digit(number)],
        &[
            name(*b"_HID", &string("LNRO0005")),
            name(*b"_UID", &integer(number as u64)),
            name(*b"_CCA", &integer(1)),
            name(
                *b"_CRS",
                &resources(&[
                    memory(slot.address as u32, VIRTIO_SLOT_BYTES as u32),
                    edge_interrupt(slot.irq),
                ]),
            ),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_virtio_device_is_described() {
        let count = |devices: usize| {
            let definitions = definitions(Board {
                vcpus: 1,
                virtio_devices: devices,
            });
            definitions.windows(8).filter(|bytes| bytes == b"LNRO0005").count()
        };
        assert_eq!((count(0), count(3), count(16)), (0, 3, 16));
    }
}
