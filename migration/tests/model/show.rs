//! A world in one line, for people who read a trace.

use std::fmt;

use crate::world::{PhaseA, PhaseB, World};

impl fmt::Display for World {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("| A: ")?;
        match (&self.a.agent, self.a.down) {
            (_, true) => formatter.write_str("host down")?,
            (None, false) => formatter.write_str("no agent")?,
            (Some(agent), false) => match &agent.core {
                Some(core) => write!(formatter, "{:?}", core.state())?,
                None => write!(formatter, "{:?}", agent.rows.instance.status)?,
            },
        }
        match &self.a.vmm {
            None => formatter.write_str(", no VMM")?,
            Some(vmm) => {
                let does = if vmm.running { "runs" } else { "stands" };
                match vmm.phase {
                    PhaseA::Here => write!(formatter, ", VMM {does}")?,
                    PhaseA::Rounds => write!(formatter, ", VMM {does}, copying")?,
                    PhaseA::Stopped(_) => write!(formatter, ", VMM stopped")?,
                    PhaseA::Sent(_) | PhaseA::Parked(_) => write!(formatter, ", VMM parked")?,
                    PhaseA::PageSource => write!(formatter, ", page source")?,
                }
                write!(formatter, " e{}", vmm.permits.had())?;
            }
        }
        formatter.write_str(" | D")?;
        let id = self.newest_armed();
        let decision = match self.store {
            Some(owner) => Some(owner.phase),
            None => self.b.disk.decisions[id.index()].map(|(decision, _)| decision),
        };
        match decision {
            Some(decision) => write!(formatter, "({id}) {decision}")?,
            None => formatter.write_str(" -")?,
        }
        formatter.write_str(" | B: ")?;
        match (&self.b.agent, self.b.down) {
            (_, true) => formatter.write_str("host down")?,
            (None, false) => formatter.write_str("no agent")?,
            (Some(agent), false) if agent.over => write!(formatter, "{:?}", agent.instance.status)?,
            (Some(agent), false) => match agent.core.decision() {
                Some(decision) => write!(formatter, "{decision}")?,
                None => formatter.write_str("prepared")?,
            },
        }
        match &self.b.vmm {
            None => formatter.write_str(", no VMM")?,
            Some(vmm) => {
                let does = match vmm.phase {
                    PhaseB::Loading => "loads",
                    PhaseB::Ready(_) => "ready",
                    PhaseB::Here if vmm.running => "runs",
                    PhaseB::Here => "stands",
                    PhaseB::Failed => "failed",
                };
                write!(formatter, ", VMM {does} e{}", vmm.permits.had())?;
            }
        }
        Ok(())
    }
}
