//! The verbs about snapshots: snapshot and restore.

use ferry_proto::agent::v1::{RestoreInstanceRequest, SnapshotInfo, SnapshotInstanceRequest};

use super::arguments::{RestoreArguments, SnapshotArguments};
use super::client::Agent;
use super::failure::{Exit, Outcome};
use super::instances::{absolute, answer, sentence};
use super::output::{Format, human_bytes, human_ms};

/// However long it takes: an agent that is gone is noticed by the connection.
pub(super) async fn snapshot(agent: &Agent, arguments: SnapshotArguments, format: Format) -> Outcome {
    let what = format!("snapshot {}", arguments.named.name);
    let request = SnapshotInstanceRequest {
        instance: arguments.named.name,
        directory: absolute("--to", &arguments.to)?,
    };
    let info = answer(&what, agent.compute().await?.snapshot_instance(request).await)?;
    format.one(&info, written)?;
    Ok(Exit::Done)
}

/// However long it takes, as [`snapshot`].
pub(super) async fn restore(agent: &Agent, arguments: RestoreArguments, format: Format) -> Outcome {
    let directory = absolute("DIR", &arguments.directory)?;
    let what = format!("restore {directory}");
    let request = RestoreInstanceRequest {
        directory,
        name: arguments.name.unwrap_or_default(),
        same_identity: arguments.same_identity,
    };
    let info = answer(&what, agent.compute().await?.restore_instance(request).await)?;
    format.one(&info, sentence)?;
    Ok(Exit::Done)
}

fn written(info: &SnapshotInfo) -> String {
    let paused = match info.paused_ms {
        Some(paused_ms) => format!("the guest stood still for {}", human_ms(paused_ms)),
        None => "the guest is paused".to_owned(),
    };
    format!(
        "{} was written to {}: {} of its {} of memory, in {}; {paused}",
        info.name,
        info.directory,
        human_bytes(info.stored_bytes),
        human_bytes(info.memory_bytes),
        human_ms(info.total_ms),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_says_where_it_is_and_what_it_cost() {
        let info = SnapshotInfo {
            name: "web".to_owned(),
            directory: "/srv/snap".to_owned(),
            memory_bytes: 1 << 30,
            stored_bytes: 3 << 20,
            paused_ms: Some(12.0),
            total_ms: 1500.0,
            ..SnapshotInfo::default()
        };
        assert_eq!(
            written(&info),
            "web was written to /srv/snap: 3 MiB of its 1 GiB of memory, in 1.50 s; the guest stood still for 12.0 ms"
        );
        let object = serde_json::to_value(SnapshotInfo {
            paused_ms: None,
            ..info
        });
        assert!(object.unwrap()["paused_ms"].is_null());
    }
}
