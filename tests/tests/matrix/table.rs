//! What is printed in the end: where each cell ended, and how many of all there are were run.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ferry_rpc::faults::{Moment, Site};

use crate::cell::{Actor, Cell, Ending, Fault};
use crate::run::Outcome;

/// Outcomes by row and column; none of a cell that failed.
#[derive(Default)]
pub(crate) struct Table {
    rows: Mutex<BTreeMap<usize, Row>>,
}

struct Row {
    title: String,
    columns: BTreeMap<&'static str, Option<Outcome>>,
}

impl Table {
    /// Enters what came of a cell.
    pub(crate) fn enter(&self, cell: &Cell, outcome: Option<Outcome>) {
        let at = Site::ALL.iter().position(|site| *site == cell.site).unwrap_or_default();
        let number = 2 * at + usize::from(cell.moment == Moment::After);
        let row = || Row {
            title: format!("{} {} {}", cell.course, cell.moment, cell.site),
            columns: BTreeMap::new(),
        };
        let mut rows = self.lock();
        let row = rows.entry(number).or_insert_with(row);
        row.columns.insert(column(cell.fault), outcome);
    }

    /// Prints it, with `all` for how many cells there are.
    pub(crate) fn print(&self, all: usize) {
        let rows = self.lock();
        let run: usize = rows.values().map(|row| row.columns.len()).sum();
        if run == 0 {
            return;
        }
        println!(
            "\nwhere the guest was in the end: A, B; a, b where it crashed; - nobody there to fail; ! not as it must be\n"
        );
        print!("{:44}", "");
        for column in COLUMNS {
            print!(" {column}");
        }
        println!();
        for row in rows.values() {
            print!("{:44}", row.title);
            for column in COLUMNS {
                let mark = row.columns.get(column).map_or(' ', |outcome| mark(*outcome));
                print!(" {mark:^width$}", width = column.len());
            }
            println!();
        }
        println!("\n{run} of {all} cells run");
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, Row>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn mark(outcome: Option<Outcome>) -> char {
    match outcome {
        Some(Outcome::Ended(Ending::AtA)) => 'A',
        Some(Outcome::Ended(Ending::AtB)) => 'B',
        Some(Outcome::Ended(Ending::CrashedAtA)) => 'a',
        Some(Outcome::Ended(Ending::CrashedAtB)) => 'b',
        Some(Outcome::NobodyThere) => '-',
        None => '!',
    }
}

/// Kill and stop of agent A, VMM A, VMM B and agent B, then what messages suffer.
const COLUMNS: [&str; 11] = [
    "kill agent A",
    "VMM A",
    "VMM B",
    "agent B",
    "stop agent A",
    "VMM A ",
    "VMM B ",
    "agent B ",
    "lose",
    "double",
    "late",
];

fn column(fault: Fault) -> &'static str {
    let number = match fault {
        Fault::Kill(Actor::AgentA) => 0,
        Fault::Kill(Actor::VmmA) => 1,
        Fault::Kill(Actor::VmmB) => 2,
        Fault::Kill(Actor::AgentB) => 3,
        Fault::Stop(Actor::AgentA) => 4,
        Fault::Stop(Actor::VmmA) => 5,
        Fault::Stop(Actor::VmmB) => 6,
        Fault::Stop(Actor::AgentB) => 7,
        Fault::Lose => 8,
        Fault::Double => 9,
        Fault::Delay => 10,
    };
    COLUMNS[number]
}
