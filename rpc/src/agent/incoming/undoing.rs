//! The steps of an incoming migration: which was reached, and what is undone of it.

use std::time::Duration;

use ferry_migration::handover::Decision;

use super::driver::Driver;
use crate::agent::backends::room;
use crate::agent::steps::{DestinationStep, DestinationUndo};

impl Driver {
    /// The next step begins. Whatever of it a restarted agent has to know is in the journal already.
    pub(super) fn enter(&mut self, step: DestinationStep) {
        self.step = self.step.max(step);
        tracing::debug!(migration = %self.row.id, %step, "{}", step.row().does);
    }

    /// Undoes what was reached, the last first. The instance is forgotten last: an agent that ends in between does all of it again.
    pub(super) async fn undo(&mut self) {
        for (step, how, words) in self.step.undoing() {
            match how {
                DestinationUndo::EndMachine => self.kill_vmm().await,
                DestinationUndo::RemoveDisks if self.row.info.copied_disks.is_empty() => continue,
                DestinationUndo::RemoveDisks => {
                    let copied = &self.row.info.copied_disks;
                    for device in room::remove(copied, self.row.instance, self.agent.host()) {
                        let line = format!(
                            "{step}: block device {} keeps what was copied onto it: it has a part of the guest's disk, or all of it",
                            device.display()
                        );
                        self.row.info.undone.push(line);
                    }
                }
                DestinationUndo::Forget => {
                    while !self.forget().await {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                }
            }
            self.row.info.undone.push(format!("{step}: {words}"));
        }
    }
}

/// The step that a decision is of. One for the source ends whatever step it was.
pub(super) fn step_of(decision: Decision) -> DestinationStep {
    match decision {
        Decision::Open => DestinationStep::Expect,
        Decision::Claimed => DestinationStep::Claim,
        Decision::Running => DestinationStep::Run,
        Decision::Source => DestinationStep::Reserve,
    }
}
