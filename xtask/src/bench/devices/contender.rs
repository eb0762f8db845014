//! Who is measured: Ferry, and QEMU in several modes, each with a guest of its own for each run.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use ferry_tests::{Guest, Pair};

use super::image::Image;
use super::network::{MAC, TAP};
use super::row::{Device, MEMORY_MIB, Row};
use crate::bench::{ferry, qemu};

/// What all contenders are given.
pub(super) struct Host {
    /// The disk.
    pub(super) image: Image,
    /// The release build.
    pub(super) ferry: ferry::Binary,
    /// What the processor's clock runs at, in kHz.
    pub(super) tsc_khz: u64,
}

/// A VMM, and how it is told to do a disk's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contender {
    /// Ferry.
    Ferry,
    /// QEMU in a mode.
    Qemu(Mode),
}

/// How QEMU does its work. The network card has one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// io_uring, from the main loop.
    IoUring,
    /// io_uring, from a thread of the disk's own.
    IoThread,
    /// A pool of threads.
    Threads,
    /// A card on a tap.
    Tap,
}

impl Contender {
    /// The peers for a row.
    pub(super) fn peers(row: &Row) -> &'static [Self] {
        match row.device {
            Device::Disk => &[
                Self::Qemu(Mode::IoUring),
                Self::Qemu(Mode::IoThread),
                Self::Qemu(Mode::Threads),
            ],
            Device::Sender | Device::Receiver(_) => &[Self::Qemu(Mode::Tap)],
        }
    }

    /// The name in the table.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ferry => "ferry",
            Self::Qemu(Mode::IoUring) => "qemu io_uring",
            Self::Qemu(Mode::IoThread) => "qemu iothread",
            Self::Qemu(Mode::Threads) => "qemu threads",
            Self::Qemu(Mode::Tap) => "qemu",
        }
    }
}

/// A guest that runs. Dropping it ends it.
pub(super) enum Running {
    /// One of an agent of its own.
    Ferry(Box<Pair>),
    /// A process.
    Qemu(Process),
}

/// A QEMU, and the folder of its files.
pub(super) struct Process {
    child: qemu::Ended,
    folder: tempfile::TempDir,
}

impl Running {
    /// Starts the guest of a row.
    ///
    /// # Errors
    /// If the VMM does not start.
    pub(super) fn start(contender: Contender, row: &Row, host: &Host) -> Result<Self> {
        match contender {
            Contender::Ferry => start_ferry(row, host).map(|pair| Self::Ferry(Box::new(pair))),
            Contender::Qemu(mode) => start_qemu(mode, row, host).map(Self::Qemu),
        }
    }

    /// What the guest printed so far.
    ///
    /// # Errors
    /// If there is no console, or the guest is gone.
    pub(super) fn console(&mut self) -> Result<String> {
        let file = match self {
            Self::Ferry(pair) => ferry_console(pair)?,
            Self::Qemu(process) => {
                if let Some(status) = process.child.0.try_wait().context("failed to look after QEMU")? {
                    bail!("QEMU ended ({status}): {}", process.complaints());
                }
                process.console()
            }
        };
        let bytes = fs::read(&file).with_context(|| format!("failed to read {}", file.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Ends the guest; what the VMM complained of is an error.
    ///
    /// # Errors
    /// The complaints.
    pub(super) fn end(self) -> Result<()> {
        match &self {
            Self::Ferry(pair) => pair.close(),
            Self::Qemu(process) => match process.complaints().trim() {
                "" => Ok(()),
                complaints => bail!("QEMU says: {complaints}"),
            },
        }
    }
}

fn start_ferry(row: &Row, host: &Host) -> Result<Pair> {
    let mut pair = Pair::prepare_with(host.ferry.file())?;
    pair.a.start()?;
    let guest = Guest::new("g").memory_mib(MEMORY_MIB).work(&row.cmdline(host.tsc_khz));
    let guest = match row.device {
        Device::Disk => guest.disk(&format!("path={}", host.image.path().display())),
        Device::Sender | Device::Receiver(_) => guest.nic(&format!("tap={TAP},mac={MAC}")),
    };
    pair.a.ferry(&guest.arguments(&pair.kernel()))?.exit(0)?;
    pair.keep_logs();
    Ok(pair)
}

/// The console of the only guest of host `a`.
fn ferry_console(pair: &Pair) -> Result<PathBuf> {
    let instances = pair.a.data_dir.join("instances");
    let mut found = fs::read_dir(&instances).with_context(|| format!("failed to list {}", instances.display()))?;
    let instance = found.next().context("the guest is gone")??;
    Ok(instance.path().join("console.log"))
}

fn start_qemu(mode: Mode, row: &Row, host: &Host) -> Result<Process> {
    let folder = tempfile::Builder::new().prefix("ferry-q").tempdir();
    let folder = folder.context("failed to make a folder")?;
    let kernel = folder.path().join("probe.elf");
    fs::write(&kernel, ferry_probe::PROBE_ELF).context("failed to write the probe")?;
    // QEMU makes it too, but later than it is looked for.
    File::create(console_in(folder.path())).context("failed to make the console's file")?;
    let mut command = qemu::command(MEMORY_MIB, &kernel, &row.cmdline(host.tsc_khz));
    command
        .args(["-serial", &format!("file:{}", console_in(folder.path()).display())])
        .args(["-global", "virtio-mmio.force-legacy=false"])
        .args(device_arguments(mode, &host.image))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(complaints_in(folder.path())).context("failed to make QEMU's log")?);
    let child = qemu::Ended(command.spawn().context("failed to start QEMU")?);
    Ok(Process { child, folder })
}

fn device_arguments(mode: Mode, image: &Image) -> Vec<String> {
    let disk = |aio: &str, device: &str| {
        let file = image.path().display();
        let drive = format!("if=none,id=disk,format=raw,file={file},cache=none,aio={aio}");
        ["-drive", &drive, "-device", device].map(str::to_owned).to_vec()
    };
    let words = |words: [&str; 2]| words.map(str::to_owned).to_vec();
    let device = "virtio-blk-device,drive=disk";
    match mode {
        Mode::IoUring => disk("io_uring", device),
        Mode::Threads => disk("threads", device),
        Mode::IoThread => {
            let own = words(["-object", "iothread,id=thread"]);
            [own, disk("io_uring", &format!("{device},iothread=thread"))].concat()
        }
        Mode::Tap => {
            let netdev = format!("tap,id=net,ifname={TAP},script=no,downscript=no");
            let device = format!("virtio-net-device,netdev=net,mac={MAC}");
            [words(["-netdev", &netdev]), words(["-device", &device])].concat()
        }
    }
}

impl Process {
    fn console(&self) -> PathBuf {
        console_in(self.folder.path())
    }

    fn complaints(&self) -> String {
        fs::read_to_string(complaints_in(self.folder.path())).unwrap_or_default()
    }
}

fn console_in(folder: &Path) -> PathBuf {
    folder.join("console")
}

fn complaints_in(folder: &Path) -> PathBuf {
    folder.join("complaints")
}
