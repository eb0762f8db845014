//! Where things lie in a PC's physical addresses and ports.

/// End of conventional memory: the extended BIOS data area would begin here.
pub(crate) const CONVENTIONAL_END: u64 = 0x9_fc00;

/// Start of memory above the legacy area (video memory, option ROMs).
pub(crate) const HIGH_MEMORY_START: u64 = 1 << 20;

/// First address that boot information may use: the real-mode interrupt table and BIOS data stay free.
pub(crate) const BOOT_INFORMATION_START: u64 = 0x6000;

/// Where ACPI's tables lie, in the area of the BIOS, which the memory map keeps free: a guest that is not told looks here too.
pub(crate) const ACPI_START: u64 = 0xe_0000;

/// A page of its own for the generation id, so that nothing else in it changes.
pub(crate) const GENERATION_ID: u64 = 0xe_f000;

/// Where the MP table lies, in the last place in which a guest looks for it.
pub(crate) const MP_TABLE: u64 = 0xf_0000;

/// The local APIC's registers, the same for each vCPU.
pub(crate) const LOCAL_APIC: u64 = 0xfee0_0000;

/// The I/O APIC's registers, and how many lines it has.
pub(crate) const IO_APIC: u64 = 0xfec0_0000;
pub(crate) const IO_APIC_LINES: u8 = 24;

/// Interrupt line on which a guest hears that its generation id is another; where a second serial port would be.
pub(crate) const GENERATION_IRQ: u32 = 3;

/// ACPI's own interrupt line, level-triggered: raised for as long as an event waits that the guest has enabled.
pub(crate) const ACPI_IRQ: u16 = 9;

/// First port and interrupt line of the serial console.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
pub(crate) const SERIAL_IRQ: u32 = 4;

/// Command port of the keyboard controller, which can reset the machine.
pub(crate) const KEYBOARD_COMMAND_PORT: u16 = 0x64;

/// The panic device (`pvpanic` of QEMU).
pub(crate) const PANIC_PORT: u16 = 0x505;

/// Power management events as QEMU's q35 has them: two bytes of status, two that enable.
pub(crate) const POWER_EVENT_PORT: u16 = 0x600;
pub(crate) const POWER_EVENT_PORT_END: u16 = POWER_EVENT_PORT + 3;

/// Power management control as QEMU's q35 has it: sleep enable switches off.
pub(crate) const POWER_CONTROL_PORT: u16 = 0x604;

/// Reset control register of Intel's chipsets.
pub(crate) const RESET_CONTROL_PORT: u16 = 0xcf9;

/// Where a virtio-mmio device answers: 4 KiB of registers, and its interrupt line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VirtioSlot {
    /// First guest physical address, in the hole below 4 GiB.
    pub(crate) address: u64,
    /// The interrupt line; edge-triggered.
    pub(crate) irq: u32,
}

/// Bytes of a slot's registers.
pub(crate) const VIRTIO_SLOT_BYTES: u64 = 0x1000;

/// How many virtio devices a machine may have.
pub(crate) const VIRTIO_SLOTS: usize = 16;

/// The slot of the device of this number. The lines are those that a PC's own devices leave free, first those that a
/// guest without an I/O APIC reaches too.
pub(crate) fn virtio_slot(number: usize) -> VirtioSlot {
    const LINES: [u32; VIRTIO_SLOTS] = [5, 6, 7, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];
    VirtioSlot {
        address: 0xd000_0000 + number as u64 * VIRTIO_SLOT_BYTES,
        irq: LINES[number],
    }
}
