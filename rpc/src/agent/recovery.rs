//! What a restarted agent finds: instances by their sockets, migrations by the journal.

mod last_rows;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use ferry_migration::handover::{Ended, Origin};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report;
use tokio::sync::mpsc::UnboundedReceiver;

use super::context::RequestContext;
use super::failure::Failure;
use super::instances::{Agent, Instance, InstanceState};
use super::journal::{Arrival, InstanceRow, MigrationRow, Role, RowWrite, Status, interrupt};
use super::outgoing::now_text;
use super::vmm_client::Vmm;
use super::{incoming, outgoing, spawn};
use last_rows::OfInstance;

/// Finds everything again, before any request is served.
///
/// # Errors
/// The journal cannot be read.
pub(crate) async fn recover(agent: &Arc<Agent>) -> Result<(), Failure> {
    // What waits for a migration goes on with it; all else ended with the agent before this one.
    let interrupted = agent
        .journal
        .write(RowWrite::Beginning, |transaction| interrupt(transaction, &now_text()))
        .await?;
    if interrupted > 0 {
        tracing::info!(interrupted, "actions that the agent before this one had begun");
    }
    let rows = agent.journal.read(InstanceRow::all).await?;
    let unfinished = agent.journal.read(MigrationRow::unfinished).await?;
    let here: Vec<_> = rows.iter().map(|row| row.id).collect();
    // What serves the last pages of a guest that left is in its folder.
    let serving: Vec<_> = unfinished.iter().filter(|row| row.is_serving()).cloned().collect();
    let known = [&here[..], &serving.iter().map(|row| row.instance).collect::<Vec<_>>()].concat();
    Agent::remove_orphans(&agent.config.data_dir.join("instances"), &known);

    let arrivals = agent.journal.read(Arrival::all).await?;

    let mut written = HashSet::new();
    for row in rows {
        let OfInstance { current, earlier } = OfInstance::new(&row, &unfinished);
        for migration in earlier {
            written.insert(migration.id);
            last_rows::of_one_before(agent, migration).await?;
        }
        let instance = agent.instances.add(row);
        if let Some(arrival) = arrivals.iter().find(|arrival| arrival.instance == instance.id) {
            let mut state = instance.state.lock().await;
            state.arrival = Some(arrival.clone());
            state.origin = Origin::Unasked;
        }
        match current {
            None => find(agent, &instance).await,
            // It has begun nothing: its guest is looked for as any other.
            Some(migration) if is_waiting(&migration) => find(agent, &instance).await,
            Some(migration) if migration.role == Role::Source => outgoing::recover(agent, migration, instance).await,
            Some(migration) => incoming::recover(agent, migration, instance).await?,
        }
    }
    // Behind those that are under way, in the order in which they were accepted.
    let is_left = |migration: &&MigrationRow| is_waiting(migration) && !written.contains(&migration.id);
    for migration in unfinished.iter().filter(is_left) {
        if let Some(instance) = agent.instances.by_id(migration.instance) {
            outgoing::wait_on(agent, migration.clone(), instance).await;
        }
    }
    for row in serving {
        outgoing::recover_serving(agent, row).await;
    }
    // The instance left or was removed, and the agent ended before it wrote that the migration was over.
    let is_orphan = |migration: &MigrationRow| !here.contains(&migration.instance) && !migration.is_serving();
    for orphan in unfinished.into_iter().filter(is_orphan) {
        last_rows::of_one_without_its_instance(agent, orphan).await?;
    }
    // First of all what may be stale: its source is asked at once.
    for arrival in arrivals {
        let news = agent.arrived(&arrival);
        agent.settle(&RequestContext::agent(), arrival, news);
    }
    Ok(())
}

fn is_waiting(migration: &MigrationRow) -> bool {
    migration.role == Role::Source && outgoing::waits(migration)
}

/// An instance that no migration has: its VMM is found again, or it crashed while nobody looked.
async fn find(agent: &Arc<Agent>, instance: &Arc<Instance>) {
    let socket = agent.folder(instance.id).join(spawn::SOCKET);
    let mut state = instance.state.lock().await;
    if matches!(state.row.status, Status::Stopped | Status::Crashed | Status::Incoming) {
        // None should be there. One that is has no right to run: the agent before this one died while it ended it.
        let ended = tokio::task::spawn_blocking(move || spawn::kill_listening(&socket)).await;
        tracing::debug!(instance = %instance.id, ?ended, "looked for a VMM that should not be there");
        if state.row.status == Status::Incoming {
            // The log has why not; the next start finds it again.
            let _ = agent.forget(&mut state).await;
        } else if state.row.restarts.due.is_some() {
            // Taken up once everything is found again.
            let _ = agent.due.send(instance.id);
        }
        return;
    }
    drop(state);
    // One that is there and silent is waited for, and the instance is not called crashed meanwhile.
    let (agent, instance) = (Arc::clone(agent), Arc::clone(instance));
    let found = tokio::spawn(async move {
        match Vmm::find(&socket).await {
            Some((vmm, standing, events)) => found_again(&agent, &instance, vmm, standing, events).await,
            None => lost(&agent, &instance).await,
        }
    });
    // Most answer at once; the others are not waited for here.
    let _ = tokio::time::timeout(FIND_TIME, found).await;
}

/// How long the start of an agent waits for each VMM.
const FIND_TIME: Duration = Duration::from_secs(2);

async fn found_again(
    agent: &Arc<Agent>,
    instance: &Arc<Instance>,
    vmm: Vmm,
    standing: wire::Standing,
    events: UnboundedReceiver<Report>,
) {
    let mut state = instance.state.lock().await;
    if is_settled(agent, instance, &state) {
        // Whoever settled it looked for its VMM. One that is found after that has no right to run.
        let its_own = state.vmm.as_ref().is_some_and(|current| current.is_same(&vmm));
        if !its_own && let Err(error) = vmm.kill().await {
            tracing::error!(instance = %instance.id, %error, "a VMM that should be dead does not die");
        }
        return;
    }
    tracing::info!(instance = %instance.id, name = state.row.spec.name, pid = vmm.pid(), "found again");
    let (pid, id) = (vmm.pid(), instance.id.to_string());
    // The agent before this one may have ended before it came to that. Not waited for: a guest does not need it to run.
    tokio::task::spawn_blocking(move || spawn::see_to_cgroup(pid, &id));
    agent.attach(instance, &mut state, vmm.clone(), events);
    let is_permitted = standing.epoch >= state.row.epoch;
    if is_permitted {
        // The user's pause or resume may have been obeyed and not journalled.
        state.row.status = if standing.user_paused {
            Status::Paused
        } else {
            Status::Running
        };
    }
    if let Some(ended) = standing.ended {
        agent.guest_ended(&mut state, &ended).await;
    } else if !is_permitted {
        // Journalled for this very VMM, and the agent died before it could be sent.
        let permit = wire::Permit {
            instance: instance.id.to_string(),
            epoch: state.row.epoch,
            paused: state.row.status == Status::Paused,
        };
        if let Err(error) = vmm.order(Command::Permit(permit)).await {
            tracing::warn!(instance = %instance.id, %error, "the guest could not be started");
            agent
                .end(&mut state, Ended::Crashed, format!("it could not be started: {error}"))
                .await;
        }
    }
}

/// Whether its user stopped, started or deleted the instance while its VMM was looked for.
fn is_settled(agent: &Agent, instance: &Instance, state: &InstanceState) -> bool {
    agent.instances.by_id(instance.id).is_none()
        || state.vmm.is_some()
        || matches!(state.row.status, Status::Stopped | Status::Crashed)
}

async fn lost(agent: &Arc<Agent>, instance: &Arc<Instance>) {
    let mut state = instance.state.lock().await;
    if is_settled(agent, instance, &state) {
        return;
    }
    let rebooted = state.row.boot_id != agent.boot_id;
    let reason = if rebooted {
        "the host went down"
    } else {
        "the VMM died while no agent ran"
    };
    tracing::warn!(instance = %instance.id, name = state.row.spec.name, reason, "the instance crashed");
    agent.end(&mut state, Ended::Crashed, reason.to_owned()).await;
}
