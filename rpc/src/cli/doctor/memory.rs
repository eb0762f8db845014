//! Memory: how much there is, how it is backed, and how the kernel tells what of it was ever touched.

use rustix::process::{Resource, getrlimit};

use super::super::output::human_bytes;
use super::{Need, kernel_file};

pub(super) fn needs() -> Vec<Need> {
    vec![amount(), huge_pages(), pagemap_scan(), userfaultfd(), locked()]
}

/// A field of /proc/meminfo in bytes.
pub(crate) fn meminfo(field: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = text.lines().find_map(|line| {
        let rest = line.strip_prefix(field)?.strip_prefix(':')?;
        rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    kib.map(|kib| kib << 10)
}

fn amount() -> Need {
    let (Some(total), Some(available)) = (meminfo("MemTotal"), meminfo("MemAvailable")) else {
        return Need::missing("memory", "/proc/meminfo cannot be read", "known", "mount /proc");
    };
    let found = format!("{}, {} available", human_bytes(total), human_bytes(available));
    let wanted = "512 MiB available and more";
    if available < 512 << 20 {
        return Need::poor(
            "memory",
            found,
            wanted,
            "the guests' memory must be free: end what uses it",
        );
    }
    Need::fact("memory", found, wanted)
}

fn huge_pages() -> Need {
    let (need, wanted) = ("transparent huge pages", "madvise or always");
    let enabled = kernel_file("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    match chosen(&enabled) {
        Some(mode @ ("madvise" | "always")) => Need::fact(need, mode, wanted),
        other => {
            let remedy = "migrations into this host are several times slower page by page: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled";
            Need::poor(need, other.unwrap_or("not in this kernel"), wanted, remedy)
        }
    }
}

/// The word in brackets, which is what the kernel says is in force.
fn chosen(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word)
}

fn pagemap_scan() -> Need {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let (need, wanted) = ("PAGEMAP_SCAN", "Linux 6.7 or newer");
    match version(&release) {
        Some(version) if version >= (6, 7) => Need::fact(need, format!("Linux {release} has it"), wanted),
        Some(version) if version >= (5, 15) => Need::fact(need, format!("Linux {release}: by pagemap, slower"), wanted),
        _ => Need::missing(
            "kernel",
            format!("Linux {release}"),
            "Linux 5.15 or newer",
            "boot a newer kernel",
        ),
    }
}

/// Asked as whoever runs this; VMMs open theirs as their agent's user.
fn userfaultfd() -> Need {
    let (need, wanted) = ("userfaultfd", "allowed, for faults of the kernel too");
    match ferry_vmm::probe_watching() {
        Ok(()) => Need::fact(need, "allowed", wanted),
        Err(error) => {
            let remedy = "no guest moves here by post-copy: set the sysctl vm.unprivileged_userfaultfd to 1, give access to /dev/userfaultfd, or run the agent as root";
            Need::poor(need, crate::error_chain(&error), wanted, remedy)
        }
    }
}

/// Major and minor out of a release such as `6.18.44-generic`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn locked() -> Need {
    let limit = getrlimit(Resource::Memlock).current;
    let found = limit.map_or_else(|| "unlimited".to_owned(), human_bytes);
    Need::fact("memory that may be locked", found, "any: Ferry locks none")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_choice_is_the_word_in_brackets() {
        assert_eq!(chosen("always [madvise] never"), Some("madvise"));
        assert_eq!(chosen(""), None);
    }

    #[test]
    fn releases_are_read_up_to_the_minor() {
        assert_eq!(version("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(version("5.15"), Some((5, 15)));
        assert_eq!(version("unknown"), None);
    }

    #[test]
    fn the_kernel_tells_how_much_memory_there_is() {
        assert!(meminfo("MemTotal").unwrap() > meminfo("MemAvailable").unwrap());
        assert_eq!(meminfo("Nonsense"), None);
    }
}
