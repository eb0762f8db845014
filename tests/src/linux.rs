//! A Linux guest to be run, and what it prints.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ferry_linux_guest::{CMDLINE, Image};

use crate::host::Host;
use crate::waiting::until;

/// What `ferry run` is told of a Linux guest. The default is 256 MiB and two vCPUs.
#[derive(Clone, Debug)]
pub struct Linux {
    name: String,
    memory: String,
    vcpus: u32,
    cmdline: String,
    image: Image,
    devices: Vec<String>,
}

impl Linux {
    /// A guest that only ticks. Its image is built if it is not in the cache, which takes minutes.
    ///
    /// # Errors
    /// If the image is not there and cannot be built: says what is missing.
    pub fn new(name: &str) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            memory: "256M".to_owned(),
            vcpus: 2,
            cmdline: CMDLINE.to_owned(),
            image: ferry_linux_guest::image().context("failed to get the Linux guest (cargo xtask linux --install)")?,
            devices: Vec::new(),
        })
    }

    /// The same with so much memory, as `ferry run --memory` takes it.
    #[must_use]
    pub fn memory(mut self, size: &str) -> Self {
        size.clone_into(&mut self.memory);
        self
    }

    /// The same with so many vCPUs.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// The same with further words on its command line.
    #[must_use]
    pub fn words(mut self, words: &str) -> Self {
        self.cmdline = format!("{} {words}", self.cmdline);
        self
    }

    /// The same with a disk, as `ferry run --disk` takes it.
    #[must_use]
    pub fn disk(self, disk: &str) -> Self {
        self.device("--disk", disk)
    }

    /// The same with a network card, as `ferry run --net` takes it.
    #[must_use]
    pub fn nic(self, nic: &str) -> Self {
        self.device("--net", nic)
    }

    fn device(mut self, flag: &str, value: &str) -> Self {
        self.devices.extend([flag.to_owned(), value.to_owned()]);
        self
    }

    /// The same with a copy of its kernel, in this folder, that has no PVH entry point: it is started by the 64-bit protocol of Linux.
    ///
    /// # Errors
    /// If it cannot be written, or the kernel has no such entry point.
    pub fn without_pvh(mut self, folder: &Path) -> Result<Self> {
        // A note's header: length of the name, length of what it says (an address of 8 bytes), type 18, name.
        const NOTE: [u8; 16] = *b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0";
        let mut kernel = fs::read(&self.image.kernel)?;
        let found = kernel.windows(NOTE.len()).position(|bytes| bytes == NOTE);
        let note = found.context("the Linux guest's kernel has no PVH entry point")?;
        kernel[note + 8] = 0xff;
        self.image.kernel = folder.join("vmlinux-without-pvh");
        fs::write(&self.image.kernel, kernel)?;
        Ok(self)
    }

    /// The same with its kernel as a bzImage in this folder: with a setup header, and not compressed, for unpacking takes hours where ring 0 is
    /// emulated. Like one that is, it is loaded as one piece and started 0x200 bytes on.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn as_bzimage(mut self, folder: &Path) -> Result<Self> {
        let kernel = bzimage(&fs::read(&self.image.kernel)?).context("the Linux guest's kernel is no vmlinux")?;
        self.image.kernel = folder.join("bzImage");
        fs::write(&self.image.kernel, kernel)?;
        Ok(self)
    }

    /// Runs it on a host.
    ///
    /// # Errors
    /// If it is refused.
    pub fn run(&self, host: &Host) -> Result<()> {
        let (kernel, initrd) = (self.image.kernel.display(), self.image.initramfs.display());
        let (kernel, initrd, vcpus) = (kernel.to_string(), initrd.to_string(), self.vcpus.to_string());
        let arguments = [
            "run",
            &self.name,
            "--memory",
            &self.memory,
            "--vcpus",
            &vcpus,
            "--kernel",
            &kernel,
            "--initrd",
            &initrd,
            "--cmdline",
            &self.cmdline,
        ];
        let devices = self.devices.iter().map(String::as_str);
        let arguments: Vec<&str> = arguments.into_iter().chain(devices).collect();
        host.ferry(&arguments)?.exit(0)?;
        Ok(())
    }
}

/// A bzImage of a vmlinux: boot sector and setup, of which nothing but the header is looked at, a page with a jump, memory as the kernel wants it.
fn bzimage(vmlinux: &[u8]) -> Option<Vec<u8>> {
    const JUMP_PAGE: u64 = 0x1000;
    let number = |at: usize, bytes: usize| {
        let field = vmlinux.get(at..at + bytes)?;
        Some(
            field
                .iter()
                .rev()
                .fold(0, |number, &byte| number << 8 | u64::from(byte)),
        )
    };
    let (table, entry_bytes, entries) = (
        number(32, 8)? as usize,
        number(54, 2)? as usize,
        number(56, 2)? as usize,
    );
    let mut loaded = Vec::new();
    for header in (0..entries).map(|index| table + index * entry_bytes) {
        const PT_LOAD: u64 = 1;
        if number(header, 4)? == PT_LOAD {
            let [offset, _, address, in_file, in_memory] = [8, 16, 24, 32, 40].map(|field| number(header + field, 8));
            let bytes = vmlinux.get(offset? as usize..(offset? + in_file?) as usize)?;
            loaded.push((address?, bytes, in_memory?));
        }
    }
    let start = loaded.iter().map(|&(address, ..)| address).min()?;
    let end = loaded.iter().map(|&(address, _, bytes)| address + bytes).max()?;

    let mut file = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    // Fields by their offsets in Documentation/arch/x86/boot.rst: one sector of setup, boot flag and jump, magic number, version 2.15.
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    // Loaded high, there, not relocatable, with a 64-bit entry point, for a command line of 2047 bytes, with this much memory.
    put(0x211, &[1]);
    put(0x214, &((start - JUMP_PAGE) as u32).to_le_bytes());
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &[1]);
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &(start - JUMP_PAGE).to_le_bytes());
    put(0x260, &((end - start + JUMP_PAGE) as u32).to_le_bytes());
    let memory = file.len() as u64 + JUMP_PAGE;
    file.resize((memory + end - start) as usize, 0);
    // mov eax, the first byte of the kernel, which is its 64-bit entry point; jmp rax
    let jump = 1024 + 0x200;
    file[jump] = 0xb8;
    file[jump + 1..jump + 5].copy_from_slice(&(number(24, 8)? as u32).to_le_bytes());
    file[jump + 5..jump + 7].copy_from_slice(&[0xff, 0xe0]);
    for (address, bytes, _) in loaded {
        let at = (memory + address - start) as usize;
        file[at..at + bytes.len()].copy_from_slice(bytes);
    }
    Some(file)
}

/// How long Linux may take to boot where ring 0 is emulated and the machine is busy.
pub const BOOT: Duration = Duration::from_secs(300);

/// The console log of the only guest of a host. It can be read after the guest has left, too.
pub struct Console(File);

impl Console {
    /// Opens it.
    ///
    /// # Errors
    /// If there is no guest, or more than one.
    pub fn of(host: &Host) -> Result<Self> {
        let folder = host.data_dir.join("instances");
        let instances: Vec<_> = fs::read_dir(&folder)
            .with_context(|| format!("failed to read {}", folder.display()))?
            .flatten()
            .collect();
        let [instance] = &instances[..] else {
            bail!("one guest expected at {}, found {}", host.name, instances.len());
        };
        let file = instance.path().join("console.log");
        Ok(Self(
            File::open(&file).with_context(|| format!("failed to open {}", file.display()))?,
        ))
    }

    /// All that the guest printed.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn text(&self) -> Result<String> {
        let mut bytes = Vec::new();
        let mut file = &self.0;
        file.seek(SeekFrom::Start(0))?;
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).replace('\r', ""))
    }
}

/// All that the only guest of a host printed there so far; nothing if there is none yet.
fn printed(host: &Host) -> String {
    let text = Console::of(host).and_then(|console| console.text());
    text.unwrap_or_default()
}

/// Whether the kernel is still on its way to the first process, which ticks.
fn is_booting(text: &str) -> bool {
    !text
        .rsplit("Linux version")
        .next()
        .unwrap_or_default()
        .contains("TICK ")
}

/// A guest whose kernel goes on printing is waited for so many times as long as is said: how long a boot takes on a host that has other things
/// to do nobody knows.
const BOOTS_ON: u32 = 6;

/// Waits until the guest has printed these words so many times on a host, and gives all that it printed. While it boots, the deadline begins
/// anew with whatever it prints.
///
/// # Errors
/// What it printed last, if it does not, and at once if its kernel panicked instead.
pub fn wait_printed(host: &Host, words: &str, times: usize, deadline: Duration) -> Result<String> {
    let what = format!("{words:?} is printed {times} times at {}", host.name);
    let (mut length, mut went_on) = (0, Instant::now());
    let found = until(&what, deadline * BOOTS_ON, || {
        let text = printed(host);
        if text.len() > length && is_booting(&text) {
            (length, went_on) = (text.len(), Instant::now());
        }
        match text.matches(words).count() {
            count if count >= times => Ok(Some(text)),
            _ if text.contains("Kernel panic") => bail!("the guest's kernel panicked"),
            _ if went_on.elapsed() > deadline => bail!("waited {:.1} s in vain: {what}", deadline.as_secs_f64()),
            _ => Ok(None),
        }
    });
    found.with_context(|| {
        let text = printed(host);
        let lines: Vec<&str> = text.lines().collect();
        format!("it printed:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"))
    })
}

/// Has the guest's shell carry a line out, 60 bytes at most, and waits until it says that it did. No line twice: the first one's word
/// would be taken for the second's. It may be carried out twice: a guest that is starved can lose the begin of a line, for its shell throws away
/// what it has read of one within a second; then the line is typed again.
///
/// # Errors
/// If it does not, or could not.
pub fn carry_out(host: &Host, name: &str, line: &str, deadline: Duration) -> Result<()> {
    let typed = format!("{line}\n");
    let mut known = tails_answered(&printed(host), line);
    // Dropped, and so ended, once the guest has carried it out.
    let mut typing = host.type_into(name, &typed)?;
    let what = format!("the guest carries out {line:?}");
    until(&what, deadline, || {
        let text = printed(host);
        if text.contains(&format!("FAILED {line}\n")) {
            bail!("the guest could not carry out {line:?}");
        }
        if text.contains(&format!("DID {line}\n")) {
            return Ok(Some(()));
        }
        let tails = tails_answered(&text, line);
        if tails > known {
            known = tails;
            drop(std::mem::replace(&mut typing, host.type_into(name, &typed)?));
        }
        Ok(None)
    })
}

/// How often the guest answered to the end of a line without its begin.
fn tails_answered(text: &str, line: &str) -> usize {
    // What follows the last line's end may be half a line.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let answers = whole
        .lines()
        .filter_map(|said| said.strip_prefix("DID ").or_else(|| said.strip_prefix("FAILED ")));
    answers.filter(|tail| *tail != line && line.ends_with(tail)).count()
}

/// The numbers of the whole `TICK` lines in what a guest printed, of which none says that its data is damaged.
///
/// # Errors
/// The line that does.
pub fn ticks(text: &str) -> Result<Vec<u64>> {
    let mut ticks = Vec::new();
    // What follows the last line's end may be half a line.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    for line in whole.lines() {
        let Some(rest) = line.strip_prefix("TICK ") else {
            continue;
        };
        if !rest.ends_with("data=same") {
            bail!("the guest says {line:?}");
        }
        ticks.extend(rest.split(' ').next().and_then(|number| number.parse::<u64>().ok()));
    }
    Ok(ticks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_to_the_end_of_a_line_alone_are_counted() {
        let line = "$b mount -t sysfs sys /sys";
        let said = "TICK 2 up=1\nFAILED ysfs sys /sys\nDID cd /sys\nDID \nFAILED /usr\nDID ";
        assert_eq!(tails_answered(said, line), 2);
        assert_eq!(tails_answered(&format!("FAILED {line}\nDID {line}\n"), line), 0);
    }

    #[test]
    fn whole_ticks_are_read() {
        let text = "LINUX 6.1\nTICK 0 up=1.0 data=same\nTICK 1 up=2.0 data=same\nTICK 2 up";
        assert_eq!(ticks(text).expect("clean"), [0, 1]);
    }

    #[test]
    fn a_guest_boots_until_it_ticks() {
        let first = "[0.0] Linux version 6.1\n[1.0] Run /init\n";
        let ticks = format!("{first}LINUX 6.1\nTICK 0 up=1.0 data=same\n");
        assert!(is_booting("") && is_booting(first) && !is_booting(&ticks));
        assert!(is_booting(&format!("{ticks}{first}")));
    }

    #[test]
    fn damage_is_found() {
        assert!(ticks("TICK 0 up=1.0 data=DAMAGED\n").is_err());
    }
}
