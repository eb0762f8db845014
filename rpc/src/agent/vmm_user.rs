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

/// The numbers that an agent gives to VMMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserRange {
    first: u32,
    last: u32,
}

impl Default for UserRange {
    /// Above those that systemd gives to containers (524288 to 1879048191, `UIDS-GIDS.md`), as far as a signed number goes.
    fn default() -> Self {
        Self {
            first: 0x7000_0000,
            last: 0x7fff_ffff,
        }
    }
}

impl UserRange {
    /// The numbers from `first` to `last`; none if that is no range, or root is in it.
    #[must_use]
    pub fn new(first: u32, last: u32) -> Option<Self> {
        // The last number of all means "leave it as it is" to the kernel.
        (0 < first && first <= last && last < u32::MAX).then_some(Self { first, last })
    }

    fn contains(self, number: u32) -> bool {
        (self.first..=self.last).contains(&number)
    }

    /// All of them, beginning somewhere in it.
    fn beginning_at(self, somewhere: u32) -> impl Iterator<Item = u32> {
        let count = self.last - self.first + 1;
        (0..count).map(move |step| self.first + (somewhere % count + step) % count)
    }
}

/// Gives an instance's folder to its VMM's user, to be read, and a folder for a started mark, to be written.
///
/// # Errors
/// This process may not give files away: it is not root, or the file system does not know such owners.
pub(crate) fn give(folder: &Path, mark_folder: Option<&Path>, range: UserRange) -> io::Result<u32> {
    /// Two instances must not find the same number free.
    static CHOOSING: Mutex<()> = Mutex::new(());
    let choosing = CHOOSING.lock().unwrap_or_else(PoisonError::into_inner);
    let user = choose(folder, range)?;
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
fn choose(folder: &Path, range: UserRange) -> io::Result<u32> {
    let has = fs::metadata(folder)?.gid();
    if range.contains(has) {
        return Ok(has);
    }
    let beside = folder.parent().unwrap_or(folder);
    let taken: Vec<u32> = fs::read_dir(beside)?
        .filter_map(|entry| Some(entry.ok()?.metadata().ok()?.gid()))
        .collect();
    // Instances of another agent on this host are not seen here: chance keeps them apart.
    let hash = blake3::hash(folder.as_os_str().as_encoded_bytes());
    let begin = u32::from_le_bytes([0, 1, 2, 3].map(|at| hash.as_bytes()[at]));
    let free = range.beginning_at(begin).find(|number| !taken.contains(number));
    free.ok_or_else(|| io::Error::other("each user of the agent's --vmm-users is another VMM's"))
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
        let Ok(user) = give(&folder, None, UserRange::default()) else {
            return;
        };
        assert!(UserRange::default().contains(user));
        assert_eq!(give(&folder, None, UserRange::default()).unwrap(), user);
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o750);
    }

    #[test]
    fn a_number_that_is_taken_is_passed_over() {
        let instances = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| instances.path().join(name));
        fs::create_dir(&one).unwrap();
        let range = UserRange::new(70_000, 70_001).unwrap();
        let wanted = choose(&one, range).unwrap();
        fs::create_dir(&two).unwrap();
        if chown(&two, None, Some(wanted)).is_ok() {
            assert_eq!(choose(&one, range).unwrap(), 140_001 - wanted);
            let narrow = UserRange::new(wanted, wanted).unwrap();
            assert!(choose(&one, narrow).unwrap_err().to_string().contains("--vmm-users"));
        }
    }

    #[test]
    fn a_range_has_neither_root_nor_nobody_at_all() {
        assert_eq!(UserRange::new(0, 5), None);
        assert_eq!(UserRange::new(6, 5), None);
        assert_eq!(UserRange::new(5, u32::MAX), None);
        let few = UserRange::new(5, 7).unwrap();
        assert_eq!(few.beginning_at(u32::MAX).collect::<Vec<_>>().len(), 3);
        assert!(few.beginning_at(u32::MAX).all(|number| few.contains(number)));
    }
}
