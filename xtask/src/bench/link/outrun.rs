//! A guest that writes faster than the link carries: who ends all the same, with what blackout, and when the guest is back at its work.

use std::time::Duration;

use anyhow::Result;
use ferry_tests::ShapedLink;
use serde_json::{Value, json};

use super::rate;
use crate::bench::recovery::{BACK, WINDOW_MS};
use crate::bench::table::{self, Contender};
use crate::bench::workload::Workload;
use crate::bench::{Late, Options, Peer, Sample, Work, clock, ferry, in_turn, qemu};

/// Random pages as many as make so many times the link's rate.
const TIMES: f64 = 1.5;

/// Ferry by its defaults, without what is told of pages by what they changed, and by what its user would give it for such a guest.
const WAYS: [(&str, &[&str]); 4] = [
    ("ferry", &[]),
    ("ferry off", &["--compress", "off"]),
    ("ferry auto-converge", &["--auto-converge"]),
    ("ferry hybrid", &["--mode", "hybrid"]),
];

/// Those that are its peer's defaults, and what it has for such a guest.
const MODES: [qemu::Mode; 3] = [qemu::Mode::Plain, qemu::Mode::Multifd2, qemu::Mode::Xbzrle];

/// Ten times what all of this guest takes over 1 Gbit/s. Who is not done by then is taken not to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// The guest for a link of this rate.
///
/// # Errors
/// If it does not say what it is.
pub(super) fn workload(rate: &str) -> Result<Workload> {
    let pages_per_s = TIMES * rate::nominal(rate)? / PAGE;
    Ok(Workload::outrun(pages_per_s as u64))
}

/// Moves it, each contender in turn, prints the table, and gives what is to be written down; whether a run failed.
///
/// # Errors
/// If the link cannot be measured.
pub(super) fn measure(
    link: &ShapedLink,
    rate: &str,
    workload: &Workload,
    options: &Options,
    ferry: &ferry::Binary,
) -> Result<(Value, bool)> {
    let modes: &[qemu::Mode] = match options.peer {
        Some(Peer::Qemu) => &MODES,
        Some(Peer::CloudHypervisor) | None => &[],
    };
    let own = WAYS.iter().map(|(name, _)| *name);
    let names = own.chain(modes.iter().map(|mode| mode.name()));
    let mut contenders: Vec<_> = names.map(Contender::new).collect();
    let carried = rate::measured(link)?;
    let tsc_khz = clock::tsc_khz()?;
    for round in 1..=options.runs {
        eprintln!("{}: run {round} of {}", workload.name, options.runs);
        for turn in in_turn(contenders.len(), round) {
            let outcome = match turn.checked_sub(WAYS.len()) {
                None => ferry.run_within(PATIENCE, link, workload, tsc_khz, WAYS[turn].1),
                Some(mode) => qemu::run_within(PATIENCE, link, modes[mode], workload, tsc_khz),
            };
            contenders[turn].add_within(outcome);
        }
    }
    println!(
        "\nover {rate}, of which {:.1} MiB/s are left for one connection:",
        carried / MIB
    );
    table::print_head(workload);
    table::print_rows(contenders.iter());
    println!("who has not ended after {} s is taken not to end", PATIENCE.as_secs());
    for contender in &contenders {
        print_work(contender, carried);
        print_late(contender, carried);
    }
    let record = json!({
        "workload": workload.name,
        "link": rate,
        "link_bytes_per_s": carried,
        "contenders": contenders.iter().map(Contender::to_json).collect::<Vec<_>>(),
    });
    Ok((record, contenders.iter().any(Contender::has_failed)))
}

/// Whether the guest did what it is there for, and what was left of that while it was moved: throttled, or kept from it by a busy host.
fn print_work(contender: &Contender, carried: f64) {
    let of = |part: fn(Work) -> f64| contender.median(|s| s.work.map(part));
    if let (Some(before), Some(during)) = (of(|work| work.before), of(|work| work.during)) {
        let times = |rate: f64| rate * PAGE / carried;
        println!(
            "{}: the guest wrote {before:.0} pages a second, {:.2} times what the link carries, and {:.2} times while it was moved",
            contender.name(),
            times(before),
            times(during)
        );
    }
}

/// How soon the guest was back, beside what its late pages take the link.
fn print_late(contender: &Contender, carried: f64) {
    let of = |part: fn(Late, f64) -> Option<f64>| contender.median(|s: &Sample| part(s.late?, carried));
    let Some(bytes) = of(|late, _| Some(late.bytes)) else {
        return;
    };
    let name = contender.name();
    let link_ms = bytes / carried * 1e3;
    println!(
        "{name}: {:.1} MiB came late, which take the link {link_ms:.0} ms; the last came after {:.0} ms",
        bytes / MIB,
        of(|late, _| Some(late.ms)).unwrap_or(f64::NAN)
    );
    match (
        of(|late, _| late.back_ms),
        of(|late, carried| Some(late.back_ms? / late.bytes * carried / 1e3)),
    ) {
        (Some(back), Some(ratio)) => println!(
            "{name}: {:.0} % of its throughput back after {back:.0} ms, at the end of {WINDOW_MS:.0} ms with that: {ratio:.2} of the link's time",
            BACK * 100.0
        ),
        _ => println!("{name}: {:.0} % of its throughput was not seen again", BACK * 100.0),
    }
}

const PAGE: f64 = 4096.0;
const MIB: f64 = 1_048_576.0;
