//! What became of each check: a line for people or programs as it ends, and a JUnit file for CI systems.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use super::super::failure::Failure;
use super::super::output::{self, Format};

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    Ok,
    Failed,
    /// Not tried: it needs what an earlier check did not find.
    Skipped,
}

/// One check.
#[derive(Debug, Serialize)]
pub(super) struct Check {
    pub(super) suite: &'static str,
    pub(super) check: String,
    pub(super) verdict: Verdict,
    /// What was found, or why it failed or was skipped.
    pub(super) text: String,
    pub(super) seconds: f64,
}

/// The checks so far.
pub(super) struct Report {
    format: Format,
    checks: Vec<Check>,
}

impl Report {
    pub(super) fn new(format: Format) -> Self {
        let checks = Vec::new();
        Self { format, checks }
    }

    /// Adds a check and tells it.
    pub(super) fn tell(&mut self, check: Check) -> Result<(), Failure> {
        match self.format {
            Format::Json => output::json_line(&check)?,
            Format::Human => output::text(&line(&check))?,
        }
        self.checks.push(check);
        Ok(())
    }

    pub(super) fn has_failed(&self) -> bool {
        self.count(Verdict::Failed) > 0
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.checks.iter().filter(|check| check.verdict == verdict).count()
    }

    /// The last line for people; programs have had their objects.
    pub(super) fn close(&self, took: Duration) -> Result<(), Failure> {
        if self.format == Format::Json {
            return Ok(());
        }
        output::text(&format!(
            "{} checks: {} ok, {} failed, {} skipped, in {:.1} s. Guests, agents and files are removed.",
            self.checks.len(),
            self.count(Verdict::Ok),
            self.count(Verdict::Failed),
            self.count(Verdict::Skipped),
            took.as_secs_f64()
        ))
    }

    /// All of it as a JUnit file.
    pub(super) fn junit(&self) -> String {
        let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
        let all: Vec<&Check> = self.checks.iter().collect();
        let _ = writeln!(xml, "<testsuites name=\"ferry selftest\"{}>", sums(&all));
        let mut suites: Vec<&str> = all.iter().map(|check| check.suite).collect();
        suites.dedup();
        for suite in suites {
            let checks: Vec<&Check> = all.iter().copied().filter(|check| check.suite == suite).collect();
            let _ = writeln!(xml, "  <testsuite name=\"{}\"{}>", escaped(suite), sums(&checks));
            checks.iter().for_each(|check| case(&mut xml, check));
            xml += "  </testsuite>\n";
        }
        xml += "</testsuites>\n";
        xml
    }
}

fn line(check: &Check) -> String {
    let mark = match check.verdict {
        Verdict::Ok => "ok",
        Verdict::Failed => "FAIL",
        Verdict::Skipped => "skip",
    };
    format!("{mark:<4}  {}: {}: {}", check.suite, check.check, check.text)
}

fn sums(checks: &[&Check]) -> String {
    let count = |verdict| checks.iter().filter(|check| check.verdict == verdict).count();
    let seconds: f64 = checks.iter().map(|check| check.seconds).sum();
    format!(
        " tests=\"{}\" failures=\"{}\" errors=\"0\" skipped=\"{}\" time=\"{seconds:.3}\"",
        checks.len(),
        count(Verdict::Failed),
        count(Verdict::Skipped)
    )
}

fn case(xml: &mut String, check: &Check) {
    let (name, text) = (escaped(&check.check), escaped(&check.text));
    let _ = write!(
        xml,
        "    <testcase classname=\"ferry.{}\" name=\"{name}\" time=\"{:.3}\">",
        escaped(check.suite),
        check.seconds
    );
    let _ = match check.verdict {
        Verdict::Ok => write!(xml, "<system-out>{text}</system-out>"),
        Verdict::Failed => write!(xml, "<failure message=\"{text}\">{text}</failure>"),
        Verdict::Skipped => write!(xml, "<skipped message=\"{text}\"/>"),
    };
    *xml += "</testcase>\n";
}

/// Text as XML has it, in attributes too. What XML 1.0 cannot hold is shown as U+FFFD.
fn escaped(text: &str) -> String {
    let mut xml = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => xml += "&amp;",
            '<' => xml += "&lt;",
            '>' => xml += "&gt;",
            '"' => xml += "&quot;",
            '\n' | '\r' | '\t' => {
                let _ = write!(xml, "&#{};", u32::from(char));
            }
            '\u{0}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => xml.push('\u{fffd}'),
            char => xml.push(char),
        }
    }
    xml
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(suite: &'static str, verdict: Verdict, text: &str) -> Check {
        Check {
            suite,
            check: "a <check>".to_owned(),
            verdict,
            text: text.to_owned(),
            seconds: 0.25,
        }
    }

    #[test]
    fn a_junit_file_counts_and_escapes() {
        let report = Report {
            format: Format::Json,
            checks: vec![
                check("doctor", Verdict::Ok, "all there"),
                check("kills", Verdict::Failed, "it said \"no\" & \u{1b}[1m\nwent"),
                check("kills", Verdict::Skipped, "no KVM"),
            ],
        };
        let xml = report.junit();
        assert!(
            xml.contains(
                r#"<testsuites name="ferry selftest" tests="3" failures="1" errors="0" skipped="1" time="0.750">"#
            ),
            "{xml}"
        );
        assert!(
            xml.contains(r#"<testsuite name="kills" tests="2" failures="1""#),
            "{xml}"
        );
        assert!(
            xml.contains(r#"<failure message="it said &quot;no&quot; &amp; �[1m&#10;went">"#),
            "{xml}"
        );
        assert!(
            xml.contains(r#"name="a &lt;check&gt;""#) && xml.ends_with("</testsuites>\n"),
            "{xml}"
        );
        assert!(report.has_failed());
    }
}
