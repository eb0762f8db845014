//! What a migration would come to, for people.

use ferry_proto::agent::v1::{MigrationPrediction, WrittenBy, WrittenPart};

use super::output::{human_bytes, human_ms, human_rate};

/// All that is known, a line each.
pub(super) fn account(prediction: &MigrationPrediction) -> String {
    if let Some(why) = &prediction.unknown {
        return format!("what it would come to is not known: {why}");
    }
    let mut lines = vec![prediction.words.clone()];
    let remedy = |remedy: &ferry_proto::agent::v1::PredictedRemedy| {
        format!("  would help: {} ({})", remedy.argument, remedy.words)
    };
    lines.extend(prediction.remedies.iter().map(remedy));
    lines.push(memory(prediction));
    lines.extend(writes(prediction));
    if let Some(rate) = prediction.bandwidth_bytes_per_s {
        lines.push(format!("link: {}, {}", human_rate(rate), prediction.bandwidth_from));
    }
    lines.extend(
        prediction
            .compression
            .as_ref()
            .map(|words| format!("compression: {words}")),
    );
    lines.join("\n")
}

fn memory(prediction: &MigrationPrediction) -> String {
    let zero = prediction
        .zero_share
        .map_or_else(String::new, |share| format!(", {:.0} % of them zero", share * 100.0));
    format!(
        "memory: {} of {} populated{zero}",
        human_bytes(prediction.populated_bytes),
        human_bytes(prediction.memory_bytes)
    )
}

fn writes(prediction: &MigrationPrediction) -> Vec<String> {
    let (Some(sample_ms), Some(rate)) = (prediction.sample_ms, prediction.dirty_bytes_per_s) else {
        return vec!["writes: not looked at, or the guest stands still".to_owned()];
    };
    let by = |by: &WrittenBy| format!("{} after {}", human_bytes(by.bytes), human_ms(by.after_ms));
    let found: Vec<_> = prediction.written.iter().map(by).collect();
    let mut lines = vec![format!(
        "writes: {} in {}; different pages: {}",
        human_rate(rate),
        human_ms(sample_ms),
        found.join(", ")
    )];
    let by_vcpu = &prediction.dirty_bytes_per_s_by_vcpu;
    let each = |(vcpu, rate): (usize, &f64)| format!("{vcpu}: {}", human_rate(*rate));
    lines.push(match by_vcpu.is_empty() {
        true => "writes by vCPU: the dirty log does not tell (--dirty ring does)".to_owned(),
        false => format!(
            "writes by vCPU: {}",
            by_vcpu.iter().enumerate().map(each).collect::<Vec<_>>().join(", ")
        ),
    });
    let part = |part: &WrittenPart| {
        format!(
            "{} at {:#x}: {}",
            human_bytes(part.bytes),
            part.address,
            human_rate(part.dirty_bytes_per_s)
        )
    };
    let parts: Vec<_> = prediction.dirty_parts.iter().map(part).collect();
    if !parts.is_empty() {
        lines.push(format!("writes by part of memory: {}", parts.join(", ")));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_said_with_its_reason() {
        let unknown = MigrationPrediction {
            unknown: Some("instance g is stopped".to_owned()),
            ..MigrationPrediction::default()
        };
        assert_eq!(
            account(&unknown),
            "what it would come to is not known: instance g is stopped"
        );
    }

    #[test]
    fn all_that_was_found_is_told() {
        let prediction = MigrationPrediction {
            words: "expected: 1 round".to_owned(),
            bandwidth_bytes_per_s: Some(1048576.0),
            bandwidth_from: "assumed".to_owned(),
            compression: Some("pages are compressed with lz4".to_owned()),
            memory_bytes: 1 << 30,
            populated_bytes: 1 << 20,
            zero_share: Some(0.25),
            sample_ms: Some(3000.0),
            written: vec![WrittenBy {
                after_ms: 3000.0,
                bytes: 3 << 20,
            }],
            dirty_bytes_per_s: Some(1048576.0),
            dirty_bytes_per_s_by_vcpu: vec![1048576.0, 0.0],
            dirty_parts: vec![WrittenPart {
                address: 128 << 20,
                bytes: 128 << 20,
                dirty_bytes_per_s: 1048576.0,
            }],
            ..MigrationPrediction::default()
        };
        let told = account(&prediction);
        for words in [
            "expected: 1 round",
            "1 MiB of 1 GiB populated, 25 % of them zero",
            "1 MiB/s in 3.00 s",
            "3 MiB after 3.00 s",
            "0: 1 MiB/s, 1: 0 B/s",
            "128 MiB at 0x8000000: 1 MiB/s",
            "link: 1 MiB/s, assumed",
            "compression: pages are compressed with lz4",
        ] {
            assert!(told.contains(words), "{words:?} in {told}");
        }
    }
}
