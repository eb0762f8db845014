//! Writing a guest to files while it stands still.

use std::time::Instant;

use anyhow::{Context, ensure};
use ferry_proto::vmm::v1 as wire;
use ferry_vmm::RunState;

use super::Snapshotted;
use super::files::{self, Files};
use crate::vmm_process::convert::ms;
use crate::vmm_process::guest::LocalGuest;

/// Stops the guest if it runs, writes it, and lets it go on if it ran: whatever becomes of the files.
pub(super) fn take(mut guest: Box<LocalGuest>, files: &Files) -> Snapshotted {
    let was = guest.machine.run_state();
    let began = Instant::now();
    let written = write(&mut guest, files);
    let mut ended = written.unwrap_or_else(|error| wire::SnapshotEnded {
        error: format!("{error:#}"),
        ..Default::default()
    });
    // A pause that failed left it running, and then this does nothing.
    let stuck = match was {
        RunState::Running => guest.machine.run().err(),
        RunState::Paused => None,
    };
    ended.paused_ms = (was == RunState::Running).then(|| ms(began.elapsed()));
    Snapshotted {
        guest,
        stuck: stuck.map(|error| format!("failed to go on after a snapshot: {error}")),
        ended,
    }
}

/// The order is that of a migration: vCPUs, devices and disks come to rest, then the state, then memory.
fn write(guest: &mut LocalGuest, files: &Files) -> anyhow::Result<wire::SnapshotEnded> {
    guest.machine.pause().context("failed to stop the guest")?;
    // Whatever ended it is told before its vCPU stands still. The machine's owner will see to it.
    ensure!(
        guest.inbox.is_empty(),
        "the guest ends or resets itself at this very moment: ask again when it runs"
    );
    guest
        .disks
        .write_back()
        .context("a disk does not take what the guest wrote")?;
    let disks = guest.disks.moments()?;
    let state = guest.machine.export()?.to_bytes();
    let profile = guest.machine.profile().to_bytes();
    let table = guest
        .machine
        .memory()
        .save_image(&files.memory)
        .context("failed to write the file memory")?;
    let ended = wire::SnapshotEnded {
        error: String::new(),
        paused_ms: None,
        pages: table.pages(),
        pieces_digest: files::write("memory.pieces", &files.pieces, &table.to_bytes())?,
        state_digest: files::write("state", &files.state, &state)?,
        profile_digest: files::write("profile", &files.profile, &profile)?,
        disks,
    };
    guest.disks.let_pass(&ended.disks);
    Ok(ended)
}
