//! Agent A while a migration has its instance: the real [`SourceAgent`], driven as `rpc/src/agent/outgoing/` drives it.
//!
//! Events come from the VMM's socket, from agent B, from timers and from the user. Effects are carried out in order, and
//! until the list is done no other event is taken. A step ends before each effect that changes something for good, so that
//! the agent can be killed before it and after it; only one that comes first shares the step of its event.

use ferry_migration::handover::{
    Decision, Doubt, Peer, Side as ResolveSide, SourceAgent, SourceCopy, SourceEvent, SourceState, Wish,
};

use crate::config::{Config, Home};
use crate::effects_a::{feed, go_on};
use crate::moves::{Kind, Moves, What, Who};
use crate::mutants::Mutant;
use crate::network::{Answer, Answers, Call, Id, Message};
use crate::world::{AgentA, EventA, OrderA, ReplyA, Status, World, Write};
use crate::{instance_a, postcopy, vmm_a};

pub(crate) fn moves(moves: &mut Moves<'_>) {
    let (world, config) = (moves.from, moves.config);
    let Some(agent) = &world.a.agent else {
        moves.add_writing_a(What::Does("starts again"), Kind::Sure, |world, write| {
            start(world, config, write)
        });
        return;
    };
    if !agent.todo.is_empty() {
        moves.add_writing_a(What::GoesOn, Kind::Sure, |world, write| go_on(world, config, write));
        return;
    }
    from_vmm(moves, agent);
    let Some(core) = &agent.core else { return };
    from_peer(moves, agent, core);
    from_timers(moves, agent, core);
    from_user(moves, agent, core);
}

/// What the VMM answered and said, its end, and a connection that broke.
fn from_vmm(moves: &mut Moves<'_>, agent: &AgentA) {
    let (world, config) = (moves.from, moves.config);
    if let Some(&reply) = world.a.socket.replies.first() {
        // An answer to what another incarnation asked means nothing.
        let event = event_of_reply(reply).filter(|_| is_asked(agent, reply.order()));
        let what = event.map_or(What::Does("hears its VMM's answer"), What::Source);
        moves.add_writing_a(what, Kind::Sure, |world, write| {
            world.a.socket.replies.remove(0);
            answered(world, config, reply);
            if let Some(event) = event {
                feed(world, config, event, write);
            }
        });
    }
    if let Some(&said) = world.a.socket.events.first() {
        let event = event_of(said);
        moves.add_writing_a(
            event.map_or(What::Does("hears its VMM"), What::Source),
            Kind::Sure,
            |world, write| {
                world.a.socket.events.remove(0);
                match event {
                    Some(event) => feed(world, config, event, write),
                    None => postcopy::drained(world, write),
                }
            },
        );
    }
    let heard_all = world.a.socket.replies.is_empty() && world.a.socket.events.is_empty();
    match &world.a.vmm {
        None if agent.attached && heard_all => {
            moves.add_writing_a(What::Source(SourceEvent::VmmGone), Kind::Sure, |world, write| {
                if let Some(agent) = &mut world.a.agent {
                    agent.attached = false;
                    agent.unanswered.clear();
                }
                world.a.socket.broke();
                match instance_a::holds_migration(world) {
                    true => feed(world, config, SourceEvent::VmmGone, write),
                    false => instance_a::vmm_died(world, write),
                }
            });
        }
        Some(_) if agent.attached && !world.a.socket.open => {
            moves.add(
                Who::AgentA,
                What::Does("connects to its VMM again"),
                Kind::Sure,
                |world| {
                    connect(world, config);
                },
            );
        }
        _ => {}
    }
}

fn from_peer(moves: &mut Moves<'_>, agent: &AgentA, core: &SourceAgent) {
    let (world, config) = (moves.from, moves.config);
    let waits_for_expect = matches!(core.state(), SourceState::Arming { .. });
    let waits_for_decision = matches!(core.state(), SourceState::Asking { .. });
    match agent.call {
        Some(Call::Expect(id)) if waits_for_expect => {
            for answer in agent.answers.all() {
                let event = match answer {
                    Answer::Is(Decision::Open) => SourceEvent::Expecting(id.number),
                    _ => SourceEvent::ExpectFailed(id.number),
                };
                hear(moves, event, Kind::Sure);
            }
            let kind = sure_if(world.b.agent.is_none());
            hear(moves, SourceEvent::ExpectFailed(id.number), kind);
        }
        Some(Call::Decide(id)) if waits_for_decision => {
            for answer in agent.answers.all() {
                let event = match answer {
                    Answer::Is(decision) => SourceEvent::Decided(id.number, decision),
                    Answer::Error => SourceEvent::NoAnswer,
                };
                hear(moves, event, Kind::Sure);
            }
            if config.home == Home::Store && !world.a.full {
                moves.add_writing_a(
                    What::DoesWith("asks the store for D of", id),
                    Kind::Sure,
                    |world, write| {
                        let decision = ask_store(world, config, id);
                        forget_call(world);
                        feed(world, config, SourceEvent::Decided(id.number, decision), write);
                    },
                );
            }
            let unreachable = world.b.agent.is_none() && config.home == Home::Journal;
            hear(moves, SourceEvent::NoAnswer, sure_if(unreachable));
        }
        _ => {}
    }
    for id in Id::all() {
        for decision in [Decision::Running, Decision::Source] {
            let is_ours = id.migration == agent.rows.migration.number || config.is(Mutant::UntaggedMessages);
            if is_ours && world.network.has(Message::Told(id, decision)) {
                let number = if config.is(Mutant::UntaggedMessages) {
                    agent.rows.migration.armed
                } else {
                    id.number
                };
                let event = SourceEvent::Decided(number, decision);
                moves.add_writing_a(What::Source(event), Kind::Chance, |world, write| {
                    feed(world, config, event, write)
                });
            }
        }
    }
    // Heartbeats: B does not take part any more, or has been silent for too long.
    let is_over_at_b = world.b.agent.as_ref().is_none_or(|agent| agent.over);
    if is_before_go(core) && is_over_at_b {
        moves.add_writing_a(What::Source(SourceEvent::Abort), Kind::Sure, |world, write| {
            feed(world, config, SourceEvent::Abort, write);
        });
    }
}

/// The answer to a call, or its deadline: nobody waits for it after that.
fn hear(moves: &mut Moves<'_>, event: SourceEvent, kind: Kind) {
    let config = moves.config;
    moves.add_writing_a(What::Source(event), kind, |world, write| {
        forget_call(world);
        feed(world, config, event, write);
    });
}

fn forget_call(world: &mut World) {
    if let Some(agent) = &mut world.a.agent {
        agent.call = None;
        agent.answers = Answers::default();
    }
}

fn sure_if(is_sure: bool) -> Kind {
    if is_sure { Kind::Sure } else { Kind::Chance }
}

fn ask_store(world: &mut World, config: &Config, id: Id) -> Decision {
    use ferry_migration::handover::Move;
    let there = world.decision(Home::Store, id);
    world
        .swap(config, id, Move::Refuse)
        .unwrap_or(there.unwrap_or(Decision::Open))
}

fn from_timers(moves: &mut Moves<'_>, agent: &AgentA, core: &SourceAgent) {
    let config = moves.config;
    if agent.ask_due && matches!(core.state(), SourceState::Asking { .. }) {
        moves.add_writing_a(What::Source(SourceEvent::TimeToAsk), Kind::Sure, |world, write| {
            if let Some(agent) = &mut world.a.agent {
                agent.ask_due = false;
            }
            feed(world, config, SourceEvent::TimeToAsk, write);
        });
    }
}

fn is_before_go(core: &SourceAgent) -> bool {
    matches!(
        core.state(),
        SourceState::Copying | SourceState::Arming { .. } | SourceState::Granted { .. } | SourceState::Recalling { .. }
    )
}

fn from_user(moves: &mut Moves<'_>, agent: &AgentA, core: &SourceAgent) {
    let (world, config) = (moves.from, moves.config);
    if is_before_go(core) {
        moves.add_writing_a(What::Source(SourceEvent::Abort), Kind::Chance, |world, write| {
            feed(world, config, SourceEvent::Abort, write);
        });
    }
    // The person must be certain that host B is off: a silent agent is not enough.
    let may_resolve = config.resolves && !world.onlooker.resolved && world.b.down;
    let doubt = Doubt {
        side: ResolveSide::Source(agent.rows.migration.said),
        is_indeterminate: matches!(core.state(), SourceState::Asking { .. }),
        known: agent.rows.instance.known,
        peer: Peer::Silent,
    };
    if may_resolve && doubt.resolve(Wish::RunHere).is_ok() {
        let event = SourceEvent::Resolved(Wish::RunHere);
        moves.add_writing_a(What::Source(event), Kind::Chance, |world, write| {
            feed(world, config, event, write)
        });
    }
}

fn event_of(said: EventA) -> Option<SourceEvent> {
    match said {
        EventA::Converged(_) => Some(SourceEvent::Converged),
        EventA::Disarmed(id) => Some(SourceEvent::Disarmed(id.number)),
        EventA::GoSent(id) => Some(SourceEvent::GoSent(id.number)),
        EventA::SendEnded => Some(SourceEvent::CopyEnded),
        EventA::Drained => None,
    }
}

fn event_of_reply(reply: ReplyA) -> Option<SourceEvent> {
    match reply {
        ReplyA::Refused(OrderA::Grant(id), _) => Some(SourceEvent::GrantRefused(id.number)),
        ReplyA::Traded(_, traded) => Some(SourceEvent::Answered(traded)),
        ReplyA::Done(OrderA::Permit(_)) => Some(SourceEvent::Resumed),
        // Taken before, from an agent that was here before this one.
        ReplyA::Refused(OrderA::Permit(permit), had) if had >= permit.epoch => Some(SourceEvent::Resumed),
        ReplyA::Done(_) | ReplyA::Refused(..) => None,
    }
}

/// Whether somebody still waits for the answer: an order of a migration that is over is given until it is answered, but its
/// answer reaches nobody.
fn is_asked(agent: &AgentA, order: OrderA) -> bool {
    let is_ours = match order {
        OrderA::Grant(id) | OrderA::CallOff { id, .. } => id.migration == agent.rows.migration.number,
        OrderA::Permit(_) | OrderA::Pause(_) => true,
    };
    is_ours && agent.unanswered.contains(&order)
}

/// An order is answered: it is not given again. A permit for which the locks are missing is.
fn answered(world: &mut World, config: &Config, reply: ReplyA) {
    let Some(agent) = &mut world.a.agent else { return };
    let order = reply.order();
    if !agent.unanswered.contains(&order) {
        return;
    }
    match reply {
        ReplyA::Refused(OrderA::Permit(permit), had) if had < permit.epoch && !config.is(Mutant::OneTryForTheLocks) => {
            agent.unanswered.retain(|waiting| *waiting != order);
            agent.unanswered.push(order);
            world.a.socket.order(order);
        }
        ReplyA::Done(OrderA::Pause(_)) => {
            agent.unanswered.retain(|waiting| *waiting != order);
            agent.rows.instance.status = Status::Paused;
            if !world.a.full {
                world.a.disk.instance.status = Status::Paused;
            }
        }
        _ => agent.unanswered.retain(|waiting| *waiting != order),
    }
}

/// The VMM accepts a new connection and says where it stands; what was not answered is asked again.
fn connect(world: &mut World, config: &Config) {
    let Some(vmm) = &world.a.vmm else { return };
    let said = vmm_a::made_up(vmm);
    world.a.socket.accepted(crate::mutants::old_orders(config));
    let Some(agent) = &mut world.a.agent else { return };
    agent.attached = true;
    // The user was told that nothing came of it.
    agent.unanswered.retain(|order| !matches!(order, OrderA::Pause(_)));
    world.a.socket.events.extend(said);
    for order in agent.unanswered.clone() {
        world.a.socket.order(order);
    }
}

/// A new incarnation: what the journal says, and the VMM if it is there.
fn start(world: &mut World, config: &Config, write: Write) {
    world.a.down = false;
    let rows = world.a.disk;
    let mut agent = AgentA::new(rows, None);
    agent.attached = world.a.vmm.is_some();
    world.a.agent = Some(agent);
    if world.a.vmm.is_none() {
        world.a.socket.broke();
    }
    let migration = rows.migration;
    if migration.serves_pages && !migration.over {
        connect(world, config);
        return;
    }
    if migration.over || rows.instance.status == Status::Absent {
        instance_a::find(world, config, write);
        return;
    }
    connect(world, config);
    let copy = match world.a.vmm {
        Some(_) => SourceCopy::Held,
        None => SourceCopy::Gone,
    };
    let armed = if config.is(Mutant::ForgettingTheJournal) {
        0
    } else {
        migration.armed
    };
    let resumed = migration.resumed.filter(|_| copy == SourceCopy::Held);
    let (core, effects) = match (resumed, migration.said) {
        (Some(resumed), _) => SourceAgent::recover_resuming(migration.epoch, armed, resumed),
        (None, _) if config.is(Mutant::RestartingWithoutAsking) => SourceAgent::recover(migration.epoch, 0, copy),
        (None, Some(decision)) => SourceAgent::recover_decided(migration.epoch, armed, copy, decision),
        (None, None) => SourceAgent::recover(migration.epoch, armed, copy),
    };
    if let Some(agent) = &mut world.a.agent {
        (agent.core, agent.todo) = (Some(core), effects);
    }
    go_on(world, config, write);
}
