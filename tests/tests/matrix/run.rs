//! Runs one cell: a pair of agents, a guest, a migration, the fault, and what comes of it.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_rpc::faults::{Moment, Site, Word};
use ferry_tests::{Call, Guest, Host, Pair, Relay, Tampering, Witness, disk, process, until};
use rustix::process::Signal;

use crate::cell::{Actor, Cell, Ending, Fault, LATE, Power, STOPPED};
use crate::course::Course;
use crate::cut;
use crate::expectation::{Said, Scene, allowed};
use crate::gate::Gate;
use crate::journals::{Look, look};
use crate::judge;

/// What came of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It ended so, as it may.
    Ended(Ending),
    /// Who was to fail was not there.
    NobodyThere,
}

/// A pair of hosts whose agents and VMMs pass a gate, with a guest at A.
pub(crate) struct Stage {
    /// Before the folder that it is in.
    pub(crate) gate: Gate,
    pub(crate) pair: Pair,
    pub(crate) witness: Witness,
    pub(crate) power: Power,
    /// That of a guest that runs; the machine of an instance that is off is not held yet.
    pub(crate) vmm_a: Option<u32>,
    vmm_b: Option<u32>,
    pub(crate) migration: String,
    /// How it stood right after somebody was killed.
    struck: Option<Scene>,
    /// A call that asks for the migration's end.
    abort: Option<Call>,
    _relay: Relay,
}

/// The instance's name.
pub(crate) const NAME: &str = "g";

/// Small and nearly idle, but its memory is checked, and it beats every 10 ms.
const WORK: &str = "fill=random fill_mib=4 work=uniform work_mib=2 rate=100 heartbeat_ms=10";

/// What agents and VMMs may complain of here.
const EXPECTED: [&str; 2] = ["--fault-gate", "nobody knows on which host the guest runs"];

/// And of a guest that is lost with its pages.
const LOST: [&str; 2] = ["a guest is lost with the pages that it lacked", "the guest is lost"];

/// With this in the environment every migration is a cold one: what may come of a fault is the same.
const COLD: &str = "FERRY_MATRIX_COLD";

/// Whether every migration is a cold one.
pub(crate) fn is_cold() -> bool {
    std::env::var_os(COLD).is_some()
}

/// How long a site may take to be reached: an agent that asks for D waits 5 s first.
const REACHED: Duration = Duration::from_secs(30);

/// How long healing may take: 30 s of silence are the longest that anybody waits before it asks, on a busy machine.
const HEALED: Duration = Duration::from_secs(90);

/// Runs a cell, and tells every site that somebody came by.
///
/// # Errors
/// What does not hold, and what passed the gate.
pub(crate) fn run(cell: &Cell) -> Result<(Outcome, HashSet<Site>)> {
    let mut stage = Stage::set(cell.power)?;
    let outcome = stage.play(cell).with_context(|| {
        let (gate, story) = (stage.gate.story(), stage.pair.story());
        format!("{cell}\npassed the gate: {gate}\n{story}")
    })?;
    Ok((outcome, stage.gate.sites()))
}

/// A disk that both hosts see; the guest leaves it alone, but who runs the guest has it.
const DISK: &str = "disk.img";

/// Boots a guest. The first of all has the host for itself and measures its counter's frequency; beside others that is not reliable.
fn boot(pair: &Pair) -> Result<Witness> {
    static TSC_KHZ: Mutex<Option<u64>> = Mutex::new(None);
    let mut known = TSC_KHZ.lock().unwrap_or_else(PoisonError::into_inner);
    let image = disk::sparse(pair.folder(), DISK, 1 << 20)?;
    let boot = |work: &str| {
        let guest = Guest::new(NAME).memory_mib(64).work(work);
        pair.run(&guest.disk(&format!("path={}", image.display())))
    };
    if let Some(tsc_khz) = *known {
        drop(known);
        return boot(&format!("{WORK} tsc_khz={tsc_khz}"));
    }
    let witness = boot(WORK)?;
    *known = Some(witness.tsc_khz());
    Ok(witness)
}

/// Stops the guest that was booted; from then on none may run.
fn switch_off(pair: &Pair, witness: &Witness) -> Result<()> {
    pair.keep_logs();
    pair.a.ferry(&["stop", NAME, "--force"])?.exit(0)?;
    pair.a.wait_for_status(NAME, "stopped")?;
    ensure!(
        witness.is_silent(Duration::from_millis(50)),
        "a guest that was stopped beats"
    );
    Ok(())
}

impl Stage {
    fn set(power: Power) -> Result<Self> {
        let mut pair = Pair::prepare()?;
        EXPECTED.iter().for_each(|words| pair.expect_complaint(words));
        LOST.iter().for_each(|words| pair.expect_complaint(words));
        let gate = Gate::open(pair.folder())?;
        let relay = Relay::before(&pair.b, Tampering::Messages(cut::between_the_vmms(gate.shared())))?;
        pair.a.set_peer("b", &relay.url());
        for host in [&mut pair.a, &mut pair.b] {
            let flag = ["--fault-gate".to_owned(), gate.socket().display().to_string()];
            host.arguments.extend(flag);
            host.start()?;
        }
        let witness = boot(&pair)?;
        let vmm_a = match power {
            Power::On => Some(pair.a.vmm()?),
            Power::Off => {
                switch_off(&pair, &witness)?;
                None
            }
        };
        Ok(Self {
            pair,
            gate,
            witness,
            power,
            vmm_a,
            vmm_b: None,
            migration: String::new(),
            struck: None,
            abort: None,
            _relay: relay,
        })
    }

    fn play(&mut self, cell: &Cell) -> Result<Outcome> {
        self.set_out(cell)?;
        self.pair.keep_logs();
        self.vmm_a = self.vmm_a.or_else(|| self.pair.a.vmms().first().copied());
        self.vmm_b = self.pair.b.vmms().first().copied();
        let before = self.scene()?;
        let struck = self.strike(cell.fault)?;
        if !struck {
            return Ok(Outcome::NobodyThere);
        }
        if cell.course == Course::Aborted && cell.fault == Fault::Kill(Actor::AgentA) {
            // The wish died with the agent that had it.
            self.abort()?;
        }
        let looks = self.settle()?;
        let ending = judge::ending(self.power, &looks)?;
        // Who is held does not hold everybody: what it was at the very moment is one of the two, or between them.
        let after = self.struck.take().unwrap_or_else(|| before.clone());
        let allowed = [allowed(cell, &before), allowed(cell, &after)].concat();
        ensure!(
            allowed.contains(&ending),
            "it ended {ending}, allowed is {allowed:?} for {before:?} to {after:?}; journals: {looks:?}"
        );
        judge::judge(self, cell.course, &looks, ending)?;
        Ok(Outcome::Ended(ending))
    }

    /// Begins the migration, and does what its course wants until somebody is held at the cell's site.
    fn set_out(&mut self, cell: &Cell) -> Result<()> {
        let hold = || self.gate.hold(cell.moment, cell.site);
        match cell.course {
            Course::Straight | Course::Late => hold(),
            Course::Refused => {
                self.gate.lose(Moment::Before, Site::WireGo);
                hold();
            }
            Course::Asked => {
                self.gate.lose(Moment::Before, Site::CallPost);
                hold();
            }
            Course::Unanswered => {
                self.gate.lose(Moment::Before, Site::CallPost);
                self.gate.lose(Moment::Before, Site::CallDecide);
                hold();
            }
            Course::Aborted => hold(),
            Course::Recalled => self.gate.hold(Moment::Before, Site::GiveGrant),
        }
        let mut words = vec!["--detach"];
        words.extend_from_slice(match (cell.power, is_cold()) {
            // Several seconds, so that its pages are late when somebody fails.
            (Power::On, false) if cell.course == Course::Late => {
                &["--max-downtime", "2s", "--mode", "postcopy", "--bandwidth", "8Mbit"]
            }
            (Power::On, false) => &["--digests", "--verify", "--max-downtime", "2s"],
            (Power::Off, _) | (_, true) => &["--digests", "--verify", "--cold"],
        });
        if cell.course == Course::Aborted {
            words.extend(["--hold-at", "armed"]);
        }
        let began = self.pair.migrate(NAME, &words)?.exit(0)?;
        began.migration()?.text("id")?.clone_into(&mut self.migration);
        match cell.course {
            Course::Straight | Course::Late | Course::Refused | Course::Asked | Course::Unanswered => {}
            Course::Aborted => {
                until("agent B expects the guest", REACHED, || {
                    let look = look(&self.pair.b, &self.migration)?;
                    Ok((look.decision() == Some("OPEN")).then_some(()))
                })?;
                self.abort()?;
            }
            Course::Recalled => {
                ensure!(self.gate.wait_held(REACHED), "agent A does not come to give the grant");
                self.pair.a.kill();
                self.gate.hold(cell.moment, cell.site);
                self.pair.a.spawn_agent()?;
            }
        }
        ensure!(
            self.gate.wait_held(REACHED),
            "nobody came by {} {}",
            cell.moment,
            cell.site
        );
        Ok(())
    }

    /// Asks for the migration's end, and does not wait for it.
    fn abort(&mut self) -> Result<()> {
        self.abort = Some(self.pair.a.begin(&["migration", "abort", &self.migration])?);
        Ok(())
    }

    /// How it stands while somebody is held.
    fn scene(&self) -> Result<Scene> {
        let said = |has_left: bool, has_come: bool| match (has_left, has_come) {
            (_, true) => Said::Yes,
            (true, false) => Said::Maybe,
            (false, false) => Said::No,
        };
        let is_past = |host, moment, site| self.gate.is_past(host, moment, site);
        let granted = is_past("a", Moment::Before, Site::OrderGrant);
        let permitted = is_past("b", Moment::Before, Site::OrderPermit);
        let decision = look(&self.pair.b, &self.migration)?.decision().map(str::to_owned);
        Ok(Scene {
            decision,
            go: said(granted, is_past("wire", Moment::After, Site::WireGo)),
            permit: said(permitted, is_past("b", Moment::Before, Site::ReportStarted)),
            marked: self.marks().any(|mark| mark.join("started").exists()),
        })
    }

    /// The folders of started marks at B.
    pub(crate) fn marks(&self) -> impl Iterator<Item = PathBuf> {
        judge::mark_folders(&self.pair.b).into_iter()
    }

    /// Does what the cell is about, and heals it. False if who was to fail is not there.
    fn strike(&mut self, fault: Fault) -> Result<bool> {
        match fault {
            Fault::Kill(actor) => {
                let Some(id) = self.process(actor) else {
                    return Ok(false);
                };
                match actor {
                    Actor::AgentA => self.pair.a.kill(),
                    Actor::AgentB => self.pair.b.kill(),
                    Actor::VmmA | Actor::VmmB => process::signal(id, Signal::KILL)?,
                }
                self.struck = Some(self.scene()?);
                until("who was killed is dead", HEALED, || {
                    Ok((!process::is_alive(id)).then_some(()))
                })?;
                self.gate.say(Word::Go);
                match actor {
                    Actor::AgentA => self.pair.a.start()?,
                    Actor::AgentB => self.pair.b.start()?,
                    Actor::VmmA | Actor::VmmB => {}
                }
            }
            Fault::Stop(actor) => {
                let Some(id) = self.process(actor) else {
                    return Ok(false);
                };
                // Agent A waits 5 s twice for a VMM that does not answer, and then says so: the very ten that somebody is stopped here.
                self.pair.expect_complaint("the VMM does not wind the migration up");
                process::signal(id, Signal::STOP)?;
                self.gate.say(Word::Go);
                thread::sleep(STOPPED);
                // What it was part of may be over, and it with it.
                let _ = process::signal(id, Signal::CONT);
            }
            Fault::Lose => self.gate.say(Word::Lose),
            Fault::Double => self.gate.say(Word::Double),
            Fault::Delay => {
                // An answer of VMM A that is late keeps those behind it: the agent waits as above.
                self.pair.expect_complaint("the VMM does not wind the migration up");
                thread::sleep(LATE);
                self.gate.say(Word::Go);
            }
        }
        // What the course lost, so that the site was reached, is lost no more.
        self.gate.heal();
        Ok(true)
    }

    fn process(&self, actor: Actor) -> Option<u32> {
        let id = match actor {
            Actor::AgentA => self.pair.a.pid(),
            Actor::VmmA => self.vmm_a,
            Actor::VmmB => self.vmm_b,
            Actor::AgentB => self.pair.b.pid(),
        };
        id.filter(|&id| process::is_alive(id))
    }

    /// Waits until nothing is left to do at either agent: the migration is over at both, and no guest is called running whose VMM is dead.
    fn settle(&self) -> Result<[Look; 2]> {
        let mut last = None;
        let settled = until("both agents are done with the migration", HEALED, || {
            let hosts = [&self.pair.a, &self.pair.b];
            let looks = [look(hosts[0], &self.migration)?, look(hosts[1], &self.migration)?];
            last = Some(looks.clone());
            let is_true = |(look, host): (&Look, &Host)| {
                look.status() != Some("indeterminate") && (look.status() == Some("running")) != host.vmms().is_empty()
            };
            let is_settled = looks.iter().all(Look::is_over) && looks.iter().zip(hosts).all(is_true);
            Ok(is_settled.then_some(looks))
        });
        settled.with_context(|| format!("the journals say {last:?}"))
    }

    /// The guest's disk.
    pub(crate) fn disk(&self) -> PathBuf {
        self.pair.folder().join(DISK)
    }

    /// Folders of instances at both hosts.
    pub(crate) fn instance_folders(&self) -> usize {
        [&self.pair.a, &self.pair.b]
            .iter()
            .map(|host| fs::read_dir(host.data_dir.join("instances")).map_or(0, Iterator::count))
            .sum()
    }
}
