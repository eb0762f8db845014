//! What would let a migration end that is not expected to.

use std::time::Duration;

use super::{End, Prediction, Sampled, Wanted, Way, predict};
use crate::postcopy::Lateness;
use crate::source::{Manner, Terms};

/// How much more than what was found out is asked for, so that a guest that varies a little is moved all the same.
const MARGIN: f64 = 1.1;

/// Bytes a second beyond which no link is asked for.
const FASTEST_LINK: f64 = 1e12;

/// What would have to be different for a migration that is not expected to end.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Remedies {
    /// The shortest blackout that would have to be allowed.
    pub max_downtime: Option<Duration>,
    /// The lowest bandwidth that would do, in bytes a second.
    pub bytes_per_second: Option<f64>,
    /// With vCPUs that are kept from running: for how much of the time, and what it comes to.
    pub auto_converge: Option<Prediction>,
    /// With pages that come late.
    pub hybrid: Option<Prediction>,
}

/// Looks for what would have a migration end that [`predict`] says never will.
#[must_use]
pub fn remedies(guest: &Sampled, way: &Way, wanted: &Wanted) -> Remedies {
    let ends = |prediction: &Prediction| prediction.end != End::Never;
    let tried = |wanted: Wanted| Some(predict(guest, way, &wanted)).filter(ends);
    let Manner::Live { .. } = wanted.terms.manner else {
        return Remedies::default();
    };
    let with_downtime = |max_downtime: Duration| {
        let terms = Terms {
            manner: Manner::Live { max_downtime },
            ..wanted.terms
        };
        ends(&predict(guest, way, &Wanted { terms, ..*wanted }))
    };
    let with_rate = |bytes_per_second: f64| {
        let (way, terms) = (
            Way {
                bytes_per_second,
                ..*way
            },
            Terms {
                bandwidth: None,
                ..wanted.terms
            },
        );
        ends(&predict(guest, &way, &Wanted { terms, ..*wanted }))
    };
    let seconds = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 8);
    let longest = LONGEST_DOWNTIME.as_secs_f64();
    let downtime = least(1e-3, longest, |downtime| with_downtime(seconds(downtime)));
    Remedies {
        max_downtime: downtime.map(|found| seconds(found * MARGIN)),
        bytes_per_second: least(way.capped(&wanted.terms).max(1.0), FASTEST_LINK, with_rate).map(|rate| rate * MARGIN),
        auto_converge: tried(Wanted {
            most_throttle: MOST_THROTTLE,
            ..*wanted
        })
        .filter(|_| wanted.most_throttle < MOST_THROTTLE),
        hybrid: tried(Wanted {
            lateness: Lateness::WhenItPays,
            ..*wanted
        })
        .filter(|_| wanted.lateness == Lateness::Never),
    }
}

/// The longest blackout that a user may allow.
const LONGEST_DOWNTIME: Duration = Duration::from_secs(60);

/// The most that vCPUs are throttled unless their user says otherwise.
const MOST_THROTTLE: u32 = 99;

/// About the least value between these for which it does: what does goes on doing so above it.
fn least(from: f64, to: f64, does: impl Fn(f64) -> bool) -> Option<f64> {
    if !does(to) {
        return None;
    }
    let (mut without, mut with) = (from.min(to), to);
    while with > without * PRECISION {
        let middle = (without * with).sqrt();
        if does(middle) {
            with = middle;
        } else {
            without = middle;
        }
    }
    Some(with)
}

/// How near a least value is looked for.
const PRECISION: f64 = 1.03;
