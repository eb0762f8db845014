//! The file beside a disk image that says who holds the image: `<image>.ferry-lock`.
//!
//! It holds no lock itself. What counts is the lock on the image, which goes with its holder's process; this file gives the
//! holder a name, and remembers the highest epoch under which an instance had the disk. One line of JSON, written in place
//! and never removed: others have it open.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Who holds a disk, or held it last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Holder {
    pub(crate) host: String,
    pub(crate) instance: Uuid,
    pub(crate) name: String,
    /// The highest epoch under which the instance had the disk.
    pub(crate) epoch: u64,
    /// The VMM, in the process numbers of its host.
    pub(crate) pid: u32,
}

/// More than a line has: names are short. What is longer was written by somebody else.
pub(crate) const LONGEST_LINE: usize = 1024;

/// The lock file of an image.
pub(crate) fn path_of(image: &Path) -> PathBuf {
    let mut path = OsString::from(image);
    path.push(".ferry-lock");
    PathBuf::from(path)
}

/// The file beside an image in which those who only read it leave their names.
pub(crate) fn readers_path_of(image: &Path) -> PathBuf {
    let mut path = OsString::from(image);
    path.push(".ferry-readers");
    PathBuf::from(path)
}

/// A lock on an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    /// Of those that only read it.
    Shared,
    /// Of the one that writes it.
    Exclusive,
}

/// The lock that some other open file has on this image, or on a part of it. It may be gone, or there, a moment later.
///
/// # Errors
/// The file system does not lock.
pub(crate) fn lock_on(image: &File) -> io::Result<Option<Lock>> {
    let mut asked = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        // Must be zero for this kind of lock.
        l_pid: 0,
    };
    fcntl(image, FcntlArg::F_OFD_GETLK(&mut asked))?;
    Ok(match libc::c_int::from(asked.l_type) {
        libc::F_UNLCK => None,
        libc::F_RDLCK => Some(Lock::Shared),
        _ => Some(Lock::Exclusive),
    })
}

/// Whom the file names; none if it is empty, or being written, or not ours.
pub(crate) fn read(file: &File) -> Option<Holder> {
    read_at(file, 0)
}

/// The same of a name that begins there.
pub(crate) fn read_at(file: &File, offset: u64) -> Option<Holder> {
    let mut bytes = [0; LONGEST_LINE];
    let count = file.read_at(&mut bytes, offset).ok()?;
    parse(&bytes[..count])
}

/// Whom these bytes name, if they name anybody.
pub(crate) fn parse(bytes: &[u8]) -> Option<Holder> {
    serde_json::from_slice(bytes).ok()
}

/// Names `holder`. It is not synced: whoever asks on this host sees it at once, after a crash of the host it matters no more, and for other
/// hosts somebody syncs it when nothing waits for that.
///
/// # Errors
/// The file system is full or gone.
pub(crate) fn write(file: &File, holder: &Holder) -> io::Result<()> {
    let mut line = serde_json::to_vec(holder)?;
    line.push(b'\n');
    file.write_all_at(&line, 0)?;
    file.set_len(line.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder() -> Holder {
        Holder {
            host: "a".to_owned(),
            instance: Uuid::from_u128(1),
            name: "web".to_owned(),
            epoch: 3,
            pid: 4711,
        }
    }

    #[test]
    fn the_last_holder_is_named() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(read(&file), None);
        let long = Holder {
            name: "a-much-longer-name".to_owned(),
            ..holder()
        };
        write(&file, &long).unwrap();
        write(&file, &holder()).unwrap();
        assert_eq!(read(&file), Some(holder()));
    }

    #[test]
    fn what_is_not_ours_names_nobody() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"{\"host\":\"a\"}", 0).unwrap();
        assert_eq!(read(&file), None);
        file.write_all_at(&[b' '; 2 * LONGEST_LINE], 0).unwrap();
        assert_eq!(read(&file), None);
    }

    #[test]
    fn a_lock_of_somebody_else_is_told_and_ones_own_is_not() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let other = File::options().read(true).write(true).open(image.path()).unwrap();
        let lock = |kind: libc::c_int| {
            let lock = libc::flock {
                l_type: kind as libc::c_short,
                l_whence: libc::SEEK_SET as libc::c_short,
                l_start: 0,
                l_len: 0,
                l_pid: 0,
            };
            fcntl(&other, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
            lock_on(image.as_file()).unwrap()
        };
        assert_eq!(lock(libc::F_RDLCK), Some(Lock::Shared));
        assert_eq!(lock(libc::F_WRLCK), Some(Lock::Exclusive));
        assert_eq!(lock_on(&other).unwrap(), None);
        assert_eq!(lock(libc::F_UNLCK), None);
    }

    #[test]
    fn a_lock_file_lies_beside_its_image() {
        assert_eq!(path_of(Path::new("/srv/web.img")), Path::new("/srv/web.img.ferry-lock"));
    }
}
