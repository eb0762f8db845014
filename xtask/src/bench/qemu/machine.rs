//! One QEMU process, ended by its own handle whatever happens.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::qmp::Qmp;
use crate::bench::console::Console;
use crate::bench::workload::Workload;

/// The program.
pub(super) const PROGRAM: &str = "qemu-system-x86_64";

/// A running QEMU. Dropping it kills it.
pub(super) struct Machine {
    pub(super) qmp: Qmp,
    pub(super) console: Console,
    process: Running,
}

struct Running {
    child: Ended,
    complaints: PathBuf,
}

/// A process that is ended with its owner.
pub(in crate::bench) struct Ended(pub(in crate::bench) Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Machine {
    /// Starts one in `folder`, with the probe running or, as a destination, waiting for it.
    ///
    /// # Errors
    /// What QEMU said on its standard error if it ended at once.
    pub(super) fn start(folder: &Path, name: &str, workload: &Workload, tsc_khz: u64, role: Role<'_>) -> Result<Self> {
        let socket = folder.join(name);
        let complaints = folder.join(format!("{name}.err"));
        let kernel = folder.join("probe.elf");
        fs::write(&kernel, ferry_probe::PROBE_ELF).context("failed to write the probe")?;
        let mut command = command(workload.memory_mib, &kernel, &workload.full_cmdline(tsc_khz));
        if let Role::Destination {
            network: Some(network), ..
        } = role
        {
            command = inside(network, &command);
        }
        command
            .args(["-serial", "stdio"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&complaints).context("failed to make QEMU's log")?);
        if let Role::Destination { .. } = role {
            command.args(["-incoming", "defer"]);
        }
        let mut child = command.spawn().with_context(|| format!("failed to start {PROGRAM}"))?;
        let stdout = child.stdout.take().expect("stdout was piped");
        let process = Running {
            child: Ended(child),
            complaints,
        };
        let qmp = Qmp::connect(&socket, Duration::from_secs(20)).with_context(|| process.complaints())?;
        Ok(Self {
            qmp,
            console: Console::follow(stdout),
            process,
        })
    }

    /// The process.
    pub(super) fn pid(&self) -> u32 {
        self.process.child.0.id()
    }

    /// Has it listen for a migration on a free port of this address and gives the URI.
    ///
    /// # Errors
    /// What QEMU answered.
    pub(super) fn listen(&mut self, address: &str) -> Result<String> {
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|free| free.local_addr())
            .context("no free port")?
            .port();
        let uri = format!("tcp:{address}:{port}");
        let listening = self.qmp.execute("migrate-incoming", json!({ "uri": uri }));
        listening.with_context(|| self.process.complaints())?;
        Ok(uri)
    }
}

/// What a QEMU is there for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Role<'a> {
    /// It runs the probe.
    Source,
    /// It waits for it, in this network if that is not the calling thread's.
    Destination {
        /// As a file.
        network: Option<&'a Path>,
    },
}

/// The same command in another network.
fn inside(network: &Path, command: &Command) -> Command {
    let mut entered = Command::new("nsenter");
    entered
        .arg(format!("--net={}", network.display()))
        .arg(command.get_program())
        .args(command.get_args());
    entered
}

/// QEMU with one vCPU, this kernel and nothing else.
pub(in crate::bench) fn command(memory_mib: u64, kernel: &Path, cmdline: &str) -> Command {
    // It ends with this process, however that ends.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", PROGRAM])
        .args(["-M", "microvm,accel=kvm,acpi=off,rtc=off,pit=on"])
        .args(["-cpu", "host,-arch-capabilities"])
        .args([
            "-name",
            "guest=probe,debug-threads=on",
            "-nodefaults",
            "-no-user-config",
            "-nographic",
            "-monitor",
            "none",
        ])
        .args(["-m", &memory_mib.to_string(), "-smp", "1"])
        .arg("-kernel")
        .arg(kernel)
        .args(["-append", cmdline]);
    command
}

impl Running {
    fn complaints(&self) -> String {
        let text = fs::read_to_string(&self.complaints).unwrap_or_default();
        format!("QEMU (pid {}) says: {}", self.child.0.id(), text.trim())
    }
}
