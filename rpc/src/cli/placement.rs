//! Where an instance would go, and why, and what that would come to: `migrate --dry-run`, and what is said of a choice.

use std::time::Duration;

use ferry_proto::agent::v1::{HostVerdict, LiveMigrateReply, LiveMigrateRequest, Refusal};

use super::client::Agent;
use super::failure::{Exit, Outcome};
use super::migrate::cast;
use super::output::{self, Format, Table, note};
use super::prediction;

/// Has the hosts checked, and tells of each what came of it, and what the migration would come to. Exit code 4 if it would be refused.
pub(super) async fn dry_run(agent: &Agent, request: LiveMigrateRequest, format: Format) -> Outcome {
    let name = request.instance.clone();
    if request.sample_ms > 0 {
        let time = Duration::from_millis(request.sample_ms.into());
        note(&format!(
            "the guest is looked at for {}",
            humantime::format_duration(time)
        ));
    }
    let reply = cast(agent, request).await?;
    match format {
        Format::Human => {
            output::text(&table(&reply).to_string())?;
            if let Some(prediction) = &reply.prediction {
                output::text(&prediction::account(prediction))?;
            }
        }
        Format::Json => output::json_line(&reply)?,
    }
    if let Some(refusal) = reply.refusals.first() {
        note(&format!(
            "instance {name} stays on host {}: {} ({})",
            reply.source, refusal.why, refusal.reason
        ));
        return Ok(Exit::Refused);
    }
    if reply.destination.is_empty() {
        note(&format!(
            "no host would take instance {name}, which is on host {}",
            reply.source
        ));
        return Ok(Exit::Refused);
    }
    note(&format!(
        "instance {name} would go from host {} to host {}; nothing was changed",
        reply.source, reply.destination
    ));
    Ok(Exit::Done)
}

/// Which host was chosen of several, and why.
pub(super) fn choice(reply: &LiveMigrateReply) -> Option<String> {
    let taken = reply.hosts.iter().find(|host| host.taken)?;
    let left: Vec<_> = reply
        .hosts
        .iter()
        .filter_map(|host| Some(format!("; not host {}: {}", host.host, reason(host)?)))
        .collect();
    Some(format!("host {} chosen: {}{}", taken.host, taken.why, left.concat()))
}

fn reason(host: &HostVerdict) -> Option<String> {
    Some(format!("{} ({})", host.why, host.reason.as_ref()?))
}

/// A line for each host, and one for each further reason against it; first those against all.
fn table(reply: &LiveMigrateReply) -> Table {
    let mut table = Table::new(&["HOST", "TAKEN", ">WEIGHT", "WHY", "REMEDY"]);
    let refused = |host: &str, refusal: &Refusal| {
        let cells = [host, &refusal.reason, "", &refusal.why, &refusal.remedy];
        cells.map(str::to_owned)
    };
    for refusal in &reply.refusals {
        table.row(refused(ANY, refusal));
    }
    for host in &reply.hosts {
        table.row([
            host.host.clone(),
            match (host.taken, &host.reason) {
                (true, _) => "yes".to_owned(),
                (false, None) => "could".to_owned(),
                (false, Some(reason)) => reason.clone(),
            },
            host.weight
                .map_or_else(|| "-".to_owned(), |weight| format!("{weight:.2}")),
            host.why.clone(),
            host.remedy.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
        for refusal in host.refusals.iter().skip(1) {
            table.row(refused("", refusal));
        }
    }
    table
}

/// In the place of a host: wherever it is to go.
const ANY: &str = "(any)";

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, taken: bool, reason: Option<&str>, why: &str) -> HostVerdict {
        HostVerdict {
            host: name.to_owned(),
            taken,
            reason: reason.map(str::to_owned),
            why: why.to_owned(),
            ..HostVerdict::default()
        }
    }

    #[test]
    fn a_choice_says_why_and_what_was_left() {
        let reply = LiveMigrateReply {
            hosts: vec![
                host("b", true, None, "9 MiB free"),
                host("c", false, None, "8 MiB free"),
                host("d", false, Some("DISKS"), "no image"),
            ],
            ..LiveMigrateReply::default()
        };
        assert_eq!(
            choice(&reply).as_deref(),
            Some("host b chosen: 9 MiB free; not host d: no image (DISKS)")
        );
    }

    #[test]
    fn every_reason_has_its_line_with_what_to_do() {
        let refusal = |reason: &str| Refusal {
            reason: reason.to_owned(),
            why: format!("why of {reason}"),
            remedy: format!("remedy of {reason}"),
            ..Refusal::default()
        };
        let both = HostVerdict {
            refusals: vec![refusal("DISKS"), refusal("NETWORK")],
            ..host("b", false, Some("DISKS"), "why of DISKS")
        };
        let reply = LiveMigrateReply {
            hosts: vec![both],
            refusals: vec![refusal("INSTANCE_STATE")],
            ..LiveMigrateReply::default()
        };
        let told = table(&reply).to_string();
        let lines: Vec<_> = told.lines().collect();
        assert_eq!(lines.len(), 4, "{told}");
        assert!(
            lines[1].starts_with("(any)") && lines[1].ends_with("remedy of INSTANCE_STATE"),
            "{told}"
        );
        assert!(
            lines[2].starts_with("b ") && lines[2].contains("why of DISKS"),
            "{told}"
        );
        assert!(
            lines[3].contains("why of NETWORK") && lines[3].ends_with("remedy of NETWORK"),
            "{told}"
        );
    }

    #[test]
    fn of_a_request_that_was_received_before_there_is_nothing_to_say() {
        assert_eq!(choice(&LiveMigrateReply::default()), None);
    }
}
