//! What is printed in the end: where each cell ended, and how many of all there are were run.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ferry_rpc::faults::{Moment, Site};

use crate::cell::{Actor, Cell, Ending, Fault, Power};
use crate::run::Outcome;

/// Outcomes by row and column; none of a cell that failed.
#[derive(Default)]
pub(crate) struct Table {
    told: Mutex<Told>,
}

#[derive(Default)]
struct Told {
    rows: BTreeMap<usize, Row>,
    /// In how many cells somebody came by a site.
    passed: HashMap<Site, usize>,
}

struct Row {
    title: String,
    columns: BTreeMap<&'static str, Option<Outcome>>,
}

impl Table {
    /// Enters what came of a cell, and the sites that somebody came by in it; none of one that failed.
    pub(crate) fn enter(&self, cell: &Cell, ran: Option<&(Outcome, HashSet<Site>)>) {
        let at = Site::ALL.iter().position(|site| *site == cell.site).unwrap_or_default();
        let block = match cell.power {
            Power::On => 0,
            Power::Off => Site::ALL.len(),
        };
        let number = 2 * (block + at) + usize::from(cell.moment == Moment::After);
        let title = format!("{} {} {}", cell.course, cell.moment, cell.site);
        let row = || Row {
            title: match cell.power {
                Power::On => title,
                Power::Off => format!("stopped-{title}"),
            },
            columns: BTreeMap::new(),
        };
        let mut told = self.lock();
        let row = told.rows.entry(number).or_insert_with(row);
        row.columns.insert(column(cell.fault), ran.map(|(outcome, _)| *outcome));
        for &site in ran.iter().flat_map(|(_, sites)| sites) {
            *told.passed.entry(site).or_default() += 1;
        }
    }

    /// Prints it, with `all` for how many cells there are, and how often the sites were come by that have no cells `of_their_own`.
    pub(crate) fn print(&self, all: usize, of_their_own: &HashSet<Site>) {
        let told = self.lock();
        let rows = &told.rows;
        let run: usize = rows.values().map(|row| row.columns.len()).sum();
        if run == 0 {
            return;
        }
        println!(
            "\nwhere the guest (of stopped-…: the instance) was in the end: A, B; a, b where it crashed; - nobody there to fail; ! not as it must be\n"
        );
        print!("{:52}", "");
        for column in COLUMNS {
            print!(" {column}");
        }
        println!();
        for row in rows.values() {
            print!("{:52}", row.title);
            for column in COLUMNS {
                let mark = row.columns.get(column).map_or(' ', |outcome| mark(*outcome));
                print!(" {mark:^width$}", width = column.len());
            }
            println!();
        }
        let others = Site::ALL.iter().filter(|site| !of_their_own.contains(site));
        let others = others.map(|site| format!("{site} {}", told.passed.get(site).copied().unwrap_or_default()));
        println!(
            "\nsites without cells of their own, and in how many cells they were come by: {}",
            others.collect::<Vec<_>>().join(", ")
        );
        println!("\n{run} of {all} cells run");
    }

    fn lock(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
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
