//! Where an instance would go, and why: `migrate --dry-run`, and what is said of a choice.

use ferry_proto::agent::v1::{HostVerdict, LiveMigrateReply, LiveMigrateRequest};

use super::client::Agent;
use super::failure::{Exit, Outcome};
use super::migrate::cast;
use super::output::{self, Format, Table, note};

/// Has the hosts checked, and tells of each what came of it. Exit code 4 if none would take the instance.
pub(super) async fn dry_run(agent: &Agent, request: LiveMigrateRequest, format: Format) -> Outcome {
    let name = request.instance.clone();
    let reply = cast(agent, request).await?;
    match format {
        Format::Human => output::text(&table(&reply.hosts).to_string())?,
        Format::Json => output::json_line(&reply)?,
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

fn table(hosts: &[HostVerdict]) -> Table {
    let mut table = Table::new(&["HOST", "TAKEN", ">WEIGHT", "WHY", "REMEDY"]);
    for host in hosts {
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
    }
    table
}

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
    fn of_a_request_that_was_received_before_there_is_nothing_to_say() {
        assert_eq!(choice(&LiveMigrateReply::default()), None);
    }
}
