//! Which kernels and initrds may be sent here: those that a migration into here was told are missing. They wait until its guest is prepared,
//! and those that nobody came for are removed, so that no peer fills the disk that the journal is on.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::agent::images;

/// How many are expected at once: two each of as many migrations as come in at the same time by default, and as many again that were given up.
const MOST_EXPECTED: usize = 16;

/// How long one is expected, and kept: longer than the largest takes over a slow link.
const PATIENCE: Duration = Duration::from_secs(1800);

/// The images that are expected, each with the time at which it was last told to be missing.
#[derive(Default)]
pub(crate) struct ExpectedImages(Mutex<HashMap<String, Instant>>);

impl ExpectedImages {
    /// These are missing, says the answer to whoever is going to send them. What was expected longer ago than is waited for, or first where
    /// there are too many, is not any more, and goes from `folder` if it came.
    pub(super) fn expect(&self, missing: &[String], folder: &Path, now: Instant) {
        let mut expected = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        expected.extend(missing.iter().map(|hash| (hash.clone(), now)));
        let mut by_age: Vec<_> = expected.iter().map(|(hash, &since)| (since, hash.clone())).collect();
        by_age.sort();
        let too_many = by_age.len().saturating_sub(MOST_EXPECTED);
        let gone = by_age
            .into_iter()
            .enumerate()
            .filter(|(index, (since, _))| *index < too_many || now.duration_since(*since) > PATIENCE);
        for (_, (_, hash)) in gone {
            expected.remove(&hash);
            // It may never have come, or be a guest's by now.
            let _ = fs::remove_file(folder.join(images::file_name(&hash)));
        }
    }

    /// Whether it may be sent here.
    pub(crate) fn has(&self, hash: &str, now: Instant) -> bool {
        let expected = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        expected
            .get(hash)
            .is_some_and(|&since| now.duration_since(since) <= PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_may_be_sent_and_not_for_ever() {
        let (folder, expected, now) = (tempfile::tempdir().unwrap(), ExpectedImages::default(), Instant::now());
        let kept = folder.path().join(images::file_name("old"));
        fs::write(&kept, b"bytes").unwrap();
        expected.expect(&["old".to_owned()], folder.path(), now);
        assert!(expected.has("old", now) && !expected.has("other", now));
        let later = now + PATIENCE + Duration::from_secs(1);
        assert!(!expected.has("old", later));
        expected.expect(&["new".to_owned()], folder.path(), later);
        assert!(!kept.exists() && expected.has("new", later));
    }

    #[test]
    fn of_too_many_the_first_are_forgotten() {
        let (folder, expected, start) = (tempfile::tempdir().unwrap(), ExpectedImages::default(), Instant::now());
        for number in 0..=MOST_EXPECTED {
            let now = start + Duration::from_secs(number as u64);
            expected.expect(&[number.to_string()], folder.path(), now);
        }
        assert!(!expected.has("0", start) && expected.has("1", start));
    }
}
