//! What a restarted agent finds: instances by their sockets, migrations by the journal.

use std::sync::Arc;

use super::failure::Failure;
use super::instances::Agent;
use super::journal::{InstanceRow, MigrationRow, Role, Status};
use super::vmm_client::Vmm;
use super::{incoming, outgoing, spawn};

/// Finds everything again, before any request is served.
///
/// # Errors
/// The journal cannot be read.
pub(crate) async fn recover(agent: &Arc<Agent>) -> Result<(), Failure> {
    let rows = agent.journal.read(InstanceRow::all).await?;
    let unfinished = agent.journal.read(MigrationRow::unfinished).await?;
    let known: Vec<_> = rows.iter().map(|row| row.id).collect();
    Agent::remove_orphans(&agent.config.data_dir.join("instances"), &known);

    for row in rows {
        let migration = unfinished
            .iter()
            .find(|migration| migration.instance == row.id)
            .cloned();
        let instance = agent.instances.add(row);
        match migration {
            None => find(agent, &instance).await,
            Some(migration) if migration.role == Role::Source => outgoing::recover(agent, migration, instance).await,
            Some(migration) => incoming::recover(agent, migration, instance).await?,
        }
    }
    for mut orphan in unfinished
        .into_iter()
        .filter(|migration| !known.contains(&migration.instance))
    {
        // The instance left or was removed, and the agent ended before it wrote that the migration was over.
        orphan.over = true;
        if orphan.role == Role::Source && orphan.said.as_deref() == Some("RUNNING") {
            orphan.info.status = "completed".to_owned();
            orphan.info.guest_location = Some(orphan.peer.clone());
        } else {
            orphan.info.status = "failed".to_owned();
            orphan
                .info
                .error
                .get_or_insert_with(|| "the agent ended during it".to_owned());
        }
        orphan.info.ended = Some(humantime::format_rfc3339_millis(std::time::SystemTime::now()).to_string());
        agent.journal.write(move |transaction| orphan.save(transaction)).await?;
    }
    Ok(())
}

/// An instance that no migration has: its VMM is found again, or it crashed while nobody looked.
async fn find(agent: &Arc<Agent>, instance: &Arc<super::instances::Instance>) {
    let mut state = instance.state.lock().await;
    if matches!(state.row.status, Status::Stopped | Status::Crashed) {
        return;
    }
    let socket = agent.folder(instance.id).join(spawn::SOCKET);
    match Vmm::connect(&socket, None).await {
        Ok((vmm, standing, events)) => {
            tracing::info!(instance = %instance.id, name = state.row.spec.name, pid = vmm.pid(), "found again");
            agent.attach(instance, &mut state, vmm, events);
            // The user's pause or resume may have been obeyed and not journalled.
            match standing.machine.as_str() {
                "running" => state.row.status = Status::Running,
                "paused" => state.row.status = Status::Paused,
                _ => {}
            }
            if let Some(ended) = standing.ended {
                agent.guest_ended(&mut state, &ended).await;
            }
        }
        Err(error) => {
            let rebooted = state.row.boot_id != agent.boot_id;
            let reason = if rebooted {
                "the host went down"
            } else {
                "the VMM died while no agent ran"
            };
            tracing::warn!(instance = %instance.id, name = state.row.spec.name, %error, reason, "the instance crashed");
            agent.end(&mut state, Status::Crashed, reason.to_owned()).await;
        }
    }
}
