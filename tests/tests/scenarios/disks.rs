//! Disks as their hosts see them: who may have one, who has it, and who gets it when a guest moves. Both hosts of these
//! scenarios see the same files, as with shared storage.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use ferry_tests::disk::{self, holder, is_locked};
use ferry_tests::{
    Guest, Pair, until,
    waiting::{CALL, MOVE},
};
use libtest_mimic::Trial;
use rustix::fs::{FlockOperation, fcntl_lock};

use crate::scenario::{on_kvm, stays_and_moves_later};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        disks_are_shown_and_locked,
        the_locks_go_where_the_guest_goes,
        the_lock_stays_over_a_reboot_and_goes_with_a_stop,
        a_locked_disk_names_its_holder,
        a_read_only_disk_is_shared,
        a_disk_that_is_missing_at_the_destination_is_named_before_anything_moves,
        an_image_that_does_not_hold_the_guests_disk_is_refused_before_anything_moves,
        images_that_cannot_be_disks_are_refused,
        a_stale_copy_is_not_started,
        a_guest_whose_disk_is_taken_at_the_switch_is_indeterminate_until_it_has_it_back,
    ]
}

/// A sparse image of 16 MiB.
fn image(pair: &Pair, name: &str) -> Result<PathBuf> {
    disk::sparse(pair.folder(), name, 16 << 20)
}

fn with_disk(image: &Path) -> Guest {
    Guest::new("g").disk(&format!("path={}", image.display()))
}

fn disks_are_shown_and_locked(pair: &mut Pair) -> Result<()> {
    let (root, data) = (image(pair, "root.img")?, image(pair, "data.img")?);
    let guest = with_disk(&root).disk(&format!("path={},readonly=on,serial=data-1", data.display()));

    let witness = pair.run(&guest)?;

    let shown = pair.a.show("g")?;
    let expected = serde_json::json!([
        { "path": root, "readonly": false, "serial": null },
        { "path": data, "readonly": true, "serial": "data-1" },
    ]);
    ensure!(
        shown["disks"] == expected && shown["nics"] == serde_json::json!([]),
        "{shown}"
    );
    ensure!(is_locked(&root)? && is_locked(&data)?);
    let holder = holder(&root)?;
    ensure!(
        holder["host"] == "a" && holder["instance"] == shown["id"] && holder["name"] == "g",
        "{holder}"
    );
    ensure!(holder["epoch"] == 1 && holder["pid"] == pair.a.vmm()?, "{holder}");
    ensure!(!pair.folder().join("data.img.ferry-lock").exists());
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn the_locks_go_where_the_guest_goes(pair: &mut Pair) -> Result<()> {
    let disk = image(pair, "root.img")?;
    let witness = pair.run(&with_disk(&disk))?;

    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)?;
    ensure!(is_locked(&disk)?);
    let at_b = holder(&disk)?;
    ensure!(
        at_b["host"] == "b" && at_b["epoch"] == 2 && at_b["pid"] == pair.b.vmm()?,
        "{at_b}"
    );

    pair.b
        .ferry(&["migrate", "g", "--to", "a", "--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "a")?;
    pair.runs_only_at(&pair.a, "g", &witness)?;
    let at_a = holder(&disk)?;
    ensure!(is_locked(&disk)? && at_a["host"] == "a" && at_a["epoch"] == 3, "{at_a}");
    Ok(())
}

fn the_lock_stays_over_a_reboot_and_goes_with_a_stop(pair: &mut Pair) -> Result<()> {
    let disk = image(pair, "root.img")?;
    let witness = pair.run(&with_disk(&disk))?;

    pair.a.ferry(&["reboot", "g"])?.exit(0)?;
    witness.wait_ready_times(2)?;
    ensure!(is_locked(&disk)?);
    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;
    ensure!(!is_locked(&disk)?);
    pair.a.ferry(&["start", "g"])?.exit(0)?;

    witness.wait_ready_times(3)?;
    let shown = pair.a.wait_for_status("g", "running")?;
    ensure!(
        is_locked(&disk)? && holder(&disk)?["epoch"] == shown["epoch"],
        "{shown}"
    );
    Ok(())
}

fn a_locked_disk_names_its_holder(pair: &mut Pair) -> Result<()> {
    let disk = image(pair, "root.img")?;
    let witness = pair.run(&with_disk(&disk))?;
    let second = Guest {
        name: "second".to_owned(),
        ..with_disk(&disk)
    };

    pair.b
        .ferry(&second.arguments(&pair.kernel()))?
        .exit(4)?
        .says(&disk.display().to_string())?
        .says("instance g (host a, epoch 1)")?;

    pair.b.ferry(&["show", "second"])?.exit(3)?;
    ensure!(pair.b.vmms().is_empty(), "a VMM is left");
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_read_only_disk_is_shared(pair: &mut Pair) -> Result<()> {
    let disk = image(pair, "data.img")?;
    let reader = |name: &str| Guest {
        name: name.to_owned(),
        ..Guest::new("").disk(&format!("path={},readonly=on", disk.display()))
    };
    pair.a.ferry(&reader("one").arguments(&pair.kernel()))?.exit(0)?;
    pair.b.ferry(&reader("two").arguments(&pair.kernel()))?.exit(0)?;

    let writer = with_disk(&disk);

    pair.a
        .ferry(&writer.arguments(&pair.kernel()))?
        .exit(4)?
        .says(&disk.display().to_string())?
        .says("read by instance one (host a, epoch 1), instance two (host b, epoch 1)")?;
    Ok(())
}

fn a_disk_that_is_missing_at_the_destination_is_named_before_anything_moves(pair: &mut Pair) -> Result<()> {
    let disk = image(pair, "root.img")?;
    let witness = pair.run(&with_disk(&disk))?;
    // The guest has its image open: to B it is as if it were on A's own disk.
    let hidden = pair.folder().join("hidden.img");
    fs::rename(&disk, &hidden)?;

    pair.migrate("g", &[])?
        .exit(4)?
        .says(&format!("disk {} on host b", disk.display()))?
        .says("DISKS")?;

    fs::rename(&hidden, &disk)?;
    stays_and_moves_later(pair, &witness)
}

fn an_image_that_does_not_hold_the_guests_disk_is_refused_before_anything_moves(pair: &mut Pair) -> Result<()> {
    const SIZE: u64 = 16 << 20;
    let disk = image(pair, "root.img")?;
    let witness = pair.run(&with_disk(&disk))?;
    let refused = |storage: &str, here: u64| -> Result<()> {
        pair.migrate("g", &["--storage", storage])?
            .exit(4)?
            .says(&format!(
                "disk {} on host b: it has {here} bytes, and the guest's disk {SIZE}",
                disk.display()
            ))?
            .says("DISKS")?;
        pair.runs_only_at(&pair.a, "g", &witness)
    };

    // The guest's own image became shorter, where both hosts see it.
    let resized = |bytes| OpenOptions::new().write(true).open(&disk)?.set_len(bytes);
    resized(SIZE / 2)?;
    refused("auto", SIZE / 2)?;
    refused("shared", SIZE / 2)?;
    resized(SIZE)?;
    // Another one under the same path at B: the guest has its own open.
    let own = pair.folder().join("own.img");
    fs::rename(&disk, &own)?;
    disk::sparse(pair.folder(), "root.img", SIZE - 512)?;
    refused("shared", SIZE - 512)?;
    fs::rename(&own, &disk)?;

    // One that grew holds the disk that the guest knows.
    resized(2 * SIZE)?;
    stays_and_moves_later(pair, &witness)
}

fn images_that_cannot_be_disks_are_refused(pair: &mut Pair) -> Result<()> {
    let qcow2 = image(pair, "root.qcow2")?;
    fs::write(&qcow2, [b"QFI\xfb\0\0\0\x03".as_slice(), &[0; 504]].concat())?;
    let empty = pair.folder().join("empty.img");
    fs::write(&empty, b"")?;
    let missing = pair.folder().join("missing.img");
    let refused = |disk: &Path, says: &str| -> Result<()> {
        let told = pair.a.ferry(&with_disk(disk).arguments(&pair.kernel()))?;
        told.exit(4)?.says(&disk.display().to_string())?.says(says)?;
        Ok(())
    };

    refused(&qcow2, "qcow2")?;
    refused(&empty, "empty")?;
    refused(pair.folder(), "directory")?;
    refused(&missing, "No such file")?;
    pair.a
        .ferry(&["run", "g", "--kernel", &pair.kernel(), "--disk", "root.img"])?
        .exit(2)?
        .says("--disk")?;

    ensure!(pair.a.vmms().is_empty(), "a VMM is left");
    ensure!(fs::read_dir(pair.a.data_dir.join("instances"))?.count() == 0);
    ensure!(!pair.folder().join("root.qcow2.ferry-lock").exists());
    Ok(())
}

fn a_stale_copy_is_not_started(pair: &mut Pair) -> Result<()> {
    let disk = image(pair, "root.img")?;
    pair.run(&with_disk(&disk))?;
    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;
    // As if the instance had run elsewhere since, and this host's journal were an old one.
    let mut later = holder(&disk)?;
    later["epoch"] = 9.into();
    later["host"] = "elsewhere".into();
    let lock_file = format!("{}.ferry-lock", disk.display());
    fs::write(&lock_file, later.to_string())?;

    pair.a
        .ferry(&["start", "g"])?
        .exit(4)?
        .says("epoch 9 on host elsewhere")?
        .says("stale")?;

    pair.a.wait_for_status("g", "stopped")?;
    fs::remove_file(&lock_file)?;
    pair.a.ferry(&["start", "g"])?.exit(0)?;
    pair.a.wait_for_status("g", "running")?;
    Ok(())
}

/// B cannot lock the disk, so it refuses the guest; and somebody else took it when A let go of it, so A may not run the guest
/// either. B is made to meet another file under the path: one that is locked all the time leaves nothing to chance.
fn a_guest_whose_disk_is_taken_at_the_switch_is_indeterminate_until_it_has_it_back(pair: &mut Pair) -> Result<()> {
    pair.expect_complaint("trying again until it runs");
    let disk = image(pair, "root.img")?;
    let witness = pair.run(&with_disk(&disk))?;
    let at_a = pair.folder().join("root-at-a.img");
    fs::rename(&disk, &at_a)?;
    let at_b = File::options().read(true).write(true).open(image(pair, "root.img")?)?;
    fcntl_lock(&at_b, FlockOperation::NonBlockingLockExclusive)?;
    let taken = OpenOptions::new().read(true).write(true).open(&at_a)?;
    let waiting = std::thread::spawn(move || -> Result<File> {
        // Waits for A.
        fcntl_lock(&taken, FlockOperation::LockExclusive)?;
        Ok(taken)
    });

    let began = pair.migrate("g", &["--detach"])?.exit(0)?;
    let id = began.migration()?.text("id")?.to_owned();
    until("the guest is indeterminate", MOVE, || {
        let record = pair.a.ferry(&["migration", "show", &id])?.exit(0)?.migration()?;
        ensure!(!record.is_over(), "it ended: {}", record.record);
        let says_why = record.record["error"]
            .as_str()
            .is_some_and(|error| error.contains(&disk.display().to_string()));
        Ok((record.text("status")? == "indeterminate" && says_why).then_some(record))
    })?
    .is("indeterminate", "a")?;
    let beats = witness.beats().len();
    until("agent A says so", CALL, || {
        Ok((pair.a.show("g")?["status"] == "indeterminate").then_some(()))
    })?;
    ensure!(
        witness.is_silent(std::time::Duration::from_millis(500)),
        "it runs without its disk"
    );
    ensure!(witness.beats().len() == beats, "it ran without its disk");
    fs::rename(&at_a, &disk)?;
    drop(waiting.join().expect("waiting does not panic")?);

    let record = pair.wait_over(&id)?.is("failed", "a")?;

    ensure!(record.text("error")?.contains("locked"), "{}", record.record);
    ensure!(is_locked(&disk)? && holder(&disk)?["host"] == "a");
    stays_and_moves_later(pair, &witness)
}
