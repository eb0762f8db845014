//! `bench`: named workloads, each migrated back and forth between two agents on this machine; medians are printed.
//!
//! Memory is touched before anything is counted, as much as will be used: on a virtual host the first touch pays for the
//! outer host too. What is measured by sampling (memory of the VMMs) is measured in moves of its own, so that it does
//! not disturb the timed ones.

mod clock;
mod footprint;
mod measure;
mod report;
mod workloads;

use super::arguments::BenchArguments;
use super::failure::{Exit, Failure, Outcome};
use super::output::{self, Format};

use self::report::Figures;

pub(super) async fn run(arguments: BenchArguments, format: Format) -> Outcome {
    let chosen = workloads::chosen(&arguments.workloads).map_err(|problem| Failure::new(Exit::Usage, problem))?;
    if arguments.list {
        format.many(&chosen, report::list)?;
        return Ok(Exit::Done);
    }
    let mut all = Vec::new();
    for workload in &chosen {
        let figures = measure::workload(workload, &arguments).await?;
        if format == Format::Json {
            output::json_line(&figures)?;
        }
        all.push(figures);
    }
    if format == Format::Human {
        output::text(&report::table(&all))?;
    }
    let clean = all.iter().all(|figures: &Figures| figures.clean);
    Ok(if clean { Exit::Done } else { Exit::Failed })
}
