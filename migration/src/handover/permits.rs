//! Every VMM's half: a permit of an epoch that it has had is refused.

use uuid::Uuid;

use super::{Epoch, Permit};

/// Why a VMM did not take a permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PermitRefused {
    /// The permit is for another guest.
    #[error("the permit is for instance {0}")]
    OtherInstance(Uuid),
    /// The permit's epoch is not above the one that this VMM has had.
    #[error("epoch {offered} is not above epoch {had}, which this guest has had here")]
    NotNew {
        /// The epoch of the refused permit.
        offered: Epoch,
        /// The highest epoch taken so far.
        had: Epoch,
    },
}

/// The epochs that one VMM has had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Permits {
    instance: Uuid,
    had: Epoch,
}

impl Permits {
    /// A VMM of `instance` that has not run yet.
    #[must_use]
    pub fn new(instance: Uuid) -> Self {
        Self {
            instance,
            had: Epoch(0),
        }
    }

    /// Whether a permit would be taken. One that is not taken after this, because something else is in the way, may come again.
    ///
    /// # Errors
    /// Refused if it is another guest's or not of a higher epoch.
    pub fn check(&self, permit: Permit) -> Result<(), PermitRefused> {
        if permit.instance != self.instance {
            return Err(PermitRefused::OtherInstance(permit.instance));
        }
        if permit.epoch <= self.had {
            return Err(PermitRefused::NotNew {
                offered: permit.epoch,
                had: self.had,
            });
        }
        Ok(())
    }

    /// Takes a permit: from here on the VMM may run the guest under its epoch.
    ///
    /// # Errors
    /// Refused if it is another guest's or not of a higher epoch.
    pub fn take(&mut self, permit: Permit) -> Result<(), PermitRefused> {
        self.check(permit)?;
        self.had = permit.epoch;
        Ok(())
    }

    /// The epoch under which this VMM runs or ran; 0 if it never did.
    #[must_use]
    pub fn had(&self) -> Epoch {
        self.had
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permit_is_taken_once() {
        let instance = Uuid::from_u128(7);
        let permit = Permit {
            instance,
            epoch: Epoch(4),
            paused: false,
        };
        let mut permits = Permits::new(instance);
        assert_eq!(permits.check(permit), Ok(()));
        assert_eq!(permits.take(permit), Ok(()));
        assert_eq!(
            permits.take(permit),
            Err(PermitRefused::NotNew {
                offered: Epoch(4),
                had: Epoch(4)
            })
        );
        assert_eq!(
            permits.take(Permit {
                epoch: Epoch(5),
                ..permit
            }),
            Ok(())
        );
    }
}
