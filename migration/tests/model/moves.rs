//! One step of the world, and all steps that can be taken next.

use std::fmt;

use ferry_migration::handover::{DestinationEvent, Epoch, SourceEvent};

use crate::config::{Config, Failure};
use crate::network::Id;
use crate::world::{World, Write};
use crate::{agent_a, agent_b, failures, instance_a, instance_b, postcopy, vmm_a, vmm_b};

/// Who takes a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    AgentA,
    VmmA,
    VmmB,
    AgentB,
    /// Nobody: something breaks, or is mended.
    Fate,
    User,
}

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum What {
    /// Agent A's core takes an event, and its effects are carried out up to the next durable one.
    Source(SourceEvent),
    /// Agent B's core takes an event.
    Destination(DestinationEvent),
    /// An agent goes on with its list of effects.
    GoesOn,
    Does(&'static str),
    DoesWith(&'static str, Id),
    DoesUnder(&'static str, Epoch),
    Breaks(Failure),
}

/// Whether a step may be relied upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It happens when nothing fails any more.
    Sure,
    /// It may happen, and nothing may depend on it: news that can be lost, a user's wish, a timeout without a cause.
    Chance,
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Step {
    pub(crate) who: Who,
    pub(crate) what: What,
    /// The journal failed in it.
    pub(crate) write: Write,
}

impl fmt::Display for Step {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let who = match self.who {
            Who::AgentA => "agent A",
            Who::VmmA => "VMM A",
            Who::VmmB => "VMM B",
            Who::AgentB => "agent B",
            Who::Fate => "--",
            Who::User => "user",
        };
        write!(formatter, "{who:<8} ")?;
        match self.what {
            What::Source(event) => write!(formatter, "takes {event:?}")?,
            What::Destination(event) => write!(formatter, "takes {event:?}")?,
            What::GoesOn => formatter.write_str("goes on with its effects")?,
            What::Does(text) => formatter.write_str(text)?,
            What::DoesWith(text, id) => write!(formatter, "{text} {id}")?,
            What::DoesUnder(text, epoch) => write!(formatter, "{text} epoch {epoch}")?,
            What::Breaks(failure) => write!(formatter, "{}", failure.words())?,
        }
        match self.write {
            Write::Works => Ok(()),
            Write::Fails => formatter.write_str(" (its write fails)"),
            Write::FailsLate => formatter.write_str(" (its write is said to fail, and lands)"),
        }
    }
}

impl Failure {
    fn words(self) -> &'static str {
        match self {
            Self::AgentA => "agent A is killed",
            Self::VmmA => "VMM A is killed",
            Self::VmmB => "VMM B is killed",
            Self::AgentB => "agent B is killed",
            Self::HostA => "host A crashes",
            Self::HostB => "host B crashes",
            Self::JournalA => "agent A's journal is full",
            Self::JournalB => "agent B's journal is full",
            Self::SocketA => "the connection of agent A and VMM A breaks",
            Self::SocketB => "the connection of agent B and VMM B breaks",
        }
    }
}

/// Where a world can go.
pub(crate) struct Moves<'a> {
    pub(crate) from: &'a World,
    pub(crate) config: &'a Config,
    pub(crate) found: Vec<(Step, Kind, World)>,
}

impl<'a> Moves<'a> {
    /// Every step that can be taken from `from`.
    pub(crate) fn all(from: &'a World, config: &'a Config) -> Vec<(Step, Kind, World)> {
        let mut moves = Self {
            from,
            config,
            found: Vec::new(),
        };
        agent_a::moves(&mut moves);
        instance_a::moves(&mut moves);
        vmm_a::moves(&mut moves);
        vmm_b::moves(&mut moves);
        agent_b::moves(&mut moves);
        instance_b::moves(&mut moves);
        if config.postcopy {
            postcopy::moves(&mut moves);
        }
        failures::moves(&mut moves);
        moves.found
    }

    /// A step that writes nothing durable.
    pub(crate) fn add(&mut self, who: Who, what: What, kind: Kind, change: impl FnOnce(&mut World)) {
        let mut world = self.from.clone();
        change(&mut world);
        let step = Step {
            who,
            what,
            write: Write::Works,
        };
        self.found.push((step, kind, world));
    }

    /// A step in which agent A may write its journal.
    pub(crate) fn add_writing_a(&mut self, what: What, kind: Kind, change: impl Fn(&mut World, Write)) {
        self.add_writing(Who::AgentA, self.from.a.full, what, kind, change);
    }

    /// A step in which agent B may write its journal.
    pub(crate) fn add_writing_b(&mut self, what: What, kind: Kind, change: impl Fn(&mut World, Write)) {
        self.add_writing(Who::AgentB, self.from.b.full, what, kind, change);
    }

    fn add_writing(&mut self, who: Who, full: bool, what: What, kind: Kind, change: impl Fn(&mut World, Write)) {
        let (writes, kind): (&[Write], Kind) = if full {
            (&[Write::Fails, Write::FailsLate], Kind::Chance)
        } else {
            (&[Write::Works], kind)
        };
        for &write in writes {
            let mut world = self.from.clone();
            change(&mut world, write);
            self.found.push((Step { who, what, write }, kind, world));
        }
    }
}
