//! An agent that starts again beside fifty VMs: how long until all of them are found.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferry_tests::until;
use tokio::runtime::Runtime;

use super::agent::{Agent, ms};
use super::{Figure, median};
use crate::bench::two_hosts;

const VMS: usize = 50;
const RUNS: usize = 5;
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) fn measure(ferry: &Path) -> Result<Vec<Figure>> {
    let mut pair = two_hosts(ferry)?;
    pair.a.start()?;
    let runtime = Runtime::new()?;
    runtime.block_on(async {
        let agent = Agent::connect(&pair.a).await?;
        for number in 0..VMS {
            let run = agent.run_paused(&format!("g{number}"), &pair.kernel()).await;
            run.with_context(|| format!("guest {number}"))?;
        }
        anyhow::Ok(())
    })?;
    let mut found = Vec::new();
    for _ in 0..RUNS {
        pair.a.kill();
        let began = Instant::now();
        pair.a.spawn_agent()?;
        let agent = until("the agent answers", PATIENCE, || {
            Ok(runtime.block_on(Agent::connect(&pair.a)).ok())
        })?;
        until("all are found again", PATIENCE, || {
            let instances = runtime.block_on(agent.instances())?;
            ensure!(instances.len() == VMS, "{} instances", instances.len());
            let is_found = instances
                .iter()
                .all(|info| info.vmm_pid.is_some() && info.status == "paused");
            Ok(is_found.then_some(()))
        })?;
        found.push(ms(began.elapsed()) / 1000.0);
    }
    Ok(vec![
        Figure::new(
            format!("agent's start until {VMS} VMs are found, median"),
            median(&found),
            "s",
        )
        .at_most(2.0),
    ])
}
