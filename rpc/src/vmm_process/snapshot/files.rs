//! The open files of a snapshot.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, ensure};

/// The files that come with an order, in this order.
pub(super) struct Files {
    pub(super) memory: File,
    pub(super) pieces: File,
    pub(super) state: File,
    pub(super) profile: File,
}

impl Files {
    /// Sorts the descriptors.
    ///
    /// # Errors
    /// There are more or fewer than files.
    pub(super) fn new(descriptors: Vec<OwnedFd>) -> anyhow::Result<Self> {
        let count = descriptors.len();
        let files = <[OwnedFd; 4]>::try_from(descriptors).ok();
        let files = files.with_context(|| format!("{count} descriptors came, a snapshot has 4 files"))?;
        let [memory, pieces, state, profile] = files.map(File::from);
        Ok(Self {
            memory,
            pieces,
            state,
            profile,
        })
    }
}

/// Writes a whole file and returns its digest.
///
/// # Errors
/// The file system is full, or failed.
pub(super) fn write(name: &str, mut file: &File, bytes: &[u8]) -> anyhow::Result<String> {
    file.write_all(bytes)
        .with_context(|| format!("failed to write the file {name}"))?;
    Ok(digest(bytes))
}

/// Reads a whole file, if it is no longer than `limit` and has this digest.
///
/// # Errors
/// Names the file and what is wrong with it.
pub(super) fn read(name: &str, file: &File, limit: usize, expected: &str) -> anyhow::Result<Vec<u8>> {
    let failed = || format!("failed to read the file {name}");
    let length = file.metadata().with_context(failed)?.len();
    let length = usize::try_from(length).ok().filter(|&length| length <= limit);
    let length =
        length.with_context(|| format!("the file {name} is longer than the {limit} bytes that it can have"))?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0).with_context(failed)?;
    ensure!(
        digest(&bytes) == expected,
        "the file {name} is damaged: its BLAKE3 digest is not the one in snapshot.json"
    );
    Ok(bytes)
}

fn digest(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read() {
        let file = tempfile::tempfile().unwrap();
        let digest = write("state", &file, b"bytes").unwrap();
        assert_eq!(read("state", &file, 5, &digest).unwrap(), b"bytes");
    }

    #[test]
    fn a_file_that_is_damaged_cut_short_or_too_long_is_named() {
        let file = tempfile::tempfile().unwrap();
        let digest = write("state", &file, b"bytes").unwrap();
        let refused = |limit| format!("{:#}", read("state", &file, limit, &digest).unwrap_err());
        assert!(refused(4).contains("file state is longer than the 4 bytes"));
        file.write_all_at(b"B", 0).unwrap();
        assert!(refused(5).contains("file state is damaged"));
        file.set_len(3).unwrap();
        assert!(refused(5).contains("file state is damaged"));
    }

    #[test]
    fn a_snapshot_has_four_files() {
        assert!(Files::new(Vec::new()).is_err());
    }
}
