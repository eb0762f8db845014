//! `demo`: a busy guest moves from one agent to another and back, on this machine, and every figure told is measured.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::account::{blackout, rounds, sums};
use super::doctor::fsync_latency;
use super::failure::{Exit, Failure, Outcome};
use super::lab::{GuestPlan, Lab, Move, MoveOrder, ProbeGuest, Stretch, in_a_lab};
use super::output::{self, Format, human_bytes, human_count, human_ms, note};
use super::progress::Progress;
use super::terminal::LiveLine;
use crate::agent::Transport;

pub(super) async fn run(format: Format) -> Outcome {
    let began = Instant::now();
    let told = Teller { format };
    let mut story = in_a_lab(async |lab: &mut Lab| show(lab, &told).await).await?;
    story.seconds = began.elapsed().as_secs_f64();
    match format {
        Format::Json => output::json_line(&story)?,
        Format::Human => output::text(&closing(&story))?,
    }
    Ok(if story.clean { Exit::Done } else { Exit::Failed })
}

/// The two moves, told to nobody but as progress on stderr.
pub(super) async fn moves() -> Result<Vec<Move>, Failure> {
    let told = Teller { format: Format::Json };
    let story = in_a_lab(async |lab: &mut Lab| show(lab, &told).await).await?;
    Ok(story.moves)
}

/// What `-o json` prints.
#[derive(Debug, Serialize)]
struct Story {
    guest: Guest,
    moves: Vec<Move>,
    /// Whether nothing at all was wrong.
    clean: bool,
    /// From the start to the last file removed.
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct Guest {
    memory_bytes: u64,
    vcpus: u32,
    cmdline: String,
    /// From the order to run it until it had filled its memory.
    ready_after_ms: f64,
    /// By its own clock, before anything moved.
    page_writes_per_s: f64,
    fsync_ms: f64,
    fsync_file_system: String,
}

async fn show(lab: &mut Lab, told: &Teller) -> Result<Story, Failure> {
    let plan = plan();
    told.line("Ferry moves a running guest between two agents on this machine.");
    let latency = fsync_latency(lab.directory()).map_err(|error| {
        Failure::new(
            Exit::Failed,
            format!("measure fsync in {}: {error}", lab.directory().display()),
        )
    })?;
    lab.start_agents().await?;
    for host in 0..2 {
        told.line(&format!(
            "agent {}   {} (process {})",
            lab.host(host),
            lab.agent(host).url,
            lab.agent_pid(host)
        ));
    }
    told.line(&format!(
        "journals  {}; an fsync takes {}",
        latency.file_system,
        human_ms(latency.median_ms)
    ));
    let waiting = told.waiting("the guest boots and fills its memory");
    let guest = lab.boot(&plan).await?;
    let rate = guest.write_rate_over(Duration::from_millis(700)).await;
    drop(waiting);
    told.line(&format!(
        "guest     {}: {}, {} of them random data, writes {} pages a second, checks them; ready after {}",
        plan.name,
        human_bytes(plan.memory_bytes),
        human_bytes((FILL_MIB + WORK_MIB) << 20),
        human_count(rate.round() as u64),
        human_ms(guest.ready_after.as_secs_f64() * 1000.0),
    ));

    let mut moves = Vec::new();
    for source in [0, 1] {
        moves.push(one_way(lab, &guest, source, told).await?);
    }
    let clean = moves.iter().all(Move::is_clean);
    let about = Guest {
        memory_bytes: plan.memory_bytes,
        vcpus: plan.vcpus,
        cmdline: plan.cmdline,
        ready_after_ms: guest.ready_after.as_secs_f64() * 1000.0,
        page_writes_per_s: rate,
        fsync_ms: latency.median_ms,
        fsync_file_system: latency.file_system.to_owned(),
    };
    Ok(Story {
        guest: about,
        moves,
        clean,
        seconds: 0.0,
    })
}

async fn one_way(lab: &Lab, guest: &ProbeGuest, source: usize, told: &Teller) -> Result<Move, Failure> {
    let order = MoveOrder {
        source,
        streams: 0,
        transport: Transport::Tcp,
        verify: false,
        late: None,
        listen: Duration::from_millis(700),
    };
    told.line(&format!(
        "\n{} → {}",
        lab.host(order.source),
        lab.host(order.destination())
    ));
    let mut progress = Progress::new();
    let moved = lab.move_guest(guest, order, |info| progress.snapshot(info)).await;
    progress.end();
    let moved = moved?;
    told.line(&account(&moved));
    Ok(moved)
}

/// What happened in one move. Each line is a measurement or a count.
fn account(moved: &Move) -> String {
    let info = &moved.migration;
    let mut lines = vec![rounds(&info.rounds).to_string().trim_end().to_owned(), sums(info)];
    lines.extend(
        info.downtime_ms
            .as_ref()
            .map(|downtime| format!("blackout {}", blackout(downtime))),
    );
    lines.push(format!(
        "the guest itself saw a gap of {} at most; a reader of its heartbeats (one each {HEARTBEAT_MS} ms) waited {} at most",
        human_ms(moved.guest_gap_ms),
        human_ms(moved.reader_gap_ms),
    ));
    let per_second = |stretch: Stretch| human_count(stretch.page_writes_per_s.round() as u64);
    lines.push(format!(
        "it wrote {} pages a second before, {} while it was moved, {} after",
        per_second(moved.felt.before),
        per_second(moved.felt.during),
        per_second(moved.felt.after),
    ));
    lines.push(check(
        moved.heartbeats_missing == 0 && moved.heartbeats_doubled == 0,
        &format!(
            "{} heartbeats, {} missing, {} doubled",
            moved.heartbeats, moved.heartbeats_missing, moved.heartbeats_doubled
        ),
    ));
    lines.push(check(
        moved.faults == 0 && moved.clock_back == 0,
        &format!(
            "{} pages written ({} a second by the guest's clock) and {} read back in full: {} damaged",
            human_count(moved.page_writes),
            human_count(moved.page_writes_per_s.round() as u64),
            human_count(moved.pages_checked),
            moved.faults
        ),
    ));
    let runs_once = moved.runners == [info.destination.clone()] && moved.vmm_processes == 1;
    let runners = if moved.runners.is_empty() {
        "nowhere".to_owned()
    } else {
        moved.runners.join(" and ")
    };
    lines.push(check(
        runs_once,
        &format!("runs on {runners}; VMM processes: {}", moved.vmm_processes),
    ));
    lines.join("\n")
}

fn check(ok: bool, text: &str) -> String {
    format!("{} {text}", if ok { "✓" } else { "✗" })
}

fn closing(story: &Story) -> String {
    let blackout = |moved: &Move| Some(human_ms(moved.migration.downtime_ms.as_ref()?.total));
    let blackouts: Vec<String> = story.moves.iter().filter_map(blackout).collect();
    let verdict = match story.clean {
        true => "nothing was lost, nothing ran twice",
        false => "something is wrong, see the lines marked ✗",
    };
    format!(
        "\nTwo moves, blackouts {}: {verdict}. Guest, agents and files are removed. {:.1} s in all.",
        blackouts.join(" and "),
        story.seconds
    )
}

fn plan() -> GuestPlan {
    GuestPlan {
        name: "demo".to_owned(),
        memory_bytes: 1 << 30,
        vcpus: 1,
        dirty: "log".to_owned(),
        cmdline: format!(
            "fill=random fill_mib={FILL_MIB} work=uniform work_mib={WORK_MIB} rate=20000 heartbeat_ms={HEARTBEAT_MS}"
        ),
        patience: Duration::from_secs(60),
    }
}

/// Tells people as it goes; programs get one object at the end.
struct Teller {
    format: Format,
}

impl Teller {
    fn line(&self, text: &str) {
        match self.format {
            // A closed stdout is noticed at the end, when the guest is safely gone.
            Format::Human => drop(output::text(text)),
            Format::Json => {}
        }
    }

    /// Says on stderr what is waited for, until the answer is dropped.
    fn waiting(&self, text: &str) -> LiveLine {
        let mut line = LiveLine::new();
        match line.is_live() {
            true => line.draw(&format!("{text} …")),
            false => note(text),
        }
        line
    }
}

const FILL_MIB: u64 = 512;
const WORK_MIB: u64 = 256;
const HEARTBEAT_MS: u64 = 20;

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_probe::cmdline::Options;

    #[test]
    fn the_guest_does_what_the_demo_says() {
        let plan = plan();
        let options = Options::parse(&plan.cmdline).unwrap();
        assert_eq!((options.write_rate(), options.check), (20_000, true));
        assert!((options.fill_mib + options.work_size_mib()) << 20 < plan.memory_bytes);
    }
}
