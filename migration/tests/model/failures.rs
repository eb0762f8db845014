//! What breaks, and what mends.

use ferry_migration::handover::Decision;

use crate::config::{Config, Failure};
use crate::moves::{Kind, Moves, What, Who};
use crate::world::World;

pub(crate) fn moves(moves: &mut Moves<'_>) {
    let (world, config) = (moves.from, moves.config);
    if world.failures.count() < config.most {
        for &failure in config.breaks {
            if !world.failures.had(failure) && can_break(world, failure) {
                moves.add(Who::Fate, What::Breaks(failure), Kind::Chance, |world| {
                    world.failures.add(failure);
                    fail(world, config, failure);
                });
            }
        }
    }
    if world.a.full {
        moves.add(Who::Fate, What::Does("agent A can write again"), Kind::Sure, |world| {
            world.a.full = false
        });
    }
    if world.b.full {
        moves.add(Who::Fate, What::Does("agent B can write again"), Kind::Sure, |world| {
            world.b.full = false
        });
    }
    if !world.stream.closed {
        moves.add(
            Who::Fate,
            What::Does("the link between the VMMs is cut"),
            Kind::Chance,
            |world| {
                world.stream.closed = true;
                world.stream.go = None;
            },
        );
    } else if world.stream.go.is_some() {
        moves.add(Who::Fate, What::Does("GO is lost on the way"), Kind::Chance, |world| {
            world.stream.go = None
        });
    }
}

fn can_break(world: &World, failure: Failure) -> bool {
    match failure {
        Failure::AgentA => world.a.agent.is_some(),
        Failure::AgentB => world.b.agent.is_some(),
        Failure::VmmA => world.a.vmm.is_some(),
        Failure::VmmB => world.b.vmm.is_some(),
        Failure::HostA => !world.a.down,
        Failure::HostB => !world.b.down,
        Failure::JournalA => !world.a.full,
        Failure::JournalB => !world.b.full,
        Failure::SocketA => world.a.socket.open && world.a.vmm.is_some(),
        Failure::SocketB => world.b.socket.open && world.b.vmm.is_some(),
    }
}

fn fail(world: &mut World, config: &Config, failure: Failure) {
    match failure {
        Failure::AgentA => end_agent_a(world),
        Failure::AgentB => end_agent_b(world),
        Failure::VmmA => kill_vmm_a(world, config),
        Failure::VmmB => {
            world.onlooker.excused = true;
            world.end_vmm_b();
        }
        Failure::HostA => {
            end_agent_a(world);
            kill_vmm_a(world, config);
            world.onlooker.excused = true;
            world.a.socket.broke();
            world.a.down = true;
            world.a.full = false;
        }
        Failure::HostB => {
            end_agent_b(world);
            world.end_vmm_b();
            world.onlooker.excused = true;
            world.b.socket.broke();
            world.b.down = true;
            world.b.full = false;
            // Gone with the host, as the boot is another: the mark is on tmpfs.
            world.b.mark = false;
            world.b.boot += 1;
        }
        Failure::JournalA => world.a.full = true,
        Failure::JournalB => world.b.full = true,
        Failure::SocketA => world.a.socket.broke(),
        Failure::SocketB => world.b.socket.broke(),
    }
}

fn end_agent_a(world: &mut World) {
    if world.a.agent.take().is_some() {
        world.a.socket.agent_died();
    }
}

fn end_agent_b(world: &mut World) {
    if world.b.agent.take().is_some() {
        world.b.socket.agent_died();
    }
}

/// Its death excuses the loss of the guest, unless the guest is B's by then and B has all of it.
fn kill_vmm_a(world: &mut World, config: &Config) {
    if world.a.vmm.is_none() {
        return;
    }
    let id = world.newest_armed();
    let is_at_b = world.decision(config.home, id) == Some(Decision::Running)
        && world.b.vmm.as_ref().is_some_and(|vmm| vmm.owns() && !vmm.missing);
    if !is_at_b {
        world.onlooker.excused = true;
    }
    world.onlooker.vmm_a_died = true;
    world.end_vmm_a();
}
