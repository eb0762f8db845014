//! Agent B: the real [`DestinationAgent`], driven as `rpc/src/agent/incoming/` drives it.

use ferry_migration::handover::{Decision, DestinationAgent, DestinationEffect, DestinationEvent};

use crate::config::{Config, Home};
use crate::effects_b::{answer, feed, go_on, move_register};
use crate::instance_b;
use crate::moves::{Kind, Moves, What, Who};
use crate::mutants::Mutant;
use crate::network::{Answer, Call, Id, Message};
use crate::world::{AgentB, EventB, NotDurable, PhaseB, ReplyB, Status, World, Write};

pub(crate) fn moves(moves: &mut Moves<'_>) {
    let (world, config) = (moves.from, moves.config);
    let Some(agent) = &world.b.agent else {
        // A store that is not reached keeps the agent from starting.
        if !(world.b.full && config.home == Home::Store) {
            moves.add_writing_b(What::Does("starts again"), Kind::Sure, |world, write| {
                start(world, config, write)
            });
        }
        return;
    };
    if !agent.todo.is_empty() {
        moves.add_writing_b(What::GoesOn, Kind::Sure, |world, write| go_on(world, config, write));
        return;
    }
    from_vmm(moves, agent);
    from_peer(moves, agent);
    if let Some((attempt, decision)) = agent.later {
        moves.add_writing_b(What::Does("writes its decision again"), Kind::Sure, |world, write| {
            write_again(world, config, (attempt, decision), write);
        });
    }
}

fn from_vmm(moves: &mut Moves<'_>, agent: &AgentB) {
    let (world, config) = (moves.from, moves.config);
    if let Some(&reply) = world.b.socket.replies.first() {
        let what = What::Does("hears its VMM's answer to the permit");
        moves.add_writing_b(what, Kind::Sure, |world, write| {
            world.b.socket.replies.remove(0);
            permit_answered(world, config, reply, write);
        });
    }
    if let Some(&said) = world.b.socket.events.first() {
        let event = event_of(said);
        moves.add_writing_b(What::Destination(event), Kind::Sure, |world, write| {
            world.b.socket.events.remove(0);
            // What was made up for a VMM that was found again: of a claimed guest the permit is on its way already.
            let is_known = matches!(said, EventB::Ready(_))
                && world
                    .b
                    .agent
                    .as_ref()
                    .is_some_and(|agent| agent.permit && agent.core.decision() == Some(Decision::Claimed));
            if !is_known {
                feed(world, config, event, None, write);
            }
        });
    }
    let heard_all = world.b.socket.replies.is_empty() && world.b.socket.events.is_empty();
    match &world.b.vmm {
        None if agent.attached && heard_all => {
            let what = What::Destination(gone(world, config, agent));
            moves.add_writing_b(what, Kind::Sure, |world, write| vmm_gone(world, config, write));
        }
        Some(_) if agent.attached && !world.b.socket.open => {
            moves.add_writing_b(What::Does("connects to its VMM again"), Kind::Sure, |world, write| {
                connect(world, config, write);
            });
        }
        _ => {}
    }
}

fn from_peer(moves: &mut Moves<'_>, agent: &AgentB) {
    let (world, config) = (moves.from, moves.config);
    for id in Id::all().filter(|id| id.number > 0) {
        let is_ours = id.migration == world.b.disk.migration || config.is(Mutant::UntaggedMessages);
        let has_task = is_ours && !agent.over;
        if world.network.has(Message::Expect(id)) {
            let call = Call::Expect(id);
            let number = tagged(config, agent, id);
            if has_task {
                moves.add_writing_b(
                    What::Destination(DestinationEvent::Expect(number)),
                    Kind::Sure,
                    |world, write| {
                        feed(world, config, DestinationEvent::Expect(number), Some(call), write);
                    },
                );
            } else {
                moves.add(
                    Who::AgentB,
                    What::DoesWith("does not expect", id),
                    Kind::Sure,
                    |world| {
                        answer(world, call, Answer::Error);
                    },
                );
            }
        }
        if world.network.has(Message::Decide(id)) {
            let call = Call::Decide(id);
            let number = tagged(config, agent, id);
            if has_task {
                moves.add_writing_b(
                    What::Destination(DestinationEvent::Decide(number)),
                    Kind::Sure,
                    |world, write| {
                        decide(world, config, call, number, write);
                    },
                );
            } else {
                moves.add_writing_b(What::DoesWith("looks D up of", id), Kind::Sure, |world, write| {
                    let answered = decide_without_task(world, config, id, write);
                    answer(world, call, answered);
                });
            }
        }
    }
    if agent.over || !matches!(agent.core.decision(), None | Some(Decision::Open)) {
        return;
    }
    // Nothing was heard from A for too long, or A rolled back.
    let is_left = world.a.agent.as_ref().is_none_or(|source| source.core.is_none())
        || world.network.has(Message::RolledBack(world.b.disk.migration));
    let kind = if is_left { Kind::Sure } else { Kind::Chance };
    moves.add_writing_b(What::Destination(DestinationEvent::GiveUp), kind, |world, write| {
        feed(world, config, DestinationEvent::GiveUp, None, write);
    });
}

/// The attempt of a message: what it says, or, as a mistake, whatever is under way.
fn tagged(config: &Config, agent: &AgentB, id: Id) -> u32 {
    match config.is(Mutant::UntaggedMessages) {
        true => agent.core.attempt().max(1),
        false => id.number,
    }
}

fn event_of(said: EventB) -> DestinationEvent {
    match said {
        EventB::Ready(id) => DestinationEvent::Ready(id.number),
        EventB::Started => DestinationEvent::Started,
        EventB::LoadFailed => DestinationEvent::LoadFailed,
    }
}

fn decide(world: &mut World, config: &Config, call: Call, number: u32, write: Write) {
    let Some(agent) = &mut world.b.agent else { return };
    match agent.core.decision() {
        None if config.is(Mutant::MissingRowIsNotOpen) => answer(world, call, Answer::Error),
        Some(Decision::Claimed) if config.is(Mutant::AnyIncarnationHandsBack) && !agent.first => {
            // As if it knew that the permit was never sent.
            let attempt = agent.core.attempt();
            agent.core = DestinationAgent::recover(Some((attempt, Decision::Source)));
            agent.reply = Some(call);
            agent.todo = vec![
                DestinationEffect::Journal {
                    attempt,
                    decision: Decision::Source,
                },
                DestinationEffect::Answer(Decision::Source),
                DestinationEffect::KillVmm,
            ];
            go_on(world, config, write);
        }
        _ => feed(world, config, DestinationEvent::Decide(number), Some(call), write),
    }
}

/// No task owns the row: the migration is over here, or was never known. A missing row counts as OPEN.
fn decide_without_task(world: &mut World, config: &Config, id: Id, write: Write) -> Answer {
    let newest = newest(world, config, id.migration);
    if let Some((number, decision)) = newest
        && number >= id.number
    {
        let settled = if number > id.number { Decision::Source } else { decision };
        if settled != Decision::Open {
            return Answer::Is(settled);
        }
    }
    if config.is(Mutant::MissingRowIsNotOpen) {
        return Answer::Error;
    }
    match move_register(world, config, id, Decision::Source, write) {
        Ok(()) => Answer::Is(Decision::Source),
        Err(NotDurable) => Answer::Error,
    }
}

/// The newest attempt with a row, and its D.
fn newest(world: &World, config: &Config, migration: u8) -> Option<(u32, Decision)> {
    let rows = Id::all().filter(|id| id.migration == migration && id.number > 0);
    let with_row = rows.filter_map(|id| match config.home {
        Home::Journal => world.decision(Home::Journal, id).map(|decision| (id.number, decision)),
        Home::Store => world
            .store
            .filter(|owner| owner.id == id)
            .map(|owner| (id.number, owner.phase)),
    });
    with_row.last()
}

fn write_again(world: &mut World, config: &Config, (attempt, decision): (u32, Decision), write: Write) {
    let id = Id {
        migration: world.b.disk.migration,
        number: attempt,
    };
    if move_register(world, config, id, decision, write).is_err() {
        return;
    }
    let Some(agent) = &mut world.b.agent else { return };
    agent.later = None;
    if decision == Decision::Running {
        match world.b.vmm {
            Some(_) => feed(world, config, DestinationEvent::Started, None, write),
            None => vmm_gone(world, config, write),
        }
        return;
    }
    agent.over = true;
    agent.instance.status = Status::Absent;
    world.network.send(Message::Told(id, decision));
    instance_b::save(world, write);
}

/// What a dead VMM means to the core.
fn gone(world: &World, config: &Config, agent: &AgentB) -> DestinationEvent {
    let started = world.b.mark && !config.is(Mutant::CrashTakenForRefusal);
    let same_boot = agent.claimed_boot == world.b.boot || config.is(Mutant::HandingBackAfterHostCrash);
    DestinationEvent::VmmGone { started, same_boot }
}

fn vmm_gone(world: &mut World, config: &Config, write: Write) {
    let Some(agent) = &mut world.b.agent else { return };
    world.b.socket.broke();
    agent.attached = false;
    agent.permit = false;
    if agent.over {
        instance_b::vmm_died(world, write);
        return;
    }
    let Some(agent) = &world.b.agent else { return };
    let event = gone(world, config, agent);
    feed(world, config, event, None, write);
}

fn permit_answered(world: &mut World, config: &Config, reply: ReplyB, write: Write) {
    let Some(agent) = &mut world.b.agent else { return };
    agent.permit = false;
    match reply {
        ReplyB::Taken => {}
        ReplyB::Refused { started: true } => feed(world, config, DestinationEvent::Started, None, write),
        // It did not start and will not: once it is dead, its missing mark proves that.
        ReplyB::Refused { started: false } => world.end_vmm_b(),
    }
}

/// The VMM accepts a new connection and says where it stands: what it said meanwhile is made up for.
fn connect(world: &mut World, config: &Config, write: Write) {
    let Some(vmm) = &world.b.vmm else { return };
    let made_up = match vmm.phase {
        PhaseB::Here => Some(EventB::Started),
        PhaseB::Ready(id) => Some(EventB::Ready(id)),
        PhaseB::Failed => Some(EventB::LoadFailed),
        PhaseB::Loading => None,
    };
    world.b.socket.accepted(crate::mutants::old_orders(config));
    let Some(agent) = &mut world.b.agent else { return };
    agent.attached = true;
    // An answer to it is lost, and where the VMM stands says as much.
    agent.permit = false;
    if agent.over {
        return;
    }
    world.b.socket.events.extend(made_up);
    feed(world, config, DestinationEvent::VmmFound, None, write);
}

/// A new incarnation: what the journal says, and the VMM if it is there.
fn start(world: &mut World, config: &Config, write: Write) {
    world.b.down = false;
    let rows = world.b.disk;
    let newest = newest(world, config, rows.migration);
    let claimed_boot = match (newest, config.home) {
        (Some((number, _)), Home::Journal) => {
            let id = Id {
                migration: rows.migration,
                number,
            };
            rows.decisions[id.index()].map_or(world.b.boot, |(_, boot)| boot)
        }
        (Some(_), Home::Store) => world.store.map_or(world.b.boot, |owner| owner.boot),
        (None, _) => world.b.boot,
    };
    let core = match newest {
        Some(_) if config.is(Mutant::ForgettingTheJournal) => DestinationAgent::recover(None),
        newest => DestinationAgent::recover(newest),
    };
    let mut agent = AgentB::new(core, rows.instance, claimed_boot);
    agent.over = rows.over;
    agent.first = false;
    agent.attached = world.b.vmm.is_some();
    world.b.agent = Some(agent);
    if world.b.vmm.is_none() {
        world.b.socket.broke();
    }
    if rows.over {
        instance_b::find(world, config, write);
    } else if world.b.vmm.is_some() {
        connect(world, config, write);
    } else {
        vmm_gone(world, config, write);
    }
}
