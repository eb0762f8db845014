//! KVM: whether it may be used, what it offers, and what kind it is.

use std::error::Error;

use super::{Need, kernel_file};

pub(super) fn needs() -> Vec<Need> {
    vec![device(), kind(), processors()]
}

fn device() -> Need {
    let (need, wanted) = ("/dev/kvm", "API version 12 and the capabilities that Ferry uses");
    match ferry_vmm::host() {
        Ok(_) => Need::met(need, "API version 12, all capabilities that Ferry uses", wanted),
        Err(error) => {
            let mut found = error.to_string();
            let mut source = error.source();
            while let Some(cause) = source {
                found += &format!(": {cause}");
                source = cause.source();
            }
            let (found, remedy) = match found.split_once("; ") {
                Some((found, remedy)) => (found.to_owned(), remedy.to_owned()),
                None => (found, "see dmesg for what the kernel says of it".to_owned()),
            };
            Need::missing(need, found, wanted, remedy)
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
        (Some("kvm_pvm"), _) => {
            "kvm_pvm: shadow page tables, no hardware virtualisation; first writes to logged pages and guest kernels are slow"
        }
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
    let wanted = "2 or more: copying runs beside the guest";
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
