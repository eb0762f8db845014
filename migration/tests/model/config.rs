//! What one search covers.

use crate::mutants::Mutant;

/// Where D is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Home {
    /// A row in agent B's journal; agent A asks with `Decide`.
    Journal,
    /// A compare-and-swap store that both agents reach.
    Store,
}

/// What comes after a first attempt that was called off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Again {
    /// A second attempt of the same migration (DISARM).
    Attempt,
    /// A second migration, prepared anew.
    Migration,
}

/// One thing that breaks. Each breaks once in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Failure {
    AgentA,
    VmmA,
    VmmB,
    AgentB,
    HostA,
    HostB,
    /// Writes of agent A fail until there is room again; with a store, it is not reached either.
    JournalA,
    JournalB,
    /// The connection between an agent and its VMM breaks while both live.
    SocketA,
    SocketB,
}

impl Failure {
    /// Kills and crashes.
    pub(crate) const DEATHS: &'static [Self] = &[
        Self::AgentA,
        Self::VmmA,
        Self::VmmB,
        Self::AgentB,
        Self::HostA,
        Self::HostB,
    ];
    /// All.
    pub(crate) const ALL: &'static [Self] = &[
        Self::AgentA,
        Self::VmmA,
        Self::VmmB,
        Self::AgentB,
        Self::HostA,
        Self::HostB,
        Self::JournalA,
        Self::JournalB,
        Self::SocketA,
        Self::SocketB,
    ];
}

/// The failures that happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Failures(u16);

impl Failures {
    pub(crate) fn count(self) -> u32 {
        self.0.count_ones()
    }

    pub(crate) fn had(self, failure: Failure) -> bool {
        self.0 & 1 << failure as u16 != 0
    }

    pub(crate) fn add(&mut self, failure: Failure) {
        self.0 |= 1 << failure as u16;
    }
}

/// Bounds and rules of one search.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    pub(crate) name: &'static str,
    pub(crate) home: Home,
    pub(crate) again: Again,
    /// The user had paused the guest before it migrates.
    pub(crate) paused: bool,
    /// The user pauses it, once, while no migration has it.
    pub(crate) user_pauses: bool,
    /// A crashed guest is started again.
    pub(crate) restarts: bool,
    /// A person may end one doubt with `resolve --run-here`.
    pub(crate) resolves: bool,
    /// Pages are missing at B when its guest starts.
    pub(crate) postcopy: bool,
    /// What may break.
    pub(crate) breaks: &'static [Failure],
    /// How many of those in one run.
    pub(crate) most: u32,
    pub(crate) mutant: Option<Mutant>,
}

impl Config {
    pub(crate) fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    /// The attempts that the first migration may arm.
    pub(crate) fn attempts(&self) -> u32 {
        match self.again {
            Again::Attempt => 2,
            Again::Migration => 1,
        }
    }
}

/// What everything else differs from.
pub(crate) const BASE: Config = Config {
    name: "journal",
    home: Home::Journal,
    again: Again::Attempt,
    paused: false,
    user_pauses: false,
    restarts: true,
    resolves: true,
    postcopy: false,
    breaks: Failure::DEATHS,
    most: 3,
    mutant: None,
};
