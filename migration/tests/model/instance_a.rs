//! The instance at A while no migration has it: its VMM dies, it is started again, its user pauses it, it migrates again.

use ferry_migration::handover::{
    Ended, Epoch, Fallen, GrantRegister, Leaving, Origin, Permit, Permits, RestartPolicy, Verdict, Wanted,
};

use crate::config::{Again, Config};
use crate::effects_a::save;
use crate::moves::{Kind, Moves, What, Who};
use crate::mutants::Mutant;
use crate::network::{INSTANCE, Socket};
use crate::world::{AgentA, InstanceRow, OrderA, PhaseA, Side, Status, VmmA, World, Write};

pub(crate) fn moves(moves: &mut Moves<'_>) {
    let (world, config) = (moves.from, moves.config);
    let Some(agent) = &world.a.agent else { return };
    if agent.core.is_some() || !agent.todo.is_empty() || !agent.rows.migration.over {
        return;
    }
    let status = agent.rows.instance.status;
    if status.may_run() && !agent.attached && agent.starting.is_none() {
        moves.add_writing_a(What::Does("finds that the guest's VMM is gone"), Kind::Sure, vmm_died);
    }
    if let Some(epoch) = agent.starting {
        if world.locks.is_none() {
            moves.add(
                Who::AgentA,
                What::DoesUnder("starts a VMM with the guest booted anew under", epoch),
                Kind::Sure,
                |world| {
                    boot(world, epoch);
                },
            );
        }
        return;
    }
    let right = match (agent.resolved, verdict(agent, config)) {
        (Some(epoch), _) | (None, Verdict::Start(epoch)) => Some(epoch),
        _ => None,
    };
    if status == Status::Crashed
        && let Some(epoch) = right
    {
        moves.add_writing_a(
            What::DoesUnder("journals a new right to run,", epoch),
            Kind::Sure,
            |world, write| {
                let before = world.a.agent.as_ref().map(|agent| agent.rows.instance);
                take_new_right(world, epoch);
                if save(world, write).is_err()
                    && let (Some(agent), Some(before)) = (&mut world.a.agent, before)
                {
                    (agent.rows.instance, agent.starting) = (before, None);
                    agent.resolved = right_of(before, epoch);
                }
            },
        );
    }
    // A migration is over for its instance when the VMM has wound it up, and was heard. Only if both agree on whether the
    // user paused the guest does another begin.
    let is_here = |vmm: &VmmA| vmm.phase == PhaseA::Here && vmm.user_paused == (status == Status::Paused);
    let is_idle = world.a.vmm.as_ref().is_some_and(is_here)
        && agent.attached
        && world.a.socket.open
        && world.a.socket.events.is_empty()
        && !agent.unanswered.iter().any(|order| matches!(order, OrderA::Pause(_)));
    if !is_idle {
        return;
    }
    if config.user_pauses && status == Status::Running && !world.onlooker.user_paused {
        let epoch = agent.rows.instance.epoch;
        moves.add(Who::User, What::Does("pauses the guest"), Kind::Chance, |world| {
            world.onlooker.user_paused = true;
            world.a.socket.order(OrderA::Pause(epoch));
            if let Some(agent) = &mut world.a.agent {
                agent.unanswered.push(OrderA::Pause(epoch));
            }
        });
    }
    let b_is_free = world
        .b
        .agent
        .as_ref()
        .is_some_and(|agent| agent.over && agent.todo.is_empty() && agent.instance.status == Status::Absent)
        && world.b.disk.instance.status == Status::Absent
        && world.b.vmm.is_none();
    let is_first = agent.rows.migration.number == 1 && agent.rows.migration.armed <= 1;
    if config.again == Again::Migration && is_first && status.may_run() && b_is_free && !world.a.full && !world.b.full {
        moves.add(
            Who::User,
            What::Does("migrates the guest again: B is prepared, rounds begin"),
            Kind::Chance,
            |world| {
                world.prepare_again(config);
            },
        );
    }
}

/// Whether events of the VMM are for a migration.
pub(crate) fn holds_migration(world: &World) -> bool {
    world.a.agent.as_ref().is_some_and(|agent| agent.core.is_some())
}

/// The VMM of a guest that no migration has is gone: it crashed. Said also where it cannot be written.
pub(crate) fn vmm_died(world: &mut World, write: Write) {
    let Some(agent) = &mut world.a.agent else { return };
    if agent.rows.migration.serves_pages && !agent.rows.migration.over {
        return;
    }
    if agent.rows.instance.status.may_run() {
        agent.rows.instance.status = Status::Crashed;
        let _ = save(world, write);
    }
}

/// A right of `resolve` stays one if it could not be written that the guest starts under it.
fn right_of(row: InstanceRow, epoch: Epoch) -> Option<Epoch> {
    (row.known == epoch).then_some(epoch)
}

fn verdict(agent: &AgentA, config: &Config) -> Verdict {
    let policy = if config.restarts {
        RestartPolicy::OnCrash
    } else {
        RestartPolicy::Never
    };
    let fallen = Fallen {
        wanted: Wanted::ByPolicy(policy, Ended::Crashed),
        had: agent.rows.instance.epoch,
        known: agent.rows.instance.known,
        leaving: if agent.rows.migration.over {
            Leaving::No
        } else {
            Leaving::Armed(agent.rows.migration.said)
        },
        origin: Origin::Settled,
    };
    match fallen.verdict() {
        Verdict::Start(_) if config.is(Mutant::UsingAnEpochTwice) => Verdict::Start(fallen.had),
        verdict => verdict,
    }
}

/// In memory; it counts once it is saved.
fn take_new_right(world: &mut World, epoch: Epoch) {
    let Some(agent) = &mut world.a.agent else { return };
    let instance = &mut agent.rows.instance;
    (instance.epoch, instance.known, instance.status) = (epoch, epoch.max(instance.known), Status::Running);
    (agent.starting, agent.resolved) = (Some(epoch), None);
}

/// A new VMM boots the guest, takes the locks and its permit, and runs.
fn boot(world: &mut World, epoch: Epoch) {
    if !world.lock(Side::A) {
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
    world.a.vmm = Some(VmmA {
        phase: PhaseA::Here,
        running: true,
        user_paused: false,
        grants: GrantRegister::default(),
        permits,
        migration: 0,
        epoch,
        next: 1,
        announced: false,
        abort: false,
        send_ended: false,
        anew: true,
    });
    world.a.socket = Socket::new(true);
    if let Some(agent) = &mut world.a.agent {
        agent.attached = true;
        agent.starting = None;
    }
}

/// A restarted agent looks for the instance's VMM by its socket.
pub(crate) fn find(world: &mut World, config: &Config, write: Write) {
    let Some(agent) = &mut world.a.agent else { return };
    if agent.rows.instance.status == Status::Absent {
        // The guest left: what is still there has no right to run.
        agent.rows.migration.over = true;
        agent.attached = false;
        world.end_vmm_a();
        world.a.socket.broke();
        let _ = save(world, write);
        return;
    }
    let Some(vmm) = &world.a.vmm else { return };
    if !agent.rows.instance.status.may_run() {
        agent.attached = false;
        world.end_vmm_a();
        world.a.socket.broke();
        return;
    }
    // The user's pause may have been obeyed and not journalled.
    let is_permitted = vmm.permits.had() >= agent.rows.instance.epoch;
    if is_permitted {
        agent.rows.instance.status = if vmm.user_paused {
            Status::Paused
        } else {
            Status::Running
        };
    }
    let permit = Permit {
        instance: INSTANCE,
        epoch: agent.rows.instance.epoch,
        paused: agent.rows.instance.status == Status::Paused,
    };
    world.a.socket.accepted(crate::mutants::old_orders(config));
    if !is_permitted && let Some(agent) = &mut world.a.agent {
        agent.unanswered.push(OrderA::Permit(permit));
        world.a.socket.order(OrderA::Permit(permit));
    }
}
