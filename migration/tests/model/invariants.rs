//! What must hold, and when nothing is left to do.

use std::fmt;

use crate::config::{Config, Failure};
use crate::world::{PhaseA, Side, Status, World};

/// What was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fault {
    TwoOwners,
    SourceAfterDestination,
    EpochTwice,
    WithoutLocks,
    IllegalMove,
    NobodyKnows,
    Lost,
    NeverSettles,
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::TwoOwners => "two VMMs may run the guest",
            Self::SourceAfterDestination => "the source's copy runs after the destination ran the guest",
            Self::EpochTwice => "an epoch is used twice",
            Self::WithoutLocks => "a guest runs without the locks of its disks",
            Self::IllegalMove => "D makes a move that it does not have",
            Self::NobodyKnows => "it is over, and not exactly one agent has the guest and knows how it stands",
            Self::Lost => "the guest is lost, and could have been kept",
            Self::NeverSettles => "it never settles, though nothing fails any more",
        })
    }
}

/// What is wrong with this world, settled or not.
pub(crate) fn check(world: &World) -> Option<Fault> {
    if world.onlooker.fault.is_some() {
        return world.onlooker.fault;
    }
    let (a, b) = (&world.a.vmm, &world.b.vmm);
    let a_owns = a.as_ref().filter(|vmm| vmm.owns());
    let b_owns = b.as_ref().filter(|vmm| vmm.owns());
    if a_owns.is_some() && b_owns.is_some() {
        return Some(Fault::TwoOwners);
    }
    // After a crash that was declared, and only then, the guest may be booted anew at A.
    let may_own = |anew: bool| !world.onlooker.ran_at_b || (anew && world.onlooker.resolved);
    if a_owns.is_some_and(|vmm| !may_own(vmm.anew)) {
        return Some(Fault::SourceAfterDestination);
    }
    let a_runs = a.as_ref().is_some_and(|vmm| vmm.running);
    let b_runs = b.as_ref().is_some_and(|vmm| vmm.running);
    if a_runs && world.locks != Some(Side::A) || b_runs && world.locks != Some(Side::B) {
        return Some(Fault::WithoutLocks);
    }
    None
}

/// Whether both agents are there and neither waits for, asks for, or owes anything.
pub(crate) fn is_settled(world: &World, config: &Config) -> bool {
    let (Some(a), Some(b)) = (&world.a.agent, &world.b.agent) else {
        return false;
    };
    let is_quiet_at_a = a.todo.is_empty()
        && a.core.is_none()
        && a.rows.migration.over
        && a.starting.is_none()
        && a.resolved.is_none()
        && a.unanswered.is_empty()
        && a.attached == world.a.vmm.is_some()
        && a.attached == a.rows.instance.status.may_run()
        && a.attached == world.a.socket.open
        && world.a.socket.is_empty()
        // After CANCELLED it winds up by itself.
        && world.a.vmm.as_ref().is_none_or(|vmm| !vmm.is_sending())
        && !world.a.full;
    let is_quiet_at_b = b.todo.is_empty()
        && b.over
        && b.starting.is_none()
        && b.later.is_none()
        && !b.permit
        && b.attached == world.b.vmm.is_some()
        && b.attached == b.instance.status.may_run()
        && b.attached == world.b.socket.open
        && world.b.socket.is_empty()
        && (b.instance.settled || b.instance.status == Status::Absent)
        && world.b.vmm.as_ref().is_none_or(|vmm| !vmm.missing)
        && !world.b.full;
    let is_crashed = a.rows.instance.status == Status::Crashed || b.instance.status == Status::Crashed;
    is_quiet_at_a && is_quiet_at_b && !(config.restarts && is_crashed)
}

/// What is wrong with a world that has settled.
pub(crate) fn check_settled(world: &World) -> Option<Fault> {
    let (Some(a), Some(b)) = (&world.a.agent, &world.b.agent) else {
        return None;
    };
    let at_a = world.a.vmm.as_ref().map(|vmm| (vmm.owns(), vmm.running));
    let at_b = world.b.vmm.as_ref().map(|vmm| (vmm.owns(), vmm.running));
    let is_known = |status: Status, vmm: Option<(bool, bool)>| match status {
        Status::Running => vmm == Some((true, true)),
        Status::Paused => vmm == Some((true, false)),
        Status::Crashed | Status::Absent => vmm.is_none(),
        Status::Incoming => false,
    };
    let (status_a, status_b) = (a.rows.instance.status, b.instance.status);
    let is_one = (status_a == Status::Absent) != (status_b == Status::Absent);
    // A grant that is held for ever would keep its user from pausing it, and the next migration from arming.
    let is_bound = world
        .a
        .vmm
        .as_ref()
        .is_some_and(|vmm| vmm.phase == PhaseA::Here && vmm.grants.binds());
    if !(is_known(status_a, at_a) && is_known(status_b, at_b) && is_one) || is_bound {
        return Some(Fault::NobodyKnows);
    }
    let kept_at_a = world.a.vmm.as_ref().is_some_and(|vmm| vmm.owns() && !vmm.anew);
    let kept_at_b = world.b.vmm.as_ref().is_some_and(|vmm| vmm.owns() && !vmm.anew);
    // Without a host's crash, VMM B alive, and VMM A alive until D is decided, it is not lost.
    if !world.onlooker.excused && !kept_at_a && !kept_at_b {
        return Some(Fault::Lost);
    }
    // And if it never ran at B, VMM B's death is no excuse.
    let hosts_stood = !world.failures.had(Failure::HostA) && !world.failures.had(Failure::HostB);
    if hosts_stood && !world.onlooker.vmm_a_died && !world.onlooker.ran_at_b && !kept_at_a {
        return Some(Fault::Lost);
    }
    None
}
