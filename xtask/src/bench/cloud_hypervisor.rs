//! The same guest and workload in Cloud Hypervisor: two processes on this host, a migration over loopback TCP with four connections.
//!
//! Driven by its HTTP API over a Unix socket (`vmm/src/api/openapi/cloud-hypervisor.yaml` there): `vm.receive-migration` at the destination, which answers
//! once the guest runs there, and `vm.send-migration` at the source. Several connections came with its version 51.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::console::{Console, Times, compare};
use super::qemu::Ended;
use super::workload::Workload;
use super::{BEATS_AFTER, BEATS_BEFORE, Measured, Sample, warm};

/// The program.
const PROGRAM: &str = "cloud-hypervisor";

/// What it is compared with: as many connections as its own figures are told for most often.
const CONNECTIONS: u32 = 4;

/// The name in the table.
pub(super) const NAME: &str = "cloud-hyp. 4";

/// Whether it is here, new enough.
///
/// # Errors
/// Says what was found.
pub(super) fn check() -> Result<()> {
    let told = Command::new(PROGRAM).arg("--version").output();
    let told = told.with_context(|| {
        format!("{PROGRAM} is not on PATH; its project's releases have it as one file, of which version 51 or later is needed")
    })?;
    let text = String::from_utf8_lossy(&told.stdout).into_owned();
    let major = text.split_whitespace().find_map(|word| {
        let number = word.trim_start_matches('v').split('.').next()?;
        number.parse::<u32>().ok()
    });
    ensure!(
        major >= Some(51),
        "{} was found, version 51 or later is needed: older ones have one connection",
        text.trim()
    );
    Ok(())
}

/// Moves the guest once and measures what is asked for; `tsc_khz` is what its clock runs at.
///
/// # Errors
/// If it does not start, does not migrate, or the guest does not live through it.
pub(super) fn run(workload: &Workload, tsc_khz: u64, measured: Measured) -> Result<Sample> {
    let folder = tempfile::Builder::new()
        .prefix("ferry-c")
        .tempdir()
        .context("failed to make a folder")?;
    let destination = Machine::start(folder.path(), "d", None).context("destination")?;
    let guest = (workload, tsc_khz);
    let source = Machine::start(folder.path(), "s", Some(guest)).context("source")?;
    let long = Duration::from_secs(120);
    source.console.wait_ready(long).context("source")?;
    source.console.wait_for_beats(BEATS_BEFORE, long).context("source")?;
    let calm = Instant::now();
    warm(workload)?;

    let url = format!("tcp:127.0.0.1:{}", free_port()?);
    let meter = measured.meter([source.pid(), destination.pid()]);
    let (times, runs) = moves(&source, &destination, &url, calm)?;
    let cpu_s = meter.map(|meter| meter.stop().iter().sum());
    let after = destination.console.wait_for_beats(BEATS_AFTER, Duration::from_secs(30));
    after.context("destination")?;

    let (before, after) = (source.console.beats(), destination.console.beats());
    let seen = compare(&before, &after, tsc_khz, times)?;
    Ok(Sample {
        cpu_s,
        ..Sample::of(runs.duration_since(times.began).as_secs_f64() * 1e3, seen)
    })
}

/// Orders the migration; when it was ordered, and when the destination said that the guest runs there.
fn moves(source: &Machine, destination: &Machine, url: &str, calm: Instant) -> Result<(Times, Instant)> {
    thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let answered = destination.put("vm.receive-migration", &json!({ "receiver_url": url }));
            answered.map(|()| Instant::now())
        });
        wait_listening(url)?;
        let times = Times::ordered_now(calm);
        let order = json!({ "destination_url": url, "connections": CONNECTIONS, "downtime_ms": 300 });
        source.put("vm.send-migration", &order)?;
        let runs = receiving
            .join()
            .ok()
            .context("the thread that waits for the destination died")??;
        ensure!(
            runs > times.began,
            "{PROGRAM} answered vm.receive-migration before anything was sent: this version does not tell when the guest runs"
        );
        Ok((times, runs))
    })
}

/// Waits until somebody listens there, without connecting: the first connection is the migration's.
fn wait_listening(url: &str) -> Result<()> {
    let port: u16 = url.rsplit(':').next().unwrap_or_default().parse()?;
    let wanted = format!("0100007F:{port:04X} 00000000:0000 0A");
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        if std::fs::read_to_string("/proc/net/tcp")?.contains(&wanted) {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(5));
    }
    bail!("nobody listens at {url}")
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("no free port")?;
    Ok(listener.local_addr()?.port())
}

/// One process, ended by its own handle whatever happens.
struct Machine {
    console: Console,
    socket: PathBuf,
    complaints: PathBuf,
    process: Ended,
}

impl Machine {
    /// Starts one in `folder`, with the probe running or, without a guest, waiting for orders.
    fn start(folder: &Path, name: &str, guest: Option<(&Workload, u64)>) -> Result<Self> {
        let socket = folder.join(name);
        let complaints = folder.join(format!("{name}.err"));
        let mut command = Command::new(PROGRAM);
        command.arg("--api-socket").arg(&socket);
        if let Some((workload, tsc_khz)) = guest {
            let kernel = folder.join("probe.elf");
            std::fs::write(&kernel, ferry_probe::PROBE_ELF).context("failed to write the probe")?;
            command
                .args(["--cpus", "boot=1", "--serial", "tty", "--console", "off"])
                .args(["--memory", &format!("size={}M", workload.memory_mib)])
                .arg("--kernel")
                .arg(&kernel)
                .args(["--cmdline", &workload.full_cmdline(tsc_khz)]);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&complaints).context("failed to make its log")?);
        let mut child: Child = command.spawn().with_context(|| format!("failed to start {PROGRAM}"))?;
        let stdout = child.stdout.take().context("its standard output is gone")?;
        let machine = Self {
            console: Console::follow(stdout),
            socket,
            complaints,
            process: Ended(child),
        };
        machine.wait_answering()?;
        Ok(machine)
    }

    fn pid(&self) -> u32 {
        self.process.0.id()
    }

    fn wait_answering(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match UnixStream::connect(&self.socket) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| self.story());
                }
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Gives one order and waits until it is answered.
    fn put(&self, order: &str, body: &Value) -> Result<()> {
        let stream = UnixStream::connect(&self.socket).with_context(|| self.story())?;
        stream.set_read_timeout(Some(ANSWER))?;
        exchange(stream, order, body).with_context(|| format!("{order}: {}", self.story()))
    }

    fn story(&self) -> String {
        let text = std::fs::read_to_string(&self.complaints).unwrap_or_default();
        format!("{PROGRAM} (pid {}) says: {}", self.pid(), text.trim())
    }
}

/// One request of HTTP/1.1 and its answer, of which only whether it went well is of interest.
fn exchange(mut stream: impl Read + Write, order: &str, body: &Value) -> Result<()> {
    let body = body.to_string();
    let head = format!(
        "PUT /api/v1/{order} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes())?;
    let mut answer = BufReader::new(stream);
    let mut status = String::new();
    answer.read_line(&mut status)?;
    let code: Option<u16> = status.split(' ').nth(1).and_then(|code| code.parse().ok());
    if code.is_some_and(|code| (200..300).contains(&code)) {
        return Ok(());
    }
    let mut length = 0;
    let mut line = String::new();
    while answer.read_line(&mut line)? > 2 {
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().unwrap_or(0);
        }
        line.clear();
    }
    let mut reason = String::new();
    answer.take(length).read_to_string(&mut reason)?;
    bail!("it answered {}: {}", status.trim(), reason.trim())
}

/// How long an order may take; receiving ends with the migration.
const ANSWER: Duration = Duration::from_secs(180);

#[cfg(test)]
mod tests {
    use std::io::{self, Cursor};

    use super::*;

    /// What was said to it, and what it answers.
    struct Said(Vec<u8>, Cursor<&'static [u8]>);

    impl Read for &mut Said {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1.read(buffer)
        }
    }

    impl Write for &mut Said {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_order_that_went_well_has_no_content() {
        let mut said = Said(Vec::new(), Cursor::new(b"HTTP/1.1 204 \r\nServer: x\r\n\r\n"));
        exchange(&mut said, "vm.send-migration", &json!({ "a": 1 })).unwrap();
        let said = String::from_utf8(said.0).unwrap();
        assert!(said.starts_with("PUT /api/v1/vm.send-migration HTTP/1.1\r\n"), "{said}");
        assert!(said.ends_with("Content-Length: 7\r\n\r\n{\"a\":1}"), "{said}");
    }

    #[test]
    fn a_refusal_is_told_in_its_own_words() {
        let mut said = Said(
            Vec::new(),
            Cursor::new(b"HTTP/1.1 500 \r\ncontent-length: 7\r\n\r\nno room"),
        );
        let told = format!(
            "{:#}",
            exchange(&mut said, "vm.send-migration", &json!({})).unwrap_err()
        );
        assert!(told.contains("500") && told.contains("no room"), "{told}");
    }

    #[test]
    fn an_answer_that_is_cut_short_is_no_success() {
        let mut said = Said(Vec::new(), Cursor::new(b""));
        exchange(&mut said, "vm.send-migration", &json!({})).unwrap_err();
    }
}
