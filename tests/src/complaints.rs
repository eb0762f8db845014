//! Finds what agents and VMMs complained of in their logs.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Lines at `WARN` or `ERROR` in `log` that have none of the `expected` words in them.
#[must_use]
pub fn in_log(log: &str, expected: &BTreeSet<String>) -> Vec<String> {
    let lines = log.lines().map(without_colours).filter(|line| is_complaint(line));
    lines
        .filter(|line| !expected.iter().any(|words| line.contains(words.as_str())))
        .collect()
}

/// The last lines of a file, for a failed test's message.
#[must_use]
pub fn tail(file: &Path, lines: usize) -> String {
    let text = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let all: Vec<_> = text.lines().map(without_colours).collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn is_complaint(line: &str) -> bool {
    let mut words = line.split_ascii_whitespace().take(3);
    words.any(|word| matches!(word, "WARN" | "ERROR")) || line.contains("panicked at")
}

fn without_colours(line: &str) -> String {
    let mut parts = line.split('\x1b');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| {
        text + part.split_once('m').map_or("", |(_, rest)| rest)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_and_errors_are_complaints() {
        let log = "2026-01-01T00:00:00Z  INFO agent: a WARN of old\n\
                   2026-01-01T00:00:00Z \x1b[33m WARN\x1b[0m agent: odd\n\
                   2026-01-01T00:00:00Z ERROR agent: bad\n\
                   thread 'main' panicked at src/lib.rs:1\n";
        assert_eq!(in_log(log, &BTreeSet::new()).len(), 3);
        let expected = BTreeSet::from(["odd".to_owned(), "panicked".to_owned()]);
        assert_eq!(in_log(log, &expected), ["2026-01-01T00:00:00Z ERROR agent: bad"]);
    }
}
