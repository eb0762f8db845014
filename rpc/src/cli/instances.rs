//! The verbs about instances: run, list, show, start, pause, resume, reboot, stop, delete.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ferry_proto::agent::v1::{
    DeleteInstanceRequest, DiskSpec, InstanceInfo, InstanceRequest, InstanceSpec, ListInstancesRequest, NicSpec,
    RunInstanceRequest, StopInstanceRequest,
};
use serde_json::json;
use tonic::{Response, Status};

use super::arguments::{Named, RunArguments};
use super::client::{Agent, LONG_PATIENCE, PATIENCE, within};
use super::devices::{DiskArgument, NicArgument, NicEnd};
use super::events;
use super::failure::{Exit, Failure, Outcome};
use super::output::{self, Format, Table, human_bandwidth, human_bytes, or_dash};

/// A change of an instance that takes its name and gives back what it is now.
#[derive(Debug, Clone, Copy)]
pub(super) enum Change {
    Start,
    Pause,
    Resume,
    Reboot,
}

pub(super) async fn run(agent: &Agent, arguments: RunArguments, format: Format) -> Outcome {
    let name = arguments.name.clone();
    let spec = InstanceSpec {
        name: arguments.name,
        memory_bytes: arguments.memory,
        vcpus: arguments.vcpus,
        cpu: arguments.cpu,
        dirty: arguments.dirty,
        kernel: absolute("--kernel", &arguments.kernel)?,
        initrd: arguments
            .initrd
            .as_deref()
            .map(|path| absolute("--initrd", path))
            .transpose()?
            .unwrap_or_default(),
        cmdline: arguments.cmdline,
        hugepages: arguments.hugepages,
        restart: arguments.restart,
        disks: arguments.disks.into_iter().map(disk).collect::<Result<_, _>>()?,
        nics: arguments.nics.into_iter().map(nic).collect(),
    };
    let request = within(LONG_PATIENCE, RunInstanceRequest { spec: Some(spec) });
    let info = answer(
        &format!("run {name}"),
        agent.compute().await?.run_instance(request).await,
    )?;
    format.one(&info, sentence)?;
    Ok(Exit::Done)
}

pub(super) async fn list(agent: &Agent, all: bool, format: Format) -> Outcome {
    let mut instances = instances_of(agent).await?;
    let mut silent = Vec::new();
    if all {
        for (host, peer) in agent.peers().await? {
            match instances_of(&peer).await {
                Ok(more) => instances.extend(more),
                Err(failure) => silent.push(format!("host {host}: {}", failure.message)),
            }
        }
    }
    format.many(&instances, table)?;
    match silent.is_empty() {
        true => Ok(Exit::Done),
        false => Err(Failure::new(
            Exit::NoAnswer,
            format!("the list lacks {}", silent.join("; ")),
        )),
    }
}

pub(super) async fn show(agent: &Agent, named: Named, format: Format) -> Outcome {
    let what = format!("show {}", named.name);
    let request = within(PATIENCE, InstanceRequest { instance: named.name });
    let info = answer(&what, agent.compute().await?.show_instance(request).await)?;
    format.one(&info, details)?;
    Ok(Exit::Done)
}

pub(super) async fn change(agent: &Agent, change: Change, named: Named, format: Format) -> Outcome {
    let mut client = agent.compute().await?;
    let request = within(
        LONG_PATIENCE,
        InstanceRequest {
            instance: named.name.clone(),
        },
    );
    let (verb, answered) = match change {
        Change::Start => ("start", client.start_instance(request).await),
        Change::Pause => ("pause", client.pause_instance(request).await),
        Change::Resume => ("resume", client.resume_instance(request).await),
        Change::Reboot => ("reboot", client.reboot_instance(request).await),
    };
    let info = answer(&format!("{verb} {}", named.name), answered)?;
    format.one(&info, sentence)?;
    Ok(Exit::Done)
}

pub(super) async fn stop(agent: &Agent, named: Named, force: bool, timeout: Duration, format: Format) -> Outcome {
    let what = format!("stop {}", named.name);
    let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
    let request = StopInstanceRequest {
        instance: named.name,
        force,
        timeout_ms,
    };
    let request = within(timeout.saturating_add(LONG_PATIENCE), request);
    let info = answer(&what, agent.compute().await?.stop_instance(request).await)?;
    format.one(&info, sentence)?;
    Ok(Exit::Done)
}

pub(super) async fn delete(agent: &Agent, named: Named, force: bool, format: Format) -> Outcome {
    let name = named.name;
    let request = within(
        LONG_PATIENCE,
        DeleteInstanceRequest {
            instance: name.clone(),
            force,
        },
    );
    let reply = answer(
        &format!("delete {name}"),
        agent.compute().await?.delete_instance(request).await,
    )?;
    match format {
        Format::Json => output::json_line(&json!({ "id": reply.id }))?,
        Format::Human => output::text(&format!("{name} is deleted ({})", reply.id))?,
    }
    Ok(Exit::Done)
}

/// What one host has.
pub(super) async fn instances_of(agent: &Agent) -> Result<Vec<InstanceInfo>, Failure> {
    let request = within(PATIENCE, ListInstancesRequest {});
    let reply = agent.compute().await?.list_instances(request).await;
    Ok(answer(&format!("list the instances at {}", agent.url), reply)?.instances)
}

/// The agent reads the file, from wherever it was started: it must not depend on where we are.
pub(super) fn absolute(flag: &str, path: &Path) -> Result<String, Failure> {
    let wrong = |problem: String| Failure::new(Exit::Usage, format!("{flag} {}: {problem}", path.display()));
    let absolute: PathBuf = std::path::absolute(path).map_err(|error| wrong(error.to_string()))?;
    absolute
        .into_os_string()
        .into_string()
        .map_err(|_| wrong("is not UTF-8".to_owned()))
}

fn disk(argument: DiskArgument) -> Result<DiskSpec, Failure> {
    Ok(DiskSpec {
        path: absolute("--disk path", &argument.path)?,
        readonly: argument.readonly,
        serial: argument.serial,
    })
}

fn nic(argument: NicArgument) -> NicSpec {
    let (tap, bridge) = match argument.end {
        NicEnd::Tap(tap) => (Some(tap), None),
        NicEnd::Bridge(bridge) => (None, Some(bridge)),
    };
    NicSpec {
        tap,
        bridge,
        mac: argument.mac.map(|mac| mac.to_string()).unwrap_or_default(),
        rate_bytes_per_s: argument.rate,
    }
}

pub(super) fn answer<T>(what: &str, answered: Result<Response<T>, Status>) -> Result<T, Failure> {
    answered
        .map(Response::into_inner)
        .map_err(|status| Failure::of_status(what, &status))
}

pub(super) fn sentence(info: &InstanceInfo) -> String {
    let reason = info
        .reason
        .as_ref()
        .map(|reason| format!(": {reason}"))
        .unwrap_or_default();
    format!(
        "{} is {} on {}{reason} ({})",
        info.name, info.status, info.host, info.id
    )
}

fn table(instances: &[InstanceInfo]) -> Table {
    let mut table = Table::new(&["NAME", "STATUS", "TASK", "HOST", ">MEMORY", ">VCPUS", "ID"]);
    for info in instances {
        let memory = human_bytes(info.memory_bytes);
        let (name, status, host, id) = (
            info.name.clone(),
            info.status.clone(),
            info.host.clone(),
            info.id.clone(),
        );
        table.row([
            name,
            status,
            or_dash(info.task.as_ref()),
            host,
            memory,
            info.vcpus.to_string(),
            id,
        ]);
    }
    table
}

fn details(info: &InstanceInfo) -> String {
    let reason = info
        .reason
        .as_ref()
        .map(|reason| format!(" ({reason})"))
        .unwrap_or_default();
    let cmdline = Some(info.cmdline.as_str()).filter(|text| !text.is_empty());
    let mut rows = vec![
        ("name", info.name.clone()),
        ("id", info.id.clone()),
        ("host", info.host.clone()),
        ("status", format!("{}{reason}", info.status)),
        ("task", or_dash(info.task.as_ref())),
        ("epoch", info.epoch.to_string()),
        ("migration", or_dash(info.migration.as_ref())),
        ("memory", memory_line(info)),
        ("vcpus", info.vcpus.to_string()),
        ("cpu", info.cpu.clone()),
        ("dirty", info.dirty.clone()),
        ("restart", info.restart.clone()),
        ("cmdline", or_dash(cmdline)),
        ("vmm pid", or_dash(info.vmm_pid)),
    ];
    rows.extend(info.also_at.iter().map(|host| ("also at", host.clone())));
    rows.extend(info.disks.iter().map(|disk| ("disk", disk_line(disk))));
    rows.extend(info.nics.iter().map(|nic| ("net", nic_line(nic))));
    rows.extend(info.fault.iter().map(|fault| ("fault", events::fault_line(fault))));
    let mut lines: Vec<_> = rows
        .into_iter()
        .map(|(key, value)| format!("{key:<10} {value}"))
        .collect();
    if !info.events.is_empty() {
        lines.push(format!("\n{}", events::table(&info.events)));
    }
    lines.join("\n")
}

fn memory_line(info: &InstanceInfo) -> String {
    let all = human_bytes(info.memory_bytes);
    match info.balloon {
        Some(balloon) if balloon.target_bytes != info.memory_bytes || balloon.actual_bytes != info.memory_bytes => {
            format!(
                "{all}, the guest is asked to have {} and has {}",
                human_bytes(balloon.target_bytes),
                human_bytes(balloon.actual_bytes)
            )
        }
        _ => all,
    }
}

fn disk_line(disk: &DiskSpec) -> String {
    let readonly = if disk.readonly { ", read-only" } else { "" };
    let serial = disk.serial.as_ref().map(|serial| format!(", serial {serial}"));
    format!("{}{readonly}{}", disk.path, serial.unwrap_or_default())
}

fn nic_line(nic: &NicSpec) -> String {
    let rate = nic
        .rate_bytes_per_s
        .map(|rate| format!(", at most {} each way", human_bandwidth(rate)));
    let rate = rate.unwrap_or_default();
    match (&nic.tap, &nic.bridge) {
        (Some(tap), _) => format!("{} on tap {tap}{rate}", nic.mac),
        (None, bridge) => format!("{} on bridge {}{rate}", nic.mac, or_dash(bridge.as_ref())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_the_fields_of_the_contract_and_null_for_the_unknown() {
        let info = InstanceInfo {
            id: "i".into(),
            name: "web".into(),
            status: "running".into(),
            ..Default::default()
        };
        let object = serde_json::to_value(&info).unwrap();
        for field in ["id", "name", "host", "status", "task", "epoch", "migration"] {
            assert!(object.get(field).is_some(), "{field}");
        }
        assert!(object["task"].is_null() && object["migration"].is_null());
    }

    #[test]
    fn disks_and_cards_are_shown() {
        let info = InstanceInfo {
            disks: vec![DiskSpec {
                path: "/srv/web.img".into(),
                readonly: true,
                serial: None,
            }],
            nics: vec![NicSpec {
                bridge: Some("br0".into()),
                mac: "02:00:00:00:00:01".into(),
                rate_bytes_per_s: Some(12_500_000),
                ..Default::default()
            }],
            ..Default::default()
        };
        let object = serde_json::to_value(&info).unwrap();
        assert_eq!(
            object["disks"],
            json!([{ "path": "/srv/web.img", "readonly": true, "serial": null }])
        );
        assert_eq!(
            object["nics"],
            json!([{ "tap": null, "bridge": "br0", "mac": "02:00:00:00:00:01", "rate_bytes_per_s": 12_500_000 }])
        );
        let shown = details(&info);
        assert!(shown.contains("disk       /srv/web.img, read-only"), "{shown}");
        let card = "net        02:00:00:00:00:01 on bridge br0, at most 100Mbit each way";
        assert!(shown.contains(card), "{shown}");
    }

    #[test]
    fn paths_do_not_depend_on_where_the_agent_was_started() {
        assert!(absolute("--kernel", Path::new("vmlinux")).unwrap().starts_with('/'));
        assert_eq!(
            absolute("--kernel", Path::new("/boot/vmlinux")).unwrap(),
            "/boot/vmlinux"
        );
    }
}
