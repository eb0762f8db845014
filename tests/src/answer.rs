//! What the command line answered.

use std::fmt;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A finished call of the command line.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The call, for messages.
    pub call: String,
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Answer {
    /// The answer itself, if the exit code is this one.
    ///
    /// # Errors
    /// The whole call and what it said, if it is another.
    pub fn exit(self, code: i32) -> Result<Self> {
        if self.code == Some(code) {
            Ok(self)
        } else {
            bail!("exit code {code} expected: {self}")
        }
    }

    /// The answer itself, if it says `text` on either stream.
    ///
    /// # Errors
    /// The whole call and what it said, if not.
    pub fn says(self, text: &str) -> Result<Self> {
        let said = self.stdout.contains(text) || self.stderr.contains(text);
        if said {
            Ok(self)
        } else {
            bail!("{text:?} expected in: {self}")
        }
    }

    /// The last object on standard output.
    ///
    /// # Errors
    /// If the last line is no JSON.
    pub fn json(&self) -> Result<Value> {
        let line = self.stdout.lines().rfind(|line| !line.trim().is_empty());
        let line = line.with_context(|| format!("no output: {self}"))?;
        serde_json::from_str(line).with_context(|| format!("not JSON: {self}"))
    }

    /// Every object on standard output, one a line.
    ///
    /// # Errors
    /// If a line is no JSON.
    pub fn json_lines(&self) -> Result<Vec<Value>> {
        let lines = self.stdout.lines().filter(|line| !line.trim().is_empty());
        lines
            .map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {self}")))
            .collect()
    }

    /// The last object as a migration's record.
    ///
    /// # Errors
    /// If the last line is no JSON.
    pub fn migration(&self) -> Result<Migration> {
        Ok(Migration { record: self.json()? })
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` ended with {:?}\nstdout: {}\nstderr: {}",
            self.call, self.code, self.stdout, self.stderr
        )
    }
}

/// A migration's record, as `migration show -o json` prints it.
#[derive(Clone, Debug)]
pub struct Migration {
    /// All of it.
    pub record: Value,
}

impl Migration {
    /// A field as text.
    ///
    /// # Errors
    /// If it is missing or none.
    pub fn text(&self, field: &str) -> Result<&str> {
        self.record[field]
            .as_str()
            .with_context(|| format!("no text {field} in {}", self.record))
    }

    /// A field, or a field of a field (`downtime_ms.total`), as a number.
    ///
    /// # Errors
    /// If it is missing or none.
    pub fn number(&self, field: &str) -> Result<f64> {
        let value = field.split('.').fold(&self.record, |value, name| &value[name]);
        value
            .as_f64()
            .with_context(|| format!("no number {field} in {}", self.record))
    }

    /// Whether nothing will change any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(
            self.record["status"].as_str(),
            Some("completed" | "failed" | "cancelled" | "error")
        )
    }

    /// How many rounds there were.
    #[must_use]
    pub fn rounds(&self) -> usize {
        self.record["rounds"].as_array().map_or(0, Vec::len)
    }

    /// The record, if it says so.
    ///
    /// # Errors
    /// The whole record, if it says something else.
    pub fn is(self, status: &str, location: &str) -> Result<Self> {
        let found = (self.text("status")?, self.text("guest_location")?);
        if found == (status, location) {
            Ok(self)
        } else {
            bail!("{status} at {location} expected: {}", self.record)
        }
    }
}
