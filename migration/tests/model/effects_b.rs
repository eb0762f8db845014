//! Agent B carries out what its core asks for, and moves D, as `rpc/src/agent/incoming/driver.rs` does.

use ferry_migration::handover::{Decision, DestinationEffect, DestinationEvent, Epoch, HandBack, Move, Permit};

use crate::config::{Config, Home};
use crate::invariants::Fault;
use crate::network::{Answer, Call, INSTANCE, Id, Message};
use crate::world::{NotDurable, Status, World, Write};
use crate::{instance_b, mutants};

/// Answers a call, if its caller still waits.
pub(crate) fn answer(world: &mut World, call: Call, answer: Answer) {
    if let Some(agent) = &mut world.a.agent
        && agent.call == Some(call)
    {
        agent.answers.add(answer);
    }
}

/// One event: the core decides.
pub(crate) fn feed(world: &mut World, config: &Config, event: DestinationEvent, reply: Option<Call>, write: Write) {
    let Some(agent) = &mut world.b.agent else { return };
    if mutants::is_ignored(config, &agent.core, event) {
        return;
    }
    agent.todo = agent.core.step(event);
    agent.reply = reply;
    mutants::reorder_at_b(config, &mut agent.todo);
    go_on(world, config, write);
}

fn is_for_good(effect: &DestinationEffect) -> bool {
    match effect {
        DestinationEffect::Journal { .. } | DestinationEffect::KillVmm => true,
        DestinationEffect::Answer(_)
        | DestinationEffect::Refuse
        | DestinationEffect::SendPermit
        | DestinationEffect::TellSource(_)
        | DestinationEffect::Adopt
        | DestinationEffect::AdoptCrashed
        | DestinationEffect::JournalLater { .. } => false,
    }
}

/// Carries effects out, up to the next that changes something for good.
pub(crate) fn go_on(world: &mut World, config: &Config, write: Write) {
    let mut is_first = true;
    while let Some(effect) = world.b.agent.as_ref().and_then(|agent| agent.todo.first().copied()) {
        if is_for_good(&effect) && !is_first {
            return;
        }
        is_first = false;
        let done = carry_out(world, config, effect, write);
        let Some(agent) = &mut world.b.agent else { return };
        match done {
            Ok(()) => drop(agent.todo.remove(0)),
            Err(NotDurable) => agent.todo = agent.core.step(DestinationEvent::JournalFailed),
        }
    }
    let Some(agent) = &mut world.b.agent else { return };
    // Whoever still waits is told to ask again.
    if let Some(call) = agent.reply.take() {
        answer(world, call, Answer::Error);
    }
    let Some(agent) = &mut world.b.agent else { return };
    if agent.core.is_refused() && !agent.attached && agent.later.is_none() && !agent.over {
        agent.over = true;
        agent.instance.status = Status::Absent;
        instance_b::save(world, write);
    }
}

fn carry_out(world: &mut World, config: &Config, effect: DestinationEffect, write: Write) -> Result<(), NotDurable> {
    let Some(agent) = &mut world.b.agent else { return Ok(()) };
    let migration = world.b.disk.migration;
    match effect {
        DestinationEffect::Journal { attempt, decision } => {
            let id = Id {
                migration,
                number: attempt,
            };
            move_register(world, config, id, decision, write)?;
        }
        DestinationEffect::Answer(decision) => {
            if let Some(call) = agent.reply.take() {
                answer(world, call, Answer::Is(decision));
            }
        }
        DestinationEffect::Refuse => {
            if let Some(call) = agent.reply.take() {
                answer(world, call, Answer::Error);
            }
        }
        DestinationEffect::SendPermit => send_permit(world),
        DestinationEffect::KillVmm => {
            agent.attached = false;
            agent.permit = false;
            world.end_vmm_b();
            world.b.socket.broke();
        }
        DestinationEffect::TellSource(decision) => {
            let id = Id {
                migration,
                number: agent.core.attempt(),
            };
            world.network.send(Message::Told(id, decision));
        }
        DestinationEffect::Adopt => {
            agent.over = true;
            agent.later = None;
            instance_b::save(world, write);
        }
        DestinationEffect::AdoptCrashed => {
            agent.over = true;
            agent.later = None;
            agent.attached = false;
            agent.permit = false;
            agent.instance.status = Status::Crashed;
            world.end_vmm_b();
            world.b.socket.broke();
            instance_b::save(world, write);
        }
        DestinationEffect::JournalLater { attempt, decision } => agent.later = Some((attempt, decision)),
    }
    Ok(())
}

fn send_permit(world: &mut World) {
    let epoch = world.b.disk.epoch.next();
    let Some(agent) = &mut world.b.agent else { return };
    agent.permit = true;
    let permit = permit(epoch, world.b.disk.paused);
    // It is sent again only over a new connection, or when it was not answered.
    if !world.b.socket.orders.contains(&permit) {
        world.b.socket.order(permit);
    }
}

fn permit(epoch: Epoch, paused: bool) -> Permit {
    Permit {
        instance: INSTANCE,
        epoch,
        paused,
    }
}

/// D moves, and with RUNNING the instance becomes this host's, in one transaction.
pub(crate) fn move_register(
    world: &mut World,
    config: &Config,
    id: Id,
    decision: Decision,
    write: Write,
) -> Result<(), NotDurable> {
    let boot = world.b.boot;
    let before = world.decision(config.home, id);
    if let Some(agent) = &mut world.b.agent
        && id.migration == world.b.disk.migration
    {
        if decision == Decision::Claimed {
            agent.claimed_boot = boot;
        }
        if decision == Decision::Running {
            let epoch = world.b.disk.epoch.next();
            agent.instance.epoch = epoch;
            agent.instance.known = epoch;
            agent.instance.status = if world.b.disk.paused {
                Status::Paused
            } else {
                Status::Running
            };
        }
    }
    let by = match (decision, before) {
        (Decision::Open, _) => Move::Expect,
        (Decision::Claimed, _) => Move::Claim,
        (Decision::Running, _) => Move::Run,
        (Decision::Source, Some(Decision::Claimed)) => Move::GiveBack(hand_back(world)),
        (Decision::Source, _) => Move::Refuse,
    };
    let moved = match config.home {
        Home::Store if write.lands() => world.swap(config, id, by),
        _ => by.apply(before),
    };
    if moved.is_err() {
        // Who comes late at the store loses; in a journal of one's own nothing but a final row is in the way.
        let is_final = matches!(before, Some(Decision::Running | Decision::Source));
        if !(config.home == Home::Store || is_final) {
            world.onlooker.fault.get_or_insert(Fault::IllegalMove);
        }
        return Err(NotDurable);
    }
    if write.lands() {
        if config.home == Home::Journal {
            world.b.disk.decisions[id.index()] = Some((decision, boot));
        }
        if decision == Decision::Running
            && let Some(agent) = &world.b.agent
        {
            world.b.disk.instance = agent.instance;
        }
    }
    write.result()
}

/// The proof that agent B has; whether it holds is seen from who runs the guest.
fn hand_back(world: &World) -> HandBack {
    match world.b.vmm {
        Some(_) => HandBack::PermitNotSent,
        None => HandBack::DeadBeforeStart,
    }
}
