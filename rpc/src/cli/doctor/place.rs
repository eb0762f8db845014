//! Where an agent would work: its data directory, and its place in the network.

use std::fs;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{fstatfs, statfs};

use super::super::client::Agent;
use super::super::output::{human_bytes, human_ms};
use super::Need;

pub(super) fn data_directory(path: &Path) -> Vec<Need> {
    let need = "data directory";
    let wanted = "writable";
    let place = path
        .ancestors()
        .find(|ancestor| ancestor.is_dir())
        .unwrap_or(Path::new("/"));
    let shown = if place == path {
        path.display().to_string()
    } else {
        format!("{} (to be made in {})", path.display(), place.display())
    };
    let latency = match fsync_latency(place) {
        Ok(latency) => latency,
        Err(error) => {
            let remedy = format!(
                "let this user write there, or name another one with --data-dir: chown $USER {}",
                place.display()
            );
            return vec![Need::missing(need, format!("{shown}: {error}"), wanted, remedy)];
        }
    };
    let free = statfs(place).map_or(0, |stats| stats.f_bavail.saturating_mul(stats.f_bsize.unsigned_abs()));
    let found = format!("{shown}, {} free", human_bytes(free));
    let room = match free {
        0..LITTLE_SPACE => Need::poor(need, found, wanted, "the journal must be writable: make room"),
        _ => Need::met(need, found, wanted),
    };
    vec![room, journal(&latency)]
}

fn journal(latency: &FsyncLatency) -> Need {
    let (need, wanted) = ("fsync of the journal", "durable, 10 ms at most");
    let (median, worst) = (latency.median_ms, latency.worst_ms);
    let found = format!(
        "{} (worst of {FSYNCS}: {}) on {}",
        human_ms(median),
        human_ms(worst),
        latency.file_system
    );
    if latency.in_memory {
        return Need::poor(
            need,
            found,
            wanted,
            "the journal would not outlive a power cut: put --data-dir on a disk",
        );
    }
    if median > 10.0 {
        return Need::poor(
            need,
            found,
            wanted,
            "each migration's blackout is longer by this: put --data-dir on a faster disk",
        );
    }
    Need::fact(need, found, wanted)
}

pub(super) async fn network(listen: SocketAddr, agent: &Agent) -> Vec<Need> {
    let told = tokio::time::timeout(Duration::from_secs(3), agent.host()).await;
    let running = told.ok().and_then(Result::ok);
    let port = port(listen, running.as_ref().map(|info| info.host.as_str()), agent);
    let Some(info) = running else { return vec![port] };
    let reachable = [&info.advertise, &info.data_address]
        .into_iter()
        .filter(|address| !is_loopback(address));
    let reachable: Vec<&str> = reachable.map(String::as_str).collect();
    let (need, wanted) = ("agent's network", "loopback, until peers authenticate each other");
    let network = if reachable.is_empty() {
        Need::fact(
            need,
            format!(
                "agent {} on {}, data port {}",
                info.host, info.advertise, info.data_address
            ),
            wanted,
        )
    } else {
        let remedy = "whoever reaches these addresses may run and move guests: keep them on a network of their own";
        Need::poor(
            need,
            format!("agent {} on {}", info.host, reachable.join(", ")),
            wanted,
            remedy,
        )
    };
    vec![port, network]
}

fn port(listen: SocketAddr, running: Option<&str>, agent: &Agent) -> Need {
    let (need, wanted) = ("port for the agent", format!("{listen} free, or an agent's already"));
    match (TcpListener::bind(listen), running) {
        (Ok(_), _) => Need::met(need, format!("{listen} is free"), wanted),
        (Err(error), Some(host))
            if error.kind() == io::ErrorKind::AddrInUse && agent.url.ends_with(&format!(":{}", listen.port())) =>
        {
            Need::met(need, format!("agent {host} answers at {}", agent.url), wanted)
        }
        (Err(error), _) => {
            let remedy = "something else has it: give the agent another one with --listen";
            Need::missing(need, format!("{listen}: {error}"), wanted, remedy)
        }
    }
}

/// Whether an address or a URL is one that only this host reaches. Unknown ones count as reachable.
fn is_loopback(address: &str) -> bool {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = rest.rsplit_once(':').map_or(rest, |(host, _)| host);
    let host = host.trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// What it costs to make a small write durable.
pub(crate) struct FsyncLatency {
    pub(crate) median_ms: f64,
    pub(crate) worst_ms: f64,
    pub(crate) file_system: &'static str,
    /// The file system keeps nothing when the host goes down.
    pub(crate) in_memory: bool,
}

/// Measures durable writes of a database page in a directory that exists; leaves nothing there.
pub(crate) fn fsync_latency(directory: &Path) -> io::Result<FsyncLatency> {
    let mut file = tempfile::tempfile_in(directory).or_else(|_| {
        // File systems without unnamed files, and directories of other owners, answer differently: the plain way decides.
        let path = directory.join(format!(".ferry-doctor-{}", std::process::id()));
        let file = fs::File::create_new(&path)?;
        fs::remove_file(&path)?;
        Ok::<_, io::Error>(file)
    })?;
    let mut took = Vec::with_capacity(FSYNCS);
    for _ in 0..FSYNCS {
        let began = Instant::now();
        file.write_all(&[1; 4096])?;
        file.sync_data()?;
        took.push(began.elapsed().as_secs_f64() * 1000.0);
    }
    took.sort_by(f64::total_cmp);
    let (file_system, in_memory) = file_system(fstatfs(&file)?.f_type as u64);
    Ok(FsyncLatency {
        median_ms: took[FSYNCS / 2],
        worst_ms: took[FSYNCS - 1],
        file_system,
        in_memory,
    })
}

/// Names by the magic numbers of statfs(2).
fn file_system(magic: u64) -> (&'static str, bool) {
    match magic {
        0x0102_1994 => ("tmpfs", true),
        0x8584_58f6 => ("ramfs", true),
        0xef53 => ("ext4", false),
        0x5846_5342 => ("xfs", false),
        0x9123_683e => ("btrfs", false),
        0x2fc1_2fc1 => ("zfs", false),
        0xf2f5_2010 => ("f2fs", false),
        0x794c_7630 => ("overlayfs", false),
        0x6969 => ("nfs", false),
        _ => ("another file system", false),
    }
}

const FSYNCS: usize = 21;
const LITTLE_SPACE: u64 = 256 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_told_from_the_rest() {
        for near in [
            "127.0.0.1:7400",
            "http://127.0.0.1:7400",
            "http://[::1]:7400",
            "localhost:1",
        ] {
            assert!(is_loopback(near), "{near}");
        }
        for far in ["0.0.0.0:7400", "http://10.0.0.1:7400", "http://host-b:7400", ""] {
            assert!(!is_loopback(far), "{far}");
        }
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_missing_with_a_remedy() {
        let needs = data_directory(Path::new("/proc/ferry"));
        assert!(!needs[0].ok && needs[0].required && needs[0].remedy.is_some());
    }

    #[test]
    fn durable_writes_are_measured_and_leave_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let latency = fsync_latency(directory.path()).unwrap();
        assert!(latency.median_ms > 0.0 && latency.median_ms <= latency.worst_ms);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
