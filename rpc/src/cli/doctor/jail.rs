//! How far a VMM can be confined here: a process goes into the jail as a VMM would, and tells what it could not have.

use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

use super::Need;
use crate::agent::UserRange;
use crate::agent::vmm_user;
use crate::vmm_process::{Part, Shortfall};

pub(super) fn needs() -> Vec<Need> {
    match rehearse() {
        Ok(shortfalls) => PARTS.iter().map(|part| part.told(&shortfalls)).collect(),
        Err(error) => {
            let remedy = "nothing is known of how guests are confined: see what keeps a process from being started";
            vec![Need::poor(
                "jail of a VMM",
                format!("{error:#}"),
                "can be tried",
                remedy,
            )]
        }
    }
}

/// Starts a process that goes into the jail and ends.
fn rehearse() -> anyhow::Result<Vec<Shortfall>> {
    let folder = tempfile::tempdir().context("failed to make a temporary directory")?;
    let mut command = Command::new("/proc/self/exe");
    command.args(["vmm", "--rehearse", "--instance-dir"]).arg(folder.path());
    // Who may not give it away is told so by the rehearsal.
    if let Ok(user) = vmm_user::give(folder.path(), None, UserRange::default()) {
        command.arg("--user").arg(user.to_string());
    }
    let ran = command.stdin(Stdio::null()).stderr(Stdio::null()).output();
    let ran = ran.context("failed to start a process")?;
    ensure!(
        ran.status.success(),
        "a process that went into the jail ended: {}",
        ran.status
    );
    shortfalls(&ran.stdout)
}

fn shortfalls(lines: &[u8]) -> anyhow::Result<Vec<Shortfall>> {
    let lines = serde_json::Deserializer::from_slice(lines).into_iter();
    lines
        .collect::<Result<_, _>>()
        .context("a process that went into the jail told something else")
}

/// What is said of a part of the jail.
struct Told {
    part: Part,
    need: &'static str,
    wanted: &'static str,
    remedy: &'static str,
}

const PARTS: [Told; 7] = [
    Told {
        part: Part::View,
        need: "jail: files",
        wanted: "a VMM sees its own folder only",
        remedy: "run the agent as root, or let users make namespaces: sysctl user.max_user_namespaces, \
                 kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0",
    },
    Told {
        part: Part::Network,
        need: "jail: network",
        wanted: "a VMM has a network of its own, which is empty",
        remedy: "as for files",
    },
    Told {
        part: Part::User,
        need: "jail: user",
        wanted: "a VMM has a user of its own",
        remedy: "only its view and its filter keep a VMM from what is the agent's: run the agent as root",
    },
    Told {
        part: Part::Capabilities,
        need: "jail: capabilities",
        wanted: "a VMM has none, and cannot get any",
        remedy: "run the agent as root, or as a user without capabilities",
    },
    Told {
        part: Part::SystemCalls,
        need: "jail: system calls",
        wanted: "a VMM makes those that it needs",
        remedy: "boot a kernel with CONFIG_SECCOMP_FILTER",
    },
    Told {
        part: Part::Limits,
        need: "jail: limits",
        wanted: "a VMM has few descriptors and dumps no core",
        remedy: "see what keeps this user from lowering its limits",
    },
    Told {
        part: Part::Weight,
        need: "jail: weight",
        wanted: "threads that yielded to a guest take their usual weight again",
        remedy: "the last pages of a move are copied at two thirds of it: give the agent CAP_SYS_RESOURCE, or LimitNICE=20 in its unit",
    },
];

impl Told {
    fn told(&self, shortfalls: &[Shortfall]) -> Need {
        let Self {
            part,
            need,
            wanted,
            remedy,
        } = self;
        match shortfalls.iter().find(|shortfall| shortfall.part == *part) {
            None => Need::fact(need, "as wanted", *wanted),
            Some(shortfall) => Need::poor(need, shortfall.reason.clone(), *wanted, *remedy),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_rehearsal_tells_is_read() {
        let lines = b"{\"part\":\"view\",\"reason\":\"denied\"}\n{\"part\":\"system-calls\",\"reason\":\"none\"}\n";
        let found = shortfalls(lines).unwrap();
        assert_eq!(
            found.iter().map(|shortfall| shortfall.part).collect::<Vec<_>>(),
            [Part::View, Part::SystemCalls]
        );
        assert!(shortfalls(b"error: no such verb").is_err());
        assert_eq!(shortfalls(b"").unwrap(), []);
    }

    #[test]
    fn each_part_is_told_of_and_comes_with_a_remedy() {
        let denied = PARTS.map(|told| Shortfall {
            part: told.part,
            reason: "denied".to_owned(),
        });
        for told in &PARTS {
            let (met, unmet) = (told.told(&[]), told.told(&denied));
            assert!(
                met.ok && !unmet.ok && !unmet.required && unmet.remedy.is_some(),
                "{}",
                told.need
            );
        }
    }
}
