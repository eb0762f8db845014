//! Which snapshots this agent is writing: a note for each, in a folder of its data directory.
//!
//! An agent that is killed leaves `DIR.partial` wherever its user wanted the snapshot, and nobody else can tell whether it is being
//! written. The next agent of the same data directory can: nobody writes one that the agent before it had begun. It removes what is
//! certainly the very folder that was made, by its number and by when it was made, for its name may be another's by now.

use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// What a note says of a folder.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
struct Folder {
    path: PathBuf,
    device: u64,
    inode: u64,
    /// Nanoseconds of unix time; none where the file system does not keep it.
    born: Option<u64>,
}

impl Folder {
    fn of(path: &Path, metadata: &Metadata) -> Self {
        let born = metadata.created().ok();
        Self {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            born: born.and_then(|born| u64::try_from(born.duration_since(UNIX_EPOCH).ok()?.as_nanos()).ok()),
        }
    }
}

/// A note. Dropping it removes it.
pub(super) struct Note(PathBuf);

impl Note {
    /// Sees to it that a note can be written before anything is made that it is about.
    pub(super) fn begin(notes: &Path) -> io::Result<Self> {
        fs::create_dir_all(notes)?;
        let note = Self(notes.join(Uuid::new_v4().to_string()));
        File::create_new(&note.0)?;
        Ok(note)
    }

    /// Writes down which folder it is. Not synced: after a crash of the host nobody knows whether the folder is there either.
    pub(super) fn is_of(&self, path: &Path) -> io::Result<()> {
        let folder = Folder::of(path, &fs::symlink_metadata(path)?);
        File::create(&self.0)?.write_all(&serde_json::to_vec(&folder)?)
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::warn!(note = %self.0.display(), %error, "failed to remove the note of a snapshot");
        }
    }
}

/// What an agent that was killed had begun.
pub(crate) struct Unfinished(Vec<Note>);

impl Unfinished {
    /// The notes that are there. To be asked before this agent writes any.
    pub(crate) fn of(notes: &Path) -> Self {
        let entries = fs::read_dir(notes).into_iter().flatten().flatten();
        Self(entries.map(|entry| Note(entry.path())).collect())
    }

    /// Removes the folders, and the notes. May wait for file systems that are slow.
    pub(crate) fn remove(self) {
        self.0.iter().for_each(remove);
    }
}

fn remove(note: &Note) {
    let Some(folder) = fs::read(&note.0)
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Folder>(&bytes).ok())
    else {
        // It was killed before it made the folder, or wrote which it is.
        return;
    };
    let is_there = fs::symlink_metadata(&folder.path);
    if !is_there.is_ok_and(|metadata| metadata.is_dir() && Folder::of(&folder.path, &metadata) == folder) {
        return;
    }
    tracing::info!(folder = %folder.path.display(), "removing a snapshot that was not finished");
    if let Err(error) = fs::remove_dir_all(&folder.path) {
        tracing::warn!(folder = %folder.path.display(), %error, "failed to remove a snapshot that was not finished");
    }
}
