//! Snapshots: a guest goes on from a folder as if nothing had happened, from one that is as it was written and from no other.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use ferry_tests::{Call, Guest, HangingDisk, Host, Pair, Witness, process, until, waiting::CALL};
use libtest_mimic::Trial;
use rustix::fs::SeekFrom;
use rustix::process::Signal;
use serde_json::Value;

use crate::scenario::{command, has_nothing, in_a_network, ip, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = on_kvm![
        a_deleted_guest_goes_on_where_its_snapshot_was_taken,
        two_vcpus_and_a_dirty_ring_go_on,
        a_running_guest_is_what_it_was_after_its_snapshot,
        one_snapshot_becomes_two_guests_beside_the_original,
        a_restored_guest_migrates_reboots_and_is_snapshotted_again,
        a_damaged_file_is_named_and_nothing_is_left,
        a_folder_that_is_there_is_not_written_to,
        a_full_disk_leaves_the_guest_running_and_no_folder,
        a_migrating_instance_is_not_snapshotted,
        a_guest_goes_on_when_its_agent_is_killed_while_it_is_written,
        a_guest_that_is_deleted_while_it_is_written_leaves_no_folder,
        nothing_is_left_of_a_guest_whose_agent_is_killed_while_it_is_loaded,
        the_same_instance_comes_back_only_when_it_is_gone,
        a_copy_has_a_generation_id_of_its_own,
        the_same_instance_keeps_its_generation_id_wherever_it_moves,
        a_disk_that_moved_on_is_refused,
        a_disk_copied_at_the_snapshot_goes_with_it,
    ];
    trials.extend(in_a_network![another_guest_has_another_mac_address]);
    trials
}

/// Writes a snapshot of `g` at `a` and gives its folder and what was said of it.
fn snapshot(pair: &Pair, folder: &str) -> Result<(PathBuf, Value)> {
    let path = pair.folder().join(folder);
    let said = pair.a.ferry(&["snapshot", "g", "--to", text(&path)])?.exit(0)?.json()?;
    Ok((path, said))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("made of ASCII")
}

/// Restores under a name and gives what was said, and a witness of this guest alone.
fn restore(host: &Host, from: &Path, name: &str) -> Result<(Value, Witness)> {
    let said = host.ferry(&["restore", text(from), "--name", name])?.exit(0)?.json()?;
    let witness = Witness::of_instance(&[host], said["id"].as_str().unwrap_or_default());
    Ok((said, witness))
}

/// The refusal of a restore, which leaves nothing of the instance.
fn refused(host: &Host, from: &Path, further: &[&str], words: &str) -> Result<()> {
    let arguments = [&["restore", text(from)], further].concat();
    let before = host.ferry(&["list"])?.exit(0)?.json_lines()?.len();
    host.ferry(&arguments)?.exit(4)?.says(words)?;
    let after = host.ferry(&["list"])?.exit(0)?.json_lines()?.len();
    ensure!(before == after, "an instance is left");
    let folders = fs::read_dir(host.data_dir.join("instances"))?.count();
    ensure!(folders == after && host.vmms().len() <= after, "something is left");
    Ok(())
}

fn goes_on_at_b(pair: &mut Pair, guest: &Guest) -> Result<()> {
    let witness = pair.run(guest)?;
    let original = pair.a.show("g")?;
    pair.a.ferry(&["pause", "g"])?.exit(0)?;

    let (folder, said) = snapshot(pair, "snap")?;
    ensure!(
        said["paused_ms"].is_null() && said["instance"] == original["id"],
        "{said}"
    );
    pair.a.wait_for_status("g", "paused")?;
    pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;
    let restored = pair
        .b
        .ferry(&["restore", text(&folder), "--name", "h"])?
        .exit(0)?
        .json()?;

    ensure!(restored["status"] == "paused" && restored["name"] == "h", "{restored}");
    ensure!(restored["id"] != original["id"] && restored["epoch"] == 1, "{restored}");
    pair.b.ferry(&["resume", "h"])?.exit(0)?;
    // The same witness: no heartbeat is missing between the two.
    pair.runs_only_at(&pair.b, "h", &witness)
}

fn a_deleted_guest_goes_on_where_its_snapshot_was_taken(pair: &mut Pair) -> Result<()> {
    goes_on_at_b(pair, &Guest::new("g"))
}

fn two_vcpus_and_a_dirty_ring_go_on(pair: &mut Pair) -> Result<()> {
    goes_on_at_b(pair, &Guest::new("g").vcpus(2).dirty("ring"))
}

fn a_running_guest_is_what_it_was_after_its_snapshot(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;

    let (folder, said) = snapshot(pair, "snap")?;

    ensure!(said["paused_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{said}");
    ensure!(
        said["memory_bytes"] == 128 << 20 && said["directory"] == text(&folder),
        "{said}"
    );
    let stored = said["stored_bytes"].as_u64().unwrap_or(0);
    ensure!((16 << 20..64 << 20).contains(&stored), "{said}");
    let memory = fs::metadata(folder.join("memory"))?;
    ensure!(
        memory.len() == 128 << 20 && memory.blocks() * 512 < stored + (8 << 20),
        "not sparse"
    );
    ensure!(fs::metadata(&folder)?.permissions().mode() & 0o777 == 0o700);
    let shown = pair.a.show("g")?;
    ensure!(shown["epoch"] == 1 && shown["task"].is_null(), "{shown}");
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn one_snapshot_becomes_two_guests_beside_the_original(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;
    let id = pair.a.show("g")?["id"].clone();
    let original = Witness::of_instance(&[&pair.a], id.as_str().unwrap_or_default());
    let (folder, _) = snapshot(pair, "snap")?;

    let (one, witness_of_one) = restore(&pair.a, &folder, "one")?;
    let (two, witness_of_two) = restore(&pair.b, &folder, "two")?;

    ensure!(one["id"] != two["id"] && one["id"] != id, "{one} {two}");
    for (host, name, witness) in [
        (&pair.a, "g", &original),
        (&pair.a, "one", &witness_of_one),
        (&pair.b, "two", &witness_of_two),
    ] {
        host.wait_for_status(name, "running")?;
        witness.wait_for_beats_at(host.name, 5)?;
        witness.check()?;
    }
    refused(&pair.a, &folder, &["--name", "one"], "one")
}

fn a_restored_guest_migrates_reboots_and_is_snapshotted_again(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;
    let (folder, _) = snapshot(pair, "snap")?;
    pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;
    let said = pair
        .a
        .ferry(&["restore", text(&folder), "--name", "g"])?
        .exit(0)?
        .json()?;
    let witness = Witness::of_instance(&[&pair.a, &pair.b], said["id"].as_str().unwrap_or_default());
    witness.wait_for_beats_at("a", 5)?;

    pair.migrate("g", &["--digests"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)?;

    let again = pair.folder().join("again");
    pair.b.ferry(&["snapshot", "g", "--to", text(&again)])?.exit(0)?;
    pair.b.ferry(&["reboot", "g"])?.exit(0)?;
    witness.wait_ready_times(1)?;
    pair.b.ferry(&["delete", "g", "--force"])?.exit(0)?;
    let (_, third) = restore(&pair.a, &again, "h")?;
    pair.runs_only_at(&pair.a, "h", &third)
}

/// Changes a byte of a file of the snapshot.
fn damage(folder: &Path, name: &str, offset: u64) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(folder.join(name))?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ 0x10], offset)?;
    Ok(())
}

fn a_damaged_file_is_named_and_nothing_is_left(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;
    let (folder, _) = snapshot(pair, "snap")?;
    pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;
    let refused = |words: &str| refused(&pair.a, &folder, &["--name", "h"], words);

    // A page that the image holds: what lies between them is not read.
    let in_memory = rustix::fs::seek(File::open(folder.join("memory"))?, SeekFrom::Data(8 << 20))?;
    let piece = in_memory >> 20 << 20;
    let damaged = format!("the image is damaged in the 1048576 bytes at offset {piece}");
    for (name, offset, words) in [
        ("memory", in_memory, damaged.as_str()),
        ("memory.pieces", 100, "the file memory.pieces is damaged"),
        ("state", 100, "the file state is damaged"),
        ("profile", 20, "the file profile is damaged"),
        ("kernel", 100, "the file kernel cannot be used: it is damaged"),
        ("snapshot.json", 300, "snapshot.json"),
    ] {
        damage(&folder, name, offset)?;
        refused(words).with_context(|| format!("{name} is damaged at {offset}"))?;
        damage(&folder, name, offset)?;
    }
    let memory = OpenOptions::new().write(true).open(folder.join("memory"))?;
    memory.set_len(64 << 20)?;
    refused("the image has 67108864 bytes, of this guest it has 134217728")?;
    fs::rename(folder.join("state"), folder.join("gone"))?;
    refused("the file state cannot be used")?;
    std::os::unix::fs::symlink("gone", folder.join("state"))?;
    refused("the file state cannot be used")?;
    fs::write(
        folder.join("snapshot.json"),
        r#"{"format":"ferry-snapshot","version":7}"#,
    )?;
    refused("version 7, this build knows version 1")
}

fn a_folder_that_is_there_is_not_written_to(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    let folder = pair.folder().join("mine");
    fs::create_dir(&folder)?;
    let to = |path: &str| pair.a.ferry(&["snapshot", "g", "--to", path]);

    to(text(&folder))?.exit(4)?.says("is there already")?;
    to("/nowhere/snap")?.exit(1)?.says("/nowhere/snap.partial")?;
    fs::create_dir(pair.folder().join("snap.partial"))?;
    to(text(&pair.folder().join("snap")))?
        .exit(4)?
        .says("is being written")?;

    ensure!(fs::read_dir(&folder)?.count() == 0);
    pair.a.ferry(&["snapshot", "nobody", "--to", "/tmp/x"])?.exit(3)?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

/// A file system of 8 MiB, gone when it is dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf) -> Result<Self> {
        fs::create_dir(&at)?;
        command("mount", &["-t", "tmpfs", "-o", "size=8m", "tmpfs", text(&at)])?;
        Ok(Self(at))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = command("umount", &["--lazy", text(&self.0)]);
    }
}

fn a_full_disk_leaves_the_guest_running_and_no_folder(pair: &mut Pair) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root may mount the small disk that this needs");
        return Ok(());
    }
    let witness = pair.run(&Guest::new("g"))?;
    let disk = SmallDisk::mount(pair.folder().join("small"))?;

    let to = disk.0.join("snap");
    let said = pair.a.ferry(&["snapshot", "g", "--to", text(&to)])?.exit(1)?;

    said.says("No space left on device")?.says("is what it was")?;
    ensure!(fs::read_dir(&disk.0)?.count() == 0, "something is left");
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_migrating_instance_is_not_snapshotted(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    let underway = pair.migrate_until("g", &["--hold-at", "running"], |record| Ok(record.rounds() >= 1))?;
    let to = pair.folder().join("snap");

    let said = pair.a.ferry(&["snapshot", "g", "--to", text(&to)])?;
    said.exit(4)?.says(&underway.id)?;

    pair.a.ferry(&["migration", "abort", &underway.id])?.exit(0)?;
    underway.call.wait()?.exit(1)?;
    ensure!(!to.exists());
    pair.runs_only_at(&pair.a, "g", &witness)
}

/// Begins to write `g`, stops its VMM in the middle of that, and gives the folder that is being written.
fn stop_in_a_snapshot(pair: &Pair) -> Result<(Call, PathBuf)> {
    let partial = pair.folder().join("snap.partial");
    let folder = pair.folder().join("snap");
    let vmm = pair.a.vmm()?;
    let call = pair.a.begin(&["snapshot", "g", "--to", text(&folder)])?;
    until("memory is being written", CALL, || {
        let length = fs::metadata(partial.join("memory")).map_or(0, |metadata| metadata.len());
        Ok((length > 0).then_some(()))
    })?;
    process::signal(vmm, Signal::STOP)?;
    Ok((call, partial))
}

/// A guest that takes long enough to be written.
fn large() -> Guest {
    let work = "fill=random fill_mib=320 work=uniform work_mib=16 rate=1000 heartbeat_ms=20";
    Guest::new("g").memory_mib(512).work(work)
}

fn a_guest_goes_on_when_its_agent_is_killed_while_it_is_written(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&large())?;
    let vmm = pair.a.vmm()?;

    let (call, partial) = stop_in_a_snapshot(pair)?;
    pair.a.kill();
    call.wait()?.exit(8)?;
    process::signal(vmm, Signal::CONT)?;
    pair.a.start()?;

    pair.runs_only_at(&pair.a, "g", &witness)?;
    until("what was written is removed", CALL, || {
        Ok((!partial.exists()).then_some(()))
    })?;
    snapshot(pair, "snap")?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_guest_that_is_deleted_while_it_is_written_leaves_no_folder(pair: &mut Pair) -> Result<()> {
    pair.run(&large())?;

    let (call, partial) = stop_in_a_snapshot(pair)?;
    ensure!(pair.a.show("g")?["task"] == "snapshotting");
    pair.a.ferry(&["pause", "g"])?.exit(4)?.says("while a snapshot")?;
    pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;

    call.wait()?.exit(4)?.says("ended before its snapshot was written")?;
    ensure!(!partial.exists() && !pair.folder().join("snap").exists());
    has_nothing(&pair.a)
}

/// Whether a process has the file open.
fn has_open(process: u32, file: &Path) -> bool {
    let open = fs::read_dir(format!("/proc/{process}/fd"));
    let mut open = open.into_iter().flatten().flatten();
    open.any(|descriptor| fs::read_link(descriptor.path()).is_ok_and(|link| link == file))
}

fn nothing_is_left_of_a_guest_whose_agent_is_killed_while_it_is_loaded(pair: &mut Pair) -> Result<()> {
    pair.run(&large())?;
    let (folder, _) = snapshot(pair, "snap")?;
    pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;

    let memory = folder.join("memory");
    let disk = HangingDisk::on(&memory)?;
    let call = pair.b.begin(&["restore", text(&folder), "--name", "h"])?;
    disk.hang()?;
    let vmm = until("a VMM has the memory to load", CALL, || {
        Ok(pair.b.vmms().into_iter().find(|&vmm| has_open(vmm, &memory)))
    })?;
    process::signal(vmm, Signal::STOP)?;
    pair.b.kill();
    call.wait()?.exit(8)?;
    drop(disk);
    pair.b.start()?;

    has_nothing(&pair.b)?;
    let (_, witness) = restore(&pair.b, &folder, "h")?;
    pair.runs_only_at(&pair.b, "h", &witness)
}

fn the_same_instance_comes_back_only_when_it_is_gone(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;
    let id = pair.a.show("g")?["id"].clone();
    let (folder, _) = snapshot(pair, "snap")?;
    let same = ["--name", "again", "--same-identity"];

    refused(&pair.a, &folder, &same, "is on host a already")?;
    refused(
        &pair.b,
        &folder,
        &same,
        "is on host a (g, running): delete it there first",
    )?;
    pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;
    pair.b.terminate()?;
    refused(&pair.a, &folder, &same, "cannot be told")?;
    pair.b.start()?;
    let restored = pair.a.ferry(&["restore", text(&folder), "--same-identity"])?;
    let restored = restored.exit(0)?.json()?;

    ensure!(restored["id"] == id && restored["name"] == "g", "{restored}");
    ensure!(restored["epoch"].as_u64().is_some_and(|epoch| epoch > 1), "{restored}");
    let witness = Witness::of_instance(&[&pair.a, &pair.b], id.as_str().unwrap_or_default());
    pair.runs_only_at(&pair.a, "g", &witness)?;
    pair.migrate("g", &["--digests"])?.exit(0)?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

/// The generation id of a snapshotted guest, in its page of memory.
fn generation_id(folder: &Path) -> Result<u128> {
    let mut id = [0; 16];
    File::open(folder.join("memory"))?.read_exact_at(&mut id, 0xe_f000)?;
    ensure!(id != [0; 16], "no generation id in {}", folder.display());
    Ok(u128::from_le_bytes(id))
}

fn a_copy_has_a_generation_id_of_its_own(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;
    let (original, _) = snapshot(pair, "snap")?;
    pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;

    pair.a.ferry(&["restore", text(&original), "--name", "g"])?.exit(0)?;

    let (copy, _) = snapshot(pair, "copy")?;
    ensure!(generation_id(&copy)? != generation_id(&original)?);
    Ok(())
}

fn the_same_instance_keeps_its_generation_id_wherever_it_moves(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;
    let (original, _) = snapshot(pair, "snap")?;
    pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;

    pair.a
        .ferry(&["restore", text(&original), "--same-identity"])?
        .exit(0)?;
    let (same, _) = snapshot(pair, "same")?;
    pair.migrate("g", &[])?.exit(0)?;

    let moved = pair.folder().join("moved");
    pair.b.ferry(&["snapshot", "g", "--to", text(&moved)])?.exit(0)?;
    ensure!(generation_id(&same)? == generation_id(&original)?);
    ensure!(generation_id(&moved)? == generation_id(&original)?);
    Ok(())
}

/// A guest with a disk, its snapshot, and the image.
fn snapshot_with_a_disk(pair: &Pair) -> Result<(PathBuf, PathBuf)> {
    let image = pair.folder().join("root.img");
    File::create(&image)?.set_len(16 << 20)?;
    pair.run(&Guest::new("g").disk(&format!("path={}", image.display())))?;
    Ok((snapshot(pair, "snap")?.0, image))
}

fn a_disk_that_moved_on_is_refused(pair: &mut Pair) -> Result<()> {
    let (folder, image) = snapshot_with_a_disk(pair)?;
    let disk_is_refused = |words: &str| refused(&pair.a, &folder, &["--name", "h"], words);

    disk_is_refused("is locked by instance g")?;
    pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;
    let (_, witness) = restore(&pair.a, &folder, "h")?;
    pair.runs_only_at(&pair.a, "h", &witness)?;
    pair.a.ferry(&["delete", "h", "--force"])?.exit(0)?;
    disk_is_refused("moved on since the snapshot: instance h had it on host a under epoch 1")?;

    fs::remove_file(format!("{}.ferry-lock", image.display()))?;
    OpenOptions::new().write(true).open(&image)?.write_all_at(b"x", 0)?;
    disk_is_refused("moved on since the snapshot: it was written at another time")?;
    File::create(&image)?.set_len(8 << 20)?;
    disk_is_refused("it has 8388608 bytes, then it had 16777216")?;
    fs::remove_file(&image)?;
    disk_is_refused("root.img")
}

fn a_disk_copied_at_the_snapshot_goes_with_it(pair: &mut Pair) -> Result<()> {
    let (folder, image) = snapshot_with_a_disk(pair)?;
    let copy = pair.folder().join("copy.img");
    command("cp", &["--preserve=timestamps", text(&image), text(&copy)])?;
    pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;
    OpenOptions::new().write(true).open(&image)?.write_all_at(b"x", 0)?;
    refused(&pair.a, &folder, &["--name", "h"], "moved on")?;

    fs::rename(&copy, &image)?;

    let (_, witness) = restore(&pair.a, &folder, "h")?;
    pair.runs_only_at(&pair.a, "h", &witness)
}

fn another_guest_has_another_mac_address(pair: &mut Pair) -> Result<()> {
    ip(&["link", "add", "br0", "type", "bridge"])?;
    ip(&["link", "set", "br0", "up"])?;
    let witness = pair.run(&Guest::new("g").nic("bridge=br0"))?;
    let mac = pair.a.show("g")?["nics"][0]["mac"].clone();
    let (folder, _) = snapshot(pair, "snap")?;

    let (other, witness_of_other) = restore(&pair.a, &folder, "h")?;

    let new = &other["nics"][0]["mac"];
    ensure!(
        *new != mac && new.as_str().is_some_and(|mac| mac.starts_with("02:")),
        "{other}"
    );
    witness_of_other.wait_for_beats_at("a", 5)?;
    witness_of_other.check()?;
    drop(witness);
    for name in ["g", "h"] {
        pair.a.ferry(&["delete", name, "--force"])?.exit(0)?;
    }
    let same = pair.a.ferry(&["restore", text(&folder), "--same-identity"])?;
    ensure!(same.exit(0)?.json()?["nics"][0]["mac"] == mac);
    Ok(())
}
