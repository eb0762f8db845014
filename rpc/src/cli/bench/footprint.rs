//! What a VMM costs beside its guest's memory: its proportional set size without the mappings that are guest memory.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ferry_vmm::measuring::process_children;

/// Keeps the largest footprint of any VMM, until it is asked for it.
pub(super) struct FootprintMeter {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl FootprintMeter {
    pub(super) fn start(agents: [u32; 2]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut largest = 0;
            while !stopped.load(Ordering::Relaxed) {
                largest = largest.max(now(agents).unwrap_or(0));
                thread::sleep(INTERVAL);
            }
            largest
        });
        Self { stop, thread }
    }

    /// The largest footprint seen since the start, in bytes.
    pub(super) fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or(0)
    }
}

/// The largest footprint of these agents' VMMs now, in bytes; `None` where there is no VMM.
pub(super) fn now(agents: [u32; 2]) -> Option<u64> {
    let vmms = agents.into_iter().flat_map(process_children);
    vmms.filter_map(|vmm| fs::read_to_string(format!("/proc/{vmm}/smaps")).ok())
        .map(|maps| beside_guest(&maps))
        .max()
}

/// The sum of Pss over all mappings that are not guest memory, which is anonymous and is neither dumped nor inherited.
fn beside_guest(maps: &str) -> u64 {
    let (mut sum, mut mapping) = (0, Mapping::default());
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some(range) if range.contains('-') && !range.ends_with(':') => {
                // Range, permissions, offset, device, inode, and a name where there is one.
                mapping = Mapping {
                    anonymous: words.count() < 5,
                    pss: 0,
                };
            }
            Some("Pss:") => mapping.pss = words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10,
            Some("VmFlags:") => {
                let flags: Vec<&str> = words.collect();
                let is_guest = mapping.anonymous && flags.contains(&"dd") && flags.contains(&"dc");
                sum += if is_guest { 0 } else { mapping.pss };
            }
            _ => {}
        }
    }
    sum
}

#[derive(Default)]
struct Mapping {
    anonymous: bool,
    pss: u64,
}

const INTERVAL: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_left_out() {
        let maps = "\
7f0000000000-7f0040000000 rw-p 00000000 00:00 0 
Pss:             1000000 kB
VmFlags: rd wr mr mw me ac dc dd hg 
55d0f0a00000-55d0f0b00000 r-xp 00000000 fe:00 123                        /usr/bin/ferry
Pss:                 100 kB
VmFlags: rd ex mr mw me 
55d0f1a00000-55d0f1b00000 rw-p 00000000 00:00 0                          [heap]
Pss:                  20 kB
VmFlags: rd wr mr mw me ac 
";
        assert_eq!(beside_guest(maps), 120 << 10);
    }

    #[test]
    fn a_process_without_guests_costs_what_it_costs() {
        let own = fs::read_to_string("/proc/self/smaps").unwrap();
        assert!(beside_guest(&own) > 0);
    }
}
