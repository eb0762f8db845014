//! The matrix: at each site of a switchover (`ferry_rpc::faults`), each of the four actors is killed or stopped, and each message is lost, doubled
//! and late; real agents, real VMMs, a guest on KVM.
//!
//! ```text
//!   sites × moments × faults ──► cells ──► run one ──► where it ended ──► allowed by the handover's table? all else in order?
//! ```
//!
//! A cell is a test of its own, named `course::moment::site::fault`, and has a pair of agents of its own. Cells run side by side: most of
//! their time is spent waiting. All from ARM to CONFIRM are run always; the others take turns by commit, `FERRY_LONG_TESTS=1` runs all.
//! Those named `stopped-course::…` move an instance that is off; they take turns, too. With `FERRY_MATRIX_COLD=1` every migration is a
//! cold one.

mod cell;
mod choice;
mod course;
mod cut;
mod expectation;
mod gate;
mod journals;
mod judge;
mod run;
mod table;

use std::collections::HashSet;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use ferry_rpc::faults::{Moment, Site};
use libtest_mimic::{Arguments, Trial};
use rustix::fs::{Access, access};

use crate::cell::{Cell, faults_at};
use crate::choice::Choice;
use crate::course::{Course, Reach, Stretch, powers, reach};
use crate::table::Table;

/// How many cells run side by side, on whatever machine: two agents and two small guests each, and most of them wait for something.
const SIDE_BY_SIDE: usize = 6;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(SIDE_BY_SIDE);
    let choice = Choice::new(arguments.filter.is_some());
    let table = Arc::new(Table::default());
    let mut cells: Vec<_> = cells().collect();
    // Mixed, so that those that wait are beside those that work.
    cells.sort_by_cached_key(|(cell, _)| *blake3::hash(cell.to_string().as_bytes()).as_bytes());
    let chosen = cells.iter().filter(|(cell, stretch)| choice.takes(cell, *stretch));
    let trials = chosen.map(|&(cell, _)| trial(cell, &table)).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    let of_their_own: HashSet<_> = cells.iter().map(|(cell, _)| cell.site).collect();
    table.print(cells.len(), &of_their_own);
    if let Choice::Turn(seed) = choice {
        println!("the turn was that of {seed}");
    }
    conclusion.exit_code()
}

/// Every cell that there is, and when in a migration.
fn cells() -> impl Iterator<Item = (Cell, Stretch)> {
    let reached = Site::ALL.iter().filter_map(|&site| match reach(site) {
        // A cold migration leaves nothing for later.
        Reach::On(Course::Late, _) if run::is_cold() => None,
        Reach::On(course, stretch) => Some((site, course, stretch)),
        Reach::AfterFault | Reach::Never => None,
    });
    let with_power = reached
        .flat_map(move |(site, course, stretch)| powers(site).iter().map(move |&power| (power, site, course, stretch)));
    with_power.flat_map(|(power, site, course, stretch)| {
        [Moment::Before, Moment::After].into_iter().flat_map(move |moment| {
            faults_at(site).map(move |fault| {
                let cell = Cell {
                    power,
                    course,
                    site,
                    moment,
                    fault,
                };
                (cell, stretch)
            })
        })
    })
}

fn trial(cell: Cell, table: &Arc<Table>) -> Trial {
    let table = Arc::clone(table);
    let run = move || {
        let ran = run::run(&cell);
        table.enter(&cell, ran.as_ref().ok());
        ran.map(drop).map_err(|error| format!("{error:#}").into())
    };
    Trial::test(cell.to_string(), run).with_ignored_flag(!kvm_is_here())
}

fn kvm_is_here() -> bool {
    access(Path::new("/dev/kvm"), Access::READ_OK | Access::WRITE_OK).is_ok()
}
