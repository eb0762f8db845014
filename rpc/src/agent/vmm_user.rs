//! A user of its own for each VMM, so that none can reach another's memory, files or process.
//!
//! It needs no account: it is a number that nothing else has. Which one is an instance's is what the group of its folder says. That is
//! there as long as the folder, whatever becomes of agents, and no two folders of an agent have the same. The folder and what is in
//! it stay the agent's; the group may read.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Numbers above those that systemd gives to containers (524288 to 1879048191, `UIDS-GIDS.md`), as far as a signed number goes.
const FIRST: u32 = 0x7000_0000;
const COUNT: u32 = 0x1000_0000;

/// Gives an instance's folder to its VMM's user, to be read, and a folder for a started mark, to be written.
///
/// # Errors
/// This process may not give files away: it is not root, or the file system does not know such owners.
pub(crate) fn give(folder: &Path, mark_folder: Option<&Path>) -> io::Result<u32> {
    /// Two instances must not find the same number free.
    static CHOOSING: Mutex<()> = Mutex::new(());
    let choosing = CHOOSING.lock().unwrap_or_else(PoisonError::into_inner);
    let user = choose(folder)?;
    chown(folder, None, Some(user))?;
    drop(choosing);
    fs::set_permissions(folder, Permissions::from_mode(0o750))?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(super::images::is_file_name) {
            chown(entry.path(), None, Some(user))?;
            fs::set_permissions(entry.path(), Permissions::from_mode(0o640))?;
        }
    }
    if let Some(folder) = mark_folder {
        // A VMM that cannot become this user is the agent's, and has no capability to pass over modes.
        chown(folder, None, Some(user))?;
        fs::set_permissions(folder, Permissions::from_mode(0o770))?;
    }
    Ok(user)
}

/// The number that the folder has, or one that no folder beside it has.
fn choose(folder: &Path) -> io::Result<u32> {
    let has = fs::metadata(folder)?.gid();
    if is_ours(has) {
        return Ok(has);
    }
    let beside = folder.parent().unwrap_or(folder);
    let taken: Vec<u32> = fs::read_dir(beside)?
        .filter_map(|entry| Some(entry.ok()?.metadata().ok()?.gid()))
        .collect();
    // Instances of another agent on this host are not seen here: chance keeps them apart.
    let hash = blake3::hash(folder.as_os_str().as_encoded_bytes());
    let begin = u32::from_le_bytes([0, 1, 2, 3].map(|at| hash.as_bytes()[at]));
    (0..COUNT)
        .map(|step| FIRST + begin.wrapping_add(step) % COUNT)
        .find(|number| !taken.contains(number))
        .ok_or_else(|| io::Error::other("all numbers of users are taken"))
}

fn is_ours(number: u32) -> bool {
    (FIRST..FIRST + COUNT).contains(&number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_keeps_its_number() {
        let instances = tempfile::tempdir().unwrap();
        let folder = instances.path().join("one");
        fs::create_dir(&folder).unwrap();
        // Only root gives files away.
        let Ok(user) = give(&folder, None) else { return };
        assert!(is_ours(user));
        assert_eq!(give(&folder, None).unwrap(), user);
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o750);
    }

    #[test]
    fn a_number_that_is_taken_is_passed_over() {
        let instances = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| instances.path().join(name));
        fs::create_dir(&one).unwrap();
        let wanted = choose(&one).unwrap();
        fs::create_dir(&two).unwrap();
        if chown(&two, None, Some(wanted)).is_ok() {
            assert_ne!(choose(&one).unwrap(), wanted);
        }
    }
}
