//! How many connections a migration has for pages.

use std::time::Duration;

use ferry_migration::postcopy::URGENT_STREAMS;
use ferry_proto::agent::v1::MigrationOptions;

/// How many page streams a migration has: as asked, else what this host's CPUs send at once, and what the way to the destination needs to be full, if
/// its round trip is known.
pub(crate) fn page_streams(options: &MigrationOptions, round_trip: Option<Duration>) -> u16 {
    match u16::try_from(options.streams).unwrap_or(0) {
        0 => by_cpus(cpus()).max(round_trip.map_or(1, by_way)),
        asked => asked,
    }
}

/// How many a migration has for which so many were found to fit; 0: it was prepared by an agent that kept no number, and went by its CPUs.
pub(crate) fn kept_streams(found: u32, options: &MigrationOptions) -> u16 {
    match u16::try_from(found) {
        Ok(found) if found > 0 => found,
        _ => page_streams(options, None),
    }
}

/// How many of so many streams' threads this host runs at once.
pub(crate) fn at_once(streams: u16) -> u16 {
    streams.min(u16::try_from(cpus()).unwrap_or(u16::MAX))
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// One for each CPU, up to four. Measured on two CPUs of which the guest keeps one busy, eight moves each: with two streams a move takes 521 ms and the
/// guest's largest gap is 4.6 ms, with one 548 and 3.4, with three 580 and 5.2.
fn by_cpus(cpus: usize) -> u16 {
    cpus.clamp(1, 4) as u16
}

/// What is to be under way on a long way: 10 Gbit/s for one round trip. Nobody knows what it carries before it was tried; streams more than it needs
/// cost a connection each.
const BYTES_PER_SECOND: f64 = 1.25e9;

/// What one connection has under way at most with Linux's usual limits (`net.ipv4.tcp_wmem`: 4 MiB, of which a part is the kernel's bookkeeping), as
/// measured (`docs/performance.md`, "How many streams").
const BYTES_UNDER_WAY: f64 = 2.5e6;

/// More were not faster.
const MOST_BY_WAY: f64 = 16.0;

fn by_way(round_trip: Duration) -> u16 {
    let needed = round_trip.as_secs_f64() * BYTES_PER_SECOND / BYTES_UNDER_WAY;
    needed.ceil().clamp(1.0, MOST_BY_WAY) as u16
}

/// How many page streams there are for late pages beside so many for those that come before: those on which somebody waits, and as many.
pub(crate) fn late_streams(streams: u16) -> u16 {
    streams + URGENT_STREAMS as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_way_needs_one_stream_and_a_long_one_as_many_as_fill_it() {
        let table = [
            (0, 1),
            (300, 1),
            (5_000, 3),
            (20_000, 10),
            (100_000, 16),
            (u64::MAX, 16),
        ];
        for (micros, streams) in table {
            assert_eq!(by_way(Duration::from_micros(micros)), streams, "{micros} us");
        }
    }

    #[test]
    fn what_is_asked_for_counts_however_long_the_way_is() {
        let asked = |streams, round_trip| {
            let options = MigrationOptions {
                streams,
                ..MigrationOptions::default()
            };
            page_streams(&options, round_trip)
        };
        let long = Some(Duration::from_millis(20));
        assert_eq!(asked(2, long), 2);
        assert_eq!(asked(0, long), 10);
        assert_eq!(asked(0, Some(Duration::ZERO)), asked(0, None));
        assert_eq!(kept_streams(10, &MigrationOptions::default()), 10);
        assert_eq!(kept_streams(0, &MigrationOptions::default()), asked(0, None));
        assert_eq!((by_cpus(0), by_cpus(3), by_cpus(64)), (1, 3, 4));
    }
}
