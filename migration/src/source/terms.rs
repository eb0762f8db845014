//! What a migration may take of the guest, of the link and of time; its user may change that while it goes on.

use std::num::NonZeroU64;
use std::time::Duration;

use crate::source::{Manner, SourceParameters};

/// What holds now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Whether the guest runs while it is copied.
    pub manner: Manner,
    /// How long the whole copy may take, from its begin.
    pub timeout: Duration,
    /// The most bytes a second over all page streams, until the last pages.
    pub bandwidth: Option<NonZeroU64>,
}

impl From<&SourceParameters> for Terms {
    fn from(parameters: &SourceParameters) -> Self {
        Self {
            manner: parameters.manner,
            timeout: parameters.timeout,
            bandwidth: parameters.bandwidth,
        }
    }
}

/// What is to hold from now on; `None` stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NewTerms {
    /// How long the guest may stand still. Of a guest that moves cold nothing comes of it.
    pub max_downtime: Option<Duration>,
    /// How long the whole copy may take, from its begin and not from now.
    pub timeout: Option<Duration>,
    /// A cap, or that there is none any more.
    pub bandwidth: Option<Cap>,
}

/// A cap on bytes a second, or none.
pub type Cap = Option<NonZeroU64>;

impl Terms {
    /// With these changes.
    #[must_use]
    pub fn changed(self, new: NewTerms) -> Self {
        let manner = match (self.manner, new.max_downtime) {
            (Manner::Live { .. }, Some(max_downtime)) => Manner::Live { max_downtime },
            (manner, _) => manner,
        };
        Self {
            manner,
            timeout: new.timeout.unwrap_or(self.timeout),
            bandwidth: new.bandwidth.unwrap_or(self.bandwidth),
        }
    }

    /// For a person.
    pub(super) fn words(&self) -> String {
        let bandwidth = match self.bandwidth {
            Some(cap) => format!("at most {:.1} MB/s", cap.get() as f64 / 1e6),
            None => "as fast as it goes".to_owned(),
        };
        let blackout = match self.manner {
            Manner::Live { max_downtime } => format!("a blackout of {:.1} ms, ", max_downtime.as_secs_f64() * 1e3),
            Manner::Cold => String::new(),
        };
        format!("{blackout}{:.1} s in all, {bandwidth}", self.timeout.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms {
        manner: Manner::Live {
            max_downtime: Duration::from_millis(300),
        },
        timeout: Duration::from_secs(60),
        bandwidth: NonZeroU64::new(1_000_000),
    };

    #[test]
    fn what_is_not_named_stays() {
        assert_eq!(TERMS.changed(NewTerms::default()), TERMS);
        let timeout = Some(Duration::from_secs(1));
        let changed = TERMS.changed(NewTerms {
            timeout,
            ..NewTerms::default()
        });
        assert_eq!(
            (changed.timeout, changed.manner),
            (Duration::from_secs(1), TERMS.manner)
        );
        assert_eq!(changed.bandwidth, TERMS.bandwidth);
    }

    #[test]
    fn a_cap_can_be_lifted() {
        let lifted = TERMS.changed(NewTerms {
            bandwidth: Some(None),
            ..NewTerms::default()
        });
        assert_eq!(lifted.bandwidth, None);
        assert!(lifted.words().ends_with("as fast as it goes"), "{}", lifted.words());
    }

    #[test]
    fn a_guest_that_stands_still_gets_no_budget() {
        let cold = Terms {
            manner: Manner::Cold,
            ..TERMS
        };
        let changed = cold.changed(NewTerms {
            max_downtime: Some(Duration::from_millis(1)),
            ..NewTerms::default()
        });
        assert_eq!(changed.manner, Manner::Cold);
    }
}
