//! Bytes as lines of text, with what is zero left out.
//!
//! ```text
//! # a remark
//! state 14880            a part, and how many bytes it has
//! 00000020 0a05636c6f63  where bytes lie in it, and the bytes; all others are zero
//! ```

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result, ensure};

/// Bytes of a line.
const LINE: usize = 32;

/// Named parts, each with its bytes.
#[derive(Default)]
pub(super) struct Parts(BTreeMap<String, Vec<u8>>);

impl Parts {
    /// Adds a part.
    pub(super) fn add(&mut self, name: &str, bytes: Vec<u8>) {
        self.0.insert(name.to_owned(), bytes);
    }

    /// The bytes of a part.
    ///
    /// # Errors
    /// If there is no such part.
    pub(super) fn of(&self, name: &str) -> Result<&[u8]> {
        self.0
            .get(name)
            .map(Vec::as_slice)
            .with_context(|| format!("it has no part {name:?}"))
    }

    /// As text.
    pub(super) fn to_text(&self) -> String {
        let mut text = String::new();
        for (name, bytes) in &self.0 {
            let _ = writeln!(text, "{name} {}", bytes.len());
            for (index, line) in bytes.chunks(LINE).enumerate() {
                let end = line.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
                if end > 0 {
                    let hex: String = line[..end].iter().map(|byte| format!("{byte:02x}")).collect();
                    let _ = writeln!(text, "{:08x} {hex}", index * LINE);
                }
            }
        }
        text
    }

    /// From text.
    ///
    /// # Errors
    /// Names the line that is none.
    pub(super) fn from_text(text: &str) -> Result<Self> {
        let mut parts = Self::default();
        let mut current = None;
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (first, second) = line.split_once(' ').with_context(|| format!("{line:?}"))?;
            match (u32::from_str_radix(first, 16), &mut current) {
                (Ok(at), Some(name)) if first.len() == 8 => {
                    let part = parts.0.get_mut(name).context("a part that was begun")?;
                    put(part, at as usize, second).with_context(|| format!("{line:?}"))?;
                }
                _ => {
                    let len = second.parse().with_context(|| format!("{line:?}"))?;
                    parts.add(first, vec![0; len]);
                    current = Some(first.to_owned());
                }
            }
        }
        Ok(parts)
    }
}

fn put(part: &mut [u8], at: usize, hex: &str) -> Result<()> {
    let (len, digits) = (part.len(), hex.as_bytes().chunks(2));
    for (byte, digits) in part.iter_mut().skip(at).zip(digits.clone()) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits)?, 16)?;
    }
    ensure!(at + digits.len() <= len, "beyond the {len} bytes of its part");
    Ok(())
}
