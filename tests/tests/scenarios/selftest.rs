//! `ferry selftest`: what a CI runner is told, on a host that has all and on one that has no KVM, and that nothing is left of it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_tests::host::Call;
use ferry_tests::{Pair, binary, process, until, waiting::CALL};
use libtest_mimic::Trial;
use roxmltree::{Document, Node};

use crate::scenario::on_kvm;

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_selftest_passes_and_writes_a_junit_file,
        a_selftest_without_kvm_fails_says_so_and_tries_nothing_else,
        an_interrupted_selftest_leaves_nothing,
    ]
}

/// A selftest takes less than a minute where nothing else runs; here others may.
const PATIENCE: Duration = Duration::from_secs(600);

/// Runs `selftest`, with its labs in a folder of the scenario's.
fn begin(pair: &Pair, mut command: Command, junit: &Path) -> Result<Call> {
    let labs = pair.folder().join("labs");
    fs::create_dir_all(&labs)?;
    command
        .args(["selftest", "-o", "json", "--junit"])
        .arg(junit)
        .env("TMPDIR", &labs)
        .env("NO_COLOR", "1");
    Call::start(command, "ferry selftest".to_owned())
}

fn a_selftest_passes_and_writes_a_junit_file(pair: &mut Pair) -> Result<()> {
    let junit = pair.folder().join("selftest.xml");

    let told = begin(pair, Command::new(binary::ferry()?), &junit)?
        .wait_for(PATIENCE)?
        .exit(0)?;

    let checks = told.json_lines()?;
    ensure!(checks.iter().all(|check| check["verdict"] == "ok"), "{told}");
    let xml = fs::read_to_string(&junit)?;
    let document = Document::parse(&xml).context("the file is no XML")?;
    let cases: Vec<Node<'_, '_>> = elements(&document, "testcase");
    ensure!(
        cases.len() == checks.len(),
        "{} of {} checks: {xml}",
        cases.len(),
        checks.len()
    );
    let suites: Vec<_> = elements(&document, "testsuite")
        .iter()
        .filter_map(|suite| suite.attribute("name"))
        .collect();
    ensure!(suites == ["doctor", "demo", "kills"], "{suites:?}");
    ensure!(document.root_element().attribute("failures") == Some("0"), "{xml}");
    ensure!(
        elements(&document, "failure").is_empty() && elements(&document, "skipped").is_empty(),
        "{xml}"
    );
    let kills = cases
        .iter()
        .filter(|case| case.attribute("classname") == Some("ferry.kills"));
    ensure!(kills.count() >= 4, "{xml}");
    is_gone(pair)
}

/// `/dev/kvm` is another file to this process, and to nobody else.
fn a_selftest_without_kvm_fails_says_so_and_tries_nothing_else(pair: &mut Pair) -> Result<()> {
    const HIDE: &str = r#"mount --bind /dev/null /dev/kvm && exec "$@""#;
    let junit = pair.folder().join("selftest.xml");
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "sh", "-c", HIDE, "sh"])
        .arg(binary::ferry()?);

    let told = begin(pair, command, &junit)?.wait_for(PATIENCE)?.exit(1)?;

    let xml = fs::read_to_string(&junit)?;
    let document = Document::parse(&xml).context("the file is no XML")?;
    let failures = elements(&document, "failure");
    let named = failures
        .iter()
        .filter_map(|failure| failure.parent_element()?.attribute("name"));
    ensure!(named.collect::<Vec<_>>().contains(&"/dev/kvm"), "{xml}");
    ensure!(
        !failures[0].attribute("message").unwrap_or_default().is_empty(),
        "{xml}"
    );
    let skipped = elements(&document, "skipped");
    ensure!(skipped.len() > 4, "{xml}");
    let count = skipped.len().to_string();
    ensure!(
        document.root_element().attribute("skipped") == Some(count.as_str()),
        "{xml}"
    );
    let checks = told.json_lines()?;
    ensure!(
        checks
            .iter()
            .all(|check| check["suite"] == "doctor" || check["verdict"] == "skipped"),
        "{told}"
    );
    is_gone(pair)
}

fn an_interrupted_selftest_leaves_nothing(pair: &mut Pair) -> Result<()> {
    let junit = pair.folder().join("selftest.xml");
    let call = begin(pair, Command::new(binary::ferry()?), &junit)?;
    let labs = pair.folder().join("labs");
    until("a guest runs in the lab", PATIENCE, || {
        let named = process::naming(&labs);
        let is_vmm = |&id: &u32| process::command_line(id).is_some_and(|line| line.contains(" vmm "));
        Ok(named.iter().any(is_vmm).then_some(()))
    })?;

    call.interrupt()?;

    call.wait_for(PATIENCE)?.exit(130)?;
    let xml = fs::read_to_string(&junit)?;
    ensure!(
        !elements(&Document::parse(&xml)?, "testcase").is_empty(),
        "what was known is not told: {xml}"
    );
    is_gone(pair)
}

fn elements<'a, 'input>(document: &'a Document<'input>, name: &str) -> Vec<Node<'a, 'input>> {
    let all = document.descendants();
    all.filter(|node| node.has_tag_name(name)).collect()
}

/// No process and no file of its labs is left.
fn is_gone(pair: &Pair) -> Result<()> {
    let labs = pair.folder().join("labs");
    until("nothing of the labs is left", CALL, || {
        Ok((process::naming(&labs).is_empty() && fs::read_dir(&labs)?.count() == 0).then_some(()))
    })
}
