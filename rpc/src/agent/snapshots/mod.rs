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

pub(crate) use self::folder::Unfinished;
#[cfg(any(fuzzing, test))]
pub(crate) use self::manifest::read_hostile as read_hostile_manifest;
pub(crate) use self::restoring::Identity;
use super::failure::Failure;
use super::images;
use super::instances::Agent;

/// The files that go between a snapshot and a VMM, in the order in which a VMM wants them.
const MACHINE_FILES: [&str; 4] = ["memory", "memory.pieces", "state", "profile"];
/// Where in the data directory it is written down which snapshots are being written.
pub(crate) const UNFINISHED: &str = "unfinished-snapshots";
const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";

impl Agent {
    /// The folder that a request names. On an exposed agent `place`, the folder or what it lies in, must be where images may lie.
    fn snapshot_folder(&self, directory: &str, place: impl Fn(&Path) -> Option<&Path>) -> Result<PathBuf, Failure> {
        let allowed = self.config.is_exposed().then_some(self.config.image_dirs.as_slice());
        check_folder(directory, place, allowed)
    }
}

fn check_folder(
    directory: &str,
    place: impl Fn(&Path) -> Option<&Path>,
    allowed: Option<&[PathBuf]>,
) -> Result<PathBuf, Failure> {
    let path = PathBuf::from(directory);
    let is_name = path.is_absolute() && path.file_name().is_some() && !directory.contains('\0');
    let place = place(&path).filter(|_| is_name).ok_or_else(|| InvalidField {
        field: "directory",
        problem: format!("{directory:?} is not the absolute path of a folder"),
    })?;
    if let Some(allowed) = allowed {
        images::check_place(place, allowed)?;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_named_from_the_root() {
        assert!(check_folder("/srv/snap", Path::parent, None).is_ok());
        for bad in ["", "snap", "/", "/srv/..", "/srv/a\0b"] {
            let error = check_folder(bad, Path::parent, None).unwrap_err().chain();
            assert!(error.contains("directory"), "{bad:?}: {error}");
        }
    }

    #[test]
    fn an_exposed_agent_writes_and_reads_only_where_images_may_lie() {
        let (images, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let allowed = [images.path().to_owned()];
        let new = |folder: &Path| {
            let path = folder.join("snap").display().to_string();
            check_folder(&path, Path::parent, Some(&allowed))
        };
        assert!(new(images.path()).is_ok());
        assert!(new(elsewhere.path()).unwrap_err().to_string().contains("--image-dir"));

        let link = images.path().join("link");
        std::os::unix::fs::symlink(elsewhere.path(), &link).unwrap();
        let linked = check_folder(link.to_str().unwrap(), |path| Some(path), Some(&allowed));
        assert!(linked.unwrap_err().to_string().contains("--image-dir"));
    }
}
