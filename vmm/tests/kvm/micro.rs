//! Micro guests: a few instructions of code in a kernel file of some kind, and the machines around them.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ferry_vmm::{
    Backends, BlankMachine, BootPayload, ConsoleOutput, CpuModel, DirtyMode, FrameRun, GuestMemory, Machine,
    MachineConfig, MachineEvent, PAGE_SIZE, ThreadHook,
};

/// Nothing here takes longer than this unless it hangs.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// Where the code begins.
pub(crate) const CODE: u32 = 0x10_0000;

/// Code under construction. It starts in 32-bit protected mode with flat segments and interrupts off.
#[derive(Clone, Default)]
pub(crate) struct Code(Vec<u8>);

impl Code {
    /// `mov dword [address], value`
    pub(crate) fn store(mut self, address: u32, value: u32) -> Self {
        self.0.extend([0xc7, 0x05]);
        self.0.extend(address.to_le_bytes());
        self.0.extend(value.to_le_bytes());
        self
    }

    /// `mov dx, port; mov al, value; out dx, al`
    pub(crate) fn out_byte(mut self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.0.extend([0x66, 0xba, low, high, 0xb0, value, 0xee]);
        self
    }

    /// `mov dx, port; mov ax, value; out dx, ax`
    pub(crate) fn out_word(mut self, port: u16, value: u16) -> Self {
        let ([low, high], [value_low, value_high]) = (port.to_le_bytes(), value.to_le_bytes());
        self.0
            .extend([0x66, 0xba, low, high, 0x66, 0xb8, value_low, value_high, 0x66, 0xef]);
        self
    }

    /// Prints text, byte by byte.
    pub(crate) fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out_byte(0x3f8, byte))
    }

    /// Prints text with one `rep outsb`; the text lies behind a jump over it.
    pub(crate) fn print_string(mut self, text: &str) -> Self {
        let len = u8::try_from(text.len()).expect("short");
        // jmp over the text
        self.0.extend([0xeb, len]);
        let address = CODE + u32::try_from(self.0.len()).expect("short");
        self.0.extend(text.bytes());
        // mov esi, address; mov ecx, len; mov dx, 0x3f8; cld; rep outsb
        self.0.push(0xbe);
        self.0.extend(address.to_le_bytes());
        self.0.push(0xb9);
        self.0.extend(u32::from(len).to_le_bytes());
        self.0.extend([0x66, 0xba, 0xf8, 0x03, 0xfc, 0xf3, 0x6e]);
        self
    }

    /// Waits for a byte on the console and sends it back: `mov dx, 0x3fd; 1: in al, dx; test al, 1; jz 1b; mov dx, 0x3f8; in al, dx; out dx, al`
    pub(crate) fn echo(mut self) -> Self {
        self.0.extend([0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb]);
        self.0.extend([0x66, 0xba, 0xf8, 0x03, 0xec, 0xee]);
        self
    }

    /// `mov dx, port; 1: in al, dx; test al, bits; jz 1b`: waits until one of the bits is set.
    pub(crate) fn wait_set(mut self, port: u16, bits: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.0.extend([0x66, 0xba, low, high, 0xec, 0xa8, bits, 0x74, 0xfb]);
        self
    }

    /// `mov dx, port; 1: in al, dx; test al, bits; jnz 1b`: waits until none of the bits is set.
    pub(crate) fn wait_clear(mut self, port: u16, bits: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.0.extend([0x66, 0xba, low, high, 0xec, 0xa8, bits, 0x75, 0xfb]);
        self
    }

    /// `1: inc dword [address]; jmp 1b`: never ends.
    pub(crate) fn count(mut self, address: u32) -> Self {
        self.0.extend([0xff, 0x05]);
        self.0.extend(address.to_le_bytes());
        self.0.extend([0xeb, 0xf8]);
        self
    }

    /// `1: hlt; jmp 1b`: never ends.
    pub(crate) fn halt(mut self) -> Self {
        self.0.extend([0xf4, 0xeb, 0xfd]);
        self
    }

    /// Prints `1` in 64-bit mode and `0` in any other: `xor eax, eax`, then what is `inc rax` or else `dec eax; inc eax`.
    pub(crate) fn print_mode(mut self) -> Self {
        self.0.extend([0x31, 0xc0, 0x48, 0xff, 0xc0]);
        // add al, '0'; mov dx, 0x3f8; out dx, al
        self.0.extend([0x04, b'0', 0x66, 0xba, 0xf8, 0x03, 0xee]);
        self
    }

    /// Prints so many bytes of the command line that the boot parameters at RSI point to.
    pub(crate) fn print_cmdline(mut self, bytes: u8) -> Self {
        // mov ebx, [rsi + 0x228]; mov dx, 0x3f8
        self.0.extend([0x8b, 0x9e, 0x28, 0x02, 0, 0, 0x66, 0xba, 0xf8, 0x03]);
        for index in 0..bytes {
            // mov al, [rbx + index]; out dx, al
            self.0.extend([0x8a, 0x43, index, 0xee]);
        }
        self
    }

    /// Any instructions.
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// The ELF file around the code, which goes to [`CODE`] and is followed by 64 KiB of zeroes.
    pub(crate) fn elf(&self) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).expect("short");
        let mut file = vec![0; 0x200];
        file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 1, 1]);
        file[16..20].copy_from_slice(&[2, 0, 3, 0]);
        (file[28], file[42], file[44]) = (52, 32, 2);
        let headers = [
            [4, 0x100, 0, 0, 20, 20, 0, 4],
            [1, 0x200, 0, CODE, len, len + (64 << 10), 0, 4],
        ];
        for (at, words) in [52, 84].into_iter().zip(headers) {
            put_words(&mut file[at..], &words);
        }
        put_words(&mut file[0x100..], &[4, 4, 18, u32::from_le_bytes(*b"Xen\0"), CODE]);
        file.extend(&self.0);
        file
    }
}

/// 64-bit files: those of a Linux that starts by its own protocol.
impl Code {
    /// A vmlinux without a note; its code goes to [`CODE`].
    pub(crate) fn vmlinux(&self) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).expect("short");
        let mut file = vec![0; 0x100];
        file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        file[16..20].copy_from_slice(&[2, 0, 62, 0]);
        put_words(&mut file[24..], &[CODE, 0, 64, 0]);
        (file[54], file[56]) = (56, 1);
        put_words(&mut file[64..], &[1, 0, 0x100, 0, 0, 0, CODE, 0, len, 0, len, 0, 4, 0]);
        file.extend(&self.0);
        file
    }

    /// A bzImage of protocol 2.15; its code goes to 2 MiB and the entry point's 0x200.
    pub(crate) fn bzimage(&self) -> Vec<u8> {
        let mut file = vec![0; 1024];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[1]);
        put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
        put(0x202, b"HdrS\x0f\x02");
        put(0x22c, &0x7fff_ffffu32.to_le_bytes());
        // Relocatable, and with a 64-bit entry point.
        put(0x234, &[1, 0, 1, 0]);
        put(0x238, &2047u32.to_le_bytes());
        put(0x258, &0x20_0000u64.to_le_bytes());
        put(0x260, &0x1_0000u32.to_le_bytes());
        file.resize(1024 + 0x200, 0);
        file.extend(&self.0);
        file
    }
}

fn put_words(into: &mut [u8], words: &[u32]) {
    for (slot, word) in into.chunks_exact_mut(4).zip(words) {
        slot.copy_from_slice(&word.to_le_bytes());
    }
}

/// The console's output, to be waited for.
#[derive(Clone, Default)]
pub(crate) struct Console(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl ConsoleOutput for Console {
    fn write(&mut self, bytes: &[u8]) {
        self.0.0.lock().expect("not poisoned").extend_from_slice(bytes);
        self.0.1.notify_all();
    }
}

impl Console {
    /// Everything printed so far.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().expect("not poisoned")).into_owned()
    }

    /// Forgets what was printed.
    pub(crate) fn clear(&self) {
        self.0.0.lock().expect("not poisoned").clear();
    }

    /// Waits until `found` says something about the text.
    pub(crate) fn wait<T>(&self, found: impl Fn(&str) -> Option<T>) -> Result<T> {
        self.wait_within(DEADLINE, found)
    }

    /// The same, so long.
    pub(crate) fn wait_within<T>(&self, deadline: Duration, found: impl Fn(&str) -> Option<T>) -> Result<T> {
        let start = Instant::now();
        let mut bytes = self.0.0.lock().expect("not poisoned");
        loop {
            if let Some(value) = found(&String::from_utf8_lossy(&bytes)) {
                return Ok(value);
            }
            let rest = deadline.saturating_sub(start.elapsed());
            if rest.is_zero() {
                bail!("not on the console: {:?}", String::from_utf8_lossy(&bytes));
            }
            (bytes, _) = self.0.1.wait_timeout(bytes, rest).expect("not poisoned");
        }
    }

    /// Waits until the text is there.
    pub(crate) fn wait_for(&self, text: &str) -> Result<()> {
        self.wait(|printed| printed.contains(text).then_some(()))
    }
}

/// A machine with its console and events.
pub(crate) struct Rig {
    pub(crate) machine: Machine,
    pub(crate) console: Console,
    pub(crate) events: Receiver<MachineEvent>,
}

impl Rig {
    /// Boots code in a small machine with one vCPU, paused.
    pub(crate) fn boot(code: &Code) -> Result<Self> {
        Self::boot_with(&config(), code)
    }

    /// Boots code in a machine of this kind, paused.
    pub(crate) fn boot_with(config: &MachineConfig, code: &Code) -> Result<Self> {
        let (blank, console, events) = blank(config)?;
        Ok(Self {
            machine: blank.boot(payload(&code.elf(), "")?)?,
            console,
            events,
        })
    }

    /// The next event.
    pub(crate) fn event(&self) -> Result<MachineEvent> {
        self.events.recv_timeout(DEADLINE).context("no event")
    }
}

/// 32 MiB, one vCPU.
pub(crate) fn config() -> MachineConfig {
    MachineConfig {
        memory_bytes: 32 << 20,
        vcpus: 1,
        cpu: CpuModel::Host,
        dirty: DirtyMode::Log,
        hugepages: false,
        expect_incoming: false,
    }
}

/// A machine without a guest.
pub(crate) fn blank(config: &MachineConfig) -> Result<(BlankMachine, Console, Receiver<MachineEvent>)> {
    let console = Console::default();
    let (sender, events): (Sender<MachineEvent>, _) = channel();
    let blank = BlankMachine::new(
        config,
        Backends::default(),
        Box::new(console.clone()),
        sender,
        &ThreadHook::default(),
    )?;
    Ok((blank, console, events))
}

/// A kernel without an initrd.
pub(crate) fn payload(kernel: &[u8], cmdline: &str) -> Result<BootPayload> {
    let mut file: File = tempfile::tempfile()?;
    file.write_all(kernel)?;
    Ok(BootPayload {
        kernel: file,
        initrd: None,
        cmdline: cmdline.to_owned(),
    })
}

/// Copies all pages that one memory has populated into another, as a migration would.
pub(crate) fn copy_memory(from: &GuestMemory, to: &GuestMemory) -> Result<()> {
    let runs = from.populated()?.runs;
    let (mine, theirs) = UnixStream::pair()?;
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| from.send(mine.as_fd(), &[], &runs));
        to.receive(theirs.as_fd(), &runs)?;
        sender.join().expect("sender")
    })?;
    Ok(())
}

/// Reads the page of guest memory that holds an address.
pub(crate) fn read_page(memory: &GuestMemory, address: u32) -> Result<[u8; PAGE_SIZE as usize]> {
    let (mine, mut theirs) = UnixStream::pair()?;
    let run = FrameRun {
        first: u64::from(address) / PAGE_SIZE,
        count: 1,
    };
    memory.send(mine.as_fd(), &[], &[run])?;
    let mut page = [0; PAGE_SIZE as usize];
    theirs.read_exact(&mut page)?;
    Ok(page)
}

/// Reads 32 bits of guest memory.
pub(crate) fn read(memory: &GuestMemory, address: u32) -> Result<u32> {
    let page = read_page(memory, address)?;
    let at = (u64::from(address) % PAGE_SIZE) as usize;
    Ok(u32::from_le_bytes(page[at..at + 4].try_into()?))
}

/// Waits until 32 bits of guest memory are at least this.
pub(crate) fn wait_for_count(memory: &GuestMemory, address: u32, least: u32) -> Result<u32> {
    let start = Instant::now();
    while start.elapsed() < DEADLINE {
        let value = read(memory, address)?;
        if value >= least {
            return Ok(value);
        }
        std::thread::yield_now();
    }
    bail!("the guest does not count to {least}")
}
