//! Snapshots: an instance written to a folder, and instances made of such a folder. The layout is in `docs/snapshot.md`.
//!
//! | module | is |
//! | --- | --- |
//! | `manifest` | `snapshot.json`: what the other files are, and their digests |
//! | `folder` | the folder, being written or being read |
//! | `taking`, `restoring` | the two verbs |
//!
//! The agent opens all files and reads those that say what the instance is; memory and state go between file and VMM.

mod folder;
mod manifest;
mod restoring;
mod taking;

use std::path::{Path, PathBuf};

use ferry_proto::InvalidField;

pub(crate) use self::restoring::Identity;
use super::failure::Failure;
use super::images;
use super::instances::Agent;

/// The files that go between a snapshot and a VMM, in the order in which a VMM wants them.
const MACHINE_FILES: [&str; 4] = ["memory", "memory.pieces", "state", "profile"];
const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";

impl Agent {
    /// The folder that a request names; on an exposed agent only where images may lie, of which `within` must be a part.
    fn snapshot_folder(&self, directory: &str, within: impl Fn(&Path) -> Option<&Path>) -> Result<PathBuf, Failure> {
        let invalid = |problem: &str| InvalidField {
            field: "directory",
            problem: format!("{directory:?} {problem}"),
        };
        let path = PathBuf::from(directory);
        if !path.is_absolute() || directory.contains('\0') {
            return Err(invalid("is not an absolute path").into());
        }
        if path.file_name().is_none() {
            return Err(invalid("does not name a folder").into());
        }
        if self.config.is_exposed() {
            let place = within(&path).ok_or_else(|| invalid("does not name a folder"))?;
            images::check_place(place, &self.config.image_dirs)?;
        }
        Ok(path)
    }
}
