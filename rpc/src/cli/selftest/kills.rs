//! Migrations in which an agent or a VMM is killed, at points from ARM to CONFIRM, and what the handover's table says of each.
//!
//! A cell is a lab of its own: two agents that ask at a gate, a small guest that beats every 10 ms. The first to come by the cell's
//! site is held, somebody is killed, whoever was held goes on, a killed agent is started again. Then the guest is where the table
//! says and nowhere else, by both agents' word, by the processes on this machine, and by its own counter.

use std::time::{Duration, Instant};

use ferry_proto::agent::v1::{LiveMigrateRequest, MigrationOptions, MigrationRequest};
use rustix::process::{Signal, kill_process};
use tokio::time::sleep;

use super::super::client::{PATIENCE, within};
use super::super::failure::{Exit, Failure};
use super::super::instances::instances_of;
use super::super::lab::{Beat, Gate, GuestPlan, Lab, ProbeGuest, in_a_lab};
use super::super::migrate;
use super::say;
use crate::faults::{Moment, Site};

/// Who is killed. The source is A, the destination B.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Actor {
    AgentA,
    VmmA,
    VmmB,
    AgentB,
}

impl Actor {
    fn name(self) -> &'static str {
        match self {
            Self::AgentA => "agent A",
            Self::VmmA => "VMM A",
            Self::VmmB => "VMM B",
            Self::AgentB => "agent B",
        }
    }

    fn host(self) -> usize {
        match self {
            Self::AgentA | Self::VmmA => 0,
            Self::AgentB | Self::VmmB => 1,
        }
    }
}

/// Where the guest is in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    Runs(usize),
    Crashed(usize),
}

impl std::fmt::Display for Ending {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Runs(host) => write!(formatter, "runs on {}", HOSTS[*host]),
            Self::Crashed(host) => write!(formatter, "crashed on {}", HOSTS[*host]),
        }
    }
}

/// One kill.
#[derive(Debug)]
pub(super) struct Cell {
    moment: Moment,
    site: Site,
    actor: Actor,
    allowed: &'static [Ending],
}

impl Cell {
    pub(super) fn name(&self) -> String {
        format!("{} killed {} {}", self.actor.name(), self.moment, self.site)
    }
}

/// What is tried, with what `docs/handover.md` says of it ("When something fails").
pub(super) const CELLS: &[Cell] = &[
    // Agent A killed, any time: VMM A finishes the grant it holds.
    cell(
        Moment::After,
        Site::JournalArmed,
        Actor::AgentA,
        &[Ending::Runs(0), Ending::Runs(1)],
    ),
    // VMM A dies before GO: the guest crashed at A.
    cell(Moment::Before, Site::OrderGrant, Actor::VmmA, &[Ending::Crashed(0)]),
    // VMM B dies with D = OPEN: A resumes.
    cell(Moment::Before, Site::JournalClaimed, Actor::VmmB, &[Ending::Runs(0)]),
    // Agent B killed before CLAIM: it may find its VMM there, and claim.
    cell(
        Moment::Before,
        Site::JournalClaimed,
        Actor::AgentB,
        &[Ending::Runs(0), Ending::Runs(1)],
    ),
    // VMM B dies with D = CLAIMED, permit not sent: A resumes.
    cell(Moment::Before, Site::OrderPermit, Actor::VmmB, &[Ending::Runs(0)]),
    // Agent B killed between CLAIM and RUNNING, VMM B alive: it sends the permit again.
    cell(Moment::Before, Site::OrderPermit, Actor::AgentB, &[Ending::Runs(1)]),
    // VMM A dies after GO: D decides, and it is claimed.
    cell(Moment::After, Site::JournalClaimed, Actor::VmmA, &[Ending::Runs(1)]),
    // VMM B dies, started mark set: the guest crashed on B.
    cell(Moment::After, Site::JournalRunning, Actor::VmmB, &[Ending::Crashed(1)]),
];

const fn cell(moment: Moment, site: Site, actor: Actor, allowed: &'static [Ending]) -> Cell {
    Cell {
        moment,
        site,
        actor,
        allowed,
    }
}

/// Runs one cell and tells where the guest was in the end.
///
/// # Errors
/// What does not hold.
pub(super) async fn run(cell: &Cell) -> Result<String, Failure> {
    say(&cell.name());
    in_a_lab(async |lab: &mut Lab| play(lab, cell).await).await
}

async fn play(lab: &mut Lab, cell: &Cell) -> Result<String, Failure> {
    let gate = Gate::open(lab.directory())?;
    lab.tell_agents(gate.arguments());
    lab.start_agents().await?;
    let guest = lab.boot(&plan()).await?;
    let before = guest
        .last_beat()
        .ok_or_else(|| failed("the guest prints no heartbeats"))?;
    // A guest that boots goes by some of the sites, too.
    gate.hold(cell.moment, cell.site);
    let accepted = migrate::cast(lab.agent(0), order(&guest)).await?;
    if !gate.wait_held(REACHED).await {
        return Err(failed(format!("nobody came by {} {}", cell.moment, cell.site)));
    }

    strike(lab, cell.actor).await?;
    gate.let_pass();
    if matches!(cell.actor, Actor::AgentA | Actor::AgentB) {
        lab.start_agent_again(cell.actor.host()).await?;
    }

    let ending = settle(lab, &accepted.migration).await?;
    if !cell.allowed.contains(&ending) {
        return Err(failed(format!("it {ending}, which the handover does not allow here")));
    }
    let told = match ending {
        Ending::Runs(host) => lives_on(&guest, &before, host).await?,
        Ending::Crashed(_) => "no copy is left".to_owned(),
    };
    one_at_a_time(&guest)?;
    Ok(format!("the guest {ending}; {told}"))
}

/// Kills the actor and waits until it is dead.
async fn strike(lab: &mut Lab, actor: Actor) -> Result<(), Failure> {
    let host = actor.host();
    if matches!(actor, Actor::AgentA | Actor::AgentB) {
        lab.kill_agent(host);
        return Ok(());
    }
    let [vmm] = lab.vmms(host)[..] else {
        return Err(failed(format!("one VMM is expected on {}", HOSTS[host])));
    };
    kill_process(vmm, Signal::KILL).map_err(|error| failed(format!("kill {}: {error}", actor.name())))?;
    until("who was killed is dead", async || {
        Ok(lab.vmms(host).is_empty().then_some(()))
    })
    .await
}

/// Waits until nothing is left to do at either agent, and says where the guest is.
async fn settle(lab: &Lab, migration: &str) -> Result<Ending, Failure> {
    until("both agents are done with the migration", async || {
        for host in 0..HOSTS.len() {
            if !is_over(lab, host, migration).await? {
                return Ok(None);
            }
        }
        look(lab).await
    })
    .await
}

/// The one place where the guest is, if both agents and the processes on this machine agree on one.
async fn look(lab: &Lab) -> Result<Option<Ending>, Failure> {
    let mut found = Vec::new();
    for host in 0..HOSTS.len() {
        for info in instances_of(lab.agent(host)).await? {
            found.push((host, info));
        }
    }
    let vmms = [lab.vmms(0).len(), lab.vmms(1).len()];
    let [(host, info)] = &found[..] else { return Ok(None) };
    if info.task.is_some() {
        return Ok(None);
    }
    let ending = match info.status.as_str() {
        "running" if vmms[*host] == 1 && vmms[1 - host] == 0 => Ending::Runs(*host),
        "crashed" if vmms == [0, 0] => Ending::Crashed(*host),
        _ => return Ok(None),
    };
    Ok(Some(ending))
}

/// By this host's own journal.
async fn is_over(lab: &Lab, host: usize, migration: &str) -> Result<bool, Failure> {
    let request = MigrationRequest {
        migration: migration.to_owned(),
        forwarded: true,
    };
    let mut conductor = lab.agent(host).conductor().await?;
    let shown = conductor.show_migration(within(PATIENCE, request)).await;
    let shown =
        shown.map_err(|status| Failure::of_status(&format!("show the migration at {}", HOSTS[host]), &status))?;
    let status = shown.into_inner().status;
    Ok(matches!(
        status.as_str(),
        "completed" | "cancelled" | "failed" | "error"
    ))
}

/// The guest beats on where it is, and of all it ever printed nothing is missing.
async fn lives_on(guest: &ProbeGuest, before: &Beat, host: usize) -> Result<String, Failure> {
    let now = guest
        .last_beat()
        .map_or(before.heartbeat.seq, |beat| beat.heartbeat.seq);
    let beats = async || Ok(guest.beats_since(now, host).get(BEATS).copied());
    let last = until("the guest beats where it is said to run", beats).await?;
    let life = guest
        .life(before, &last, host)
        .ok_or_else(|| failed("the guest's heartbeats were lost"))?;
    match life.faults_found() {
        None => Ok(format!(
            "{} heartbeats, none lost or doubled, no page damaged",
            life.heartbeats()
        )),
        Some(faults) => Err(failed(faults)),
    }
}

/// By the guest's own counter, which both hosts share: it beat at B only after its last beat at A.
fn one_at_a_time(guest: &ProbeGuest) -> Result<(), Failure> {
    let counters = |host| guest.beats_since(0, host).into_iter().map(|beat| beat.heartbeat.tsc);
    match (counters(0).max(), counters(1).min()) {
        (Some(last_at_a), Some(first_at_b)) if last_at_a >= first_at_b => Err(failed(format!(
            "the guest beat at a at {last_at_a} when it had begun at b at {first_at_b}"
        ))),
        _ => Ok(()),
    }
}

fn order(guest: &ProbeGuest) -> LiveMigrateRequest {
    LiveMigrateRequest {
        instance: guest.id.clone(),
        destination: HOSTS[1].to_owned(),
        options: Some(MigrationOptions {
            max_downtime_us: 2_000_000,
            timeout_ms: 120_000,
            ..Default::default()
        }),
        request_id: uuid::Uuid::new_v4().to_string(),
        dry_run: false,
        sample_ms: 0,
    }
}

/// Small and nearly idle, but its memory is checked.
fn plan() -> GuestPlan {
    GuestPlan {
        name: "selftest".to_owned(),
        memory_bytes: 64 << 20,
        vcpus: 1,
        dirty: "log".to_owned(),
        cmdline: "fill=random fill_mib=4 work=uniform work_mib=2 rate=100 heartbeat_ms=10".to_owned(),
        patience: Duration::from_secs(60),
    }
}

async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Result<Option<T>, Failure>) -> Result<T, Failure> {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask().await? {
            return Ok(answer);
        }
        if began.elapsed() > HEALED {
            return Err(failed(format!("waited {} s in vain: {what}", HEALED.as_secs())));
        }
        sleep(Duration::from_millis(20)).await;
    }
}

fn failed(what: impl Into<String>) -> Failure {
    Failure::new(Exit::Failed, what)
}

const HOSTS: [&str; 2] = ["a", "b"];
/// Heartbeats after which a guest that is said to run is believed to.
const BEATS: usize = 5;
/// How long a site may take to be reached.
const REACHED: Duration = Duration::from_secs(30);
/// How long healing may take: 30 s of silence are the longest that anybody waits before it asks, on a busy machine.
const HEALED: Duration = Duration::from_secs(90);

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_actor_is_killed_and_no_cell_is_there_twice() {
        let names: BTreeSet<_> = CELLS.iter().map(Cell::name).collect();
        assert_eq!(names.len(), CELLS.len());
        for actor in [Actor::AgentA, Actor::VmmA, Actor::VmmB, Actor::AgentB] {
            assert!(CELLS.iter().any(|cell| cell.actor == actor), "{actor:?}");
        }
    }

    #[test]
    fn the_guest_does_what_is_said_of_it() {
        let options = ferry_probe::cmdline::Options::parse(&plan().cmdline).unwrap();
        assert!(options.check && options.heartbeat_ms == 10);
    }
}
