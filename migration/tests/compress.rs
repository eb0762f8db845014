//! Pages that travel compressed.

mod fake;

use std::num::NonZeroU64;
use std::time::Duration;

use fake::scene::*;
use fake::{FakeSource, Tracking, Workload};
use ferry_migration::guest::SourceGuest as _;
use ferry_migration::source::{Manner, SourceReport, SourceSummary};
use ferry_migration::{Compression, Method};

const BUSY: Workload = Workload::Uniform {
    frames: 3000,
    rate: 20_000,
};

/// Pages of a few words that repeat: lz4 and zstd make next to nothing of them.
fn plain_text(source: &FakeSource) {
    for frame in 3..6003 {
        source.memory().repeat(frame, frame % 50 + 1);
    }
}

/// A guest whose pages shrink.
fn text(tracking: Tracking, workload: Workload) -> Scene {
    let source = guest(tracking, workload);
    plain_text(&source);
    Scene::new(source)
}

fn compressed(mut scene: Scene, compression: Compression) -> SourceSummary {
    scene.parameters.compression = compression;
    let ends = migrate(scene);
    let (summary, loaded) = ends.arrived();
    assert_eq!(summary.bytes_sent, loaded.summary.totals.bytes);
    summary.clone()
}

#[track_caller]
fn shrinks(scene: Scene, method: Method) {
    let summary = compressed(scene, Compression::Always(method));
    let tally = &summary.compression;
    assert!(tally.bytes_before > 20 << 20, "{tally:?}");
    assert!(tally.bytes_after < tally.bytes_before / 4, "{tally:?}");
    assert!(summary.bytes_sent < 12 << 20, "{}", summary.bytes_sent);
    let saved: u64 = summary.rounds.iter().map(|round| round.saved).sum();
    assert_eq!(saved, tally.saved());
}

#[test]
fn a_guest_arrives_whole_with_lz4() {
    shrinks(text(Tracking::Log, Workload::Idle), Method::Lz4);
}

#[test]
fn a_guest_that_writes_all_the_while_arrives_whole_with_zstd() {
    let mut scene = text(Tracking::Harvest, BUSY);
    scene.parameters.compression = Compression::Always(Method::Zstd(3));
    let ends = migrate(scene);
    let (summary, _) = ends.arrived();
    assert!(summary.compression.compressed_frames > 0, "{:?}", summary.compression);
}

#[test]
fn a_cold_guest_arrives_whole() {
    let mut scene = text(Tracking::Log, Workload::Idle);
    scene.parameters.manner = Manner::Cold;
    shrinks(scene, Method::Zstd(1));
}

#[test]
fn what_is_off_is_off() {
    let summary = compressed(text(Tracking::Log, Workload::Idle), Compression::Off);
    assert_eq!(summary.compression.compressed_frames, 0);
    assert!(summary.bytes_sent > 20 << 20);
}

#[test]
fn under_a_tight_cap_it_is_switched_on_and_told() {
    let mut scene = text(Tracking::Log, Workload::Idle);
    scene.parameters.bandwidth = NonZeroU64::new(10 << 20);
    // There are a dozen frames: of two streams one may have them all, while what the other one tried out waits for its turn.
    scene.streams = 1;
    let summary = compressed(scene, Compression::Auto);
    let tally = &summary.compression;
    assert_eq!(tally.switched_on, tally.switched_off + 1, "{tally:?}");
    assert!(tally.bytes_before > 0 && tally.saved() > 0, "{tally:?}");
    let decision = summary.decisions.iter().find(|decided| decided.deed == "compress");
    assert!(
        decision.unwrap().words.starts_with("pages are compressed with "),
        "{decision:?}"
    );
}

#[test]
fn a_damaged_page_is_noticed_and_sent_again() {
    let mut memory = memory();
    memory.damage = Some(5000);
    memory.damages = 1.into();
    let mut scene = text(Tracking::Log, Workload::Idle);
    scene.destination = fake::FakeDestination::new(memory);
    scene.parameters.digests = false;
    let summary = compressed(scene, Compression::Always(Method::Zstd(1)));
    assert_eq!(summary.verified.unwrap().ranges_sent_again, 1);
}

/// A guest that writes a word here and there, and makes a page zero now and then.
const WORDS: Workload = Workload::Words {
    frames: 300,
    rate: 20_000,
};

/// A guest that writes a word of a few pages over and over.
const HOT: Workload = Workload::OneWord {
    frames: 30,
    rate: 20_000,
};

#[test]
fn what_is_written_again_is_told_by_what_it_changed() {
    for tracking in [Tracking::Log, Tracking::Harvest] {
        let mut source = guest(tracking, WORDS);
        source.settles_after = [50].into();
        let scene = Scene::new(source);
        let summary = compressed(scene, Compression::Always(Method::Lz4));
        assert!(summary.compression.delta_pages > 100, "{:?}", summary.compression);
    }
}

#[test]
fn under_a_tight_cap_pages_that_do_not_compress_are_told_by_what_they_changed() {
    let mut scene = Scene::new(guest(Tracking::Log, WORDS));
    scene.parameters.bandwidth = NonZeroU64::new(20 << 20);
    let summary = compressed(scene, Compression::Auto);
    let tally = &summary.compression;
    assert!(tally.delta_pages > 100 && tally.saved() > 0, "{tally:?}");
    let decision = summary.decisions.iter().find(|decided| decided.deed == "compress");
    assert!(
        decision
            .unwrap()
            .words
            .starts_with("pages that are sent again are told by what they changed"),
        "{decision:?}"
    );
}

#[test]
fn what_was_damaged_is_sent_whole_where_it_would_be_told_by_what_it_changed() {
    let mut memory = memory();
    // In the first round, and in the one from which copies are kept.
    memory.damage = Some(5);
    memory.damages = 2.into();
    let mut source = guest(Tracking::Log, HOT);
    source.settles_after = [50].into();
    let mut scene = Scene::new(source);
    scene.destination = fake::FakeDestination::new(memory);
    scene.parameters.digests = false;
    let summary = compressed(scene, Compression::Always(Method::Lz4));
    assert!(summary.compression.delta_pages > 0, "{:?}", summary.compression);
    assert_eq!(summary.verified.unwrap().ranges_sent_again, 1);
}

#[test]
fn what_changed_since_a_link_was_lost_is_sent_whole() {
    let window = Duration::from_secs(20);
    let mut source = guest(Tracking::Log, WORDS);
    source.settles_after = [200].into();
    let mut scene = Scene::new(source);
    scene.parameters.resume_window = window;
    scene.destination_parameters.resume_window = window;
    let (mut arm, mut next_cut) = (arming(), 4);
    scene.agent = Box::new(move |report, controls| {
        match report {
            SourceReport::Round { round, .. } if round.number >= next_cut && next_cut < 30 => {
                next_cut += 10;
                controls.cut();
            }
            SourceReport::LinkLost { .. } => controls.reconnect(),
            _ => {}
        }
        arm(report, controls);
    });
    scene.parameters.compression = Compression::Always(Method::Lz4);
    let ends = migrate(scene);
    let (summary, _) = ends.arrived();
    let resumed = |report: &&SourceReport| matches!(report, SourceReport::Resumed { .. });
    assert_eq!(ends.reports.iter().filter(resumed).count(), 3);
    assert!(summary.compression.delta_pages > 100, "{:?}", summary.compression);
}

#[test]
fn a_link_that_is_lost_is_made_again_and_what_came_whole_is_not_sent_again() {
    let window = Duration::from_secs(20);
    let mut scene = text(Tracking::Log, Workload::Idle);
    scene.parameters.resume_window = window;
    scene.destination_parameters.resume_window = window;
    scene.parameters.bandwidth = NonZeroU64::new(500 << 10);
    let (mut arm, mut is_cut) = (arming(), false);
    scene.agent = Box::new(move |report, controls| {
        match report {
            SourceReport::Progress(progress) if progress.copied.percent > 20 && !is_cut => {
                is_cut = true;
                controls.cut();
            }
            SourceReport::LinkLost { .. } => controls.reconnect(),
            _ => {}
        }
        arm(report, controls);
    });
    scene.parameters.compression = Compression::Always(Method::Lz4);
    let ends = migrate(scene);
    let (summary, _) = ends.arrived();
    let held = ends.reports.iter().find_map(|report| match report {
        SourceReport::Resumed { held_pages, .. } => Some(*held_pages),
        _ => None,
    });
    assert!(held.unwrap() > 500, "{held:?}");
    assert!(summary.compression.bytes_before < 40 << 20, "{:?}", summary.compression);
}
