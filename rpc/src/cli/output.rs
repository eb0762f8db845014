//! What the verbs print: results on stdout, as tables for people or as one JSON object a line for programs.

use std::io::{self, Write};

use serde::Serialize;

use super::failure::{Exit, Failure};

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// Tables and sentences.
    Human,
    /// One JSON object a line.
    Json,
}

impl Format {
    /// Prints one result: its JSON, or what `human` makes of it.
    pub(super) fn one<T: Serialize>(self, value: &T, human: impl FnOnce(&T) -> String) -> Result<(), Failure> {
        match self {
            Self::Json => json_line(value),
            Self::Human => text(&human(value)),
        }
    }

    /// Prints a list: an object for each, or a table.
    pub(super) fn many<T: Serialize>(self, values: &[T], table: impl FnOnce(&[T]) -> Table) -> Result<(), Failure> {
        match self {
            Self::Json => json_lines(values),
            Self::Human => text(&table(values).to_string()),
        }
    }
}

/// A list that comes in parts, and is printed whole: a part of it that was printed would look like all of it.
#[derive(Debug)]
pub(super) enum Listing<T> {
    /// What a table is made of, whose columns are as wide as the widest of all.
    Human(Vec<T>),
    /// The lines.
    Json(Vec<u8>),
}

impl<T> Listing<T> {
    pub(super) fn new(format: Format) -> Self {
        match format {
            Format::Human => Self::Human(Vec::new()),
            Format::Json => Self::Json(Vec::new()),
        }
    }

    /// Takes the next part, each of which `add_json` makes JSON of.
    pub(super) fn add(
        &mut self,
        part: Vec<T>,
        add_json: impl Fn(&T, &mut Vec<u8>) -> serde_json::Result<()>,
    ) -> Result<(), Failure> {
        match self {
            Self::Human(all) => all.extend(part),
            Self::Json(lines) => add_json_lines(lines, &part, add_json)?,
        }
        Ok(())
    }

    /// Prints all of it.
    pub(super) fn print(self, table: impl FnOnce(&[T]) -> Table) -> Result<(), Failure> {
        match self {
            Self::Human(all) => text(&table(&all).to_string()),
            Self::Json(lines) => bytes(&lines),
        }
    }
}

/// Prints one object on one line of stdout.
pub(super) fn json_line<T: Serialize>(value: &T) -> Result<(), Failure> {
    json_lines(std::slice::from_ref(value))
}

/// Prints an object a line, all in one go: there may be thousands.
fn json_lines<T: Serialize>(values: &[T]) -> Result<(), Failure> {
    let mut lines = Vec::new();
    add_json_lines(&mut lines, values, |value, lines| serde_json::to_writer(lines, value))?;
    bytes(&lines)
}

fn add_json_lines<T>(
    lines: &mut Vec<u8>,
    values: &[T],
    add_json: impl Fn(&T, &mut Vec<u8>) -> serde_json::Result<()>,
) -> Result<(), Failure> {
    let failed = |error| Failure::new(Exit::Failed, format!("print as JSON: {error}"));
    for value in values {
        add_json(value, lines).map_err(failed)?;
        lines.push(b'\n');
    }
    Ok(())
}

/// Prints text on stdout and ends the line.
pub(super) fn text(text: &str) -> Result<(), Failure> {
    let mut line = text.trim_end_matches('\n').to_owned();
    line.push('\n');
    bytes(line.as_bytes())
}

/// Prints bytes on stdout as they are.
pub(super) fn bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(|error| match error.kind() {
            // Whoever read it has seen enough: that is no news for its user.
            io::ErrorKind::BrokenPipe => Failure::told(Exit::Failed),
            _ => Failure::new(Exit::Failed, format!("write to stdout: {error}")),
        })
}

/// Says something on stderr; whether anyone hears it does not matter.
pub(super) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Columns of text. The first row is the heading.
#[derive(Debug)]
pub(super) struct Table {
    rows: Vec<Vec<String>>,
    right: Vec<bool>,
}

impl Table {
    /// A table with these headings; a heading that begins with `>` has its column aligned to the right.
    pub(super) fn new(headings: &[&str]) -> Self {
        let right = headings.iter().map(|heading| heading.starts_with('>')).collect();
        let heading = headings
            .iter()
            .map(|heading| heading.trim_start_matches('>').to_owned())
            .collect();
        Self {
            rows: vec![heading],
            right,
        }
    }

    /// Adds a row, a cell for each heading.
    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let columns = self.right.len();
        let cells = |column: usize| self.rows.iter().filter_map(move |row| row.get(column));
        let widths: Vec<usize> = (0..columns)
            .map(|column| cells(column).map(|cell| width(cell)).max().unwrap_or(0))
            .collect();
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let gap = " ".repeat(widths[column].saturating_sub(width(cell)));
                let (before, after) = if self.right[column] {
                    (gap.as_str(), "")
                } else {
                    ("", gap.as_str())
                };
                line += &format!("{before}{cell}{after}  ");
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

fn width(cell: &str) -> usize {
    cell.chars().count()
}

/// Bytes as people read them: `1.50 GiB`.
pub(super) fn human_bytes(bytes: u64) -> String {
    let units = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) if bytes.is_multiple_of(*unit) => format!("{} {name}", bytes / unit),
        Some((unit, name)) => format!("{:.2} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} B"),
    }
}

/// Bytes a second as people read them.
pub(super) fn human_rate(bytes_per_s: f64) -> String {
    format!("{}/s", human_bytes(bytes_per_s.max(0.0) as u64))
}

/// Bytes a second as `--net` and `--bandwidth` take them: `100Mbit`.
pub(super) fn human_bandwidth(bytes_per_s: u64) -> String {
    let bits = bytes_per_s as f64 * 8.0;
    let units = [(1e12, "Tbit"), (1e9, "Gbit"), (1e6, "Mbit")];
    let (unit, name) = units
        .into_iter()
        .find(|(unit, _)| bits >= *unit)
        .unwrap_or((1e3, "Kbit"));
    format!("{}{name}", bits / unit)
}

/// Milliseconds as people read them: `0.41 ms`, `12.3 ms`, `1.52 s`.
pub(super) fn human_ms(ms: f64) -> String {
    match ms.abs() {
        size if size >= 1000.0 => format!("{:.2} s", ms / 1000.0),
        size if size >= 10.0 => format!("{ms:.1} ms"),
        _ => format!("{ms:.2} ms"),
    }
}

/// A count with its thousands set apart: `20,000`.
pub(super) fn human_count(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The text, or a dash where nothing is known.
pub(super) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["NAME", ">MEMORY", "HOST"]);
        table.row(["web".to_owned(), "512 MiB".to_owned(), "a".to_owned()]);
        table.row(["database".to_owned(), "1 GiB".to_owned(), "b".to_owned()]);
        assert_eq!(
            table.to_string(),
            "NAME       MEMORY  HOST\nweb       512 MiB  a\ndatabase    1 GiB  b\n"
        );
    }

    #[test]
    fn quantities_read_well() {
        assert_eq!(human_bytes(0), "0 B");
        assert_eq!(human_bytes(512 << 20), "512 MiB");
        assert_eq!(human_bytes(3 << 29), "1.50 GiB");
        assert_eq!(human_rate(1024.0 * 1024.0), "1 MiB/s");
        assert_eq!(human_bandwidth(12_500_000), "100Mbit");
        assert_eq!(human_bandwidth(312_500_000), "2.5Gbit");
        assert_eq!(human_bandwidth(8_000), "64Kbit");
        assert_eq!(human_ms(0.414), "0.41 ms");
        assert_eq!(human_ms(12.34), "12.3 ms");
        assert_eq!(human_ms(1520.0), "1.52 s");
        assert_eq!(human_count(1), "1");
        assert_eq!(human_count(20_000), "20,000");
        assert_eq!(human_count(1_234_567), "1,234,567");
        assert_eq!(or_dash(None::<u8>), "-");
    }
}
