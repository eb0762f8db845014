//! What a migration out of here would come to: the guest is sampled, the way to the destination is what earlier migrations had of it, and the
//! policy that the migration would have says the rest.
//!
//! | module | is |
//! | --- | --- |
//! | `sample` | what the guest writes, from its VMM |
//! | `way`, `probe` | what is known of the way, from the journal; else it is tried |
//! | `words` | what is said of it all |

mod probe;
mod sample;
mod way;
mod words;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use ferry_migration::policy::prediction::{self, Deltas, End, Prediction, Sampled, Wanted};
use ferry_migration::postcopy::Lateness;
use ferry_migration::source::{Manner, OnTimeout, Terms};
use ferry_migration::{Compression, foresee, foresee_deltas};
use ferry_proto::agent::v1::{MigrationOptions, MigrationPrediction, PredictMigrationRequest};
use ferry_proto::{InvalidField, required};

pub(crate) use self::probe::{Probe, Probes};
use self::sample::Sample;
use super::context::RequestContext;
use super::failure::Failure;
use super::instances::Agent;
use super::mode::Mode;
use super::mode::{PAUSE, POSTCOPY};
use super::outgoing::{at_once, check_options, compression};

/// The longest that a guest is sampled.
const LONGEST_SAMPLE_MS: u32 = 30_000;

/// Checks for how long a guest is to be sampled.
///
/// # Errors
/// Too long.
pub(crate) fn check_sample(sample_ms: u32) -> Result<(), InvalidField> {
    match sample_ms > LONGEST_SAMPLE_MS {
        true => Err(InvalidField {
            field: "sample_ms",
            problem: format!("{sample_ms} is over {LONGEST_SAMPLE_MS}"),
        }),
        false => Ok(()),
    }
}

impl Agent {
    /// What a migration of an instance of this host would come to. Nothing is begun; when this is not waited for any more, the sample ends.
    ///
    /// # Errors
    /// The instance is not here, or a field cannot be used. What cannot be found out is said in the answer.
    pub(crate) async fn predict_migration(
        self: &Arc<Self>,
        context: &RequestContext,
        request: PredictMigrationRequest,
    ) -> Result<MigrationPrediction, Failure> {
        let options = check_options(required("options", request.options)?)?;
        check_sample(request.sample_ms)?;
        let instance = self.instance(&request.instance).await?;
        let wanted = wanted(&options)?;
        // A guest that stands still, or is handed over before anything was sent, may write what it likes.
        let writes_matter = wanted.terms.manner != Manner::Cold && wanted.lateness != Lateness::AtOnce;
        let sample_ms = if writes_matter { request.sample_ms } else { 0 };
        let compression = compression(&options.compress).map_err(|unknown| InvalidField {
            field: "options.compress",
            problem: unknown.to_string(),
        })?;
        let is_left_alone = compression == Compression::Auto
            && options.bandwidth_bytes_per_s == 0
            && match self.peers.named(&request.destination) {
                Ok(peer) => peer.is_on_this_host().await,
                Err(_) => false,
            };
        let compression = if is_left_alone { Compression::Off } else { compression };
        let compress = compression.to_string();
        let sampled = self.sample(context, &instance, sample_ms, &compress);
        let sample = match sampled.await {
            Ok(sample) => sample,
            Err(failure) => return Ok(words::unknown(&failure)),
        };
        let mut way = self.way(context, &request.destination, &options).await?;
        let guest = sample.guest(request.disk_bytes);
        let (tried, link) = (sample.tried(), way.carries(&wanted));
        // Of more streams than that none compresses sooner.
        let threads = at_once(way.streams).into();
        way.way.packed = foresee(compression, &tried, link, threads);
        let rewritten = sample.rewritten();
        let deltas = rewritten
            .and_then(|rewritten| foresee_deltas(compression, &rewritten, link, (way.streams.into(), threads)));
        way.way.deltas = deltas.map(|told| Deltas {
            told,
            copies: sample.most_copies(),
        });
        let packed = words::compression(&tried, way.way.packed, is_left_alone).map(|words| match &way.way.deltas {
            Some(deltas) => format!("{words}; {}", words::deltas(deltas)),
            None => words,
        });
        // Thousands of rounds may have to be gone through.
        let told = tokio::task::spawn_blocking(move || {
            let prediction = prediction::predict(&guest, &way.way, &wanted);
            let remedies = match prediction.end {
                End::Never => words::remedies(&prediction::remedies(&guest, &way.way, &wanted), &wanted),
                End::Whole | End::Late | End::Paused => Vec::new(),
            };
            MigrationPrediction {
                remedies,
                bandwidth_bytes_per_s: Some(way.carries(&wanted)),
                bandwidth_from: way.known_from.clone(),
                compression: packed,
                ..told(&sample, &guest, &prediction, &wanted)
            }
        });
        told.await
            .map_err(|error| Failure::host("failed to predict the migration")(std::io::Error::other(error)))
    }
}

/// What is asked for, as the engine has it.
fn wanted(options: &MigrationOptions) -> Result<Wanted, Failure> {
    let mode = Mode::of(options)?;
    let max_downtime = Duration::from_micros(options.max_downtime_us);
    Ok(Wanted {
        terms: Terms {
            manner: match mode {
                Mode::Cold => Manner::Cold,
                Mode::Precopy | Mode::Postcopy | Mode::Hybrid | Mode::Overtime => Manner::Live { max_downtime },
            },
            timeout: Duration::from_millis(options.timeout_ms),
            bandwidth: NonZeroU64::new(options.bandwidth_bytes_per_s),
        },
        on_timeout: match [PAUSE, POSTCOPY].contains(&options.on_timeout.as_str()) {
            true => OnTimeout::Pause,
            false => OnTimeout::Abort,
        },
        lateness: match mode {
            Mode::Precopy | Mode::Cold => Lateness::Never,
            Mode::Postcopy => Lateness::AtOnce,
            Mode::Hybrid => Lateness::WhenItPays,
            Mode::Overtime => Lateness::WhenItMustEnd,
        },
        most_throttle: options.max_throttle_percent,
        verify: options.verify,
    })
}

fn told(sample: &Sample, guest: &Sampled, prediction: &Prediction, wanted: &Wanted) -> MigrationPrediction {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let is_late = prediction.end == End::Late;
    MigrationPrediction {
        end: words::end(prediction.end).to_owned(),
        total_ms: Some(ms(prediction.total)),
        blackout_ms: Some(ms(prediction.blackout)),
        rounds: Some(prediction.rounds),
        bytes: Some(prediction.bytes),
        late_bytes: is_late.then_some(prediction.late_bytes),
        late_ms: is_late.then(|| ms(prediction.late)),
        throttle_percent: prediction.throttle,
        words: words::expected(prediction, wanted),
        ..sample.told(guest)
    }
}
