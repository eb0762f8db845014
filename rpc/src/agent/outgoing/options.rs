//! The options of a migration, as they were asked for.

use std::ops::RangeInclusive;

use ferry_migration::{Compression, ParseCompressionError};
use ferry_proto::InvalidField;
use ferry_proto::agent::v1::MigrationOptions;
use ferry_vmm::MOST_PERCENT as MOST_THROTTLE_PERCENT;

use super::handle::MOST_STREAMS;
use crate::agent::backends::storage::Storage;
use crate::agent::mode::{Mode, PAUSE, POSTCOPY};
use crate::agent::transport::Transport;

/// What a request wants of compression; one that says nothing wants none.
pub(crate) fn compression(text: &str) -> Result<Compression, ParseCompressionError> {
    match text {
        "" => Ok(Compression::default()),
        text => text.parse(),
    }
}

/// The longest that a lost link may be waited for: a day. The destination keeps memory for the guest that long.
pub(crate) const MOST_RESUME_WINDOW_MS: u64 = 24 * 3600 * 1000;

/// What a guest may be allowed to stand still.
pub(super) const DOWNTIMES_US: RangeInclusive<u64> = 1..=60_000_000;
pub(super) const NO_DOWNTIME: &str = "is not between 1 and 60 seconds' worth";

/// Checks what a caller chose.
///
/// # Errors
/// Names the field.
pub(crate) fn check_options(options: MigrationOptions) -> Result<MigrationOptions, InvalidField> {
    let invalid = |field, problem: String| Err(InvalidField { field, problem });
    if options.streams > u32::from(MOST_STREAMS) {
        return invalid("options.streams", format!("{} is over {MOST_STREAMS}", options.streams));
    }
    let mode = Mode::of(&options)?;
    match mode {
        Mode::Precopy | Mode::Postcopy | Mode::Hybrid | Mode::Overtime
            if !DOWNTIMES_US.contains(&options.max_downtime_us) =>
        {
            return invalid("options.max_downtime_us", NO_DOWNTIME.to_owned());
        }
        Mode::Cold if options.max_downtime_us != 0 => {
            let problem = "does not apply to a cold migration: its guest stands still from the beginning".to_owned();
            return invalid("options.max_downtime_us", problem);
        }
        Mode::Postcopy | Mode::Hybrid | Mode::Overtime if options.digests => {
            let problem = "pages that come late cannot be compared before the guest is handed over".to_owned();
            return invalid("options.digests", problem);
        }
        // A mode that a user asks for by another field.
        Mode::Overtime if options.on_timeout != POSTCOPY => {
            return invalid("options.mode", format!("{:?} is --on-timeout {POSTCOPY}", options.mode));
        }
        Mode::Precopy | Mode::Postcopy | Mode::Hybrid | Mode::Overtime | Mode::Cold => {}
    }
    if let Err(unknown) = Transport::parse(&options.transport) {
        return invalid("options.transport", unknown.problem);
    }
    if let Err(unknown) = compression(&options.compress) {
        return invalid("options.compress", unknown.to_string());
    }
    if let Err(problem) = Storage::parse(&options.storage) {
        return invalid("options.storage", problem);
    }
    if !["", "queued", "preparing", "running", "armed"].contains(&options.hold_at.as_str()) {
        return invalid(
            "options.hold_at",
            "is no point at which a migration can be held".to_owned(),
        );
    }
    if [PAUSE, POSTCOPY].contains(&options.on_timeout.as_str()) && mode == Mode::Cold {
        let problem = "does not apply to a cold migration: its guest stands still as it is".to_owned();
        return invalid("options.on_timeout", problem);
    }
    if !["", "abort", PAUSE, POSTCOPY].contains(&options.on_timeout.as_str()) {
        let problem = format!("{:?} is not one of abort, {PAUSE}, {POSTCOPY}", options.on_timeout);
        return invalid("options.on_timeout", problem);
    }
    if options.max_throttle_percent > 0 && mode == Mode::Cold {
        let problem = "does not apply to a cold migration: its guest writes nothing".to_owned();
        return invalid("options.max_throttle_percent", problem);
    }
    if options.max_throttle_percent > MOST_THROTTLE_PERCENT {
        let problem = format!("{} is over {MOST_THROTTLE_PERCENT}", options.max_throttle_percent);
        return invalid("options.max_throttle_percent", problem);
    }
    if options.resume_window_ms > MOST_RESUME_WINDOW_MS {
        let problem = format!("{} is over {MOST_RESUME_WINDOW_MS}", options.resume_window_ms);
        return invalid("options.resume_window_ms", problem);
    }
    if options.timeout_ms == 0 {
        return invalid("options.timeout_ms", "is zero".to_owned());
    }
    Ok(options)
}
