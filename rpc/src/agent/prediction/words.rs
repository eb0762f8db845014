//! What is said of a prediction.

use std::time::Duration;

use ferry_migration::policy::prediction::{Deltas, End, Prediction, Remedies, Wanted};
use ferry_migration::{Packed, SampledWay};
use ferry_proto::agent::v1::{MigrationPrediction, PredictedRemedy};

use crate::agent::failure::Failure;

/// Nothing could be found out.
pub(super) fn unknown(failure: &Failure) -> MigrationPrediction {
    MigrationPrediction {
        unknown: Some(failure.chain()),
        ..MigrationPrediction::default()
    }
}

/// The word for scripts.
pub(super) fn end(end: End) -> &'static str {
    match end {
        End::Whole => "whole",
        End::Late => "late",
        End::Paused => "paused",
        End::Never => "never",
    }
}

/// What is expected.
pub(super) fn expected(prediction: &Prediction, wanted: &Wanted) -> String {
    let comes_to = format!(
        "{} in all, {} sent in {}, a blackout of {}",
        time(prediction.total),
        megabytes(prediction.bytes as f64),
        rounds(prediction.rounds),
        time(prediction.blackout)
    );
    let throttled = match prediction.throttle {
        0 => String::new(),
        percent => format!(", vCPUs kept from running for {percent} % of the time"),
    };
    match prediction.end {
        End::Whole => format!("expected: {comes_to}{throttled}"),
        End::Late => format!(
            "expected: {comes_to}; then {} come late, within {}",
            megabytes(prediction.late_bytes as f64),
            time(prediction.late)
        ),
        End::Paused => format!("expected: its time is up, and it stands still for what is left: {comes_to}{throttled}"),
        End::Never => format!(
            "not expected to end: it would be given up after {}. {}",
            time(wanted.terms.timeout),
            prediction.words
        ),
    }
}

/// What would help, as arguments.
pub(super) fn remedies(remedies: &Remedies, wanted: &Wanted) -> Vec<PredictedRemedy> {
    let remedy = |argument: String, words: String| PredictedRemedy { argument, words };
    let mut told = Vec::new();
    if let Some(max_downtime) = remedies.max_downtime {
        let ms = max_downtime.as_secs_f64() * 1e3;
        told.push(remedy(
            format!("--max-downtime {}ms", ms.ceil()),
            "the shortest blackout in which what is left could be sent, and some more".to_owned(),
        ));
    }
    if let Some(rate) = remedies.bytes_per_second {
        told.push(remedy(
            format!("--bandwidth {}Mbit", (rate * 8.0 / 1e6).ceil()),
            "on a link that carries as much".to_owned(),
        ));
    }
    if let Some(throttled) = &remedies.auto_converge {
        let words = format!(
            "vCPUs kept from running for {} % of the time in the end: {} in all, a blackout of {}",
            throttled.throttle,
            time(throttled.total),
            time(throttled.blackout)
        );
        let argument = match wanted.most_throttle {
            0 => "--auto-converge".to_owned(),
            _ => format!("--max-throttle {}", throttled.throttle),
        };
        told.push(remedy(argument, words));
    }
    if let Some(late) = &remedies.hybrid {
        let words = format!(
            "{} until it runs there, a blackout of {}, and {} come late",
            time(late.total),
            time(late.blackout),
            megabytes(late.late_bytes as f64)
        );
        told.push(remedy("--mode hybrid".to_owned(), words));
    }
    told
}

/// How pages are expected to be compressed, or why not; `None`: no way was tried.
pub(super) fn compression(tried: &[SampledWay], packed: Option<Packed>, is_left_alone: bool) -> Option<String> {
    let takes = |bytes: u64, time: Duration| bytes as f64 / time.as_secs_f64().max(1e-6) / 1e6;
    let share = |part: u64, of: u64| 100.0 * part as f64 / of.max(1) as f64;
    let told = |way: &SampledWay| {
        format!(
            "{} takes in {:.0} MB/s a stream and leaves {:.0} %",
            way.method,
            takes(way.bytes, way.took),
            share(way.packed, way.bytes)
        )
    };
    let found: Vec<_> = tried.iter().filter(|way| way.bytes > 0).map(told).collect();
    let words = match packed {
        _ if is_left_alone => "pages are not compressed: both ends are on one host".to_owned(),
        _ if tried.is_empty() => return None,
        _ if found.is_empty() => "pages are not compressed: those that were looked at are zero".to_owned(),
        Some(packed) => format!("pages are compressed with {}: {}", packed.method, found.join(", ")),
        None => format!(
            "pages are not compressed, for it would take longer: {}",
            found.join(", ")
        ),
    };
    Some(words)
}

/// How pages are expected to be told that are sent again.
pub(super) fn deltas(deltas: &Deltas) -> String {
    format!(
        "pages that are sent again are told by what they changed, which leaves {:.0} % of them",
        deltas.told.left * 100.0
    )
}

fn rounds(count: u32) -> String {
    match count {
        1 => "1 round".to_owned(),
        count => format!("{count} rounds"),
    }
}

fn time(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds < 1.0 => format!("{:.1} ms", seconds * 1e3),
        seconds => format!("{seconds:.1} s"),
    }
}

fn megabytes(bytes: f64) -> String {
    format!("{:.1} MB", bytes / 1e6)
}

#[cfg(test)]
mod tests {
    use ferry_migration::postcopy::Lateness;
    use ferry_migration::source::{Manner, OnTimeout, Terms};

    use super::*;

    #[test]
    fn a_throttle_that_is_capped_too_low_is_to_be_raised_and_one_that_is_not_asked_for_to_be_asked_for() {
        let throttled = Prediction {
            end: End::Whole,
            total: Duration::from_secs(20),
            blackout: Duration::from_millis(100),
            rounds: 9,
            bytes: 1 << 30,
            late_bytes: 0,
            late: Duration::ZERO,
            throttle: 50,
            within_budget_after: None,
            words: String::new(),
        };
        let found = Remedies {
            auto_converge: Some(throttled),
            ..Remedies::default()
        };
        let argument = |most_throttle| {
            let wanted = Wanted {
                terms: Terms {
                    manner: Manner::Live {
                        max_downtime: Duration::from_millis(300),
                    },
                    timeout: Duration::from_secs(900),
                    bandwidth: None,
                },
                on_timeout: OnTimeout::Abort,
                lateness: Lateness::Never,
                most_throttle,
                verify: false,
            };
            let told = remedies(&found, &wanted);
            assert_eq!(told.len(), 1);
            told.into_iter().map(|remedy| remedy.argument).collect::<String>()
        };
        assert_eq!(argument(0), "--auto-converge");
        assert_eq!(argument(20), "--max-throttle 50");
    }
}
