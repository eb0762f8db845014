//! What must hold after healing: one copy, nothing lost, journals that agree, and nothing left over.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use ferry_tests::{Host, disk, process, until, waiting::CALL};

use crate::cell::{Ending, Power};
use crate::course::Course;
use crate::journals::Look;
use crate::run::{NAME, Stage};

/// How it ended, as both journals have it.
pub(crate) fn ending(power: Power, looks: &[Look; 2]) -> Result<Ending> {
    let [a, b] = looks;
    match (power, a.status(), b.status()) {
        (Power::On, Some("running"), None) | (Power::Off, Some("stopped"), None) => Ok(Ending::AtA),
        (Power::On, None, Some("running")) | (Power::Off, None, Some("stopped")) => Ok(Ending::AtB),
        (Power::On, Some("crashed"), None) => Ok(Ending::CrashedAtA),
        (Power::On, None, Some("crashed")) => Ok(Ending::CrashedAtB),
        _ => bail!("the journals do not name one place where the guest is: {looks:?}"),
    }
}

/// Judges what is there after an ending.
pub(crate) fn judge(stage: &mut Stage, course: Course, looks: &[Look; 2], ending: Ending) -> Result<()> {
    agree((stage.power, course), looks, ending).with_context(|| format!("the journals say {looks:?}"))?;
    one_copy(stage, ending)?;
    disk_is_the_runners(stage, looks, ending)?;
    stage.witness.check()?;
    never_two(stage)?;
    starts_again(stage, ending)?;
    nothing_left(stage, ending)?;
    stage.pair.close()
}

/// What both journals say of the switchover fits together, and no epoch is used twice.
fn agree((power, course): (Power, Course), [a, b]: &[Look; 2], ending: Ending) -> Result<()> {
    let moved_under = power.epoch();
    let record = a.migration.as_ref().context("A has no record of the migration")?;
    let decision = b.decision();
    let epoch = [a, b]
        .into_iter()
        .find_map(|look| look.instance.as_ref())
        .map_or(0, |&(_, epoch)| epoch);
    if let Some(said) = &record.said {
        ensure!(Some(said.as_str()) == decision, "A was told what B does not say");
    }
    ensure!(
        !b.decisions.iter().any(|(_, decision)| decision == "CLAIMED"),
        "a decision is not final"
    );
    match ending {
        Ending::AtA => {
            ensure!(decision != Some("RUNNING"), "D is RUNNING, and the guest runs at A");
            ensure!(matches!(record.status.as_str(), "failed" | "cancelled"), "A's record");
            let right = record.resumed.unwrap_or(moved_under);
            ensure!(epoch == right, "the guest runs at A under epoch {epoch}, not {right}");
            ensure!(
                record.resumed.is_none_or(|resumed| resumed > moved_under + 1),
                "an epoch was used twice"
            );
        }
        Ending::CrashedAtA => {
            ensure!(decision != Some("RUNNING"), "D is RUNNING, and the guest crashed at A");
            // Cancelled if it was called off first, and the guest ran on for a moment.
            ensure!(matches!(record.status.as_str(), "failed" | "cancelled"), "A's record");
        }
        Ending::AtB | Ending::CrashedAtB => {
            ensure!(decision == Some("RUNNING"), "the guest is at B, and D is not RUNNING");
            // A guest that was lost with its pages is told of by both.
            let is_lost = course == Course::Late && ending == Ending::CrashedAtB && record.status == "error";
            let over = if is_lost { "error" } else { "completed" };
            ensure!(record.status == over, "A's record");
            ensure!(record.resumed.is_none(), "A resumed a guest that is at B");
            ensure!(epoch == moved_under + 1, "the guest is at B under epoch {epoch}");
            let status = b.migration.as_ref().map(|record| record.status.as_str());
            ensure!(status == Some(over), "B's record");
        }
    }
    Ok(())
}

/// Exactly one copy runs, where the journals say, and it is the one that was there before if it never left.
fn one_copy(stage: &Stage, ending: Ending) -> Result<()> {
    let (a, b) = (&stage.pair.a, &stage.pair.b);
    match ending {
        Ending::AtA if stage.power == Power::On => {
            stage.pair.runs_only_at(a, NAME, &stage.witness)?;
            ensure!(Some(a.vmm()?) == stage.vmm_a, "another VMM has the guest at A");
            Ok(())
        }
        Ending::AtB if stage.power == Power::On => stage.pair.runs_only_at(b, NAME, &stage.witness),
        _ => until("no VMM is left", CALL, || {
            Ok((a.vmms().is_empty() && b.vmms().is_empty()).then_some(()))
        }),
    }
}

/// Who runs the guest has its disk, under the guest's epoch; of a guest that crashed or is off nobody has it.
fn disk_is_the_runners(stage: &Stage, looks: &[Look; 2], ending: Ending) -> Result<()> {
    let image = stage.disk();
    if stage.power == Power::Off {
        ensure!(
            !disk::is_locked(&image)?,
            "the disk of an instance that is off is locked"
        );
        return Ok(());
    }
    let (host, look) = match ending {
        Ending::AtA => ("a", &looks[0]),
        Ending::AtB => ("b", &looks[1]),
        Ending::CrashedAtA | Ending::CrashedAtB => {
            ensure!(!disk::is_locked(&image)?, "the disk of a guest that crashed is locked");
            return Ok(());
        }
    };
    ensure!(disk::is_locked(&image)?, "the guest runs, and its disk is not locked");
    let holder = disk::holder(&image)?;
    let epoch = look.instance.as_ref().map(|&(_, epoch)| epoch);
    ensure!(
        holder["host"] == host && holder["epoch"].as_u64() == epoch,
        "the guest runs at {host} under epoch {epoch:?}, and its disk is that of {holder}"
    );
    Ok(())
}

/// By the guest's own counter, which both hosts share: no heartbeat of one copy lies between those of the other.
fn never_two(stage: &Stage) -> Result<()> {
    let span = |host: &str| {
        let beats = stage.witness.beats();
        let mut counters = beats
            .iter()
            .filter(|beat| beat.host == host)
            .map(|beat| beat.heartbeat.tsc);
        let first = counters.next()?;
        Some(counters.fold((first, first), |(low, high), tsc| (low.min(tsc), high.max(tsc))))
    };
    if let (Some((_, last_at_a)), Some((first_at_b, _))) = (span("a"), span("b")) {
        ensure!(
            last_at_a < first_at_b,
            "the guest beat at A at {last_at_a} when it had begun at B at {first_at_b}"
        );
    }
    Ok(())
}

/// A guest that crashed, or that was off all the while, can be started where it is, under an epoch that nobody had.
fn starts_again(stage: &Stage, ending: Ending) -> Result<()> {
    let host = match (stage.power, ending) {
        (Power::On, Ending::AtA | Ending::AtB) => return Ok(()),
        (_, Ending::AtA | Ending::CrashedAtA) => &stage.pair.a,
        (_, Ending::AtB | Ending::CrashedAtB) => &stage.pair.b,
    };
    if stage.power == Power::Off {
        // A guest that ran meanwhile would have been ready.
        ensure!(
            stage.witness.times_ready() == 1,
            "the guest of an instance that is off was started"
        );
    }
    host.ferry(&["start", NAME])?.exit(0)?;
    let shown = host.wait_for_status(NAME, "running")?;
    let epoch = shown["epoch"].as_u64().context("no epoch is shown")?;
    ensure!(
        epoch > stage.power.epoch(),
        "it was started under epoch {epoch}, which it had before"
    );
    stage.witness.wait_ready_times(2)
}

/// Once the guest is removed: no process, socket, folder, cgroup, started mark or lock.
fn nothing_left(stage: &mut Stage, ending: Ending) -> Result<()> {
    stage.pair.keep_logs();
    let host = match ending {
        Ending::AtA | Ending::CrashedAtA => &stage.pair.a,
        Ending::AtB | Ending::CrashedAtB => &stage.pair.b,
    };
    let id = host.show(NAME)?["id"].as_str().context("no id is shown")?.to_owned();
    host.ferry(&["delete", NAME, "--force"])?.exit(0)?;
    let agents = [stage.pair.a.pid(), stage.pair.b.pid()];
    let cgroups = ["/sys/fs/cgroup/ferry", "/sys/fs/cgroup/unified/ferry"];
    let mut left = Vec::new();
    let gone = until("nothing is left", CALL, || {
        left.clear();
        let processes = process::naming(stage.pair.folder()).into_iter();
        left.extend(
            processes
                .filter(|&id| !agents.contains(&Some(id)))
                .map(|id| format!("process {id}")),
        );
        left.extend(disk::is_locked(&stage.disk())?.then(|| "a lock on the disk".to_owned()));
        left.extend((stage.instance_folders() > 0).then(|| "an instance's folder".to_owned()));
        for host in [&stage.pair.a, &stage.pair.b] {
            left.extend(mark_folders(host).iter().map(|mark| format!("{}", mark.display())));
        }
        let cgroups = cgroups.iter().map(|root| Path::new(root).join(&id));
        left.extend(
            cgroups
                .filter(|group| group.exists())
                .map(|group| format!("{}", group.display())),
        );
        Ok(left.is_empty().then_some(()))
    });
    gone.with_context(|| format!("left over: {left:?}"))?;
    for host in [&stage.pair.a, &stage.pair.b] {
        let listed = host.ferry(&["list"])?.exit(0)?;
        ensure!(listed.json_lines()?.is_empty(), "{listed}");
        claims_nothing(host)?;
    }
    Ok(())
}

/// Of a host without an instance nothing is claimed, and no migration has its turn.
fn claims_nothing(host: &Host) -> Result<()> {
    let mut told = serde_json::Value::Null;
    let none = until("no claim is left", CALL, || {
        told = host.ferry(&["host", "show", host.name])?.exit(0)?.json()?;
        let claims = [
            "memory_claimed_bytes",
            "vcpus_claimed",
            "migrations_out",
            "migrations_in",
        ];
        Ok(claims.iter().all(|&claim| told[claim] == 0).then_some(()))
    });
    none.with_context(|| format!("{told}"))
}

/// The folders of started marks that a host has, one for each migration that goes on.
pub(crate) fn mark_folders(host: &Host) -> Vec<PathBuf> {
    let folder = ferry_tests::pair::mark_folder_name(&host.data_dir);
    ["/run", "/dev/shm", "/tmp"]
        .iter()
        .flat_map(|root| {
            fs::read_dir(Path::new(root).join(&folder))
                .into_iter()
                .flatten()
                .flatten()
        })
        .map(|entry| entry.path())
        .collect()
}
