//! A file system of a few folders and a network of nothing.
//!
//! The new root is an empty tmpfs that is mounted over the instance's folder, which is there for certain. The folders that stay are
//! bound into it at the paths that they have outside, so nobody needs to translate a path and messages name what a person can look
//! at. Then it becomes the root, and the host's tree goes.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, mount_remount, unmount,
};
use rustix::process::{chdir, getegid, geteuid, pivot_root};
use rustix::thread::{CapabilitySet, capabilities};

/// What may be done with a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Read what is in it.
    Read,
    /// Make files in it, too.
    Write,
}

/// What the process has left.
#[derive(Debug)]
pub(super) struct Left {
    /// The host's mounts: what is mounted now, the host does not see.
    pub(super) mounts: io::Result<()>,
    /// The host's network.
    pub(super) network: io::Result<()>,
}

/// Leaves the host's mounts and network for own ones. Without the right to that, a user namespace of its own gives it, where users
/// may make one.
pub(super) fn leave_the_hosts() -> Left {
    let may = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN));
    if may {
        return Left {
            mounts: unshare(CloneFlags::CLONE_NEWNS).map_err(Into::into),
            network: unshare(CloneFlags::CLONE_NEWNET).map_err(Into::into),
        };
    }
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    match unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET) {
        Ok(()) => Left {
            mounts: stay_the_user(user, group),
            network: Ok(()),
        },
        Err(error) => Left {
            mounts: Err(error.into()),
            network: Err(error.into()),
        },
    }
}

/// In the new user namespace the process is who it was outside.
fn stay_the_user(user: u32, group: u32) -> io::Result<()> {
    let write = |file: &str, text: String| {
        let path = Path::new("/proc/self").join(file);
        File::options().write(true).open(path)?.write_all(text.as_bytes())
    };
    // First, or an unprivileged process may not map its group (`user_namespaces(7)`).
    write("setgroups", "deny".to_owned())?;
    write("gid_map", format!("{group} {group} 1"))?;
    write("uid_map", format!("{user} {user} 1"))
}

/// Makes these folders all that there is. The first of them is where the new root is mounted meanwhile.
///
/// # Errors
/// The host's tree is there still, as it was.
pub(super) fn show_only(folders: &[(&Path, Access)]) -> io::Result<()> {
    let Some(&(place, _)) = folders.first() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // What is mounted here does not get back to the host, and the host's own changes do not come in.
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    // Before one of them is covered; in these mounts, which others cannot be bound from.
    let opened: Vec<_> = folders
        .iter()
        .map(|(folder, _)| open_folder(folder))
        .collect::<io::Result<_>>()?;
    mount("tmpfs", place, "tmpfs", HARMLESS, Some(c"mode=755,size=64k"))?;
    let furnished = folders
        .iter()
        .zip(&opened)
        .try_for_each(|(&(folder, access), opened)| show(place, folder, opened, access))
        .and_then(|()| {
            Ok(mount_remount(
                place,
                MountFlags::BIND | MountFlags::RDONLY | HARMLESS,
                c"",
            )?)
        })
        .and_then(|()| enter(place));
    if furnished.is_err() {
        // The folder under it is still to be worked with.
        let _ = unmount(place, UnmountFlags::DETACH);
    }
    furnished
}

/// Nothing in here is a program, a device or anybody's privilege.
const HARMLESS: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

fn open_folder(folder: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(open(folder, flags, Mode::empty())?)
}

/// Binds a folder below `root`, at its own path.
fn show(root: &Path, folder: &Path, opened: &OwnedFd, access: Access) -> io::Result<()> {
    let target = below(root, folder);
    fs::create_dir_all(&target)?;
    mount_bind(format!("/proc/self/fd/{}", opened.as_raw_fd()), &target)?;
    let read_only = match access {
        Access::Read => MountFlags::RDONLY,
        Access::Write => MountFlags::empty(),
    };
    // A mount that is being bound takes no flags: they are given in a second step (`mount(2)`, MS_BIND).
    Ok(mount_remount(&target, MountFlags::BIND | HARMLESS | read_only, c"")?)
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// Makes `root` the root, and forgets the one before. Stacking one upon the other needs no folder to put it (`pivot_root(2)`).
fn enter(root: &Path) -> io::Result<()> {
    chdir(root)?;
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    Ok(chdir("/")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_keeps_its_path_in_the_new_root() {
        assert_eq!(
            below(Path::new("/a/b"), Path::new("/run/marks")),
            Path::new("/a/b/run/marks")
        );
    }

    #[test]
    fn a_thread_of_its_own_sees_only_what_it_is_shown() {
        let folder = tempfile::tempdir().unwrap();
        let (kept, marks) = (folder.path().join("kept"), folder.path().join("marks"));
        for (folder, file) in [(&kept, "image"), (&marks, "old")] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join(file), "content").unwrap();
        }
        // Mounts and root are a thread's own here, the rest of the test's process keeps the host's.
        let seen = std::thread::scope(|scope| {
            let look = || {
                unshare(CloneFlags::CLONE_NEWNS).ok()?;
                show_only(&[(&kept, Access::Read), (&marks, Access::Write)]).unwrap();
                Some((
                    fs::read_to_string(kept.join("image")).unwrap(),
                    fs::write(kept.join("new"), "").is_err(),
                    fs::write(marks.join("new"), "").is_ok(),
                    Path::new("/etc").exists(),
                    fs::write("/new", "").is_err(),
                ))
            };
            scope.spawn(look).join().unwrap()
        });
        // Without the right to it there is nothing to be seen.
        let Some(seen) = seen else { return };
        assert_eq!(seen, ("content".to_owned(), true, true, false, true));
        assert!(marks.join("new").exists() && Path::new("/etc").exists());
    }
}
