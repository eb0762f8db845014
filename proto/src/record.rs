//! A migration's record as JSON: what the journal keeps, and what the command line prints.
//!
//! Here, and not where it is used: lists of thousands are made of it, and this crate is built for speed where theirs are built fast.

use crate::agent::v1::MigrationInfo;

impl MigrationInfo {
    /// Reads what [`Self::add_json`] wrote. What an older build did not know is empty.
    ///
    /// # Errors
    /// It is no record.
    pub fn from_json(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }

    /// Adds the record to `text`, on one line that is not ended.
    ///
    /// # Errors
    /// None that is known: every field of it has a place in JSON.
    pub fn add_json(&self, text: &mut Vec<u8>) -> serde_json::Result<()> {
        serde_json::to_writer(text, self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let record = MigrationInfo {
            name: "web\n\"1\"".to_owned(),
            total_ms: Some(0.1),
            memory_total: Some(u64::MAX),
            ..MigrationInfo::default()
        };
        let mut text = Vec::new();
        record.add_json(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(!text.contains('\n'), "{text}");
        assert_eq!(MigrationInfo::from_json(&text).unwrap(), record);
        assert_eq!(MigrationInfo::from_json("{}").unwrap(), MigrationInfo::default());
        assert!(MigrationInfo::from_json("{").is_err());
    }
}
