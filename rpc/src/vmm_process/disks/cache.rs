//! The page cache between a guest and those of its disks whose file system has no O_DIRECT.
//!
//! What the guest wrote there is in this host's memory until it is written back, and the destination reads from the disk. So
//! it is written back before the switchover is asked for, as often as it takes until little is left, and once more when the
//! guest stands still.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ferry_migration::guest::DiskCondition;
use ferry_vmm::{DiskAccess, Losses};
use rustix::fs::{Advice, OFlags, fadvise, fcntl_getfl};

use super::Disk;

/// Writing back that takes no longer than this may be done in the blackout.
const LITTLE: Duration = Duration::from_millis(2);

/// A guest may write as fast as its disk: after this the switchover is tried all the same, and calls itself off if it takes
/// too long.
const PATIENCE: Duration = Duration::from_secs(10);

/// The disks that the guest writes through the page cache.
#[derive(Debug, Default)]
pub(super) struct PageCache {
    files: Vec<Cached>,
    settling: Option<JoinHandle<()>>,
}

/// A disk that is written through the page cache.
#[derive(Debug, Clone)]
struct Cached {
    image: Arc<File>,
    losses: Arc<Losses>,
}

impl Cached {
    fn write_back(&self) -> io::Result<()> {
        self.losses.write_back(|| self.image.sync_data())
    }
}

impl PageCache {
    /// Looks for the disks that are meant.
    pub(super) fn new(disks: &[Disk]) -> Self {
        let is_cached = |disk: &&Disk| {
            let is_direct = fcntl_getfl(&*disk.image).is_ok_and(|flags| flags.contains(OFlags::DIRECT));
            disk.access == DiskAccess::ReadWrite && !is_direct
        };
        let files = disks.iter().filter(is_cached).map(|disk| Cached {
            image: Arc::clone(&disk.image),
            losses: Arc::clone(&disk.losses),
        });
        Self {
            files: files.collect(),
            settling: None,
        }
    }

    /// Begins to write back, in a thread of its own, or tells whether that is done.
    pub(super) fn settle(&mut self) -> DiskCondition {
        match self.settling.take() {
            None if self.files.is_empty() => DiskCondition::Settled,
            Some(thread) if thread.is_finished() => DiskCondition::Settled,
            Some(thread) => {
                self.settling = Some(thread);
                DiskCondition::Settling
            }
            None => {
                let files = self.files.clone();
                let begun = thread::Builder::new()
                    .name("write-back".to_owned())
                    .spawn(move || until_little_is_left(&files));
                match begun {
                    Ok(thread) => {
                        self.settling = Some(thread);
                        DiskCondition::Settling
                    }
                    Err(error) => {
                        tracing::warn!(%error, "disks are written back in the blackout only");
                        DiskCondition::Settled
                    }
                }
            }
        }
    }

    /// Writes back all of it.
    pub(super) fn write_back(&self) -> io::Result<()> {
        write_back(&self.files)
    }

    /// The same of a guest that stands still: given up at the deadline.
    pub(super) fn write_back_by(&self, deadline: Instant) -> io::Result<()> {
        if self.files.is_empty() {
            return Ok(());
        }
        let (tell, told) = mpsc::channel();
        let files = self.files.clone();
        thread::Builder::new()
            .name("write-back".to_owned())
            .spawn(move || drop(tell.send(write_back(&files))))?;
        let left = deadline.saturating_duration_since(Instant::now());
        told.recv_timeout(left)
            .unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)))
    }

    /// Drops what is cached and not dirty.
    pub(super) fn forget(&self) {
        for file in &self.files {
            if let Err(error) = fadvise(&*file.image, 0, None, Advice::DontNeed) {
                tracing::warn!(%error, "this host may hold old pages of a disk");
            }
        }
    }
}

fn until_little_is_left(files: &[Cached]) {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        let round = Instant::now();
        if let Err(error) = write_back(files) {
            tracing::warn!(%error, "a disk does not take what its guest wrote");
            return;
        }
        if round.elapsed() < LITTLE {
            return;
        }
    }
}

fn write_back(files: &[Cached]) -> io::Result<()> {
    files.iter().try_for_each(Cached::write_back)
}

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;
    use std::os::unix::fs::FileExt;

    use rustix::io::{Errno, ReadWriteFlags, preadv2};

    use super::*;

    fn cache(access: DiskAccess) -> PageCache {
        let image = tempfile::tempfile().unwrap();
        image.write_all_at(&[1; 1 << 20], 0).unwrap();
        of(image, access)
    }

    fn of(image: File, access: DiskAccess) -> PageCache {
        PageCache::new(&[Disk {
            path: "/srv/web.img".to_owned(),
            image: Arc::new(image),
            lock_file: None,
            readers: None,
            target: None,
            access,
            losses: Default::default(),
        }])
    }

    #[test]
    fn a_cached_disk_settles_in_the_end_and_anew_for_each_switchover() {
        let mut cache = cache(DiskAccess::ReadWrite);
        for _ in 0..2 {
            assert_eq!(cache.settle(), DiskCondition::Settling);
            let deadline = Instant::now() + 2 * PATIENCE;
            while cache.settle() == DiskCondition::Settling {
                assert!(Instant::now() < deadline, "it does not settle");
                thread::sleep(Duration::from_millis(1));
            }
        }
        cache.write_back().unwrap();
        cache.forget();
    }

    #[test]
    fn disks_that_bypass_the_cache_or_are_only_read_are_settled() {
        assert_eq!(cache(DiskAccess::ReadOnly).settle(), DiskCondition::Settled);
        assert_eq!(PageCache::default().settle(), DiskCondition::Settled);
    }

    /// A disk that was written through the page cache, in a folder on a disk: tmpfs has nothing to drop pages to.
    fn on_disk() -> PageCache {
        let image = tempfile::tempfile_in("/var/tmp").unwrap();
        image.write_all_at(&[1; 1 << 20], 0).unwrap();
        of(image, DiskAccess::ReadWrite)
    }

    /// Whether a page is in the page cache: a read that may not wait finds it there, or nothing.
    fn holds(cache: &PageCache, page: u64) -> bool {
        let mut bytes = [0; 4096];
        let mut into = [IoSliceMut::new(&mut bytes)];
        match preadv2(&*cache.files[0].image, &mut into, page * 4096, ReadWriteFlags::NOWAIT) {
            Ok(read) => read == 4096,
            Err(Errno::AGAIN) => false,
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn what_is_forgotten_is_read_from_the_disk_again() {
        let cache = on_disk();
        assert!(holds(&cache, 0) && holds(&cache, 200));
        cache.write_back().unwrap();
        cache.forget();
        assert!(!holds(&cache, 200));
        assert!(!holds(&cache, 0));
    }

    #[test]
    fn what_was_lost_keeps_the_switchover_from_going_on_until_the_guest_was_told() {
        let cache = cache(DiskAccess::ReadWrite);
        let losses = Arc::clone(&cache.files[0].losses);
        losses
            .write_back(|| Err(io::ErrorKind::StorageFull.into()))
            .unwrap_err();
        let deadline = Instant::now() + PATIENCE;
        for _ in 0..2 {
            cache.write_back().unwrap_err();
            cache.write_back_by(deadline).unwrap_err();
        }
        // As the device does when it fails the guest's flush.
        assert!(losses.take());
        cache.write_back().unwrap();
        cache.write_back_by(deadline).unwrap();
    }

    #[test]
    fn a_writing_back_that_fails_is_kept_for_the_guest() {
        // It takes every write and cannot make one last.
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let cache = of(null, DiskAccess::ReadWrite);
        cache.write_back().unwrap_err();
        assert!(cache.files[0].losses.take());
    }
}
