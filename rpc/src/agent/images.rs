//! Kernels and initrds: copied into the instance's folder under their content's hash, so that a guest can boot again on
//! whatever host it is, and so that nothing that happens to the original reaches it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::failure::Failure;

/// The largest image that is taken.
const LARGEST: u64 = 1 << 30;

/// The file of an image below an instance's folder.
pub(crate) fn file_name(hash: &str) -> String {
    format!("image-{hash}")
}

/// Whether `name` is what [`file_name`] gives.
pub(crate) fn is_file_name(name: &str) -> bool {
    name.strip_prefix("image-").is_some_and(is_hash)
}

/// Whether `text` is a hash as [`import`] gives it.
pub(crate) fn is_hash(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Copies the file at `path` into `folder` and returns its hash.
///
/// # Errors
/// It cannot be read, is no regular file, is too large, or there is no room.
pub(crate) fn import(what: &str, path: &Path, folder: &Path) -> Result<String, Failure> {
    // A pipe or a device must not hold the agent up before it is found to be none of our business.
    let opened = File::options()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(path);
    import_file(what, path, opened.map_err(unreadable(what, path))?, folder)
}

/// [`import`] of a file that was opened, from `path`.
///
/// # Errors
/// As those of [`import`].
pub(crate) fn import_file(what: &str, path: &Path, mut file: File, folder: &Path) -> Result<String, Failure> {
    let unreadable = unreadable(what, path);
    let metadata = file.metadata().map_err(&unreadable)?;
    if !metadata.is_file() {
        return Err(Failure::Refused(format!(
            "the {what} {} is not a regular file",
            path.display()
        )));
    }
    if metadata.len() > LARGEST {
        return Err(Failure::Refused(format!(
            "the {what} {} has {} bytes, over 1 GiB",
            path.display(),
            metadata.len()
        )));
    }
    let mut upload = Upload::begin(folder)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer).map_err(&unreadable)?;
        if count == 0 {
            return upload.finish(None);
        }
        upload.add(&buffer[..count])?;
    }
}

fn unreadable(what: &str, path: &Path) -> impl Fn(io::Error) -> Failure {
    move |error| Failure::Refused(format!("the {what} {} cannot be read: {error}", path.display()))
}

/// Checks that an image, or a snapshot, lies where an exposed agent may read from.
///
/// # Errors
/// It does not.
pub(crate) fn check_place(path: &Path, allowed: &[PathBuf]) -> Result<(), Failure> {
    let real = fs::canonicalize(path)
        .map_err(|error| Failure::Refused(format!("{} cannot be read: {error}", path.display())))?;
    let inside = |folder: &PathBuf| fs::canonicalize(folder).is_ok_and(|folder| real.starts_with(folder));
    if allowed.iter().any(inside) {
        Ok(())
    } else {
        Err(Failure::Refused(format!(
            "{} lies in none of this agent's --image-dir folders, which an agent on a network needs",
            path.display()
        )))
    }
}

/// An image that is being written; it has no name until it is whole.
pub(crate) struct Upload {
    folder: PathBuf,
    file: tempfile::NamedTempFile,
    hash: blake3::Hasher,
    length: u64,
}

impl Upload {
    /// Begins an image in `folder`.
    ///
    /// # Errors
    /// No file can be made there.
    pub(crate) fn begin(folder: &Path) -> Result<Self, Failure> {
        let file = tempfile::NamedTempFile::new_in(folder).map_err(Failure::host(format!(
            "failed to write an image into {}",
            folder.display()
        )))?;
        Ok(Self {
            folder: folder.to_owned(),
            file,
            hash: blake3::Hasher::new(),
            length: 0,
        })
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// There is no room, or the image is too large.
    pub(crate) fn add(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.length += bytes.len() as u64;
        if self.length > LARGEST {
            return Err(Failure::Refused("an image is over 1 GiB".to_owned()));
        }
        self.hash.update(bytes);
        self.file.write_all(bytes).map_err(Failure::host(format!(
            "failed to write an image into {}",
            self.folder.display()
        )))
    }

    /// Gives the image its name. With `expected`, its content must have that hash.
    ///
    /// # Errors
    /// It is another image, or the disk failed.
    pub(crate) fn finish(self, expected: Option<&str>) -> Result<String, Failure> {
        let hash = self.hash.finalize().to_hex().to_string();
        if expected.is_some_and(|expected| expected != hash) {
            return Err(Failure::Refused(format!(
                "an image arrived damaged: its hash is {hash}"
            )));
        }
        let failed = || Failure::host(format!("failed to keep an image in {}", self.folder.display()));
        self.file.as_file().sync_all().map_err(failed())?;
        self.file
            .persist(self.folder.join(file_name(&hash)))
            .map_err(|error| failed()(error.error))?;
        Ok(hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_import_is_kept_under_its_hash() {
        let folder = tempfile::tempdir().unwrap();
        let original = folder.path().join("kernel");
        fs::write(&original, b"bytes").unwrap();
        let hash = import("kernel", &original, folder.path()).unwrap();
        assert!(is_hash(&hash));
        assert_eq!(fs::read(folder.path().join(file_name(&hash))).unwrap(), b"bytes");
    }

    #[test]
    fn a_damaged_upload_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut upload = Upload::begin(folder.path()).unwrap();
        upload.add(b"other bytes").unwrap();
        assert!(upload.finish(Some(&"0".repeat(64))).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_missing_kernel_is_named() {
        let error = import("kernel", Path::new("/nowhere/vmlinux"), Path::new("/tmp")).unwrap_err();
        assert!(error.to_string().contains("kernel /nowhere/vmlinux"), "{error}");
    }
}
