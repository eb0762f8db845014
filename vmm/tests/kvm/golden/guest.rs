//! The guest whose machine is saved: it uses every kind of device, waits for a byte, and then uses them all again.
//!
//! It stays in ring 0 and has no interrupts, only what hosts that emulate ring 0 know: it looks whether a timer's tick or an answer is there.

use super::super::micro::Code;

/// Where it counts while it waits for a byte, and when all is done.
pub(super) const WAITING: u32 = 0x20_3000;
pub(super) const DONE: u32 = 0x20_4000;
/// Where its second processor counts once it is started.
pub(super) const SECOND: u32 = 0xb000;
/// 16 random bytes from before, and as many from after it was given a byte.
pub(super) const RANDOM: [u32; 2] = [0x20_2000, 0x20_2010];
/// What it leaves in the register that it calls system entry points with.
pub(super) const ENTRY: u32 = 0x00c0_ffe0;

/// What it prints when it begins to wait, and when it is done; what the third sector of its disk begins with comes in between.
pub(super) const READY: &str = "ready\n";
pub(super) const OVER: &str = "over\n";
/// Which sectors it reads before and after it waits.
pub(super) const SECTORS: [u32; 2] = [1, 2];
/// How much of the second of them it prints.
pub(super) const PRINTED: u32 = 6;

/// Its disk and its entropy source are the devices of these numbers: there is a network card between them.
const DISK: Queue = Queue {
    registers: 0xd000_0000,
    ring: 0x20_1000,
};
const ENTROPY: Queue = Queue {
    registers: 0xd000_2000,
    ring: 0x20_0000,
};
const REQUEST: u32 = 0x20_2100;
const SECTOR: u32 = 0x20_2200;
const STATUS: u32 = 0x20_2500;
/// Where its second processor begins, in real mode.
const TRAMPOLINE: u32 = 0xa000;

/// Its instructions.
pub(super) fn code() -> Code {
    let [first, second] = RANDOM;
    let mut code = ENTROPY.set_up(Code::default());
    code = ENTROPY.describe(code, 0, first, 16, WRITE, 0);
    code = ENTROPY.describe(code, 1, second, 16, WRITE, 0);
    code = ENTROPY.ask(code, 0, 0);
    code = DISK.set_up(code);
    code = DISK.describe(code, 0, REQUEST, 16, NEXT, 1);
    code = DISK.describe(code, 1, SECTOR, 512, NEXT | WRITE, 2);
    code = DISK.describe(code, 2, STATUS, 1, WRITE, 0);
    code = DISK.ask(code.store(REQUEST + 8, SECTORS[0]), 0, 0);
    code = start_ticking(set_entry(code)).print(READY);

    code = wait_for_byte(code);
    code = ENTROPY.ask(code, 1, 1);
    code = DISK.ask(code.store(REQUEST + 8, SECTORS[1]), 1, 0);
    for at in SECTOR..SECTOR + PRINTED {
        code = print_memory(code, at);
    }
    code = start_second(wait_for_tick(wait_for_tick(code)));
    code.print(OVER).count(DONE)
}

/// Descriptor flags (virtio 1.2, 2.7.5).
const NEXT: u32 = 1;
const WRITE: u32 = 2;

/// The first queue of a virtio-mmio device.
struct Queue {
    registers: u32,
    /// 8 descriptors, then the available ring at 0x100, and the used one at 0x200.
    ring: u32,
}

impl Queue {
    /// Brings the device up, as its driver (virtio 1.2, 3.1.1 and 4.2.3).
    fn set_up(&self, code: Code) -> Code {
        let steps = [
            (0x70, 0),
            (0x70, 1),
            (0x70, 3),
            // VIRTIO_F_VERSION_1 alone.
            (0x24, 1),
            (0x20, 1),
            (0x70, 0xb),
            (0x30, 0),
            (0x38, 8),
            (0x80, self.ring),
            (0x90, self.ring + 0x100),
            (0xa0, self.ring + 0x200),
            (0x44, 1),
            (0x70, 0xf),
        ];
        let write = |code: Code, (register, value)| code.store(self.registers + register, value);
        steps.into_iter().fold(code, write)
    }

    fn describe(&self, code: Code, number: u32, address: u32, len: u32, flags: u32, next: u32) -> Code {
        let at = self.ring + 16 * number;
        code.store(at, address)
            .store(at + 8, len)
            .store(at + 12, flags | next << 16)
    }

    /// Offers the chain that begins with this descriptor, as the so many-th, and waits until it is used.
    fn ask(&self, code: Code, number: u32, head: u32) -> Code {
        let (available, used) = (self.ring + 0x100, self.ring + 0x200);
        // mov word [slot], head
        let [a, b, c, d] = (available + 4 + 2 * number).to_le_bytes();
        let code = code.raw(&[0x66, 0xc7, 0x05, a, b, c, d, head as u8, 0]);
        let code = code
            .store(available, (number + 1) << 16)
            .store(self.registers + 0x50, 0);
        // 1: cmp word [used + 2], number + 1; jne 1b
        let [a, b, c, d] = (used + 2).to_le_bytes();
        code.raw(&[0x66, 0x81, 0x3d, a, b, c, d, number as u8 + 1, 0, 0x75, 0xf5])
    }
}

/// mov ecx, IA32_SYSENTER_EIP; mov eax, entry; xor edx, edx; wrmsr
fn set_entry(code: Code) -> Code {
    let [a, b, c, d] = ENTRY.to_le_bytes();
    code.raw(&[0xb9, 0x76, 1, 0, 0, 0xb8, a, b, c, d, 0x31, 0xd2, 0x0f, 0x30])
}

/// The interval timer ticks 100 times a second on the older interrupt controller, which lets nothing else through.
fn start_ticking(code: Code) -> Code {
    let controller = [(0x20, 0x11), (0x21, 0x20), (0x21, 0x04), (0x21, 0x01), (0x21, 0xfe)];
    let timer = [(0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)];
    let write = |code: Code, (port, value)| code.out_byte(port, value);
    controller.into_iter().chain(timer).fold(code, write)
}

/// `1: mov al, 0x0c; out 0x20, al; in al, 0x20; cmp al, 7; je 1b`: asks the controller for what is pending, which takes it, until that is the timer.
fn wait_for_tick(code: Code) -> Code {
    code.raw(&[0xb0, 0x0c, 0xe6, 0x20, 0xe4, 0x20, 0x3c, 7, 0x74, 0xf6])
}

/// `1: inc dword [WAITING]; mov dx, 0x3fd; in al, dx; test al, 1; jz 1b; mov dx, 0x3f8; in al, dx; out dx, al`: sends the byte back that came.
fn wait_for_byte(code: Code) -> Code {
    let [a, b, c, d] = WAITING.to_le_bytes();
    code.raw(&[
        0xff, 0x05, a, b, c, d, 0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 1, 0x74, 0xf1,
    ])
    .raw(&[0x66, 0xba, 0xf8, 0x03, 0xec, 0xee])
}

/// mov al, [address]; mov dx, 0x3f8; out dx, al
fn print_memory(code: Code, address: u32) -> Code {
    let [a, b, c, d] = address.to_le_bytes();
    code.raw(&[0xa0, a, b, c, d, 0x66, 0xba, 0xf8, 0x03, 0xee])
}

/// Has the second processor count, and waits until it does.
fn start_second(code: Code) -> Code {
    // xor ax, ax; mov ds, ax; 1: inc word [SECOND]; jmp 1b
    let code = code
        .store(TRAMPOLINE, 0xd88e_c031)
        .store(TRAMPOLINE + 4, SECOND << 16 | 0x06ff)
        .store(TRAMPOLINE + 8, 0xfaeb);
    // To the local APIC of number 1: INIT, and the page to start in.
    let code = code
        .store(0xfee0_0310, 1 << 24)
        .store(0xfee0_0300, 0x4500)
        .store(0xfee0_0310, 1 << 24)
        .store(0xfee0_0300, 0x4600 | TRAMPOLINE >> 12);
    // 1: cmp dword [SECOND], 0; je 1b
    let [a, b, c, d] = SECOND.to_le_bytes();
    code.raw(&[0x83, 0x3d, a, b, c, d, 0, 0x74, 0xf7])
}
