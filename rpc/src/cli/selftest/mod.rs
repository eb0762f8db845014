//! `selftest`: is this machine one on which Ferry works, and does this build keep its promises there? For CI runners, nested ones
//! too, in about a minute and without anything but the binary.
//!
//! Three suites: what `doctor` asks of a host, the two moves of `demo`, and migrations in which somebody is killed (`kills`). A host
//! that lacks what is required fails the first; the others are skipped then.

mod kills;
mod report;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use self::report::{Check, Report, Verdict};
use super::arguments::SelftestArguments;
use super::demo;
use super::doctor;
use super::failure::{Exit, Failure, Outcome};
use super::lab::{Move, interrupted};
use super::output::{Format, human_ms, note};

pub(super) async fn run(arguments: SelftestArguments, format: Format) -> Outcome {
    // Before anything else: a file that cannot be written is no reason to find out a minute later.
    if let Some(path) = &arguments.junit {
        write(path, "")?;
    }
    let began = Instant::now();
    let mut report = Report::new(format);
    let interrupted = interrupted()?;
    let outcome = tokio::select! {
        biased;
        outcome = all(&mut report) => outcome,
        () = interrupted => Err(Failure::new(Exit::Interrupted, "interrupted; guests, agents and files are removed")),
    };
    // What is known is told, also of a run that did not come to its end.
    if let Some(path) = &arguments.junit {
        write(path, &report.junit())?;
    }
    outcome?;
    report.close(began.elapsed())?;
    Ok(if report.has_failed() { Exit::Failed } else { Exit::Done })
}

async fn all(report: &mut Report) -> Result<(), Failure> {
    host(report)?;
    if report.has_failed() {
        return skip_the_rest(report);
    }
    moves(report).await?;
    for cell in kills::CELLS {
        let began = Instant::now();
        let outcome = kills::run(cell).await;
        report.tell(judged("kills", cell.name(), began.elapsed(), outcome)?)?;
    }
    Ok(())
}

/// What `doctor` finds. What Ferry can do without is no failure.
fn host(report: &mut Report) -> Result<(), Failure> {
    let began = Instant::now();
    let needs = doctor::of_this_host(&std::env::temp_dir());
    let each = began.elapsed().as_secs_f64() / needs.len().max(1) as f64;
    for need in needs {
        let verdict = match need.ok || !need.required {
            true => Verdict::Ok,
            false => Verdict::Failed,
        };
        let remedy = need.remedy.map(|remedy| format!("; {remedy}")).unwrap_or_default();
        report.tell(Check {
            suite: DOCTOR,
            check: need.need.to_owned(),
            verdict,
            text: format!("{}{remedy}", need.found),
            seconds: each,
        })?;
    }
    Ok(())
}

/// The demo's two moves.
async fn moves(report: &mut Report) -> Result<(), Failure> {
    let began = Instant::now();
    let made = match demo::moves().await {
        Ok(made) => made,
        Err(failure) => {
            let check = judged("demo", "two moves".to_owned(), began.elapsed(), Err(failure))?;
            return report.tell(check);
        }
    };
    let each = began.elapsed() / u32::try_from(made.len()).unwrap_or(u32::MAX).max(1);
    for moved in made {
        let name = format!("{} → {}", moved.migration.source, moved.migration.destination);
        report.tell(judged("demo", name, each, of_a_move(&moved))?)?;
    }
    Ok(())
}

fn of_a_move(moved: &Move) -> Result<String, Failure> {
    let faults = moved.faults_found();
    if !faults.is_empty() {
        return Err(Failure::new(Exit::Failed, faults.join("; ")));
    }
    let blackout = moved
        .migration
        .downtime_ms
        .as_ref()
        .map(|downtime| human_ms(downtime.total));
    Ok(format!(
        "blackout {}, {} heartbeats, none lost or doubled, no page damaged",
        blackout.unwrap_or_else(|| "unknown".to_owned()),
        moved.heartbeats
    ))
}

fn skip_the_rest(report: &mut Report) -> Result<(), Failure> {
    let moves = ["a → b", "b → a"].map(|name| ("demo", name.to_owned()));
    let kills = kills::CELLS.iter().map(|cell| ("kills", cell.name()));
    for (suite, check) in moves.into_iter().chain(kills) {
        report.tell(Check {
            suite,
            check,
            verdict: Verdict::Skipped,
            text: "this host lacks what is required".to_owned(),
            seconds: 0.0,
        })?;
    }
    Ok(())
}

/// A check of this outcome. An interruption is none: it ends everything.
fn judged(
    suite: &'static str,
    check: String,
    took: Duration,
    outcome: Result<String, Failure>,
) -> Result<Check, Failure> {
    let (verdict, text) = match outcome {
        Ok(text) => (Verdict::Ok, text),
        Err(failure) if failure.exit == Exit::Interrupted => return Err(failure),
        Err(failure) => (Verdict::Failed, failure.message),
    };
    Ok(Check {
        suite,
        check,
        verdict,
        text,
        seconds: took.as_secs_f64(),
    })
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    fs::write(path, text).map_err(|error| Failure::new(Exit::Failed, format!("write {}: {error}", path.display())))
}

/// Says on stderr what goes on.
fn say(what: &str) {
    note(&format!("{what} …"));
}

const DOCTOR: &str = "doctor";
