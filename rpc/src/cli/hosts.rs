//! `host list` and `host show`.

use ferry_proto::agent::v1::{HostStatus, ListHostsRequest};
use serde::ser::Error as _;
use serde::{Serialize, Serializer};
use serde_json::json;

use super::arguments::HostVerb;
use super::client::{Agent, LONG_PATIENCE, within};
use super::failure::{Exit, Failure, Outcome};
use super::output::{Format, Table, human_bytes, or_dash};

/// A host as the asked one sees it: what it said of itself last, and `url`, `reachable`, `last_heard` and `error` besides.
#[derive(Debug)]
struct Host(HostStatus);

impl Serialize for Host {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let status = &self.0;
        let mut object = match &status.info {
            Some(info) => serde_json::to_value(info).map_err(S::Error::custom)?,
            None => json!({ "host": status.host }),
        };
        object["url"] = json!(status.url);
        object["reachable"] = json!(status.up);
        object["last_heard"] = json!(status.last_heard);
        object["error"] = json!(status.error);
        object.serialize(serializer)
    }
}

pub(super) async fn run(agent: &Agent, verb: HostVerb, format: Format) -> Outcome {
    let mut client = agent.conductor().await?;
    let answer = client.list_hosts(within(LONG_PATIENCE, ListHostsRequest {})).await;
    let reply = answer.map_err(|status| Failure::of_status("list the hosts", &status))?;
    let mut hosts: Vec<_> = reply.into_inner().hosts.into_iter().map(Host).collect();
    match verb {
        HostVerb::List => format.many(&hosts, table)?,
        HostVerb::Show { host } => {
            let names: Vec<_> = hosts.iter().map(|known| known.0.host.clone()).collect();
            let unknown = || {
                let known = names.join(", ");
                Failure::new(Exit::NotFound, format!("show host {host}: known are only {known}"))
            };
            let at = names.iter().position(|name| *name == host).ok_or_else(unknown)?;
            format.one(&hosts.swap_remove(at), details)?;
        }
    }
    Ok(Exit::Done)
}

fn table(hosts: &[Host]) -> Table {
    let mut table = Table::new(&[
        "HOST",
        "AGENT",
        "UP",
        "LAST HEARD",
        ">INSTANCES",
        ">OUT",
        ">IN",
        ">MEMORY",
        ">CLAIMED",
        ">VCPUS",
        "VERSION",
    ]);
    for Host(status) in hosts {
        let info = status.info.as_ref();
        table.row([
            status.host.clone(),
            status.url.clone(),
            if status.up { "yes" } else { "no" }.to_owned(),
            or_dash(status.last_heard.as_ref()),
            or_dash(info.map(|info| info.instances)),
            or_dash(info.map(|info| info.migrations_out)),
            or_dash(info.map(|info| info.migrations_in)),
            or_dash(info.map(|info| human_bytes(info.memory_limit_bytes))),
            or_dash(info.map(|info| human_bytes(info.memory_claimed_bytes))),
            or_dash(info.map(|info| format!("{}/{}", info.vcpus_claimed, info.vcpus_limit))),
            or_dash(info.map(|info| info.version.as_str())),
        ]);
    }
    table
}

fn details(Host(status): &Host) -> String {
    let info = status.info.clone().unwrap_or_default();
    let rows = [
        ("host", status.host.clone()),
        ("agent", status.url.clone()),
        ("up", if status.up { "yes" } else { "no" }.to_owned()),
        ("last heard", or_dash(status.last_heard.as_ref())),
        ("error", or_dash(status.error.as_ref())),
        ("version", info.version),
        ("rpc version", info.rpc_version),
        ("advertise", info.advertise),
        ("data address", info.data_address),
        (
            "memory",
            format!(
                "{}, {} available",
                human_bytes(info.memory_total_bytes),
                human_bytes(info.memory_available_bytes)
            ),
        ),
        (
            "for guests",
            format!(
                "{} of memory, {} claimed; {} vCPUs, {} claimed",
                human_bytes(info.memory_limit_bytes),
                human_bytes(info.memory_claimed_bytes),
                info.vcpus_limit,
                info.vcpus_claimed
            ),
        ),
        ("cpus", info.cpus.to_string()),
        ("instances", info.instances.to_string()),
        (
            "migrations",
            format!("{} out, {} in", info.migrations_out, info.migrations_in),
        ),
        (
            "peers",
            or_dash(Some(info.peers.join(" ")).filter(|peers| !peers.is_empty())),
        ),
        ("boot id", info.boot_id),
    ];
    rows.map(|(key, value)| format!("{key:<12} {value}")).join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_host_is_told_with_its_reason() {
        let host = Host(HostStatus {
            host: "b".to_owned(),
            url: "http://127.0.0.1:1".to_owned(),
            error: Some("refused".to_owned()),
            ..HostStatus::default()
        });
        let object = serde_json::to_value(&host).unwrap();
        assert_eq!(
            (object["host"].as_str(), object["reachable"].as_bool()),
            (Some("b"), Some(false))
        );
        assert_eq!(object["error"].as_str(), Some("refused"));
        assert!(object["last_heard"].is_null());
    }
}
