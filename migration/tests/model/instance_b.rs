//! The instance at B once the migration into it is over: the source is asked whether it knows, and what crashed is started again.

use ferry_migration::handover::{
    Doubt, Ended, Epoch, Fallen, Heard, Origin, Peer, PeerCopy, Permit, Permits, RestartPolicy, Side as ResolveSide,
    Verdict, Wanted, Wish, heard,
};

use crate::config::Config;
use crate::moves::{Kind, Moves, What, Who};
use crate::mutants::Mutant;
use crate::network::{INSTANCE, Socket};
use crate::world::{AgentB, PhaseB, Side, Status, VmmB, World, Write};

pub(crate) fn moves(moves: &mut Moves<'_>) {
    let (world, config) = (moves.from, moves.config);
    let Some(agent) = &world.b.agent else { return };
    if !agent.over || !agent.todo.is_empty() || agent.instance.status == Status::Absent {
        return;
    }
    let status = agent.instance.status;
    if status.may_run() && !agent.attached && agent.starting.is_none() {
        moves.add_writing_b(What::Does("finds that the guest's VMM is gone"), Kind::Sure, vmm_died);
    }
    if !agent.instance.settled && !config.is(Mutant::RestartAtBWithoutAsking) {
        match source_says(world) {
            Some(PeerCopy::Pending) => {}
            Some(copy) => {
                let what = What::Does("tells agent A that D is RUNNING, and hears what A has");
                moves.add_writing_b(what, Kind::Sure, |world, write| told(world, copy, write));
            }
            None if !agent.silent => {
                moves.add(
                    Who::AgentB,
                    What::Does("gets no answer from agent A"),
                    Kind::Chance,
                    |world| {
                        if let Some(agent) = &mut world.b.agent {
                            agent.silent = true;
                        }
                    },
                );
            }
            None => {}
        }
    }
    if let Some(epoch) = agent.starting {
        if world.locks.is_none() {
            moves.add(
                Who::AgentB,
                What::DoesUnder("starts a VMM with the guest booted anew under", epoch),
                Kind::Sure,
                |world| {
                    boot(world, epoch);
                },
            );
        }
        return;
    }
    if status != Status::Crashed {
        return;
    }
    if let Verdict::Start(epoch) = verdict(agent, config) {
        moves.add_writing_b(
            What::DoesUnder("journals a new right to run,", epoch),
            Kind::Sure,
            |world, write| {
                take_new_right(world, epoch, write);
            },
        );
    }
    // The person must be certain that host A is off.
    if config.resolves && !world.onlooker.resolved && world.a.down && agent.silent {
        moves.add_writing_b(What::Does("is told: resolve --run-here"), Kind::Chance, resolve);
    }
}

/// What agent A has of the guest, if it answers.
fn source_says(world: &World) -> Option<PeerCopy> {
    let agent = world.a.agent.as_ref()?;
    Some(
        if agent.rows.instance.status == Status::Absent || agent.rows.migration.serves_pages {
            PeerCopy::Nothing
        } else if agent.rows.migration.over && agent.core.is_none() {
            PeerCopy::Holds(agent.rows.instance.epoch)
        } else {
            PeerCopy::Pending
        },
    )
}

fn told(world: &mut World, copy: PeerCopy, write: Write) {
    let Some(agent) = &mut world.b.agent else { return };
    match heard(agent.instance.epoch, copy) {
        Heard::NotYet => {}
        Heard::Settled => {
            agent.instance.settled = true;
            save(world, write);
        }
        Heard::Superseded(epoch) => {
            agent.instance.known = agent.instance.known.max(epoch);
            agent.instance.status = Status::Absent;
            (agent.attached, agent.starting) = (false, None);
            world.end_vmm_b();
            world.b.socket.broke();
            save(world, write);
        }
        // A person must look.
        Heard::Conflict(_) => {}
    }
}

fn verdict(agent: &AgentB, config: &Config) -> Verdict {
    let policy = if config.restarts {
        RestartPolicy::OnCrash
    } else {
        RestartPolicy::Never
    };
    let origin = if agent.instance.settled || config.is(Mutant::RestartAtBWithoutAsking) {
        Origin::Settled
    } else if agent.silent {
        Origin::Silent
    } else {
        Origin::Unasked
    };
    let fallen = Fallen {
        wanted: Wanted::ByPolicy(policy, Ended::Crashed),
        had: agent.instance.epoch,
        known: agent.instance.known,
        leaving: ferry_migration::handover::Leaving::No,
        origin,
    };
    fallen.verdict()
}

fn take_new_right(world: &mut World, epoch: Epoch, write: Write) {
    let Some(agent) = &mut world.b.agent else { return };
    let before = agent.instance;
    let instance = &mut agent.instance;
    (instance.epoch, instance.known, instance.status) = (epoch, epoch.max(instance.known), Status::Running);
    agent.starting = Some(epoch);
    if write.lands() {
        world.b.disk.instance = agent.instance;
    }
    if write.result().is_err() {
        (agent.instance, agent.starting) = (before, None);
    }
}

fn resolve(world: &mut World, write: Write) {
    let Some(agent) = &world.b.agent else { return };
    let doubt = Doubt {
        side: ResolveSide::Destination,
        is_indeterminate: true,
        known: agent.instance.known,
        peer: Peer::Silent,
    };
    if let Ok(Some(epoch)) = doubt.resolve(Wish::RunHere) {
        world.onlooker.resolved = true;
        take_new_right(world, epoch, write);
    }
}

fn boot(world: &mut World, epoch: Epoch) {
    if !world.lock(Side::B) {
        return;
    }
    let mut permits = Permits::new(INSTANCE);
    let permit = Permit {
        instance: INSTANCE,
        epoch,
        paused: false,
    };
    if permits.take(permit).is_err() {
        return;
    }
    world.take_right(epoch);
    world.b.vmm = Some(VmmB {
        phase: PhaseB::Here,
        running: true,
        user_paused: false,
        permits,
        missing: false,
        anew: true,
    });
    world.b.socket = Socket::new(true);
    if let Some(agent) = &mut world.b.agent {
        agent.attached = true;
        agent.starting = None;
    }
}

/// The VMM of a guest that is this host's is gone: it crashed.
pub(crate) fn vmm_died(world: &mut World, write: Write) {
    let Some(agent) = &mut world.b.agent else { return };
    if agent.instance.status.may_run() {
        agent.instance.status = Status::Crashed;
        save(world, write);
    }
}

/// Writes the instance's row, and that the migration is over. One that fails is made up for: by what the next start of the agent finds.
pub(crate) fn save(world: &mut World, write: Write) {
    if let Some(agent) = &world.b.agent
        && write.lands()
    {
        world.b.disk.instance = agent.instance;
        world.b.disk.over = agent.over;
    }
}

/// A restarted agent looks for the instance's VMM.
pub(crate) fn find(world: &mut World, config: &Config, write: Write) {
    let Some(agent) = &mut world.b.agent else { return };
    let status = agent.instance.status;
    if world.b.vmm.is_none() {
        vmm_died(world, write);
    } else if status.may_run() {
        world.b.socket.accepted(crate::mutants::old_orders(config));
    } else {
        agent.attached = false;
        world.end_vmm_b();
        world.b.socket.broke();
    }
}
