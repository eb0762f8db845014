//! Whether this host's agent knows of instances that another host has, too.

use std::time::Duration;

use ferry_proto::agent::v1::{InstanceInfo, ListInstancesRequest};

use super::super::client::Agent;
use super::Need;

/// Nothing where no agent answers: that is told elsewhere.
pub(super) async fn on_one_host(agent: &Agent) -> Option<Need> {
    let listed = async {
        let mut compute = agent.compute().await.ok()?;
        compute.list_instances(ListInstancesRequest {}).await.ok()
    };
    let listed = tokio::time::timeout(Duration::from_secs(3), listed).await.ok()??;
    Some(of(&listed.into_inner().instances))
}

fn of(instances: &[InstanceInfo]) -> Need {
    let (need, wanted) = ("instances on one host", "none that another host has, too");
    let twice = instances.iter().filter_map(|info| {
        let also_at = info.also_at.as_ref()?;
        Some(format!("{} is on {} and on {also_at}", info.name, info.host))
    });
    let twice: Vec<String> = twice.collect();
    if twice.is_empty() {
        return Need::met(need, format!("{} instances, each on one", instances.len()), wanted);
    }
    let remedy = "their migration was resolved on both hosts: find out which one is right, and delete the other with --force before it writes more";
    Need::missing(need, twice.join(", "), wanted, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_on_two_hosts_is_named_with_both() {
        let info = |name: &str, also_at: Option<&str>| InstanceInfo {
            name: name.to_owned(),
            host: "b".to_owned(),
            also_at: also_at.map(str::to_owned),
            ..InstanceInfo::default()
        };
        let need = of(&[info("web", Some("a")), info("db", None)]);
        assert_eq!((need.ok, &*need.found), (false, "web is on b and on a"));
        assert!(of(&[info("db", None)]).ok);
    }
}
