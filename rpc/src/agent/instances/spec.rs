//! Whether an instance can be had on this host.

use std::path::Path;

use ferry_migration::handover::RestartPolicy;
use ferry_proto::InvalidField;
use ferry_proto::agent::v1::InstanceSpec;

use crate::agent::backends;
use crate::agent::config::is_name;
use crate::agent::failure::Failure;
use crate::agent::host;

/// The longest kernel command line that is taken.
const LONGEST_CMDLINE: usize = 4096;
/// The most vCPUs of one instance.
const MOST_VCPUS: u32 = 64;
/// The least memory of one instance: room for a boot record, page tables and a kernel.
pub(super) const LEAST_MEMORY: u64 = 4 << 20;

/// Checks what was asked for, before anything is made.
///
/// # Errors
/// Names the field, or what this host lacks.
pub(crate) fn check(spec: &InstanceSpec) -> Result<(), Failure> {
    let invalid = |field, problem: String| Err(InvalidField { field, problem }.into());
    if !is_name(&spec.name) {
        return invalid(
            "name",
            format!(
                "{:?} is not a name: letters, digits, '.', '_' and '-', 63 at most",
                spec.name
            ),
        );
    }
    if spec.vcpus == 0 || spec.vcpus > MOST_VCPUS {
        return invalid("vcpus", format!("{} is not between 1 and {MOST_VCPUS}", spec.vcpus));
    }
    if spec.cmdline.len() > LONGEST_CMDLINE || spec.cmdline.contains('\0') {
        return invalid(
            "cmdline",
            format!("has {} bytes, {LONGEST_CMDLINE} are the limit", spec.cmdline.len()),
        );
    }
    if !["host", "x86-64-v2", "x86-64-v3"].contains(&spec.cpu.as_str()) {
        return invalid(
            "cpu",
            format!("{:?} is not one of host, x86-64-v2, x86-64-v3", spec.cpu),
        );
    }
    if !["log", "ring"].contains(&spec.dirty.as_str()) {
        return invalid("dirty", format!("{:?} is not one of log, ring", spec.dirty));
    }
    if RestartPolicy::parse(&spec.restart).is_none() {
        return invalid(
            "restart",
            format!("{:?} is not one of never, on-crash, always", spec.restart),
        );
    }
    if spec.memory_bytes < LEAST_MEMORY || !spec.memory_bytes.is_multiple_of(4096) {
        return invalid(
            "memory_bytes",
            format!("{} is below 4 MiB or no multiple of 4096", spec.memory_bytes),
        );
    }
    backends::check(spec)?;
    let total = host::meminfo("MemTotal");
    if spec.memory_bytes > total {
        return Err(Failure::Refused(format!(
            "the instance wants {} bytes of memory, host has {total} in all: give it less with --memory",
            spec.memory_bytes
        )));
    }
    if !Path::new("/dev/kvm").exists() {
        return Err(Failure::Refused(
            "host has no /dev/kvm: `ferry doctor` tells what is missing".to_owned(),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ferry_proto::agent::v1::{DiskSpec, NicSpec};

    use super::*;

    fn spec() -> InstanceSpec {
        InstanceSpec {
            name: "web-1".to_owned(),
            memory_bytes: 64 << 20,
            vcpus: 1,
            cpu: "host".to_owned(),
            dirty: "log".to_owned(),
            ..InstanceSpec::default()
        }
    }

    #[test]
    fn each_bad_field_is_named() {
        let bad = [
            (
                "name",
                InstanceSpec {
                    name: "a b".to_owned(),
                    ..spec()
                },
            ),
            ("vcpus", InstanceSpec { vcpus: 65, ..spec() }),
            (
                "cpu",
                InstanceSpec {
                    cpu: "z80".to_owned(),
                    ..spec()
                },
            ),
            (
                "dirty",
                InstanceSpec {
                    dirty: "guess".to_owned(),
                    ..spec()
                },
            ),
            (
                "restart",
                InstanceSpec {
                    restart: "sometimes".to_owned(),
                    ..spec()
                },
            ),
            (
                "memory_bytes",
                InstanceSpec {
                    memory_bytes: 4097 << 20 | 1,
                    ..spec()
                },
            ),
            (
                "disks",
                InstanceSpec {
                    disks: vec![DiskSpec::default()],
                    ..spec()
                },
            ),
            (
                "nics",
                InstanceSpec {
                    nics: vec![NicSpec::default()],
                    ..spec()
                },
            ),
        ];
        for (field, spec) in bad {
            assert!(check(&spec).unwrap_err().chain().contains(field));
        }
    }

    #[test]
    fn more_memory_than_the_host_has_is_refused() {
        let error = check(&InstanceSpec {
            memory_bytes: 1 << 50,
            ..spec()
        })
        .unwrap_err();
        assert!(error.to_string().contains("host has"), "{error}");
    }
}
