//! Measuring one workload: touch memory, boot, move it as often as asked, listen in between.

use std::time::{Duration, Instant};

use ferry_vmm::measuring::{CpuMeter, least_fetch, warm_host_memory};
use tokio::time::sleep;

use super::super::arguments::BenchArguments;
use super::super::doctor::meminfo;
use super::super::failure::{Exit, Failure};
use super::super::lab::{Beat, Lab, MoveOrder, ProbeGuest, in_a_lab};
use super::super::output::{human_bytes, note};
use super::super::terminal::LiveLine;
use super::clock::{self, Reading};
use super::footprint::{self, FootprintMeter};
use super::report::{Figures, Run, VmmMemory};
use super::workloads::Workload;
use crate::agent::Transport;

pub(super) async fn workload(workload: &Workload, arguments: &BenchArguments) -> Result<Figures, Failure> {
    let mut told = Teller {
        name: workload.name,
        line: LiveLine::new(),
    };
    check_room(workload)?;
    in_a_lab(async |lab: &mut Lab| in_lab(lab, workload, arguments, &mut told).await).await
}

/// The words that the command line takes are those of requests.
fn transport(word: &str) -> Result<Transport, Failure> {
    Transport::parse(word).map_err(|unknown| Failure::new(Exit::Usage, unknown.problem))
}

async fn in_lab(
    lab: &mut Lab,
    workload: &Workload,
    arguments: &BenchArguments,
    told: &mut Teller,
) -> Result<Figures, Failure> {
    let BenchArguments {
        runs, streams, verify, ..
    } = *arguments;
    let transport = transport(&arguments.transport)?;
    lab.start_agents().await?;
    // Before there is a guest, which would keep a processor busy.
    let least_fetch = workload.late.map(|_| least_fetch()).transpose();
    let least_fetch = least_fetch.map_err(|error| {
        let text = format!("failed to measure a round trip: {}", crate::error_chain(&error));
        Failure::new(Exit::Failed, text)
    })?;
    told.tell("boots");
    let guest = lab.boot(&workload.plan()).await?;
    let agents = [lab.agent_pid(0), lab.agent_pid(1)];
    let epoch = Instant::now();
    sleep(STAY).await;
    let idle_bytes = footprint::now(agents);
    let mut stays = Stays {
        epoch,
        began: 0,
        readings: Vec::new(),
    };
    let mut measured = Vec::new();
    for run in 0..runs {
        told.tell(&format!("move {} of {runs}", run + 1));
        let order = MoveOrder {
            source: run as usize % 2,
            streams,
            transport,
            verify,
            late: workload.late,
            listen: STAY,
        };
        let moved = timed_move(lab, &guest, order, &mut stays, workload.touched_bytes).await?;
        measured.push(Run { least_fetch, ..moved });
    }
    stays.close(&guest, runs as usize % 2);

    told.tell("one more move, to watch memory");
    let order = MoveOrder {
        source: runs as usize % 2,
        streams,
        transport,
        verify,
        late: workload.late,
        listen: Duration::from_millis(300),
    };
    let meter = FootprintMeter::start(agents);
    let watched = lab.move_guest(&guest, order, |_| {}).await;
    let migrating_bytes = meter.stop();
    let mut faults: Vec<String> = measured.iter().flat_map(|run| run.moved.faults_found()).collect();
    faults.extend(watched?.faults_found());
    for (run, error) in measured.iter_mut().zip(clock::errors(&stays.readings, guest.tsc_khz())) {
        run.clock_error = error;
    }
    told.line.clear();
    Ok(Figures::of(
        (workload, transport),
        &measured,
        VmmMemory {
            idle_bytes,
            migrating_bytes,
        },
        faults,
    ))
}

/// One move that counts. The stay before it ends with it.
async fn timed_move(
    lab: &Lab,
    guest: &ProbeGuest,
    order: MoveOrder,
    stays: &mut Stays,
    touched_bytes: u64,
) -> Result<Run, Failure> {
    // Before memory is touched: what is free for two seconds goes back.
    let predicted = lab.predict(guest, order, SAMPLE).await?;
    warm(touched_bytes)?;
    // What the guest gets done before the move is not what it got done beside all this.
    sleep(CALM).await;
    stays.close(guest, order.source);
    let meter = CpuMeter::start([lab.agent_pid(0), lab.agent_pid(1)]);
    let mut over = None;
    let mut meter = Some(meter);
    let moved = lab
        .move_guest(guest, order, |info| {
            // The guest is listened to afterwards, which is no part of the migration's cost.
            if info.status == "completed"
                && let Some(meter) = meter.take()
            {
                over = Some(meter.stop());
            }
        })
        .await;
    if let Some(meter) = meter {
        let _ = meter.stop();
    }
    let cpu = over.unwrap_or([f64::NAN; 2]);
    Ok(Run {
        moved: moved?,
        predicted,
        least_fetch: None,
        cpu_source_s: cpu[order.source],
        cpu_destination_s: cpu[order.destination()],
        clock_error: None,
    })
}

/// The guest's heartbeats, stay by stay, as readings of its clock.
struct Stays {
    epoch: Instant,
    /// The first heartbeat of the present stay.
    began: u64,
    readings: Vec<Vec<Reading>>,
}

impl Stays {
    /// Ends the guest's present stay, at a host.
    fn close(&mut self, guest: &ProbeGuest, host: usize) {
        let beats = guest.beats_since(self.began, host);
        if let Some(last) = beats.last() {
            self.began = last.heartbeat.seq + 1;
        }
        let reading = |beat: &Beat| {
            let read_ns = beat.at.saturating_duration_since(self.epoch).as_nanos() as f64;
            Reading {
                tsc: beat.heartbeat.tsc,
                read_ns,
            }
        };
        // What was read before the epoch would all seem to have come at once.
        let counted = beats.iter().filter(|beat| beat.at >= self.epoch);
        self.readings.push(counted.map(reading).collect());
    }
}

/// Source and destination have the guest's memory at the same time.
fn check_room(workload: &Workload) -> Result<(), Failure> {
    let wanted = workload.touched_bytes * 2 + SLACK;
    let available = meminfo("MemAvailable").unwrap_or(u64::MAX);
    if wanted <= available {
        return Ok(());
    }
    let text = format!(
        "{}: needs {} of memory, {} are available",
        workload.name,
        human_bytes(wanted),
        human_bytes(available)
    );
    Err(Failure::new(Exit::Failed, text))
}

/// Has the host hold as much backed memory as the destination will use, right before a move: what is free for two seconds
/// goes back to an outer host, and whoever touched it next would pay for that.
fn warm(touched_bytes: u64) -> Result<(), Failure> {
    warm_host_memory(touched_bytes + SLACK).map_err(|error| {
        Failure::new(
            Exit::Failed,
            format!("failed to touch memory first: {}", crate::error_chain(&error)),
        )
    })
}

struct Teller {
    name: &'static str,
    line: LiveLine,
}

impl Teller {
    fn tell(&mut self, what: &str) {
        let text = format!("{}: {what}", self.name);
        if self.line.is_live() {
            self.line.draw(&text)
        } else {
            note(&text)
        }
    }
}

/// How long the guest is looked at to foretell a move: longer than any round takes.
const SAMPLE: Duration = Duration::from_millis(1000);
/// How long the guest is listened to between two moves: its clock is read a hundred times.
const STAY: Duration = Duration::from_millis(1000);
/// How long the guest is left alone before a move, so that it tells what it gets done undisturbed. Memory that was touched stays for longer than that.
const CALM: Duration = Duration::from_millis(600);
/// VMMs, agents and the kernel's own.
const SLACK: u64 = 512 << 20;
