//! Post-copy's states, as far as the protocol has them: what A becomes on RUNNING, and what is lost with it.
//!
//! ```text
//!   A: parked ──RUNNING──► POSTCOPY journalled, vCPUs closed ──last page acknowledged──► journalled, freed
//!                                      │ VMM A or its host lost
//!                                      └──► B's guest lacks pages: it is lost, its restart policy decides
//! ```
//!
//! Production does it around the same cores, in the place where they have the copy destroyed (`rpc/src/agent/outgoing/serving.rs`,
//! `rpc/src/agent/incoming/late.rs`): D, permits and epochs are the same.

use crate::config::Config;
use crate::effects_a::{save, save_migration};
use crate::instance_b;
use crate::moves::{Kind, Moves, What, Who};
use crate::mutants::Mutant;
use crate::world::{EventA, NotDurable, PhaseA, PhaseB, Status, World, Write};

/// In the place of destroying the copy: agent A journals POSTCOPY, and VMM A drops its vCPUs for good.
pub(crate) fn begin(world: &mut World, config: &Config, write: Write) -> Result<(), NotDurable> {
    let Some(agent) = &mut world.a.agent else { return Ok(()) };
    agent.rows.migration.serves_pages = true;
    agent.rows.instance.status = Status::Absent;
    save(world, write)?;
    if config.is(Mutant::FreeingPagesOnRunning) {
        end_copy(world);
        return Ok(());
    }
    if let Some(vmm) = &mut world.a.vmm {
        vmm.phase = PhaseA::PageSource;
        if has_all_pages(world) {
            world.a.socket.event(EventA::Drained);
        }
    }
    Ok(())
}

fn end_copy(world: &mut World) {
    if let Some(agent) = &mut world.a.agent {
        agent.attached = false;
        agent.unanswered.clear();
    }
    world.end_vmm_a();
    world.a.socket.broke();
}

/// The last page is acknowledged: it is over at A, once that is written.
pub(crate) fn drained(world: &mut World, write: Write) {
    if let Some(agent) = &mut world.a.agent {
        agent.rows.migration.over = true;
    }
    if save_migration(world, write).is_ok() {
        end_copy(world);
    } else {
        if let Some(agent) = &mut world.a.agent {
            agent.rows.migration.over = false;
        }
        world.a.socket.events.insert(0, EventA::Drained);
    }
}

/// B holds every page of its running guest.
pub(crate) fn has_all_pages(world: &World) -> bool {
    world
        .b
        .vmm
        .as_ref()
        .is_some_and(|vmm| vmm.phase == PhaseB::Here && !vmm.missing)
}

pub(crate) fn moves(moves: &mut Moves<'_>) {
    let world = moves.from;
    let b_lacks_pages = world
        .b
        .vmm
        .as_ref()
        .is_some_and(|vmm| vmm.phase == PhaseB::Here && vmm.missing);
    // A cut link only pauses what faults, and is made again: pages come as long as VMM A lives.
    if b_lacks_pages && world.a.vmm.as_ref().is_some_and(|vmm| !vmm.owns()) {
        moves.add(Who::VmmB, What::Does("gets the last page"), Kind::Sure, |world| {
            if let Some(vmm) = &mut world.b.vmm {
                vmm.missing = false;
            }
            if world.a.vmm.as_ref().is_some_and(|vmm| vmm.phase == PhaseA::PageSource) {
                world.a.socket.event(EventA::Drained);
            }
        });
    }
    // The guest that lacked them is gone, or what was said of the last page was lost: agent B says that none is needed.
    let needs_none = !b_lacks_pages && world.b.agent.as_ref().is_some_and(|agent| agent.over);
    let is_source = world.a.vmm.as_ref().is_some_and(|vmm| vmm.phase == PhaseA::PageSource);
    if is_source && needs_none && world.a.socket.open && !world.a.socket.events.contains(&EventA::Drained) {
        moves.add(
            Who::AgentB,
            What::Does("says that no page is needed"),
            Kind::Sure,
            |world| {
                world.a.socket.event(EventA::Drained);
            },
        );
    }
    let Some(source) = &world.a.agent else { return };
    let serves = source.rows.migration.serves_pages && source.core.is_none() && source.todo.is_empty();
    if serves && !source.rows.migration.over && !source.attached {
        moves.add_writing_a(What::Does("finds the page source lost"), Kind::Sure, |world, write| {
            let Some(agent) = &mut world.a.agent else { return };
            agent.rows.migration.over = true;
            if save_migration(world, write).is_err()
                && let Some(agent) = &mut world.a.agent
            {
                agent.rows.migration.over = false;
            }
        });
    }
    // B cannot reach VMM A again, and agent A says that it is no more: by itself, or once it is asked.
    let is_lost = b_lacks_pages && source.rows.migration.over && world.a.vmm.is_none();
    let Some(agent) = &world.b.agent else { return };
    if is_lost && agent.over && agent.todo.is_empty() && agent.attached {
        moves.add_writing_b(
            What::Does("hears that the page source is lost: the guest is"),
            Kind::Sure,
            |world, write| {
                world.end_vmm_b();
                world.b.socket.broke();
                if let Some(agent) = &mut world.b.agent {
                    (agent.attached, agent.permit) = (false, false);
                }
                instance_b::vmm_died(world, write);
            },
        );
    }
}
