//! VMM A: it obeys its agent, copies, and owns the fact GO.
//!
//! As `vmm_process/vmm.rs` (the loop that obeys) and `migration::source` (the thread that copies) do it, around the real
//! [`GrantRegister`](ferry_migration::handover::GrantRegister) and [`Permits`](ferry_migration::handover::Permits).

use ferry_migration::handover::{Epoch, Permit, Traded};

use crate::config::Config;
use crate::moves::{Kind, Moves, What, Who};
use crate::mutants::Mutant;
use crate::network::Id;
use crate::world::{EventA, OrderA, PhaseA, ReplyA, Side, VmmA, World};

pub(crate) fn moves(moves: &mut Moves<'_>) {
    let (world, config) = (moves.from, moves.config);
    let Some(vmm) = &world.a.vmm else { return };
    if let Some(&order) = world.a.socket.orders.first() {
        let what = match order {
            OrderA::Grant(id) => What::DoesWith("is given the grant of", id),
            OrderA::CallOff { id, end: true } => What::DoesWith("is asked to call the migration off at", id),
            OrderA::CallOff { id, end: false } => What::DoesWith("is asked to call off", id),
            OrderA::Permit(permit) => What::DoesUnder("is given a permit of", permit.epoch),
            OrderA::Pause(epoch) => What::DoesUnder("is told to pause, under", epoch),
        };
        moves.add(Who::VmmA, what, Kind::Sure, |world| obey(world, config, order));
    }
    match vmm.phase {
        PhaseA::Rounds => rounds(moves, vmm),
        PhaseA::Stopped(id) => stopped(moves, vmm, id),
        PhaseA::Sent(id) => moves.add(
            Who::VmmA,
            What::DoesWith("says that it sent GO of", id),
            Kind::Sure,
            |world| {
                set(world, |vmm| vmm.phase = PhaseA::Parked(id));
                world.a.socket.event(EventA::GoSent(id));
            },
        ),
        PhaseA::Here | PhaseA::Parked(_) | PhaseA::PageSource => {}
    }
}

fn set(world: &mut World, change: impl FnOnce(&mut VmmA)) {
    if let Some(vmm) = &mut world.a.vmm {
        change(vmm);
    }
}

fn rounds(moves: &mut Moves<'_>, vmm: &VmmA) {
    let (world, config) = (moves.from, moves.config);
    // The agent may have called the attempt off by itself: the next one is announced then.
    let cancelled = vmm
        .grants
        .cancelled()
        .map(Id::of)
        .filter(|id| id.migration == vmm.migration);
    let next = cancelled.map_or(vmm.next, |id| vmm.next.max(id.number + 1));
    let may_announce = !vmm.announced || next > vmm.next;
    if may_announce && next <= attempts(config, vmm) && !vmm.abort {
        let id = id(vmm, next);
        moves.add(
            Who::VmmA,
            What::DoesWith("says that the rest fits, for", id),
            Kind::Sure,
            |world| {
                set(world, |vmm| (vmm.next, vmm.announced) = (next, true));
                world.a.socket.event(EventA::Converged(id));
            },
        );
    }
    if let Some(grant) = vmm.grants.held() {
        let id = Id::of(grant);
        if grant == vmm.attempt(id) && id.migration == vmm.migration && id.number >= vmm.next {
            moves.add(
                Who::VmmA,
                What::DoesWith("stops the guest for", id),
                Kind::Sure,
                |world| {
                    set(world, |vmm| {
                        vmm.phase = PhaseA::Stopped(id);
                        vmm.next = id.number;
                        vmm.running = false;
                    });
                },
            );
        } else {
            moves.add(
                Who::VmmA,
                What::DoesWith("ends the copy: a foreign grant,", id),
                Kind::Sure,
                end_copy,
            );
        }
    }
    // With no attempt left the copy ends by its own timeout, as it may at any time.
    let must_end = vmm.abort || world.stream.closed || next > attempts(config, vmm);
    let kind = if must_end { Kind::Sure } else { Kind::Chance };
    moves.add(
        Who::VmmA,
        What::Does("ends the copy: aborted, timed out or cut"),
        kind,
        end_copy,
    );
}

fn attempts(config: &Config, vmm: &VmmA) -> u32 {
    if vmm.migration == 1 { config.attempts() } else { 1 }
}

fn id(vmm: &VmmA, number: u32) -> Id {
    Id {
        migration: vmm.migration,
        number,
    }
}

fn stopped(moves: &mut Moves<'_>, vmm: &VmmA, id: Id) {
    let world = moves.from;
    if vmm.grants.held() == Some(vmm.attempt(id)) {
        if !vmm.abort && !world.stream.closed {
            moves.add(
                Who::VmmA,
                What::DoesWith("trades the grant and sends GO of", id),
                Kind::Sure,
                |world| go(world, id),
            );
        }
        moves.add(Who::VmmA, What::DoesWith("disarms", id), Kind::Chance, |world| {
            disarm(world, id)
        });
    } else {
        moves.add(
            Who::VmmA,
            What::DoesWith("finds the grant taken back of", id),
            Kind::Sure,
            |world| disarm(world, id),
        );
    }
    let kind = if vmm.abort || world.stream.closed {
        Kind::Sure
    } else {
        Kind::Chance
    };
    moves.add(
        Who::VmmA,
        What::Does("ends the copy while the guest stands still"),
        kind,
        end_copy,
    );
}

/// The grant is traded, *then* the disks are let go, *then* GO is written.
fn go(world: &mut World, id: Id) {
    let Some(vmm) = &mut world.a.vmm else { return };
    let attempt = vmm.attempt(id);
    if vmm.grants.trade_for_go(attempt) {
        vmm.phase = PhaseA::Sent(id);
        world.locks = world.locks.filter(|&holder| holder != Side::A);
        world.stream.go = Some(id);
    }
}

/// The guest runs on under the epoch that it has; rounds go on.
fn disarm(world: &mut World, id: Id) {
    let Some(vmm) = &mut world.a.vmm else { return };
    let attempt = vmm.attempt(id);
    if vmm.grants.trade_for_cancelled(attempt) == Traded::GoSent {
        vmm.phase = PhaseA::Sent(id);
        return;
    }
    vmm.phase = PhaseA::Rounds;
    vmm.running = !vmm.user_paused;
    (vmm.next, vmm.announced) = (id.number + 1, false);
    world.a.socket.event(EventA::Disarmed(id));
}

/// The migration ends before GO: the attempt is traded for CANCELLED, the guest runs on.
fn end_copy(world: &mut World) {
    let Some(vmm) = &mut world.a.vmm else { return };
    let number = match vmm.phase {
        PhaseA::Stopped(id) => id.number,
        _ => vmm.next,
    };
    let attempt = vmm.attempt(id(vmm, number));
    if vmm.grants.close(attempt) == Traded::GoSent {
        return;
    }
    vmm.phase = PhaseA::Here;
    vmm.running = !vmm.user_paused;
    (vmm.announced, vmm.abort, vmm.send_ended) = (false, false, true);
    world.stream.closed = true;
    world.a.socket.event(EventA::SendEnded);
}

/// One order of whoever wrote into the socket.
fn obey(world: &mut World, config: &Config, order: OrderA) {
    world.a.socket.orders.remove(0);
    let Some(vmm) = &mut world.a.vmm else { return };
    let had = vmm.permits.had();
    let reply = match order {
        OrderA::Grant(id) => {
            let attempt = vmm.attempt(id);
            let is_ours = vmm.is_sending() && id.migration == vmm.migration;
            if is_ours && vmm.grants.offer(attempt).is_ok() {
                ReplyA::Done(order)
            } else {
                ReplyA::Refused(order, had)
            }
        }
        OrderA::CallOff { id, end } => {
            let attempt = vmm.attempt(id);
            let traded = vmm.grants.trade_for_cancelled(attempt);
            if traded == Traded::Cancelled && end && vmm.is_sending() {
                vmm.abort = true;
            }
            ReplyA::Traded(order, traded)
        }
        OrderA::Permit(permit) => {
            if take_permit(world, config, permit) {
                ReplyA::Done(order)
            } else {
                let had = world.a.vmm.as_ref().map_or(Epoch(0), |vmm| vmm.permits.had());
                ReplyA::Refused(order, had)
            }
        }
        OrderA::Pause(epoch) => {
            if vmm.phase == PhaseA::Here && !vmm.grants.binds() && had == epoch {
                vmm.running = false;
                vmm.user_paused = true;
                ReplyA::Done(order)
            } else {
                ReplyA::Refused(order, had)
            }
        }
    };
    world.a.socket.reply(reply);
}

/// The one place where a guest gets the right to run. The locks first: where somebody has them, the permit is not taken.
fn take_permit(world: &mut World, config: &Config, permit: Permit) -> bool {
    let Some(vmm) = &world.a.vmm else { return false };
    let PhaseA::Parked(id) = vmm.phase else { return false };
    let is_old_right = config.is(Mutant::EqualEpochAfterGo) && permit.epoch == vmm.permits.had();
    if !is_old_right && (vmm.permits.check(permit).is_err() || permit.epoch <= vmm.attempt(id).epoch) {
        return false;
    }
    if !world.lock(Side::A) {
        return false;
    }
    world.take_right(permit.epoch);
    let Some(vmm) = &mut world.a.vmm else { return false };
    // Checked above; an old right is one that the mistake lets through.
    let _ = vmm.permits.take(permit);
    vmm.grants.superseded();
    vmm.phase = PhaseA::Here;
    vmm.user_paused = permit.paused;
    vmm.running = !permit.paused;
    // The stream was kept until now.
    world.stream.closed = true;
    true
}

/// What an agent that connects is told, as the events that it missed.
pub(crate) fn made_up(vmm: &VmmA) -> Vec<EventA> {
    let cancelled = vmm
        .grants
        .cancelled()
        .map(Id::of)
        .filter(|id| id.migration == vmm.migration);
    let mut said: Vec<_> = cancelled.map(EventA::Disarmed).into_iter().collect();
    match vmm.phase {
        PhaseA::Parked(id) => said.push(EventA::GoSent(id)),
        PhaseA::PageSource => {}
        PhaseA::Here => said.push(EventA::SendEnded),
        PhaseA::Rounds | PhaseA::Stopped(_) | PhaseA::Sent(_) if vmm.announced => {
            said.push(EventA::Converged(id(vmm, vmm.next)));
        }
        PhaseA::Rounds | PhaseA::Stopped(_) | PhaseA::Sent(_) => {}
    }
    said
}
