use ferry_proto::agent::v1::DirtyPart;

use super::super::progress::tests::info;
use super::*;

#[test]
fn the_last_line_always_says_where_the_guest_is() {
    let last = |info: &MigrationInfo| account(info).lines().last().unwrap().to_owned();
    let done = MigrationInfo {
        guest_location: Some("b".into()),
        ..info("completed")
    };
    assert_eq!(last(&done), "web is on b");
    let failed = MigrationInfo {
        guest_location: Some("a".into()),
        error: Some("link cut".into()),
        ..info("failed")
    };
    assert_eq!(last(&failed), "web is on a");
    assert!(account(&failed).starts_with("migration m failed: link cut"));
    assert_eq!(last(&info("indeterminate")), "nobody knows whether web is on a or on b");
    assert_eq!(last(&info("error")), "web is lost");
    let ended = MigrationInfo {
        guest_ended: Some("powered-off".into()),
        ..info("failed")
    };
    assert_eq!(last(&ended), "web ended by itself: powered-off");
}

#[test]
fn what_was_undone_is_told_of_one_that_did_not_arrive() {
    let failed = MigrationInfo {
        step: "copy".into(),
        undone: vec!["copy: it runs on".into(), "prepare: it was told".into()],
        guest_location: Some("a".into()),
        ..info("failed")
    };
    let text = account(&failed);
    assert!(
        text.contains("it came to step copy\nundone: copy: it runs on\nundone: prepare: it was told\nweb is on a"),
        "{text}"
    );
    let done = MigrationInfo {
        step: "confirm".into(),
        ..info("completed")
    };
    assert!(!account(&done).contains("step"));
}

#[test]
fn what_was_compressed_is_told() {
    let told = |wanted: &str, method: Option<&str>, compressed_frames| {
        let compression = Compressed {
            delta_pages: compressed_frames * 20,
            wanted: wanted.to_owned(),
            method: method.map(str::to_owned),
            frames: 1200,
            compressed_frames,
            bytes_before: 4 << 20,
            bytes_after: 1 << 20,
            ..Compressed::default()
        };
        account(&MigrationInfo {
            compression: Some(compression),
            ..info("completed")
        })
    };
    let by_itself = told("auto", Some("zstd:1"), 1000);
    assert!(
        by_itself.contains("compressed, in the end with zstd:1: 1,000 of 1,200 frames"),
        "{by_itself}"
    );
    assert!(
        by_itself.contains(", 20,000 pages of it told by what they changed"),
        "{by_itself}"
    );
    assert!(told("auto", None, 1).contains("compressed, in the end not: 1 of"));
    assert!(told("lz4", Some("lz4"), 7).contains("compressed with lz4: 7 of"));
    assert!(told("lz4", Some("lz4"), 0).contains("compressed with lz4: nothing got any smaller by it"));
    assert!(!told("auto", None, 0).contains("compressed"));
}

#[test]
fn what_was_compared_is_told() {
    let told = |ranges_sent_again| {
        let verified = Verified {
            pages: 20_000,
            ranges_sent_again,
            blackout_ms: 1.5,
        };
        account(&MigrationInfo {
            verified: Some(verified),
            ..info("completed")
        })
    };
    assert!(
        told(0).contains("verified: 20,000 pages are what was sent; "),
        "{}",
        told(0)
    );
    assert!(
        told(1).contains("are what was sent, 1 range sent again; "),
        "{}",
        told(1)
    );
    assert!(!account(&info("completed")).contains("verified"));
}

#[test]
fn late_pages_that_were_checked_are_told() {
    let told = |late_sent_again| {
        account(&MigrationInfo {
            late_verified: Some(9000),
            late_sent_again,
            ..info("completed")
        })
    };
    let whole = "verified: 9,000 pages that came late are what the source had";
    assert!(told(Some(0)).contains(&format!("{whole}\n")), "{}", told(Some(0)));
    let again = told(Some(256));
    assert!(
        again.contains(&format!("{whole}, 256 of them asked for again")),
        "{again}"
    );
}

#[test]
fn pages_that_come_late_and_waits_for_them_are_told() {
    let underway = MigrationInfo {
        late_pages: Some(20_000),
        late_missing: Some(5_000),
        decision: Some("the guest waits for pages: no route".into()),
        ..info(POST_COPY)
    };
    let over = MigrationInfo {
        late_missing: Some(0),
        late_ms: Some(120.5),
        late_waits_log2_us: vec![0, 0, 0, 0, 0, 0, 0, 12, 0, 0, 0, 3],
        late_median_wait_ms: Some(0.12),
        late_longest_wait_ms: Some(1.5),
        status: "completed".into(),
        ..underway
    };
    let told = "20,000 pages came late, all of them 120.5 ms after the handover; \
                the guest waited 15 times, 0.12 ms in the median and 1.50 ms at most";
    for text in [account(&over), report(&over)] {
        assert!(text.contains(told), "{text}");
    }
    let lost = MigrationInfo {
        late_missing: Some(5_000),
        status: "error".into(),
        ..over.clone()
    };
    let told = "15,000 pages came late, 5,000 never did";
    assert!(account(&lost).contains(told), "{}", account(&lost));
    let waits = "waits for pages that came late: 12 under 128 µs · 3 under 2.05 ms";
    assert!(report(&over).contains(waits), "{}", report(&over));
    assert!(!report(&info("completed")).contains("late"));
}

#[test]
fn who_wrote_and_where_is_told_of_each_round() {
    let decided = MigrationDecision {
        round: 1,
        deed: "continue".into(),
        words: "over the budget".into(),
        round_ms: Some(500.0),
        written_by_vcpu: vec![512, 0],
        dirty_parts: vec![DirtyPart {
            address: 128 << 20,
            bytes: 128 << 20,
            dirty_pages: 256,
        }],
        ..MigrationDecision::default()
    };
    let retuned = MigrationDecision {
        round_ms: None,
        deed: "retune".into(),
        ..decided.clone()
    };
    let text = report(&MigrationInfo {
        decisions: vec![decided, retuned],
        ..info("running")
    });
    let written = "\n  written: vCPU 0 4 MiB/s · vCPU 1 0 B/s · 0x8000000 to 0x10000000 2 MiB/s\n";
    assert_eq!(text.matches(written).count(), 1, "{text}");
    assert_eq!(text.matches("written").count(), 1, "{text}");
}

#[test]
fn gaps_that_are_known_are_told() {
    let gap = |sent_ms, received_ms| NetworkGap {
        mac: "02:00:5e:10:00:01".to_owned(),
        sent_ms,
        received_ms,
    };
    let moved = MigrationInfo {
        network_gaps: vec![gap(Some(5.0), Some(204.5)), gap(None, Some(7.5))],
        ..info("completed")
    };
    for text in [account(&moved), report(&moved)] {
        assert!(
            text.contains(
                "network gap of 02:00:5e:10:00:01: no frame from it for 5.00 ms · no frame for it for 204.5 ms"
            ),
            "{text}"
        );
        assert!(text.contains(": no frame for it for 7.50 ms"), "{text}");
    }
    assert!(!account(&info("completed")).contains("network gap"));
}
