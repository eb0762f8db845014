//! What a guest wrote and did not reach its disk, found out by somebody else than the guest's device.

use std::io;
use std::sync::{Mutex, PoisonError};

/// Whether a writing back failed that the guest did not ask for.
///
/// The kernel tells of such a failure once per open file (`errseq_t`, `Documentation/core-api/errseq.rst`), and the device has the same one
/// as whoever else writes it back. So who is told keeps it here, and the guest's next flush fails, as it would have without them. One lock
/// around the question to the kernel and the note of its answer: a flush between them would find that all is well.
#[derive(Debug, Default)]
pub struct Losses(Mutex<bool>);

impl Losses {
    /// Does this writing back, which the guest did not ask for; a flush of the guest's meanwhile is answered after it.
    ///
    /// # Errors
    /// It failed, or an earlier one did and the guest has not been told yet.
    pub fn write_back(&self, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut lost = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        work().inspect_err(|_| *lost = true)?;
        match *lost {
            true => Err(io::Error::other("an earlier writing back failed")),
            false => Ok(()),
        }
    }

    /// Whether there were any, at the guest's flush, after its own writing back: it is told now. Waits for one that is under way.
    pub fn take(&self) -> bool {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_failure_is_told_to_everyone_until_the_guest_was() {
        let losses = Losses::default();
        assert!(!losses.take());
        losses
            .write_back(|| Err(io::ErrorKind::StorageFull.into()))
            .unwrap_err();
        losses.write_back(|| Ok(())).unwrap_err();
        assert!(losses.take() && !losses.take());
        losses.write_back(|| Ok(())).unwrap();
    }

    #[test]
    fn a_flush_beside_a_writing_back_hears_how_that_ended() {
        let losses = &Losses::default();
        let (begun, has_begun) = mpsc::channel();
        thread::scope(|scope| {
            let failing = move || {
                begun.send(()).unwrap();
                // The kernel's answer is there, and not noted yet.
                thread::sleep(Duration::from_millis(50));
                Err(io::ErrorKind::StorageFull.into())
            };
            scope.spawn(move || losses.write_back(failing).unwrap_err());
            has_begun.recv().unwrap();
            assert!(losses.take());
        });
    }
}
