//! What is known of the way to another host: what the last migration there had of it. What nobody has measured is assumed, and said to be.

use std::sync::Arc;
use std::time::Duration;

use ferry_migration::policy::prediction::{Wanted, Way};
use ferry_migration::source::Overhead;
use ferry_proto::agent::v1::{MigrationInfo, MigrationOptions, Round};

use crate::agent::context::RequestContext;
use crate::agent::failure::Failure;
use crate::agent::instances::Agent;
use crate::agent::journal::{MigrationRow, Report};
use crate::agent::outgoing::page_streams;
use crate::agent::transport::Transport;

/// How many of the last migrations between two hosts are looked at.
const LOOKED_AT: u32 = 20;

const UNTOLD: &str = "for no migration there has told";

/// Bytes a second that are assumed of a link of which nothing is known, as the policy does of one on which nothing was sent yet.
const ASSUMED: f64 = 200e6;

/// What a round takes beside its pages: a question and its answer, and two looks at what is dirty.
const ROUND: Duration = Duration::from_micros(300);

/// Pages a second that are looked at and found to be zero: memory is read at some 8 GB/s.
const ZERO_PAGES: f64 = 2e6;

/// What a migration takes beside its rounds, and the blackout without its last pages, where none has told yet: as measured on small hosts
/// (`docs/performance.md`).
const PREPARATION: Duration = Duration::from_millis(60);
const STOP_AND_START: Duration = Duration::from_millis(3);

/// How often something goes to the destination and back meanwhile: the questions of both agents, and connections, which are made all at once and proven.
const PREPARATION_TRIPS: u32 = 10;

/// A smaller round tells of the latency more than of the link.
const TELLING_BYTES: u64 = 4 << 20;

/// Of how many migrations a time is the middle.
const LAST_FEW: usize = 5;

/// A smaller round tells of the latency alone.
const SMALL_BYTES: u64 = 64 << 10;

/// Under a cap, a round that was slower than this share of it was held up by the link.
const BELOW_CAP: f64 = 0.8;

/// The way to a host, and how it is known.
pub(super) struct KnownWay {
    pub(super) way: Way,
    pub(super) known_from: String,
    /// Page streams that the migration would have.
    pub(super) streams: u16,
}

impl KnownWay {
    /// Bytes a second that the migration would have of it.
    pub(super) fn carries(&self, wanted: &Wanted) -> f64 {
        let cap = wanted.terms.bandwidth.map_or(f64::INFINITY, |cap| cap.get() as f64);
        self.way.bytes_per_second.min(cap)
    }

    /// What these migrations tell, and of the link what a probe did, if none of them does; what they do not tell goes by how long a word there and back
    /// takes. What pages cost depends on how they travel: one by another transport tells nothing of that.
    fn learned(
        infos: &[MigrationInfo],
        (options, transport): (&MigrationOptions, Transport),
        (probed, round_trip): (Option<f64>, Duration),
    ) -> Self {
        let lately = || infos.iter().filter(|info| is_by(transport, info));
        let telling = || lately().filter_map(|info| Some((info, rate(info, round_trip)?)));
        // What `--verify` reads takes time of what a small host sends: of the last few one tells best that had it, or not, as this one.
        let is_alike = |info: &MigrationInfo| info.verified.is_some() == options.verify;
        let alike = telling().take(LAST_FEW).find(|(info, _)| is_alike(info));
        let measured = alike.or_else(|| telling().next());
        let cap = Some(options.bandwidth_bytes_per_s as f64).filter(|&cap| cap > 0.0);
        let (bytes_per_second, mut known_from) = match (measured, cap, probed) {
            (Some((info, rate)), _, _) => {
                let (id, from, to) = (&info.id, &info.source, &info.destination);
                (rate, format!("measured by migration {id} from {from} to {to}"))
            }
            (None, Some(cap), _) => (cap, format!("assumed to carry what --bandwidth allows, {UNTOLD}")),
            (None, None, Some(rate)) => {
                let by = match transport {
                    Transport::Tcp => "to its data port",
                    Transport::Grpc => "through both agents, as its pages would go",
                };
                (rate, format!("measured by sending for a moment {by}, {UNTOLD}"))
            }
            (None, None, None) => (ASSUMED, format!("assumed, {UNTOLD}, and it could not be tried")),
        };
        if measured.is_some() && cap.is_some_and(|cap| cap < bytes_per_second) {
            known_from = "what --bandwidth allows".to_owned();
        }
        Self {
            way: Way {
                bytes_per_second,
                round: lately().filter_map(round).min().unwrap_or(ROUND + round_trip),
                zero_pages_per_second: ZERO_PAGES,
                preparation: typical(lately().filter_map(preparation))
                    .or_else(|| typical(infos.iter().filter_map(preparation)))
                    .unwrap_or(PREPARATION + round_trip * PREPARATION_TRIPS),
                stop_and_start: typical(lately().filter_map(stop_and_start))
                    .or_else(|| typical(infos.iter().filter_map(stop_and_start)))
                    .unwrap_or(STOP_AND_START),
                overhead: overhead(lately()).unwrap_or_default(),
                packed: None,
                deltas: None,
            },
            known_from,
            streams: page_streams(options, Some(round_trip)),
        }
    }
}

impl Agent {
    /// What is known of the way to this host.
    ///
    /// # Errors
    /// The journal does not tell.
    pub(super) async fn way(
        self: &Arc<Self>,
        context: &RequestContext,
        destination: &str,
        options: &MigrationOptions,
    ) -> Result<KnownWay, Failure> {
        let transport = Transport::parse(&options.transport)?;
        let completed = self.completed(destination).await?;
        let round_trip = match self.peers.named(destination) {
            Ok(peer) => peer.round_trip().await.unwrap_or_default(),
            Err(_) => Duration::ZERO,
        };
        let streams = page_streams(options, Some(round_trip));
        let is_told = completed
            .iter()
            .any(|info| is_by(transport, info) && rate(info, round_trip).is_some());
        // Nothing is sent faster than its user allows, and so nothing is found out.
        let probed = match is_told || options.bandwidth_bytes_per_s > 0 || destination.is_empty() {
            true => None,
            false => self
                .probe(context, (destination, transport), (streams, round_trip))
                .await
                .inspect_err(|failure| tracing::info!(destination, error = failure.chain(), "the link is not known"))
                .ok(),
        };
        Ok(KnownWay::learned(
            &completed,
            (options, transport),
            (probed, round_trip),
        ))
    }

    /// What a switchover to this host took beside its last pages, at least, of the last few by this transport: no budget is too small that one of them
    /// would have met. `None`: nobody knows.
    pub(in crate::agent) async fn usual_overhead(&self, destination: &str, transport: Transport) -> Option<Overhead> {
        let completed = self.completed(destination).await;
        let completed = completed
            .inspect_err(|failure| tracing::info!(destination, error = failure.chain(), "no earlier move is known"))
            .ok()?;
        overhead(completed.iter().filter(|info| is_by(transport, info)))
    }

    /// The last migrations to this host that arrived, the newest first.
    async fn completed(&self, destination: &str) -> Result<Vec<MigrationInfo>, Failure> {
        let peer = destination.to_owned();
        let reports = self
            .journal
            .read(move |connection| MigrationRow::last_with(connection, &peer, LOOKED_AT))
            .await?;
        // One that cannot be read tells nothing.
        let infos = reports.iter().map(Report::read).filter_map(Result::ok);
        // Of one that came from there this host knows no rounds.
        let there = |info: &MigrationInfo| info.status == "completed" && info.source == self.host();
        Ok(infos.filter(there).collect())
    }
}

/// Whether a migration's pages went by this transport.
fn is_by(transport: Transport, info: &MigrationInfo) -> bool {
    Transport::parse(&info.transport) == Ok(transport)
}

/// Rounds while the guest ran, of a migration that ended with a blackout: the last one was that of the blackout.
fn running_rounds(info: &MigrationInfo) -> &[Round] {
    match info.rounds.split_last() {
        Some((_, running)) if !running.is_empty() => running,
        _ => &info.rounds,
    }
}

/// Bytes a second by its largest round, without the time for pages that were not sent and for the word that ends a round, which takes the round trip where
/// no small round tells. `None`: it tells nothing of the link.
fn rate(info: &MigrationInfo, round_trip: Duration) -> Option<f64> {
    // Of pages that were compressed it is not known what the link would have carried of plain ones.
    if info.compression.as_ref().is_some_and(|told| told.compressed_frames > 0) {
        return None;
    }
    let largest = running_rounds(info).iter().max_by_key(|round| round.bytes)?;
    let zero_pages = largest.pages.saturating_sub(largest.bytes / 4096);
    let beside = round(info).unwrap_or(ROUND + round_trip);
    let seconds = largest.ms / 1e3 - zero_pages as f64 / ZERO_PAGES - beside.as_secs_f64();
    if largest.bytes < TELLING_BYTES || seconds <= largest.ms / 1e4 {
        return None;
    }
    let rate = largest.bytes as f64 / seconds;
    let was_capped = info
        .bandwidth_bytes_per_s
        .is_some_and(|cap| rate > cap as f64 * BELOW_CAP);
    (rate.is_finite() && !was_capped).then_some(rate)
}

/// The middle of the last few: a single one may have been disturbed.
fn typical(lately: impl Iterator<Item = Duration>) -> Option<Duration> {
    let mut last: Vec<_> = lately.take(LAST_FEW).collect();
    last.sort();
    last.get(last.len() / 2).copied()
}

/// What a round of next to nothing took, by the quickest: one of nothing at all may have had no end to be told.
fn round(info: &MigrationInfo) -> Option<Duration> {
    let small = running_rounds(info)
        .iter()
        .filter(|round| round.pages > 0 && round.bytes < SMALL_BYTES);
    let quickest = small.map(|round| round.ms).min_by(f64::total_cmp)?;
    Duration::try_from_secs_f64(quickest / 1e3).ok()
}

/// What it took beside its rounds and its blackout.
fn preparation(info: &MigrationInfo) -> Option<Duration> {
    if info.mode != "precopy" || info.memory_digest.is_some() {
        return None;
    }
    let rounds: f64 = running_rounds(info).iter().map(|round| round.ms).sum();
    let beside = info.total_ms? - rounds - info.downtime_ms?.total;
    Duration::try_from_secs_f64(beside / 1e3).ok()
}

/// Its blackout without the last pages.
fn stop_and_start(info: &MigrationInfo) -> Option<Duration> {
    let (stop, start) = parts(info)?;
    Some(stop + start)
}

/// What its blackout had beside the last pages: the stop, and the state, the claim and the start. One whose guest stood still before had no stop.
fn parts(info: &MigrationInfo) -> Option<(Duration, Duration)> {
    let parts = info
        .downtime_ms
        .filter(|_| info.guest_was == "running" && info.mode != "cold")?;
    let time = |ms: f64| Duration::try_from_secs_f64(ms / 1e3).ok();
    Some((
        time(parts.pause + parts.drain)?,
        time(parts.state + parts.claim + parts.start)?,
    ))
}

/// The least that the last few had, of each part. `None`: nobody knows.
fn overhead<'a>(lately: impl Iterator<Item = &'a MigrationInfo>) -> Option<Overhead> {
    let last: Vec<_> = lately
        .filter(|info| had_all(info))
        .filter_map(parts)
        .take(LAST_FEW)
        .collect();
    Some(Overhead {
        stop: last.iter().map(|&(stop, _)| stop).min()?,
        start: last.iter().map(|&(_, start)| start).min()?,
    })
}

/// Whether the destination had the last pages when it got the state: of others the link's queue is in what loading took.
fn had_all(info: &MigrationInfo) -> bool {
    info.verified.is_some() || info.rounds.last().is_some_and(|last| last.bytes < SMALL_BYTES)
}

#[cfg(test)]
mod tests {
    use ferry_proto::agent::v1::{DowntimeMs, Verified};

    use super::*;

    fn moved(source: &str, megabytes: u64, ms: f64) -> MigrationInfo {
        let round = |bytes: u64, ms| Round {
            pages: bytes / 4096,
            bytes,
            ms,
            dirty_pages: 0,
        };
        MigrationInfo {
            id: format!("from-{source}"),
            source: source.to_owned(),
            destination: "b".to_owned(),
            mode: "precopy".to_owned(),
            guest_was: "running".to_owned(),
            total_ms: Some(ms + 50.0),
            downtime_ms: Some(DowntimeMs {
                total: 4.0,
                pause: 0.5,
                last_pages: 1.0,
                state: 1.0,
                claim: 0.25,
                start: 0.25,
                ..DowntimeMs::default()
            }),
            rounds: vec![round(megabytes * 1_000_000, ms), round(8192, 1.0)],
            ..MigrationInfo::default()
        }
    }

    fn learned(infos: &[MigrationInfo], bandwidth_bytes_per_s: u64, probed: Option<f64>) -> KnownWay {
        let options = MigrationOptions {
            bandwidth_bytes_per_s,
            ..MigrationOptions::default()
        };
        KnownWay::learned(infos, (&options, Transport::Tcp), (probed, Duration::ZERO))
    }

    #[test]
    fn the_last_migration_tells_of_the_way() {
        let infos = [moved("a", 100, 100.3), moved("older", 100, 50.3)];
        let known = learned(&infos, 0, None);
        assert!((known.way.bytes_per_second / 1e9 - 1.0).abs() < 0.01, "{:?}", known.way);
        assert_eq!(known.way.preparation, Duration::from_millis(46));
        assert_eq!(known.way.stop_and_start, Duration::from_millis(2));
        assert!(known.known_from.contains("from-a"), "{}", known.known_from);
    }

    #[test]
    fn one_with_the_same_verify_tells_first() {
        let verified = MigrationInfo {
            verified: Some(Verified::default()),
            ..moved("verified", 100, 200.3)
        };
        let infos = [moved("a", 100, 100.3), verified, moved("older", 100, 50.3)];
        let known_from = |infos: &[MigrationInfo], verify| {
            let options = MigrationOptions {
                verify,
                ..MigrationOptions::default()
            };
            KnownWay::learned(infos, (&options, Transport::Tcp), (None, Duration::ZERO)).known_from
        };
        assert!(known_from(&infos, true).contains("from-verified"));
        assert!(known_from(&infos, false).contains("from-a"));
        assert!(known_from(&infos[2..], true).contains("from-older"));
        assert!(known_from(&infos[1..2], false).contains("from-verified"));
    }

    #[test]
    fn one_migration_that_was_disturbed_does_not_tell_how_long_the_next_takes() {
        let slow = MigrationInfo {
            total_ms: Some(5000.0),
            ..moved("a", 100, 100.3)
        };
        let usual = || moved("a", 100, 100.3);
        let known = learned(&[slow, usual(), usual()], 0, None);
        assert_eq!(known.way.preparation, Duration::from_millis(46));
        assert_eq!(typical(std::iter::empty()), None);
    }

    #[test]
    fn the_policy_is_told_the_least_that_the_last_few_switchovers_took() {
        let took = |pause, start| {
            let downtime = DowntimeMs {
                pause,
                start,
                ..moved("a", 100, 100.3).downtime_ms.unwrap()
            };
            MigrationInfo {
                downtime_ms: Some(downtime),
                ..moved("a", 100, 100.3)
            }
        };
        let cold = MigrationInfo {
            mode: "cold".to_owned(),
            ..took(0.0, 0.0)
        };
        let mut queued = took(0.1, 0.1);
        queued.rounds.push(queued.rounds[0]);
        let usual = || took(9.0, 6.0);
        // The last one was long ago.
        let infos = [
            cold,
            queued,
            took(3.0, 5.0),
            took(2.0, 7.0),
            usual(),
            usual(),
            usual(),
            took(0.5, 0.5),
        ];
        let known = learned(&infos, 0, None).way.overhead;
        assert_eq!(
            (known.stop, known.start),
            (Duration::from_millis(2), Duration::from_micros(6250))
        );
        assert_eq!(learned(&infos[..2], 0, None).way.overhead, Overhead::default());
    }

    #[test]
    fn one_by_another_transport_tells_of_the_preparation_and_not_of_the_link() {
        let over_grpc = MigrationInfo {
            transport: "grpc".to_owned(),
            ..moved("a", 100, 200.3)
        };
        let by_tcp = [over_grpc, moved("older", 100, 100.3)];
        let known = learned(&by_tcp, 0, Some(3e9));
        assert!(known.known_from.contains("from-older"), "{}", known.known_from);
        let known = KnownWay::learned(
            &by_tcp,
            (&MigrationOptions::default(), Transport::Grpc),
            (None, Duration::ZERO),
        );
        assert!((known.way.bytes_per_second / 5e8 - 1.0).abs() < 0.01, "{:?}", known.way);
        let known = KnownWay::learned(
            &by_tcp[1..],
            (&MigrationOptions::default(), Transport::Grpc),
            (Some(1e9), Duration::ZERO),
        );
        assert_eq!(
            (known.way.bytes_per_second, known.way.preparation),
            (1e9, Duration::from_millis(46))
        );
        assert!(known.known_from.contains("through both agents"), "{}", known.known_from);
    }

    #[test]
    fn one_that_went_as_fast_as_it_was_allowed_tells_nothing_of_the_link() {
        let capped = |cap| MigrationInfo {
            bandwidth_bytes_per_s: Some(cap),
            ..moved("a", 100, 100.3)
        };
        assert_eq!(rate(&capped(1_000_000_000), Duration::ZERO), None);
        assert!(rate(&capped(10_000_000_000), Duration::ZERO).is_some());
    }

    #[test]
    fn pages_that_were_not_sent_are_not_counted_as_sent() {
        let mut info = moved("a", 100, 100.3);
        info.rounds[0].pages += 200_000;
        info.rounds[0].ms += 100.0;
        assert!((rate(&info, Duration::ZERO).unwrap() / 1e9 - 1.0).abs() < 0.01);
        info.rounds[0].pages = 20_000_000;
        assert_eq!(rate(&info, Duration::ZERO), None);
    }

    #[test]
    fn what_no_migration_has_told_goes_by_the_round_trip() {
        let options = MigrationOptions::default();
        let over = |infos: &[MigrationInfo], ms| {
            let trip = Duration::from_millis(ms);
            KnownWay::learned(infos, (&options, Transport::Tcp), (None, trip))
        };
        let (near, far) = (over(&[], 0), over(&[], 20));
        assert_eq!(far.way.round - near.way.round, Duration::from_millis(20));
        assert_eq!(far.way.preparation - near.way.preparation, Duration::from_millis(200));
        assert!(far.streams > near.streams);
        // One that tells has had the round trip in all of it, and its rate has none.
        let mut told = moved("a", 100, 120.0);
        told.rounds.insert(
            1,
            Round {
                ms: 20.0,
                ..told.rounds[1]
            },
        );
        let told = [told];
        assert_eq!(over(&told, 20).way, over(&told, 0).way);
        let way = over(&told, 20).way;
        assert_eq!(
            (way.round, way.bytes_per_second.round()),
            (Duration::from_millis(20), 1e9)
        );
        // One without small rounds does not tell how long the way is.
        let alone = [moved("a", 100, 120.3)];
        assert!((over(&alone, 20).way.bytes_per_second / 1e9 - 1.0).abs() < 0.001);
    }

    #[test]
    fn what_nobody_has_measured_is_said_to_be_assumed() {
        let tiny = [moved("a", 1, 3.0)];
        let known = learned(&tiny, 0, None);
        assert_eq!(known.way.bytes_per_second, ASSUMED);
        assert!(known.known_from.contains("assumed"));
        let capped = learned(&[], 1_000_000, None);
        assert_eq!(capped.way.bytes_per_second, 1e6);
        assert!(capped.known_from.contains("--bandwidth"));
        let probed = learned(&tiny, 0, Some(3e9));
        assert_eq!(probed.way.bytes_per_second, 3e9);
    }
}
