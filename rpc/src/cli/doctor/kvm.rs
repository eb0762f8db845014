//! KVM: whether it may be used, what it offers, and what kind it is.

use ferry_vmm::HostCapabilities;

use super::super::output::human_bytes;
use super::{Need, kernel_file};
use crate::error_chain;

pub(super) fn needs() -> Vec<Need> {
    let host = ferry_vmm::host();
    let mut needs = vec![device(host.as_ref().map_err(|error| error_chain(error)))];
    if let Ok(host) = &host {
        needs.extend([dirty_ring(host), guest_clock(host)]);
    }
    needs.extend([kind(), processors()]);
    needs
}

fn device(host: Result<&HostCapabilities, String>) -> Need {
    let (need, wanted) = ("/dev/kvm", "all capabilities that Ferry uses");
    let reason = match host {
        Ok(host) => {
            return Need::met(
                need,
                format!("all there, {} vCPUs for each guest at most", host.max_vcpus),
                wanted,
            );
        }
        Err(reason) => reason,
    };
    // The remedy is part of the reason where there is one.
    let (found, remedy) = reason
        .split_once("; ")
        .unwrap_or((&reason, "see dmesg for what the kernel says of it"));
    Need::missing(need, found, wanted, remedy)
}

fn dirty_ring(host: &HostCapabilities) -> Need {
    let found = match host.dirty_ring_bytes {
        0 => "none: --dirty ring is refused".to_owned(),
        bytes => format!("{} for each vCPU at most", human_bytes(bytes)),
    };
    Need::fact("dirty ring", found, "any")
}

fn guest_clock(host: &HostCapabilities) -> Need {
    let (need, wanted) = ("guest clock", "stable, and can be set for guests of other hosts");
    match (host.tsc_khz, host.tsc_offset_settable) {
        (0, _) => {
            let remedy = "guests' clocks may stray: see dmesg for why the TSC is unstable";
            Need::poor(need, "the time stamp counter is unstable", wanted, remedy)
        }
        (khz, true) => Need::fact(need, format!("{khz} kHz, can be set"), wanted),
        (khz, false) => {
            let remedy = "a guest from a host that booted earlier is refused here; guests of this boot come and go";
            Need::poor(need, format!("{khz} kHz, cannot be set"), wanted, remedy)
        }
    }
}

/// Bare metal, nested, or without hardware virtualisation at all: it explains much of what is slow.
fn kind() -> Need {
    let module = |name: &str| std::path::Path::new("/sys/module").join(name).exists();
    let inside = cpu_flags().is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor"));
    let found = match (
        ["kvm_pvm", "kvm_intel", "kvm_amd"]
            .into_iter()
            .find(|name| module(name)),
        inside,
    ) {
        (Some("kvm_pvm"), _) => "kvm_pvm: no hardware virtualisation, guest kernels are slow",
        (Some("kvm_intel"), true) => "kvm_intel, nested in another hypervisor",
        (Some("kvm_intel"), false) => "kvm_intel on bare metal",
        (Some("kvm_amd"), true) => "kvm_amd, nested in another hypervisor",
        (Some("kvm_amd"), false) => "kvm_amd on bare metal",
        (_, true) => "inside another hypervisor, no vendor module",
        (_, false) => "bare metal, no vendor module",
    };
    Need::fact("kind of KVM", found, "any")
}

fn processors() -> Need {
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    let clock = kernel_file("/sys/devices/system/clocksource/clocksource0/current_clocksource").unwrap_or_default();
    let (need, found) = ("processors", format!("{count}, clock source {clock}"));
    let wanted = "2 or more";
    if count < 2 {
        return Need::poor(
            need,
            found,
            wanted,
            "a migration takes time from the guest's only processor: add one",
        );
    }
    Need::fact(need, found, wanted)
}

fn cpu_flags() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    text.lines().find_map(|line| {
        line.strip_prefix("flags")?
            .split_once(':')
            .map(|(_, flags)| flags.to_owned())
    })
}
