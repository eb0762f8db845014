//! Which cells are run: all from ARM to CONFIRM of a guest that runs but those that stop somebody for ten seconds, and of the others those
//! whose turn it is.

use std::process::Command;

use ferry_rpc::faults::Site;

use crate::cell::{Actor, Cell, Fault, Power};
use crate::course::Stretch;

/// Of the cells outside the switchover, one of so many is run for each commit.
const OUTSIDE_TURNS: u8 = 16;
/// Of the cells in it in which somebody is stopped for ten seconds, one of so many: all of them are an hour of waiting.
const STOP_TURNS: u8 = 16;
/// Of the cells with an instance that is stopped, one of so many: most are what they are with one that runs.
const OFF_TURNS: u8 = 16;

/// Chooses cells.
pub(crate) enum Choice {
    /// Every cell.
    All,
    /// Those that are always run, and those whose turn it is with this seed.
    Turn(String),
}

impl Choice {
    /// All with `FERRY_LONG_TESTS`, or where cells are asked for by name. Otherwise `FERRY_MATRIX_SEED` says whose turn it is, or else the
    /// commit.
    pub(crate) fn new(by_name: bool) -> Self {
        if by_name || std::env::var_os("FERRY_LONG_TESTS").is_some() {
            return Self::All;
        }
        let seed = std::env::var("FERRY_MATRIX_SEED").ok().or_else(commit);
        Self::Turn(seed.unwrap_or_else(|| "no commit".to_owned()))
    }

    /// Whether the cell is run.
    pub(crate) fn takes(&self, cell: &Cell, stretch: Stretch) -> bool {
        let Self::Turn(seed) = self else { return true };
        let turns = match (cell.power, stretch, cell.fault) {
            _ if ends_what_is_held(cell) => return true,
            (Power::Off, ..) => OFF_TURNS,
            (Power::On, Stretch::Switchover, Fault::Stop(_)) => STOP_TURNS,
            (Power::On, Stretch::Switchover, _) => return true,
            (Power::On, Stretch::Outside, _) => OUTSIDE_TURNS,
        };
        let digest = blake3::hash(format!("{seed} {cell}").as_bytes());
        digest.as_bytes()[0].is_multiple_of(turns)
    }
}

/// What no guest that runs has: the machine at B was only held, and its agent dies between RUNNING and its end.
fn ends_what_is_held(cell: &Cell) -> bool {
    let is_near = matches!(cell.site, Site::JournalRunning | Site::Adopt | Site::TellRunning);
    cell.power == Power::Off && is_near && cell.fault == Fault::Kill(Actor::AgentB)
}

fn commit() -> Option<String> {
    let output = Command::new("git").args(["rev-parse", "HEAD"]).output().ok()?;
    let commit = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (!commit.is_empty()).then_some(commit)
}
