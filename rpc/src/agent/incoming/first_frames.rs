//! When the first frames passed the cards of a guest that arrived: this side's part of the gap that its network saw.

use ferry_proto::agent::v1::{FirstFrame, FirstFramesReply};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report;
use uuid::Uuid;

use crate::agent::failure::Failure;
use crate::agent::instances::Agent;
use crate::agent::journal::MigrationRow;

impl Agent {
    /// Agent A asks when frames passed. Nothing of a guest that is not here any more, or not as it arrived.
    ///
    /// # Errors
    /// The journal cannot be read.
    pub(crate) async fn first_frames(&self, migration: Uuid) -> Result<FirstFramesReply, Failure> {
        let row = self
            .journal
            .read(move |connection| MigrationRow::find(connection, migration))
            .await?;
        let Some(instance) = row.and_then(|row| self.instances.by_id(row.instance)) else {
            return Ok(FirstFramesReply::default());
        };
        let vmm = instance.state.lock().await.vmm.clone();
        let Some(vmm) = vmm else {
            return Ok(FirstFramesReply::default());
        };
        let cards = match vmm.order(Command::Ping(wire::Ping {})).await {
            // One that is moving on, or was started anew, tells of something else.
            Ok(Report::Standing(standing)) if standing.migration == migration.to_string() => standing.frames,
            _ => Vec::new(),
        };
        let of_card = |frames: &wire::Frames| FirstFrame {
            sent_ms: frames.sent_ms,
            received_ms: frames.received_ms,
        };
        Ok(FirstFramesReply {
            cards: cards.iter().map(of_card).collect(),
        })
    }
}
