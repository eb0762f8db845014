//! Rings that are made before a jail forbids it.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode};

use super::DEPTH;

/// Makes the rings that this process will ever have, for so many files. To be called before it gives up the calls that make one.
pub(crate) fn keep_rings(count: usize) {
    let mut spare = spare();
    spare.is_all = true;
    while spare.rings.len() < count {
        match restricted() {
            Ok(ring) => spare.rings.push(ring),
            Err(error) => {
                spare.refused = Some(error.to_string());
                return;
            }
        }
    }
}

/// Whether this kernel gives this process a ring, with the restrictions that it must have.
///
/// # Errors
/// Why not.
pub fn probe_rings() -> io::Result<()> {
    restricted().map(drop)
}

/// Rings that nobody uses now. They outlive the machine that had them.
struct Spare {
    rings: Vec<IoUring>,
    /// There will be no others.
    is_all: bool,
    /// Why there are not more.
    refused: Option<String>,
}

static SPARE: Mutex<Spare> = Mutex::new(Spare {
    rings: Vec::new(),
    is_all: false,
    refused: None,
});

fn spare() -> MutexGuard<'static, Spare> {
    SPARE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A ring, of those that there are or a new one.
pub(super) fn take() -> io::Result<IoUring> {
    let mut spare = spare();
    match spare.rings.pop() {
        Some(ring) => Ok(ring),
        None if spare.is_all => {
            let reason = spare
                .refused
                .as_deref()
                .unwrap_or("all rings of this process are in use");
            Err(io::Error::other(reason.to_owned()))
        }
        None => {
            drop(spare);
            restricted()
        }
    }
}

/// Keeps a ring for the next one who needs it. The kernel must be done with all that it was asked for.
pub(super) fn give_back(ring: IoUring) {
    spare().rings.push(ring);
}

/// A ring that can do what disks need and nothing else, for good.
pub(super) fn restricted() -> io::Result<IoUring> {
    let ring = IoUring::builder().setup_r_disabled().build(DEPTH as u32)?;
    let operations = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE];
    let mut restrictions = operations.map(Restriction::sqe_op);
    ring.submitter().register_restrictions(&mut restrictions)?;
    ring.submitter().register_enable_rings()?;
    Ok(ring)
}
