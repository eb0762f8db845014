//! Migrations over a link that is slower than memory: two network namespaces, and a veth pair between them that `tc` shapes, the same for all.

mod outrun;
mod rate;

use std::process::ExitCode;

use anyhow::{Result, bail};
use ferry_tests::ShapedLink;
use serde_json::json;

use super::devices::network::in_network_of_its_own;
use super::table::{self, Contender};
use super::workload::{self, Workload};
use super::{Options, Peer, clock, ferry, qemu, write_record};

/// Ferry's ways, as `migrate` has them.
const WAYS: [(&str, &str); 4] = [
    ("ferry auto", "auto"),
    ("ferry off", "off"),
    ("ferry lz4", "lz4"),
    ("ferry zstd", "zstd"),
];

/// Moves each workload over a link of this rate, each contender in turn, and prints the tables.
///
/// # Errors
/// If the link cannot be made, or nothing builds.
pub(super) fn run(options: &Options, rate: &str) -> Result<ExitCode> {
    let wanted = |name: &str| options.workload.as_deref().is_none_or(|text| name.contains(text));
    let workloads: Vec<_> = workload::OVER_A_LINK.iter().filter(|w| wanted(w.name)).collect();
    let outrun = wanted(workload::OUTRUN).then(|| outrun::workload(rate)).transpose()?;
    if workloads.is_empty() && outrun.is_none() {
        let names = workload::OVER_A_LINK.iter().map(|w| w.name);
        let names: Vec<_> = names.chain([workload::OUTRUN]).collect();
        bail!(
            "no workload over a link has that in its name; there are {}",
            names.join(", ")
        );
    }
    if options.peer == Some(Peer::Qemu) {
        qemu::check()?;
    }
    let ferry = ferry::build()?;
    let (mut record, mut failed) = (Vec::new(), false);
    for workload in workloads {
        let (own, peers) = in_network_of_its_own(|| {
            let link = ShapedLink::join(rate)?;
            measure(&link, workload, options, &ferry)
        })?;
        println!("\nover {rate}:");
        table::print_head(workload);
        table::print_rows(own.iter().chain(&peers));
        let (compressed, plain): (Vec<_>, Vec<_>) = peers.into_iter().partition(|peer| peer.name().contains("zstd"));
        for contender in &own {
            println!("{}, beside its peers without and with compression:", contender.name());
            table::compare_totals(contender, &plain);
            table::compare_totals(contender, &compressed);
        }
        let all = || own.iter().chain(&plain).chain(&compressed);
        failed |= all().any(Contender::has_failed);
        record.push(json!({
            "workload": workload.name,
            "link": rate,
            "contenders": all().map(Contender::to_json).collect::<Vec<_>>(),
        }));
    }
    if let Some(workload) = outrun {
        let (measured, has_failed) = in_network_of_its_own(|| {
            let link = ShapedLink::join(rate)?;
            outrun::measure(&link, rate, &workload, options, &ferry)
        })?;
        record.push(measured);
        failed |= has_failed;
    }
    write_record(options, record)?;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn measure(
    link: &ShapedLink,
    workload: &Workload,
    options: &Options,
    ferry: &ferry::Binary,
) -> Result<(Vec<Contender>, Vec<Contender>)> {
    let modes: &[qemu::Mode] = match options.peer {
        Some(Peer::Qemu) => &[qemu::Mode::Plain, qemu::Mode::Multifd2, qemu::Mode::Multifd2Zstd],
        Some(Peer::CloudHypervisor) | None => &[],
    };
    let mut own: Vec<_> = WAYS.iter().map(|(name, _)| Contender::new(name)).collect();
    let mut peers: Vec<_> = modes.iter().map(|mode| Contender::new(mode.name())).collect();
    let tsc_khz = clock::tsc_khz()?;
    for round in 1..=options.runs {
        eprintln!("{}: run {round} of {}", workload.name, options.runs);
        for (contender, (_, way)) in own.iter_mut().zip(WAYS) {
            contender.add(ferry.run_across(link, workload, tsc_khz, &["--compress", way]));
        }
        for (contender, mode) in peers.iter_mut().zip(modes) {
            contender.add(qemu::run_across(link, *mode, workload, tsc_khz));
        }
    }
    Ok((own, peers))
}
