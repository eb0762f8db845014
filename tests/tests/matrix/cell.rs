//! One cell of the matrix: where, what happens there, and what may come of it.

use std::fmt;

use ferry_rpc::faults::{Kind, Moment, Site};

use crate::course::Course;

/// What the instance is that is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Power {
    /// Its guest runs.
    On,
    /// It is stopped, and moves cold: its machine is only held, at either host, and no guest runs in it.
    Off,
}

impl Power {
    /// The epoch under which it moves: its first, or of one that is off one more, under which its machine is held.
    pub(crate) fn epoch(self) -> u64 {
        match self {
            Self::On => 1,
            Self::Off => 2,
        }
    }
}

/// Who takes part in a switchover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Actor {
    AgentA,
    VmmA,
    VmmB,
    AgentB,
}

impl Actor {
    pub(crate) const ALL: [Self; 4] = [Self::AgentA, Self::VmmA, Self::VmmB, Self::AgentB];

    fn name(self) -> &'static str {
        match self {
            Self::AgentA => "agent-a",
            Self::VmmA => "vmm-a",
            Self::VmmB => "vmm-b",
            Self::AgentB => "agent-b",
        }
    }
}

/// What happens at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fault {
    /// `kill -9`. Agents are started again, VMMs stay dead.
    Kill(Actor),
    /// SIGSTOP, and SIGCONT after [`STOPPED`].
    Stop(Actor),
    /// The message is lost, and its connection with it.
    Lose,
    /// The message comes twice.
    Double,
    /// The message, and what comes after it on its way, is late by [`LATE`].
    Delay,
}

/// How long a process is stopped: twice as long as peers, VMMs and calls are waited for.
pub(crate) const STOPPED: std::time::Duration = std::time::Duration::from_secs(10);
/// How late a message is: well past the 5 s that calls, orders and the wait for RUNNING last. With 6 s agent B still waited for its VMM when
/// agent A asked, and a source that resumed on CLAIMED was not found out.
pub(crate) const LATE: std::time::Duration = std::time::Duration::from_secs(8);

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(actor) => write!(formatter, "kill-{}", actor.name()),
            Self::Stop(actor) => write!(formatter, "stop-{}", actor.name()),
            Self::Lose => formatter.write_str("lose"),
            Self::Double => formatter.write_str("double"),
            Self::Delay => formatter.write_str("delay"),
        }
    }
}

/// One cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Cell {
    pub(crate) power: Power,
    pub(crate) course: Course,
    pub(crate) site: Site,
    pub(crate) moment: Moment,
    pub(crate) fault: Fault,
}

impl fmt::Display for Cell {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            power,
            course,
            site,
            moment,
            fault,
        } = self;
        let power = match power {
            Power::On => "",
            Power::Off => "stopped-",
        };
        write!(formatter, "{power}{course}::{moment}::{site}::{fault}")
    }
}

/// The faults that can happen at a site.
pub(crate) fn faults_at(site: Site) -> impl Iterator<Item = Fault> {
    let messages: &[Fault] = match site.kind() {
        // A second answer to one order has nobody that waits for it.
        Kind::Answer => &[Fault::Lose, Fault::Delay],
        kind if kind.is_message() => &[Fault::Lose, Fault::Double, Fault::Delay],
        _ => &[],
    };
    let kills = Actor::ALL.into_iter().map(Fault::Kill);
    let stops = Actor::ALL.into_iter().map(Fault::Stop);
    kills.chain(messages.iter().copied()).chain(stops)
}

/// How a cell may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Ending {
    /// The guest runs at A; or the instance is stopped there, as it was.
    AtA,
    /// The guest runs at B; or the instance is stopped there.
    AtB,
    /// It crashed at A.
    CrashedAtA,
    /// It crashed at B.
    CrashedAtB,
}

impl fmt::Display for Ending {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::AtA => "A",
            Self::AtB => "B",
            Self::CrashedAtA => "crashed at A",
            Self::CrashedAtB => "crashed at B",
        })
    }
}
