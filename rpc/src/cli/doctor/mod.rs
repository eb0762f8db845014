//! `doctor`: what this host has of what Ferry needs, and what to do about the rest.
//!
//! It changes nothing that stays: files, cgroups and taps that it makes to try something are removed at once.

mod cgroups;
mod disks;
mod instances;
mod jail;
mod kvm;
mod memory;
mod place;
mod taps;

use std::path::Path;

use serde::Serialize;

use super::agent::default_data_dir;
use super::arguments::DoctorArguments;
use super::client::Agent;
use super::failure::{Exit, Outcome};
use super::output::{self, Format, Table};

pub(super) use self::memory::meminfo;
pub(super) use self::place::fsync_latency;

/// One thing that Ferry needs of a host.
#[derive(Debug, Serialize)]
pub(super) struct Need {
    pub(super) need: &'static str,
    pub(super) found: String,
    pub(super) wanted: String,
    pub(super) ok: bool,
    /// Whether Ferry cannot work without it.
    pub(super) required: bool,
    /// What would help, where it is not ok.
    pub(super) remedy: Option<String>,
}

impl Need {
    /// A need that is met.
    fn met(need: &'static str, found: impl Into<String>, wanted: impl Into<String>) -> Self {
        let (found, wanted) = (found.into(), wanted.into());
        Self {
            need,
            found,
            wanted,
            ok: true,
            required: true,
            remedy: None,
        }
    }

    /// A need that is not met; without it Ferry does not work.
    fn missing(
        need: &'static str,
        found: impl Into<String>,
        wanted: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            ok: false,
            remedy: Some(remedy.into()),
            ..Self::met(need, found, wanted)
        }
    }

    /// A need that is not met; Ferry works, but not as well.
    fn poor(
        need: &'static str,
        found: impl Into<String>,
        wanted: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            required: false,
            ..Self::missing(need, found, wanted, remedy)
        }
    }

    /// A fact to know, which is fine as it is.
    fn fact(need: &'static str, found: impl Into<String>, wanted: impl Into<String>) -> Self {
        Self {
            required: false,
            ..Self::met(need, found, wanted)
        }
    }

    fn mark(&self) -> &'static str {
        match (self.ok, self.required) {
            (true, _) => "ok",
            (false, false) => "warn",
            (false, true) => "FAIL",
        }
    }
}

pub(super) async fn run(arguments: DoctorArguments, agent: String, format: Format) -> Outcome {
    let data_dir = arguments.data_dir.map_or_else(default_data_dir, Ok)?;
    let mut needs = of_this_host(&data_dir);
    let agent = Agent::new(agent);
    needs.extend(place::network(arguments.listen, &agent).await);
    needs.extend(instances::on_one_host(&agent).await);
    match format {
        Format::Json => needs.iter().try_for_each(output::json_line)?,
        Format::Human => output::text(&report(&needs))?,
    }
    let met = needs.iter().all(|need| need.ok || !need.required);
    Ok(if met { Exit::Done } else { Exit::Failed })
}

/// What this host has of what is needed, wherever its agent listens.
pub(super) fn of_this_host(data_dir: &Path) -> Vec<Need> {
    let mut needs = kvm::needs();
    needs.extend(memory::needs());
    needs.push(disks::rings());
    needs.extend(cgroups::needs());
    needs.extend(jail::needs());
    needs.extend(taps::needs());
    needs.extend(place::data_directory(data_dir));
    needs
}

fn report(needs: &[Need]) -> String {
    let mut table = Table::new(&["", "NEED", "FOUND", "WANTED"]);
    for need in needs {
        table.row([
            need.mark().to_owned(),
            need.need.to_owned(),
            need.found.clone(),
            need.wanted.clone(),
        ]);
    }
    let mut text = table.to_string();
    for need in needs {
        if let Some(remedy) = &need.remedy {
            text += &format!("\n{}: {}: {remedy}", need.mark(), need.need);
        }
    }
    let missing = needs.iter().filter(|need| !need.ok && need.required).count();
    let poor = needs.iter().filter(|need| !need.ok && !need.required).count();
    text += &match (missing, poor) {
        (0, 0) => "\nThis host has all that Ferry needs.".to_owned(),
        (0, _) => format!("\nFerry works on this host; warnings: {poor}."),
        _ => format!("\nFerry does not work on this host; needs that are not met: {missing}, warnings: {poor}."),
    };
    text
}

/// The first line of a small file of the kernel's.
fn kernel_file(path: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().next().map(|line| line.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_unmet_need_comes_with_its_remedy() {
        let needs = [
            Need::met("a", "there", "there"),
            Need::poor("b", "slow", "fast", "buy another"),
            Need::missing("c", "no", "yes", "load it"),
        ];
        let text = report(&needs);
        assert!(text.contains("ok    a"), "{text}");
        assert!(
            text.contains("warn: b: buy another") && text.contains("FAIL: c: load it"),
            "{text}"
        );
        assert!(text.ends_with("not met: 1, warnings: 1."), "{text}");
    }

    #[test]
    fn json_has_the_columns_of_the_contract() {
        let object = serde_json::to_value(Need::met("a", "b", "c")).unwrap();
        for field in ["need", "found", "wanted", "ok", "remedy"] {
            assert!(object.get(field).is_some(), "{field}");
        }
    }
}
