//! VMM B: it loads, checks what GO's manifest lists, takes the locks, and runs with a permit.

use ferry_migration::handover::Permit;

use crate::config::Config;
use crate::moves::{Kind, Moves, What, Who};
use crate::mutants::Mutant;
use crate::world::{EventB, PhaseB, ReplyB, Side, World};

pub(crate) fn moves(moves: &mut Moves<'_>) {
    let (world, config) = (moves.from, moves.config);
    let Some(vmm) = &world.b.vmm else { return };
    if let Some(&permit) = world.b.socket.orders.first() {
        moves.add(
            Who::VmmB,
            What::DoesUnder("is given a permit of", permit.epoch),
            Kind::Sure,
            |world| {
                world.b.socket.orders.remove(0);
                let reply = take_permit(world, config, permit);
                world.b.socket.reply(reply);
            },
        );
    }
    if vmm.phase == PhaseB::Loading {
        if let Some(id) = world.stream.go {
            moves.add(
                Who::VmmB,
                What::DoesWith("finds that it holds all that GO lists, of", id),
                Kind::Sure,
                |world| {
                    world.stream.go = None;
                    let locked = world.lock(Side::B);
                    let said = if locked { EventB::Ready(id) } else { EventB::LoadFailed };
                    if let Some(vmm) = &mut world.b.vmm {
                        vmm.phase = if locked { PhaseB::Ready(id) } else { PhaseB::Failed };
                        vmm.missing = config.postcopy;
                    }
                    world.b.socket.event(said);
                },
            );
        }
        let is_cut = world.stream.closed && world.stream.go.is_none();
        let kind = if is_cut { Kind::Sure } else { Kind::Chance };
        moves.add(
            Who::VmmB,
            What::Does("fails to load: cut, or the manifest is refused"),
            kind,
            |world| {
                world.stream.closed = true;
                world.stream.go = None;
                if let Some(vmm) = &mut world.b.vmm {
                    vmm.phase = PhaseB::Failed;
                }
                world.b.socket.event(EventB::LoadFailed);
            },
        );
    }
}

/// The mark is left *before* the first instruction runs, and for a guest that its user had paused too.
fn take_permit(world: &mut World, config: &Config, permit: Permit) -> ReplyB {
    let Some(vmm) = &mut world.b.vmm else {
        return ReplyB::Refused { started: false };
    };
    let started = vmm.phase == PhaseB::Here;
    let is_ready = matches!(vmm.phase, PhaseB::Ready(_));
    if !is_ready || vmm.permits.take(permit).is_err() {
        return ReplyB::Refused { started };
    }
    vmm.phase = PhaseB::Here;
    vmm.user_paused = permit.paused;
    vmm.running = !permit.paused;
    world.b.mark = true;
    world.onlooker.ran_at_b = true;
    world.take_right(permit.epoch);
    let keeps_quiet = permit.paused && config.is(Mutant::PausedGuestNeverRunning);
    if !keeps_quiet {
        world.b.socket.event(EventB::Started);
    }
    ReplyB::Taken
}
