//! `host list` and `host show`.

use ferry_proto::agent::v1::HostInfo;
use serde::ser::Error as _;
use serde::{Serialize, Serializer};
use serde_json::json;

use super::arguments::HostVerb;
use super::client::{Agent, peers_of};
use super::failure::{Exit, Failure, Outcome};
use super::output::{Format, Table, human_bytes, or_dash};

/// A host, and what its agent answered.
#[derive(Debug)]
struct Host {
    /// Its id, as it calls itself, or as the asked host calls it where it does not answer.
    name: String,
    url: String,
    answer: Result<HostInfo, Failure>,
}

/// What the host said, and `url`, `reachable` and `error` besides.
impl Serialize for Host {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = match &self.answer {
            Ok(info) => serde_json::to_value(info).map_err(S::Error::custom)?,
            Err(_) => json!({ "host": self.name }),
        };
        object["url"] = json!(self.url);
        object["reachable"] = json!(self.answer.is_ok());
        object["error"] = json!(self.answer.as_ref().err().map(|failure| &failure.message));
        object.serialize(serializer)
    }
}

pub(super) async fn run(agent: &Agent, verb: HostVerb, format: Format) -> Outcome {
    let own = agent.host().await?;
    let mut known = vec![(own.host.clone(), agent.clone())];
    known.extend(peers_of(&own)?);
    match verb {
        HostVerb::List => {
            let mut hosts = vec![Host::of(own, agent)];
            for (name, peer) in known.into_iter().skip(1) {
                hosts.push(Host::ask(name, &peer).await);
            }
            format.many(&hosts, table)?;
        }
        HostVerb::Show { host } => {
            let names: Vec<&str> = known.iter().map(|(name, _)| name.as_str()).collect();
            let unknown = format!("show host {host}: {} knows only {}", own.host, names.join(", "));
            let asked = known.into_iter().find(|(name, _)| *name == host);
            let (_, asked) = asked.ok_or_else(|| Failure::new(Exit::NotFound, unknown))?;
            format.one(&Host::of(asked.host().await?, &asked), details)?;
        }
    }
    Ok(Exit::Done)
}

impl Host {
    fn of(info: HostInfo, agent: &Agent) -> Self {
        Self {
            name: info.host.clone(),
            url: agent.url.clone(),
            answer: Ok(info),
        }
    }

    async fn ask(name: String, agent: &Agent) -> Self {
        Self {
            name,
            url: agent.url.clone(),
            answer: agent.host().await,
        }
    }
}

fn table(hosts: &[Host]) -> Table {
    let mut table = Table::new(&[
        "HOST",
        "AGENT",
        "ANSWERS",
        ">INSTANCES",
        ">CPUS",
        ">MEMORY",
        ">AVAILABLE",
        "VERSION",
    ]);
    for host in hosts {
        let info = host.answer.as_ref().ok();
        table.row([
            host.name.clone(),
            host.url.clone(),
            if info.is_some() { "yes" } else { "no" }.to_owned(),
            or_dash(info.map(|info| info.instances)),
            or_dash(info.map(|info| info.cpus)),
            or_dash(info.map(|info| human_bytes(info.memory_total_bytes))),
            or_dash(info.map(|info| human_bytes(info.memory_available_bytes))),
            or_dash(info.map(|info| info.version.as_str())),
        ]);
    }
    table
}

fn details(host: &Host) -> String {
    let info = host.answer.as_ref().ok().cloned().unwrap_or_default();
    let rows = [
        ("host", host.name.clone()),
        ("agent", host.url.clone()),
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
        ("cpus", info.cpus.to_string()),
        ("instances", info.instances.to_string()),
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
        let answer = Err(Failure::new(Exit::NoAnswer, "refused"));
        let host = Host {
            name: "b".to_owned(),
            url: "http://127.0.0.1:1".to_owned(),
            answer,
        };
        let object = serde_json::to_value(&host).unwrap();
        assert_eq!(
            (object["host"].as_str(), object["reachable"].as_bool()),
            (Some("b"), Some(false))
        );
        assert_eq!(object["error"].as_str(), Some("refused"));
    }
}
