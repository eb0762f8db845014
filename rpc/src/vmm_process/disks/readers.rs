//! Who reads a disk: of a guest that writes one the lock file tells, but any number may read it at a time.
//!
//! `<image>.ferry-readers` has slots, each as long as a name may be. A VMM that reads the disk locks a slot (`fcntl(2)`, F_OFD_SETLK) and puts its name
//! in it. Whose slot nobody has locked is gone: the name goes with the process, as the lock on the image does. It is for messages
//! and decides nothing, so that a reader without a slot, or without such a file, reads the disk all the same.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::lock_file::{self, Holder, LONGEST_LINE};

/// As many readers have a name at a time.
const SLOTS: u64 = 64;

const SLOT_BYTES: u64 = LONGEST_LINE as u64;

/// Notes that `reader` reads the disk, from now until [`leave`] or the end of its process. False where every slot is taken.
///
/// # Errors
/// The file system does not lock, or is full.
pub(super) fn enter(file: &File, reader: &Holder) -> io::Result<bool> {
    // It may have one from before.
    leave(file)?;
    let mut line = serde_json::to_vec(reader)?;
    if line.len() >= LONGEST_LINE {
        return Err(io::Error::other("the instance's name is too long"));
    }
    line.resize(LONGEST_LINE - 1, b' ');
    line.push(b'\n');
    for slot in 0..SLOTS {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&slot_lock(slot, libc::F_WRLCK))) {
            Ok(_) => return file.write_all_at(&line, slot * SLOT_BYTES).map(|()| true),
            Err(Errno::EAGAIN | Errno::EACCES) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
}

/// Gives the slot back.
///
/// # Errors
/// The file system does not lock.
pub(super) fn leave(file: &File) -> io::Result<()> {
    let mut all = slot_lock(0, libc::F_UNLCK);
    all.l_len = 0;
    fcntl(file, FcntlArg::F_OFD_SETLK(&all))?;
    Ok(())
}

/// Who reads the disk now, as far as they say.
pub(super) fn names(file: &File) -> Vec<Holder> {
    let bytes = file.metadata().map_or(0, |metadata| metadata.len());
    let slots = 0..SLOTS.min(bytes.div_ceil(SLOT_BYTES));
    slots
        .filter(|&slot| is_taken(file, slot))
        .filter_map(|slot| lock_file::read_at(file, slot * SLOT_BYTES))
        .collect()
}

fn is_taken(file: &File, slot: u64) -> bool {
    let mut asked = slot_lock(slot, libc::F_WRLCK);
    let told = fcntl(file, FcntlArg::F_OFD_GETLK(&mut asked));
    told.is_ok() && libc::c_int::from(asked.l_type) != libc::F_UNLCK
}

fn slot_lock(slot: u64, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        // There are few slots.
        l_start: (slot * SLOT_BYTES).cast_signed(),
        l_len: SLOT_BYTES.cast_signed(),
        // Must be zero for this kind of lock.
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use uuid::Uuid;

    use super::*;

    /// An open file of its own: to the locks that is another process.
    fn open(path: &Path) -> File {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        options.open(path).unwrap()
    }

    fn reader(name: &str) -> Holder {
        Holder {
            host: "a".to_owned(),
            instance: Uuid::from_u128(1),
            name: name.to_owned(),
            epoch: 3,
            pid: 1,
        }
    }

    fn names_of(file: &File) -> Vec<String> {
        names(file).into_iter().map(|holder| holder.name).collect()
    }

    #[test]
    fn readers_are_named_as_long_as_they_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.img.ferry-readers");
        let (one, other, asks) = (open(&path), open(&path), File::open(&path).unwrap());
        assert_eq!(names_of(&asks), [""; 0]);

        assert!(enter(&one, &reader("one-with-a-long-name")).unwrap());
        assert!(enter(&other, &reader("other")).unwrap());
        assert!(enter(&other, &reader("other")).unwrap(), "once more");

        assert_eq!(names_of(&asks), ["one-with-a-long-name", "other"]);
        drop(one);
        assert_eq!(names_of(&asks), ["other"]);
        let third = open(&path);
        enter(&third, &reader("third")).unwrap();
        assert_eq!(names_of(&asks), ["third", "other"]);
        leave(&other).unwrap();
        assert_eq!(names_of(&asks), ["third"]);
    }

    #[test]
    fn what_is_no_name_is_passed_over_and_slots_come_to_an_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.img.ferry-readers");
        let asks = open(&path);
        let readers: Vec<File> = (0..SLOTS).map(|_| open(&path)).collect();
        for file in &readers {
            assert!(enter(file, &reader("web")).unwrap());
        }
        let late = open(&path);
        assert!(!enter(&late, &reader("late")).unwrap());
        asks.write_all_at(&[0xff; 2 * LONGEST_LINE], 0).unwrap();
        assert_eq!(names_of(&asks).len() as u64, SLOTS - 2);
        assert!(enter(&asks, &reader(&"n".repeat(LONGEST_LINE))).is_err());
    }
}
