//! Pages that travel compressed, where it pays or its user wants it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use ferry_tests::{Guest, Migration, Pair, until, waiting::CALL};
use libtest_mimic::Trial;

use crate::scenario::{across, expect_a_lost_peer, has_nothing, in_a_network, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = on_kvm![
        text_shrinks_by_each_way_to_compress,
        random_pages_are_sent_plainly_by_each_way_to_compress,
        within_one_host_it_is_left_alone_unless_a_way_is_named,
        a_dry_run_foretells_what_is_left_of_pages,
        over_grpc_pages_are_compressed_too,
        a_disk_that_is_copied_is_compressed_too,
        a_cold_guest_arrives_compressed,
        late_pages_that_nobody_waits_for_are_compressed_too,
        what_cannot_be_compressed_with_is_refused,
    ];
    trials.extend(in_a_network![
        text_over_a_slow_link_is_compressed_of_its_own_accord,
        text_that_comes_late_over_a_slow_link_is_compressed_of_its_own_accord,
        random_pages_over_a_slow_link_are_sent_plainly,
        a_guest_that_outruns_its_link_by_small_writes_ends_by_itself,
        a_cap_counts_what_is_sent,
        a_link_that_is_cut_under_compressed_pages_is_made_again,
    ]);
    trials
}

const TEXT: &str = "fill=text fill_mib=48 work=uniform work_mib=16 rate=2000 heartbeat_ms=20";
const RANDOM: &str = "fill=random fill_mib=48 work=uniform work_mib=16 rate=2000 heartbeat_ms=20";

/// Bytes that a guest of these holds at least.
const FILLED: f64 = (48 << 20) as f64;

/// A figure of what came of compression.
fn figure(moved: &Migration, name: &str) -> Result<f64> {
    moved.number(&format!("compression.{name}"))
}

fn move_on(pair: &Pair, to: &str, how: &str) -> Result<Migration> {
    let from = if to == "b" { &pair.a } else { &pair.b };
    let words = ["migrate", "g", "--to", to, "--compress", how, "--verify"];
    from.ferry(&words)?.exit(0)?.migration()?.is("completed", to)
}

fn late_pages_that_nobody_waits_for_are_compressed_too(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(TEXT))?;
    let postcopy = ["--mode", "postcopy", "--verify"];
    let came_late = |moved: Migration, to| -> Result<f64> {
        let moved = moved.is("completed", to)?;
        let (pages, verified) = (moved.number("late_pages")?, moved.number("late_verified")?);
        let share = moved.number("late_bytes")? / (4096.0 * pages);
        ensure!(4096.0 * pages >= FILLED && verified == pages, "{}", moved.record);
        eprintln!("{share:.2} of {pages} late pages were sent");
        Ok(share)
    };

    let packed = pair
        .migrate("g", &[&postcopy[..], &["--compress", "zstd"]].concat())?
        .exit(0)?;
    let packed = came_late(packed.migration()?, "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)?;
    let back = [&["migrate", "g", "--to", "a"], &postcopy[..]].concat();
    let plain = came_late(pair.b.ferry(&back)?.exit(0)?.migration()?, "a")?;

    // Those that the guest waited for travelled plainly. Some are zero, and only told.
    ensure!(
        packed < 0.75 && plain > 0.85,
        "{packed} of them compressed, {plain} not"
    );
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn text_shrinks_by_each_way_to_compress(pair: &mut Pair) -> Result<()> {
    // Hardly anything is sent twice, however slow compressing is.
    let witness =
        pair.run(&Guest::new("g").work("fill=text fill_mib=48 work=uniform work_mib=1 rate=100 heartbeat_ms=20"))?;
    for (how, to) in [("lz4", "b"), ("zstd", "a"), ("zstd:6", "b")] {
        let moved = move_on(pair, to, how)?;
        let (before, after) = (figure(&moved, "bytes_before")?, figure(&moved, "bytes_after")?);
        ensure!(before >= FILLED && after < 0.75 * before, "{}", moved.record);
        ensure!(moved.number("bytes_sent")? < 0.9 * FILLED, "{}", moved.record);
        witness.check()?;
    }
    let plain = move_on(pair, "a", "off")?;
    ensure!(figure(&plain, "compressed_frames")? == 0.0, "{}", plain.record);
    ensure!(plain.number("bytes_sent")? > FILLED, "{}", plain.record);
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn random_pages_are_sent_plainly_by_each_way_to_compress(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(RANDOM).dirty("ring"))?;
    for (how, to) in [("lz4", "b"), ("zstd:3", "a"), ("zstd", "b")] {
        let moved = move_on(pair, to, how)?;
        let (tried, frames) = (figure(&moved, "incompressible_frames")?, figure(&moved, "frames")?);
        // Others have what pages changed that were sent before.
        let packed = figure(&moved, "compressed_frames")?;
        ensure!(tried + packed > 0.9 * frames - 8.0, "{}", moved.record);
        ensure!(
            packed == 0.0 || figure(&moved, "delta_pages")? > 0.0,
            "{}",
            moved.record
        );
        ensure!(4096.0 * tried >= FILLED / 128.0, "{}", moved.record);
        witness.check()?;
    }
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn within_one_host_it_is_left_alone_unless_a_way_is_named(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(TEXT))?;
    let moved = pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;
    let told = &moved.record["compression"];
    ensure!(
        told["wanted"] == "auto" && told["why"] == "both ends are on one host",
        "{told}"
    );
    ensure!(figure(&moved, "compressed_frames")? == 0.0, "{}", moved.record);
    ensure!(figure(&moved, "frames")? > 20.0, "{}", moved.record);
    let moved = move_on(pair, "a", "lz4")?;
    ensure!(figure(&moved, "compressed_frames")? > 0.0, "{}", moved.record);
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_dry_run_foretells_what_is_left_of_pages(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work("fill=text fill_mib=48 work=idle heartbeat_ms=20"))?;
    let foretold = |how: &str| -> Result<(f64, String)> {
        let words = ["--dry-run", "--sample", "100ms", "--compress", how];
        let told = pair.migrate("g", &words)?.exit(0)?.json()?;
        let bytes = told["prediction"]["bytes"].as_f64().context("no bytes are foretold")?;
        let words = told["prediction"]["compression"].as_str().unwrap_or_default();
        Ok((bytes, words.to_owned()))
    };
    let (plain, words) = foretold("off")?;
    ensure!(plain >= FILLED && words.is_empty(), "{plain} bytes, {words:?}");
    let (packed, words) = foretold("zstd:3")?;
    ensure!(
        packed < plain / 2.0 && words.starts_with("pages are compressed with zstd:3: "),
        "{packed} bytes, {words:?}"
    );
    let (alone, words) = foretold("auto")?;
    ensure!(
        (alone / plain - 1.0).abs() < 0.1 && words.contains("both ends are on one host"),
        "{alone} bytes, {words:?}"
    );
    let sent = move_on(pair, "b", "zstd:3")?.number("bytes_sent")?;
    ensure!(
        packed > 0.5 * sent && packed < 2.0 * sent,
        "{packed} bytes were foretold, {sent} sent"
    );
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn over_grpc_pages_are_compressed_too(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(TEXT))?;
    let moved = pair
        .migrate("g", &["--transport", "grpc", "--compress", "zstd"])?
        .exit(0)?;
    let moved = moved.migration()?.is("completed", "b")?;
    ensure!(figure(&moved, "bytes_before")? >= FILLED, "{}", moved.record);
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_disk_that_is_copied_is_compressed_too(pair: &mut Pair) -> Result<()> {
    const DISK: u64 = (32 << 20) + 512;
    let [a, b, both] = ["at-a", "at-b", "disks"].map(|name| pair.folder().join(name));
    for folder in [&a, &b, &both] {
        fs::create_dir(folder)?;
    }
    pair.a.see(&a, &both);
    pair.b.see(&b, &both);
    for host in [&mut pair.a, &mut pair.b] {
        host.terminate()?;
        host.start()?;
    }
    let contents: Vec<u8> = (0..DISK).map(|at| (at / 4096 % 7 + at % 16) as u8 | 1).collect();
    let disk = File::create(a.join("g.img"))?;
    disk.write_all_at(&contents, 0)?;
    let image = both.join("g.img").display().to_string();
    let guest = Guest::new("g").work("fill=text fill_mib=8 work=idle");
    let witness = pair.run(&guest.disk(&format!("path={image}")))?;

    let moved = pair.migrate("g", &["--compress", "lz4"])?.exit(0)?.migration()?;

    let moved = moved.is("completed", "b")?;
    ensure!(figure(&moved, "bytes_before")? >= DISK as f64, "{}", moved.record);
    ensure!(moved.number("bytes_sent")? < DISK as f64 / 2.0, "{}", moved.record);
    ensure!(fs::read(b.join("g.img"))? == contents, "the disk is not what it was");
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_cold_guest_arrives_compressed(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work(TEXT))?;
    let moved = pair
        .migrate("g", &["--cold", "--compress", "zstd:2"])?
        .exit(0)?
        .migration()?;
    let moved = moved.is("completed", "b")?;
    ensure!(figure(&moved, "bytes_before")? >= FILLED, "{}", moved.record);
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn what_cannot_be_compressed_with_is_refused(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    for how in ["gzip", "zstd:20", "lz4:2", ""] {
        pair.migrate("g", &["--compress", how])?.exit(2)?.says("--compress")?;
    }
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn text_over_a_slow_link_is_compressed_of_its_own_accord(pair: &mut Pair) -> Result<()> {
    let (_link, witness) = across(pair, "200mbit", &Guest::new("g").work(TEXT))?;

    let moved = pair
        .migrate("g", &["--compress", "auto"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    let (before, after) = (figure(&moved, "bytes_before")?, figure(&moved, "bytes_after")?);
    ensure!(before > 0.5 * FILLED && after < 0.75 * before, "{}", moved.record);
    ensure!(figure(&moved, "switched_on")? >= 1.0, "{}", moved.record);
    let decisions = moved.record["decisions"].as_array().context("no decisions")?;
    let told = decisions.iter().find(|decision| decision["deed"] == "compress");
    let words = told.and_then(|told| told["words"].as_str()).context("not told")?;
    ensure!(words.starts_with("pages are compressed with "), "{words}");
    pair.runs_only_at(&pair.b, "g", &witness)
}

/// No round has shown what the link carries: the pages that are pushed do.
fn text_that_comes_late_over_a_slow_link_is_compressed_of_its_own_accord(pair: &mut Pair) -> Result<()> {
    let work = "fill=text fill_mib=128 work=idle heartbeat_ms=20";
    let (_link, witness) = across(pair, "200mbit", &Guest::new("g").memory_mib(256).work(work))?;

    let moved = pair.migrate("g", &["--mode", "postcopy", "--verify"])?.exit(0)?;

    let moved = moved.migration()?.is("completed", "b")?;
    let (pages, verified) = (moved.number("late_pages")?, moved.number("late_verified")?);
    let share = moved.number("late_bytes")? / (4096.0 * pages);
    ensure!(4096.0 * pages >= 2.0 * FILLED && verified == pages, "{}", moved.record);
    ensure!(share < 0.8, "{share} of {pages} late pages were sent");
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn random_pages_over_a_slow_link_are_sent_plainly(pair: &mut Pair) -> Result<()> {
    let (_link, witness) = across(pair, "400mbit", &Guest::new("g").work(RANDOM))?;

    let moved = pair
        .migrate("g", &["--compress", "auto"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    ensure!(figure(&moved, "switched_on")? == 0.0, "{}", moved.record);
    // What they changed is another matter.
    let packed = figure(&moved, "compressed_frames")?;
    ensure!(
        packed == 0.0 || figure(&moved, "delta_pages")? > 0.0,
        "{}",
        moved.record
    );
    pair.runs_only_at(&pair.b, "g", &witness)
}

/// It writes 32 MB of pages a second, and twice what its blackout may take of them in a round; of each page it changes some words.
fn a_guest_that_outruns_its_link_by_small_writes_ends_by_itself(pair: &mut Pair) -> Result<()> {
    let work = "fill=random fill_mib=16 work=uniform work_mib=8 rate=8000 heartbeat_ms=20";
    let (_link, witness) = across(pair, "100mbit", &Guest::new("g").work(work))?;

    let moved = pair.migrate("g", &["--verify", "--timeout", "60s"])?.exit(0)?;

    let moved = moved.migration()?.is("completed", "b")?;
    ensure!(figure(&moved, "delta_pages")? > 1000.0, "{}", moved.record);
    let decisions = moved.record["decisions"].as_array().context("no decisions")?;
    let told = decisions.iter().filter(|decision| decision["deed"] == "compress");
    let told: Vec<_> = told.filter_map(|decision| decision["words"].as_str()).collect();
    ensure!(
        told.iter()
            .any(|words| words.starts_with("pages that are sent again are told by what they changed")),
        "{told:?}"
    );
    pair.runs_only_at(&pair.b, "g", &witness)?;

    // And as without it: the same does not end.
    let back = pair
        .b
        .ferry(&["migrate", "g", "--to", "a", "--compress", "off", "--timeout", "10s"])?
        .exit(1)?;
    back.migration()?.is("failed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_cap_counts_what_is_sent(pair: &mut Pair) -> Result<()> {
    const CAP: f64 = 10e6;
    let (_link, witness) = across(
        pair,
        "1gbit",
        &Guest::new("g").work("fill=text fill_mib=48 work=idle heartbeat_ms=20"),
    )?;

    let further = ["--compress", "zstd", "--bandwidth", "80Mbit"];
    let moved = pair
        .migrate("g", &further)?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    let rounds = moved.record["rounds"].as_array().context("no rounds")?;
    let first = rounds.first().context("no round")?;
    let (bytes, ms) = (first["bytes"].as_f64(), first["ms"].as_f64());
    let rate = bytes
        .zip(ms)
        .map(|(bytes, ms)| bytes / ms * 1e3)
        .context("no figures")?;
    ensure!(rate < 1.1 * CAP, "{rate}: {}", moved.record);
    ensure!(
        first["pages"].as_f64().unwrap_or(0.0) * 4096.0 > 1.3 * bytes.unwrap_or(0.0),
        "{}",
        moved.record
    );
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn a_link_that_is_cut_under_compressed_pages_is_made_again(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer(pair);
    let (link, witness) = across(pair, "20mbit", &Guest::new("g").work(TEXT))?;
    let further = ["--compress", "zstd", "--resume-window", "60s", "--digests"];
    let at = |percent: f64| {
        move |shown: &Migration| {
            Ok(shown.record["status"] == "running" && shown.record["progress_percent"].as_f64() >= Some(percent))
        }
    };
    let underway = pair.migrate_until("g", &further, at(30.0))?;

    link.cut()?;
    let shown = || pair.a.ferry(&["migration", "show", &underway.id])?.exit(0)?.migration();
    until("the source says that its link is lost", CALL, || {
        Ok((shown()?.record["status"] == "running (link lost)").then_some(()))
    })?;
    link.set_rate("1gbit")?;
    link.heal()?;

    let moved = underway.call.wait()?.exit(0)?.migration()?.is("completed", "b")?;
    ensure!(moved.record["resumed_links"].as_u64() >= Some(1), "{}", moved.record);
    ensure!(figure(&moved, "compressed_frames")? > 20.0, "{}", moved.record);
    pair.runs_only_at(&pair.b, "g", &witness)?;
    has_nothing(&pair.a)
}
