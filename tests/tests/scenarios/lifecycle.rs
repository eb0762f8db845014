//! One guest on one host: run, list, show, console, pause, resume, reboot, stop, start, delete, and ends of its own.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use ferry_tests::{Guest, Pair, process, until, waiting::CALL};
use libtest_mimic::Trial;

use crate::alphabet::{ENTRY, file_of};
use crate::scenario::on_kvm;

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        a_guest_runs_and_is_listed_and_shown,
        two_vcpus_run,
        the_console_tells_what_the_guest_printed,
        the_vmm_has_a_log,
        a_paused_guest_is_silent_until_it_is_resumed,
        a_reboot_boots_the_guest_anew,
        a_stopped_instance_starts_again,
        a_guest_without_an_ear_for_its_button_is_stopped_only_by_force,
        a_running_instance_is_deleted_only_by_force,
        a_guest_that_powers_off_is_stopped,
        a_guest_that_panics_is_crashed,
        a_triple_fault_is_a_crash,
        a_guest_that_resets_itself_runs_on,
        a_killed_vmm_is_a_crash,
        a_kernel_that_cannot_be_emulated_says_which_instruction_stopped_it,
    ]
}

fn a_guest_runs_and_is_listed_and_shown(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;

    let listed = pair.a.ferry(&["list"])?.exit(0)?.json_lines()?;
    let shown = pair.a.show("g")?;

    ensure!(listed.len() == 1 && listed[0]["id"] == shown["id"], "{listed:?}");
    ensure!(
        shown["status"] == "running" && shown["task"].is_null() && shown["host"] == "a",
        "{shown}"
    );
    ensure!(shown["vmm_pid"] == pair.a.vmm()?, "{shown}");
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn two_vcpus_run(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").vcpus(2))?;

    ensure!(pair.a.show("g")?["vcpus"] == 2);
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn the_console_tells_what_the_guest_printed(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    witness.wait_for_beats_at("a", 3)?;

    let console = pair.a.ferry(&["console", "g"])?.exit(0)?;

    console.says("PROBE version=")?.says("READY ")?.says("HB seq=1 ")?;
    Ok(())
}

fn the_vmm_has_a_log(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;

    pair.a.ferry(&["logs", "g"])?.exit(0)?;
    Ok(())
}

fn a_paused_guest_is_silent_until_it_is_resumed(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;

    pair.a.ferry(&["pause", "g"])?.exit(0)?;
    pair.a.wait_for_status("g", "paused")?;
    ensure!(witness.is_silent(Duration::from_millis(300)), "a paused guest beats");
    pair.a.ferry(&["resume", "g"])?.exit(0)?;

    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_reboot_boots_the_guest_anew(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;

    pair.a.ferry(&["reboot", "g"])?.exit(0)?;

    witness.wait_ready_times(2)?;
    pair.a.wait_for_status("g", "running")?;
    pair.exists_only_at(&pair.a, "g")
}

fn a_stopped_instance_starts_again(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    let first_epoch = pair.a.show("g")?["epoch"].as_u64();

    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;
    pair.a.wait_for_status("g", "stopped")?;
    until("the VMM is gone", CALL, || Ok(pair.a.vmms().is_empty().then_some(())))?;
    pair.a.ferry(&["start", "g"])?.exit(0)?;

    witness.wait_ready_times(2)?;
    let shown = pair.a.wait_for_status("g", "running")?;
    ensure!(
        shown["epoch"].as_u64() > first_epoch,
        "a right to run is used once: {shown}"
    );
    pair.exists_only_at(&pair.a, "g")
}

fn a_guest_without_an_ear_for_its_button_is_stopped_only_by_force(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;

    pair.a
        .ferry(&["stop", "g"])?
        .exit(4)?
        .says("power button")?
        .says("--force")?;
    pair.runs_only_at(&pair.a, "g", &witness)?;
    pair.a.ferry(&["pause", "g"])?.exit(0)?;
    pair.a.ferry(&["stop", "g"])?.exit(4)?.says("paused")?.says("--force")?;
    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;

    pair.a.wait_for_status("g", "stopped")?;
    Ok(())
}

fn a_running_instance_is_deleted_only_by_force(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;
    let vmm = pair.a.vmm()?;

    pair.a.ferry(&["delete", "g"])?.exit(4)?.says("g")?;
    pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;

    pair.a.wait_until_gone("g")?;
    until("the VMM is gone", CALL, || Ok((!process::is_alive(vmm)).then_some(())))?;
    let left = std::fs::read_dir(pair.a.data_dir.join("instances"))?.count();
    ensure!(left == 0, "{left} folders are left");
    Ok(())
}

fn a_guest_that_powers_off_is_stopped(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g").work("poweroff_after_ms=300 heartbeat_ms=20"))?;

    pair.a.wait_for_status("g", "stopped")?;
    until("the VMM is gone", CALL, || Ok(pair.a.vmms().is_empty().then_some(())))
}

fn a_guest_that_panics_is_crashed(pair: &mut Pair) -> Result<()> {
    pair.expect_complaint("panic");
    pair.expect_complaint("crashed");
    pair.run(&Guest::new("g").work("panic_after_ms=300 heartbeat_ms=20"))?;

    let shown = pair.a.wait_for_status("g", "crashed")?;

    ensure!(
        shown["reason"].as_str().is_some_and(|reason| reason.contains("panic")),
        "{shown}"
    );
    Ok(())
}

fn a_triple_fault_is_a_crash(pair: &mut Pair) -> Result<()> {
    pair.expect_complaint("triple");
    pair.expect_complaint("crashed");
    pair.run(&Guest::new("g").work("triplefault_after_ms=300 heartbeat_ms=20"))?;

    let shown = pair.a.wait_for_status("g", "crashed")?;

    ensure!(
        shown["reason"].as_str().is_some_and(|reason| reason.contains("triple")),
        "{shown}"
    );
    Ok(())
}

fn a_guest_that_resets_itself_runs_on(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g").work("reset_after_ms=500 heartbeat_ms=20"))?;

    witness.wait_ready_times(2)?;
    pair.a.wait_for_status("g", "running")?;
    pair.exists_only_at(&pair.a, "g")
}

fn a_killed_vmm_is_a_crash(pair: &mut Pair) -> Result<()> {
    pair.expect_complaint("crashed");
    pair.expect_complaint("VMM");
    pair.run(&Guest::new("g"))?;

    process::signal(pair.a.vmm()?, rustix::process::Signal::KILL)?;

    pair.a.wait_for_status("g", "crashed")?;
    pair.a.ferry(&["start", "g"])?.exit(0)?;
    pair.a.wait_for_status("g", "running")?;
    pair.exists_only_at(&pair.a, "g")
}

fn a_kernel_that_cannot_be_emulated_says_which_instruction_stopped_it(pair: &mut Pair) -> Result<()> {
    if !Path::new("/sys/module/kvm_pvm").exists() {
        eprintln!(
            "skipped: the processor carries out a kernel's instructions here, none is emulated (kvm_pvm is not loaded)"
        );
        return Ok(());
    }
    pair.expect_complaint("crashed");
    pair.expect_complaint("cannot emulate");
    let lacking: [(&str, &[u8], &str); 3] = [
        ("popcnt", &[0xf3, 0x0f, 0xb8, 0xc0], "bytes f3 0f b8 c0"),
        ("int3", &[0xcc, 0xf4], "bytes cc f4"),
        ("fwait", &[0x9b, 0xf4], "bytes 9b f4"),
    ];
    for (name, instruction, bytes) in lacking {
        // Behind one that is emulated: mov eax, 1.
        let code = [&[0xb8, 1, 0, 0, 0], instruction].concat();
        let kernel = file_of(pair.folder(), name, &code)?;

        pair.a
            .ferry(&["run", name, "--kernel", &kernel, "--memory", "64M"])?
            .exit(0)?;

        let shown = pair.a.wait_for_status(name, "crashed")?;
        let told = shown["reason"].as_str().unwrap_or_default().to_owned();
        let place = format!("instruction at rip {:#x}: {bytes}", ENTRY + 5);
        let named = format!("({name})");
        for words in ["vCPU 0", &place, &named, "kvm-pvm", "guest-images/linux"] {
            ensure!(told.contains(words), "{words:?} is not in {told:?}");
        }
    }
    Ok(())
}
