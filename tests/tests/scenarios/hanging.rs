//! Disks that do not answer for a while: the guest keeps what it has, and whatever needs the disk quiet waits or is called off.

use std::time::Instant;

use anyhow::{Result, ensure};
use ferry_tests::{HangingDisk, Pair, until, waiting::MOVE};
use libtest_mimic::Trial;

use crate::device_work::{stamped_image, with_disk};
use crate::scenario::on_kvm;

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_switchover_is_called_off_while_a_disk_hangs_and_the_guest_runs_on,
        a_guest_that_resets_itself_while_its_disk_hangs_is_reset_later,
        a_reboot_is_refused_while_a_disk_hangs,
    ]
}

fn a_switchover_is_called_off_while_a_disk_hangs_and_the_guest_runs_on(pair: &mut Pair) -> Result<()> {
    let image = stamped_image(pair)?;
    let disk = HangingDisk::on(&image)?;
    let witness = pair.run(&with_disk(&image, "io=randread depth=4 seconds=40"))?;
    disk.hang()?;

    let began = pair.migrate("g", &["--detach", "--max-downtime", "100ms"])?.exit(0)?;
    let id = began.migration()?.text("id")?.to_owned();
    // The grounds of the last round soon take the place of why it was called off; that there is another attempt stays.
    let called_off = || {
        let shown = pair.a.ferry(&["migration", "show", &id])?.exit(0)?.migration()?;
        ensure!(!shown.is_over(), "it is over while the disk hangs: {}", shown.record);
        Ok((shown.number("attempts")? >= 2.0).then_some(()))
    };
    until("the switchover is called off and tried again", MOVE, called_off)?;
    witness.wait_for_beats_at("a", 20)?;
    ensure!(pair.a.show("g")?["status"] == "running", "the guest does not run on");
    let let_go = Instant::now();
    disk.let_go();

    pair.wait_over(&id)?.is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)?;
    let told = witness.transfers_after(let_go)?;
    ensure!(told.operations > 0 && told.failed == 0 && told.wrong == 0, "{told}");
    Ok(())
}

fn a_guest_that_resets_itself_while_its_disk_hangs_is_reset_later(pair: &mut Pair) -> Result<()> {
    let image = stamped_image(pair)?;
    let disk = HangingDisk::on(&image)?;
    let witness = pair.run(&with_disk(&image, "io=randread depth=4 seconds=40 reset_after_ms=4000"))?;
    disk.hang()?;

    until("the reset is put off", MOVE, || {
        let logged = pair.a.ferry(&["logs", "g"])?.exit(0)?;
        Ok(logged.stdout.contains("the guest is reset later").then_some(()))
    })?;
    ensure!(
        pair.a.show("g")?["status"] == "running",
        "a disk that hangs is no crash"
    );
    disk.let_go();

    witness.wait_ready_times(2)?;
    ensure!(
        pair.a.show("g")?["status"] == "running",
        "the guest does not run after its reset"
    );
    Ok(())
}

fn a_reboot_is_refused_while_a_disk_hangs(pair: &mut Pair) -> Result<()> {
    let image = stamped_image(pair)?;
    let disk = HangingDisk::on(&image)?;
    let witness = pair.run(&with_disk(&image, "io=randread depth=4 seconds=40"))?;
    disk.hang()?;

    pair.a.ferry(&["reboot", "g"])?.exit(4)?.says("cannot be reset now")?;
    witness.wait_for_beats_at("a", 20)?;
    disk.let_go();

    pair.a.ferry(&["reboot", "g"])?.exit(0)?;
    witness.wait_ready_times(2)
}
