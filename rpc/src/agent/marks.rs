//! Started marks: whether a guest that moved in may have run here, though its VMM is dead.
//!
//! A VMM leaves its mark on tmpfs right before the guest's first instruction: no fsync, and gone with the host. The agent that reads it
//! need not be the one that said where: it may have been restarted by another user, for whom another of the roots is the first that
//! can be written. So one is written, and all are looked at; and where this agent may not look, there may be a mark. A mark too many
//! costs a guest its memory (it counts as crashed), a mark overlooked has it run twice.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use uuid::Uuid;

/// Where started marks may be: on tmpfs.
const ROOTS: [&str; 3] = ["/run", "/dev/shm", "/tmp"];
const MARK: &str = "started";

/// The started marks of the agent with one data directory.
pub(crate) struct Marks {
    /// Where its VMMs leave theirs. It is there while a migration needs it.
    own: PathBuf,
    /// Where those of an earlier agent may be, this one among them.
    all: Vec<PathBuf>,
}

impl Marks {
    /// Those of the agent with this data directory.
    ///
    /// # Errors
    /// This host has none of the places where they could be.
    pub(crate) fn of(data_dir: &Path) -> io::Result<Self> {
        let is_writable = |root: &Path| rustix::fs::access(root, rustix::fs::Access::WRITE_OK).is_ok();
        let writable = ROOTS.iter().position(|root| is_writable(Path::new(root)));
        Ok(Self::in_one_of(folders(data_dir), writable.ok_or(ErrorKind::NotFound)?))
    }

    fn in_one_of(all: Vec<PathBuf>, own: usize) -> Self {
        Self {
            own: all[own].clone(),
            all,
        }
    }

    /// The folder in which the VMM of a migration into here leaves its mark. It is that VMM's alone: others' marks are not its to
    /// make.
    pub(crate) fn folder(&self, migration: Uuid) -> PathBuf {
        self.own.join(migration.to_string())
    }

    /// The mark of a migration into here, where its VMM is to leave it.
    pub(crate) fn mark(&self, migration: Uuid) -> PathBuf {
        self.folder(migration).join(MARK)
    }

    /// Whether the VMM of this migration left its mark, or may have.
    pub(crate) fn may_have_started(&self, migration: Uuid) -> bool {
        self.all.iter().any(|folder| {
            let mark = folder.join(migration.to_string()).join(MARK);
            match fs::symlink_metadata(&mark) {
                Ok(_) => true,
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => false,
                Err(error) => {
                    tracing::error!(mark = %mark.display(), %error, "a started mark cannot be looked for, and counts as there");
                    true
                }
            }
        })
    }

    /// Removes what there is of a migration. Another one's mark keeps the folder; one that comes later makes it anew.
    pub(crate) fn remove(&self, migration: Uuid) {
        for folder in &self.all {
            // In most of them it is not there.
            let _ = fs::remove_dir_all(folder.join(migration.to_string()));
            let _ = fs::remove_dir(folder);
        }
    }
}

/// In each of the roots, the folder for the marks of the agent with this data directory.
pub(crate) fn folders(data_dir: &Path) -> Vec<PathBuf> {
    let digest = blake3::hash(data_dir.as_os_str().as_encoded_bytes()).to_hex();
    let name = format!("ferry-{}", &digest[..16]);
    ROOTS.iter().map(|root| Path::new(root).join(&name)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    const MIGRATION: Uuid = Uuid::from_u128(7);

    /// As two agents of one data directory see them, of which the second may not write where the first one does.
    fn of_two_users() -> (TempDir, Marks, Marks) {
        let root = tempfile::tempdir().unwrap();
        let all = vec![root.path().join("run/ferry-1"), root.path().join("shm/ferry-1")];
        let (before, after) = (Marks::in_one_of(all.clone(), 0), Marks::in_one_of(all, 1));
        (root, before, after)
    }

    fn leave(marks: &Marks) {
        fs::create_dir_all(marks.folder(MIGRATION)).unwrap();
        fs::write(marks.mark(MIGRATION), "").unwrap();
    }

    #[test]
    fn an_agent_that_came_back_as_another_user_finds_the_mark_that_was_left_before() {
        let (_root, before, after) = of_two_users();
        assert_ne!(before.mark(MIGRATION), after.mark(MIGRATION));
        assert!(!after.may_have_started(MIGRATION));
        leave(&before);
        assert!(after.may_have_started(MIGRATION));
        assert!(!after.may_have_started(Uuid::from_u128(8)));
    }

    #[test]
    fn where_it_may_not_look_there_may_be_a_mark() {
        let (_root, before, after) = of_two_users();
        // Neither there nor not there, for root too: ELOOP.
        fs::create_dir_all(before.own.parent().unwrap()).unwrap();
        symlink(&before.own, &before.own).unwrap();
        assert!(after.may_have_started(MIGRATION));
    }

    #[test]
    fn what_is_removed_is_gone_from_everywhere() {
        let (_root, before, after) = of_two_users();
        leave(&before);
        leave(&after);
        after.remove(MIGRATION);
        assert!(!before.may_have_started(MIGRATION));
        assert!(!before.own.exists() && !after.own.exists());
    }
}
