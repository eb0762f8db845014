//! Counts what test programs say.

/// Results of all test programs so far.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) passed: i64,
    pub(super) failed: i64,
    pub(super) skipped: i64,
    /// Failed tests, by program and name.
    pub(super) failures: Vec<String>,
    /// Skipped tests, by program and name.
    pub(super) skips: Vec<String>,
}

impl Tally {
    /// Adds the results of one program.
    pub(super) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures.extend(other.failures);
        self.skips.extend(other.skips);
    }

    /// Counts one failure that no result line tells of.
    pub(super) fn fail(&mut self, what: String) {
        self.failed += 1;
        self.failures.push(what);
    }
}

/// What a unit test prints when it passes only because it could not run.
///
/// The standard harness cannot be told at run time that a test was skipped.
pub(super) const SKIPPED: &str = "skipped: no /dev/kvm";

/// Reads the output of one program (libtest or libtest-mimic), line by line.
pub(super) struct Output {
    pub(super) tally: Tally,
    /// `test result:` lines seen.
    pub(super) results: u64,
    program: String,
    /// Inside the list of what passing tests printed.
    in_successes: bool,
    /// The test whose printed lines are being read.
    printing: String,
}

impl Output {
    pub(super) fn new(program: &str) -> Self {
        Self {
            tally: Tally::default(),
            results: 0,
            program: program.to_owned(),
            in_successes: false,
            printing: String::new(),
        }
    }

    /// Takes one line; `true` if a person wants to see it.
    pub(super) fn take(&mut self, line: &str) -> bool {
        match line {
            "successes:" => self.in_successes = true,
            "failures:" => self.in_successes = false,
            _ => {}
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            self.in_successes = false;
            self.result(result);
            return true;
        }
        if let Some(test) = line.strip_prefix("---- ").and_then(|rest| rest.split(' ').next()) {
            self.printing = test.to_owned();
        }
        if self.in_successes {
            if line.contains(SKIPPED) {
                self.tally.passed -= 1;
                self.tally.skipped += 1;
                self.tally.skips.push(format!("{}: {}", self.program, self.printing));
            }
            return false;
        }
        self.test_line(line)
    }

    /// `test name ... outcome`: failures and skips are noted by name, passes need not be seen.
    fn test_line(&mut self, line: &str) -> bool {
        let Some((name, outcome)) = line.strip_prefix("test ").and_then(|rest| rest.rsplit_once(" ... ")) else {
            return !line.is_empty();
        };
        let named = format!("{}: {}", self.program, name.trim());
        match outcome.trim() {
            "ok" => return false,
            // Set aside on purpose, for `--long`: not a test that this host could not run.
            ignored if ignored.starts_with("ignored, long") => self.tally.skipped -= 1,
            ignored if ignored.starts_with("ignored") => self.tally.skips.push(named),
            failed if failed.starts_with("FAILED") => self.tally.failures.push(named),
            _ => {}
        }
        true
    }

    /// `ok. 12 passed; 0 failed; 1 ignored; …`
    fn result(&mut self, result: &str) {
        self.results += 1;
        let count = |word: &str| {
            let part = result.split(['.', ';']).find(|part| part.trim_end().ends_with(word))?;
            part.split_ascii_whitespace().next()?.parse::<i64>().ok()
        };
        let add = |total: &mut i64, word| *total += count(word).unwrap_or(0);
        add(&mut self.tally.passed, "passed");
        add(&mut self.tally.failed, "failed");
        add(&mut self.tally.skipped, "ignored");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Output, Vec<String>) {
        let mut output = Output::new("vmm unit tests");
        let shown = text
            .lines()
            .filter(|line| output.take(line))
            .map(str::to_owned)
            .collect();
        (output, shown)
    }

    #[test]
    fn results_are_added_up() {
        let text = "running 3 tests\ntest a ... ok\ntest b ... FAILED\ntest c ... ignored\n\n\
                    test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.01s\n\
                    test result: ok. 7 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        let (output, shown) = read(text);
        let tally = output.tally;
        assert_eq!(
            (tally.passed, tally.failed, tally.skipped, output.results),
            (8, 1, 1, 2)
        );
        assert_eq!(tally.failures, ["vmm unit tests: b"]);
        assert_eq!(tally.skips, ["vmm unit tests: c"]);
        assert!(shown.iter().all(|line| !line.contains("test a")));
    }

    #[test]
    fn a_test_that_passed_without_kvm_counts_as_skipped() {
        let text = "running 2 tests\ntest boots ... ok\ntest adds ... ok\n\nsuccesses:\n\n---- boots stdout ----\n\
                    skipped: no /dev/kvm\n\n\nsuccesses:\n    adds\n    boots\n\n\
                    test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        let (output, shown) = read(text);
        assert_eq!(
            (output.tally.passed, output.tally.failed, output.tally.skipped),
            (1, 0, 1)
        );
        assert_eq!(output.tally.skips, ["vmm unit tests: boots"]);
        assert_eq!(shown.len(), 2);
    }

    #[test]
    fn what_is_set_aside_for_long_runs_is_not_skipped() {
        let text = "test soak ... ignored, long: an hour\n\
                    test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        let (output, _) = read(text);
        assert_eq!((output.tally.passed, output.tally.skipped), (0, 0));
        assert!(output.tally.skips.is_empty());
    }
}
