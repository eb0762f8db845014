//! Agent A carries out what its core asks for, as `rpc/src/agent/outgoing/switchover.rs` and `ending.rs` do.

use ferry_migration::handover::{Ending, Permit, SourceEffect, SourceEvent};

use crate::config::{Config, Home};
use crate::network::{Answers, Call, INSTANCE, Message};
use crate::world::{AgentA, NotDurable, OrderA, Status, World, Write};
use crate::{mutants, postcopy};

/// One event: the core decides.
pub(crate) fn feed(world: &mut World, config: &Config, event: SourceEvent, write: Write) {
    let Some(agent) = &mut world.a.agent else { return };
    let Some(core) = &mut agent.core else { return };
    agent.todo = match mutants::instead(config, core.state(), event) {
        Some(effects) => effects,
        None => core.step(mutants::as_heard(config, core.state(), event)),
    };
    mutants::reorder(config, &mut agent.todo);
    go_on(world, config, write);
}

/// Whether an effect changes something for good.
fn is_for_good(effect: &SourceEffect) -> bool {
    match effect {
        SourceEffect::JournalArmed(_)
        | SourceEffect::JournalDecision(..)
        | SourceEffect::JournalResumed(_)
        | SourceEffect::JournalResolved(..)
        | SourceEffect::DestroyCopy
        | SourceEffect::Finish(_) => true,
        SourceEffect::AskExpect(_)
        | SourceEffect::GiveGrant(_)
        | SourceEffect::AskTrade(_)
        | SourceEffect::AskRecall(_)
        | SourceEffect::AskAfter(_)
        | SourceEffect::AskAgain
        | SourceEffect::AskDecision(_)
        | SourceEffect::SendPermit(_)
        | SourceEffect::RollBackDestination
        | SourceEffect::SayIndeterminate => false,
    }
}

/// Carries effects out, up to the next that changes something for good.
pub(crate) fn go_on(world: &mut World, config: &Config, write: Write) {
    let mut is_first = true;
    while let Some(effect) = world.a.agent.as_ref().and_then(|agent| agent.todo.first().copied()) {
        if is_for_good(&effect) && !is_first {
            return;
        }
        is_first = false;
        match carry_out(world, config, effect, write) {
            Ok(Next::Goes) => {
                if let Some(agent) = &mut world.a.agent
                    && !agent.todo.is_empty()
                {
                    agent.todo.remove(0);
                }
            }
            Ok(Next::Stays) => return,
            Err(NotDurable) => {
                let Some(agent) = &mut world.a.agent else { return };
                agent.todo = match &mut agent.core {
                    Some(core) => core.step(SourceEvent::JournalFailed),
                    None => Vec::new(),
                };
            }
        }
    }
}

/// Whether the list goes on after an effect, in this step.
enum Next {
    Goes,
    /// It is done in two steps, or tried again.
    Stays,
}

fn carry_out(world: &mut World, config: &Config, effect: SourceEffect, write: Write) -> Result<Next, NotDurable> {
    let Some(agent) = &mut world.a.agent else {
        return Ok(Next::Goes);
    };
    let rows = &mut agent.rows;
    match effect {
        SourceEffect::JournalArmed(attempt) => {
            rows.migration.armed = attempt;
            rows.instance.known = rows.instance.known.max(rows.migration.epoch.next());
            save(world, write)?;
        }
        SourceEffect::JournalDecision(_, decision) => {
            rows.migration.said = Some(decision);
            save_migration(world, write)?;
        }
        SourceEffect::JournalResumed(epoch) => {
            let before = *rows;
            rows.migration.resumed = Some(epoch);
            (rows.instance.epoch, rows.instance.known) = (epoch, epoch);
            if let Err(failed) = save(world, write) {
                if let Some(agent) = &mut world.a.agent {
                    agent.rows = before;
                }
                return Err(failed);
            }
        }
        SourceEffect::JournalResolved(_, epoch) => {
            let before = *rows;
            (rows.migration.resumed, rows.migration.over) = (Some(epoch), true);
            rows.instance.status = Status::Crashed;
            (rows.instance.epoch, rows.instance.known) = (epoch, epoch);
            if let Err(failed) = save(world, write) {
                if let Some(agent) = &mut world.a.agent {
                    agent.rows = before;
                }
                return Err(failed);
            }
            world.onlooker.resolved = true;
        }
        SourceEffect::AskExpect(number) => {
            let id = agent.id(number);
            call(agent, Call::Expect(id));
            world.network.send(Message::Expect(id));
        }
        SourceEffect::AskDecision(number) => {
            let id = agent.id(number);
            call(agent, Call::Decide(id));
            if config.home == Home::Journal {
                world.network.send(Message::Decide(id));
            }
        }
        SourceEffect::GiveGrant(number) => order(world, |agent| OrderA::Grant(agent.id(number))),
        SourceEffect::AskTrade(number) => order(world, |agent| OrderA::CallOff {
            id: agent.id(number),
            end: true,
        }),
        SourceEffect::AskRecall(number) => order(world, |agent| OrderA::CallOff {
            id: agent.id(number),
            end: false,
        }),
        SourceEffect::SendPermit(epoch) => {
            let paused = rows.instance.status == Status::Paused;
            let permit = Permit {
                instance: INSTANCE,
                epoch,
                paused,
            };
            order(world, |_| OrderA::Permit(permit));
        }
        SourceEffect::AskAfter(_) | SourceEffect::AskAgain => agent.ask_due = true,
        SourceEffect::RollBackDestination => {
            let message = Message::RolledBack(rows.migration.number);
            world.network.send(message);
        }
        SourceEffect::SayIndeterminate => {
            // Said as well as it can be; a write that fails is only logged. Both rows: one that was said to have failed before may be there.
            let _ = save(world, write);
        }
        SourceEffect::DestroyCopy if config.postcopy => {
            postcopy::begin(world, config, write)?;
        }
        SourceEffect::DestroyCopy if world.a.vmm.is_some() => {
            agent.attached = false;
            agent.unanswered.clear();
            world.end_vmm_a();
            world.a.socket.broke();
            return Ok(Next::Stays);
        }
        SourceEffect::DestroyCopy => {
            rows.instance.status = Status::Absent;
            save(world, write)?;
        }
        SourceEffect::Finish(ending) => return finish(world, ending, write),
    }
    Ok(Next::Goes)
}

fn call(agent: &mut AgentA, call: Call) {
    agent.call = Some(call);
    agent.answers = Answers::default();
}

fn order(world: &mut World, order: impl FnOnce(&AgentA) -> OrderA) {
    let Some(agent) = &mut world.a.agent else { return };
    let order = order(agent);
    if !agent.unanswered.contains(&order) {
        agent.unanswered.push(order);
    }
    world.a.socket.order(order);
}

/// Both rows, in one transaction.
pub(crate) fn save(world: &mut World, write: Write) -> Result<(), NotDurable> {
    if let Some(agent) = &world.a.agent
        && write.lands()
    {
        world.a.disk = agent.rows;
    }
    write.result()
}

/// The migration's row alone.
pub(crate) fn save_migration(world: &mut World, write: Write) -> Result<(), NotDurable> {
    if let Some(agent) = &world.a.agent
        && write.lands()
    {
        world.a.disk.migration = agent.rows.migration;
    }
    write.result()
}

/// The migration is over for agent A, once that is written.
fn finish(world: &mut World, ending: Ending, write: Write) -> Result<Next, NotDurable> {
    let Some(agent) = &mut world.a.agent else {
        return Ok(Next::Goes);
    };
    if agent.rows.migration.serves_pages {
        // Post-copy: it is over when the last page is acknowledged.
        agent.core = None;
        return Ok(Next::Goes);
    }
    let before = agent.rows;
    agent.rows.migration.over = true;
    match ending {
        Ending::Crashed | Ending::GuestStopped => agent.rows.instance.status = Status::Crashed,
        // The copy is not resumed, and the guest starts under the right that was journalled.
        Ending::Resolved(_) => {
            agent.resolved = Some(agent.rows.instance.known);
            agent.attached = false;
            agent.unanswered.clear();
            world.end_vmm_a();
            world.a.socket.broke();
        }
        Ending::Arrived | Ending::Stayed => {}
    }
    if save(world, write).is_err() {
        // Tried again until it is written.
        if let Some(agent) = &mut world.a.agent {
            agent.rows = before;
        }
        return Ok(Next::Stays);
    }
    if let Some(agent) = &mut world.a.agent {
        agent.core = None;
        agent.call = None;
        agent.answers = Answers::default();
        agent.ask_due = false;
        agent.todo.clear();
    }
    Ok(Next::Goes)
}
