//! The folder of a snapshot: `DIR.partial` until it is whole and on the disk, then `DIR`.

mod unfinished;

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, RenameFlags, openat, renameat_with};
use rustix::io::Errno;

use super::manifest::{self, Manifest};
use crate::agent::failure::Failure;
use unfinished::Note;

pub(crate) use unfinished::Unfinished;

/// A snapshot that is being written. Dropped before it is finished, nothing of it is left.
pub(super) struct Partial {
    target: PathBuf,
    path: PathBuf,
    is_whole: bool,
    /// By which an agent that comes after this one finds it. Goes with it.
    _note: Note,
}

impl Partial {
    /// Makes the folder beside `target`, for this agent's user only: guest memory holds what the guest keeps secret. In `notes` it is
    /// written down, so that it can be removed should this agent be killed.
    ///
    /// # Errors
    /// `target` is there already, or the folder cannot be made.
    pub(super) fn begin(target: PathBuf, notes: &Path) -> Result<Self, Failure> {
        if fs::symlink_metadata(&target).is_ok() {
            return Err(is_there(&target));
        }
        let mut path = OsString::from(&target);
        path.push(".partial");
        let path = PathBuf::from(path);
        let note = Note::begin(notes).map_err(Failure::host("failed to write down that a snapshot is begun"))?;
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => {
                note.is_of(&path)
                    .map_err(Failure::host("failed to write down that a snapshot is begun"))
                    .inspect_err(|_| drop(fs::remove_dir(&path)))?;
                Ok(Self {
                    target,
                    path,
                    is_whole: false,
                    _note: note,
                })
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Failure::Refused(format!(
                "{} is there already: a snapshot is being written to it, or an agent ended while it wrote one; remove it if \
                 no snapshot is being written",
                path.display()
            ))),
            Err(error) => Err(Failure::host(format!("failed to make the folder {}", path.display()))(
                error,
            )),
        }
    }

    /// Makes a file in it.
    ///
    /// # Errors
    /// There is no room.
    pub(super) fn create(&self, name: &str) -> Result<File, Failure> {
        let path = self.path.join(name);
        let made = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        made.map_err(Failure::host(format!("failed to make the file {}", path.display())))
    }

    /// Copies a file into it.
    ///
    /// # Errors
    /// It cannot be read, or there is no room.
    pub(super) fn copy(&self, from: &Path, name: &str) -> Result<File, Failure> {
        let mut copy = self.create(name)?;
        let copied = File::open(from).and_then(|mut from| io::copy(&mut from, &mut copy));
        let failed = || {
            format!(
                "failed to copy {} into the snapshot {}",
                from.display(),
                self.target.display()
            )
        };
        copied.map_err(Failure::host(failed()))?;
        Ok(copy)
    }

    /// Writes what describes it, brings all of it to the disk and gives it its name.
    ///
    /// # Errors
    /// The disk is full or fails, or another folder has the name by now.
    pub(super) fn finish(mut self, files: Vec<File>, manifest: &[u8]) -> Result<(), Failure> {
        let failed = || Failure::host(format!("failed to write the snapshot {}", self.target.display()));
        let mut described = self.create(manifest::FILE)?;
        let mut written = || -> io::Result<()> {
            described.write_all(manifest)?;
            files.iter().chain([&described]).try_for_each(File::sync_all)?;
            sync_folder(&self.path)
        };
        written().map_err(failed())?;
        match rename_to_new(&self.path, &self.target) {
            Ok(()) => {}
            Err(Errno::EXIST | Errno::NOTEMPTY) => return Err(is_there(&self.target)),
            Err(error) => return Err(failed()(error.into())),
        }
        self.is_whole = true;
        self.target.parent().map_or(Ok(()), sync_folder).map_err(failed())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.is_whole {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(folder = %self.path.display(), %error, "failed to remove what was written of a snapshot");
        }
    }
}

fn is_there(target: &Path) -> Failure {
    Failure::Refused(format!(
        "{} is there already: a snapshot is written to a folder that is not",
        target.display()
    ))
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Renames to a name that nothing has.
fn rename_to_new(from: &Path, to: &Path) -> rustix::io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system that cannot tell. That the name was free has been looked at; an empty folder might be taken for it.
        Err(Errno::INVAL | Errno::NOSYS) => rustix::fs::rename(from, to),
        renamed => renamed,
    }
}

/// A snapshot that is there.
pub(super) struct Folder {
    path: PathBuf,
    open: OwnedFd,
}

impl Folder {
    /// Opens it.
    ///
    /// # Errors
    /// It is not there, or no folder.
    pub(super) fn open(path: PathBuf) -> Result<Self, Failure> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(open) => Ok(Self { path, open }),
            Err(error) => Err(Failure::Refused(format!(
                "the snapshot {} cannot be opened: {error}",
                path.display()
            ))),
        }
    }

    /// Opens one of its files. A link that leads elsewhere is not followed, and what could hold the agent up is not waited for.
    ///
    /// # Errors
    /// It is not there, or no regular file.
    pub(super) fn file(&self, name: &str) -> Result<File, Failure> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = openat(&self.open, name, flags, Mode::empty()).map_err(io::Error::from);
        let file = opened.map(File::from).map_err(|error| self.refused(name, &error))?;
        let metadata = file.metadata().map_err(|error| self.refused(name, &error))?;
        match metadata.is_file() {
            true => Ok(file),
            false => Err(self.refused(name, &"it is not a regular file")),
        }
    }

    /// Reads what describes it.
    ///
    /// # Errors
    /// It is damaged, of another version, or says what cannot be.
    pub(super) fn manifest(&self) -> Result<Manifest, Failure> {
        let mut bytes = Vec::new();
        self.file(manifest::FILE)?
            .take(manifest::LARGEST + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| self.refused(manifest::FILE, &error))?;
        if bytes.len() as u64 > manifest::LARGEST {
            return Err(self.refused(manifest::FILE, &"it is over 1 MiB"));
        }
        Manifest::from_bytes(&bytes).map_err(|error| {
            Failure::Refused(format!(
                "the snapshot {}: {} {error}",
                self.path.display(),
                manifest::FILE
            ))
        })
    }

    /// What is wrong with one of its files.
    pub(super) fn refused(&self, name: &str, problem: &dyn std::fmt::Display) -> Failure {
        Failure::Refused(format!(
            "the snapshot {}: the file {name} cannot be used: {problem}",
            self.path.display()
        ))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn entries(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_finished_snapshot_has_its_name_and_its_files() {
        let around = tempfile::tempdir().unwrap();
        let target = around.path().join("snap");
        let notes = tempfile::tempdir().unwrap();
        let partial = Partial::begin(target.clone(), notes.path()).unwrap();
        assert_eq!(entries(around.path()), ["snap.partial"]);
        let file = partial.create("memory").unwrap();
        partial.finish(vec![file], b"{}").unwrap();
        assert_eq!(entries(around.path()), ["snap"]);
        assert_eq!(entries(&target), ["memory", "snapshot.json"]);
        assert!(entries(notes.path()).is_empty());
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn nothing_is_left_of_one_that_is_not_finished() {
        let around = tempfile::tempdir().unwrap();
        let notes = tempfile::tempdir().unwrap();
        let partial = Partial::begin(around.path().join("snap"), notes.path()).unwrap();
        partial.create("memory").unwrap();
        drop(partial);
        assert!(entries(around.path()).is_empty());
        assert!(entries(notes.path()).is_empty());
    }

    #[test]
    fn one_of_an_agent_that_was_killed_is_removed_when_the_next_one_starts() {
        let around = tempfile::tempdir().unwrap();
        let notes = tempfile::tempdir().unwrap();
        let partial = Partial::begin(around.path().join("snap"), notes.path()).unwrap();
        partial.create("memory").unwrap();
        std::mem::forget(partial);

        Unfinished::of(notes.path()).remove();

        assert!(entries(around.path()).is_empty());
        assert!(entries(notes.path()).is_empty());
    }

    #[test]
    fn a_folder_of_the_same_name_that_somebody_made_since_is_not_touched() {
        let around = tempfile::tempdir().unwrap();
        let notes = tempfile::tempdir().unwrap();
        let partial = Partial::begin(around.path().join("snap"), notes.path()).unwrap();
        std::mem::forget(partial);
        let path = around.path().join("snap.partial");
        fs::remove_dir(&path).unwrap();
        fs::create_dir(&path).unwrap();
        File::create(path.join("memory")).unwrap();

        Unfinished::of(notes.path()).remove();

        assert_eq!(entries(&path), ["memory"]);
        assert!(entries(notes.path()).is_empty());
    }

    #[test]
    fn a_folder_that_is_there_is_not_touched() {
        let around = tempfile::tempdir().unwrap();
        let target = around.path().join("snap");
        let notes = tempfile::tempdir().unwrap();
        let begin = || Partial::begin(target.clone(), notes.path());
        let refused = |partial: Result<Partial, Failure>| partial.err().unwrap().to_string();
        let first = begin().unwrap();
        assert!(refused(begin()).contains("is being written"));
        fs::create_dir(&target).unwrap();
        assert!(refused(begin()).contains("is there already"));
        let late = first.finish(Vec::new(), b"{}").unwrap_err().to_string();
        assert!(late.contains("is there already"), "{late}");
        assert_eq!(entries(around.path()), ["snap"]);
        assert!(entries(&target).is_empty());
    }

    #[test]
    fn files_that_lead_elsewhere_are_refused() {
        let around = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/hostname", around.path().join("state")).unwrap();
        fs::create_dir(around.path().join("memory")).unwrap();
        let folder = Folder::open(around.path().to_owned()).unwrap();
        for name in ["state", "memory", "profile"] {
            let error = folder.file(name).unwrap_err().to_string();
            assert!(error.contains(&format!("the file {name} cannot be used")), "{error}");
        }
    }

    #[test]
    fn a_manifest_that_never_ends_is_refused() {
        let around = tempfile::tempdir().unwrap();
        File::create(around.path().join(manifest::FILE))
            .unwrap()
            .set_len(1 << 30)
            .unwrap();
        let folder = Folder::open(around.path().to_owned()).unwrap();
        assert!(folder.manifest().unwrap_err().to_string().contains("over 1 MiB"));
        assert!(Folder::open(around.path().join("none")).is_err());
    }
}
