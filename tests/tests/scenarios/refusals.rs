//! Bad input: a clear error that names the thing, the right exit code, and nothing left behind.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};

use anyhow::{Context, Result, ensure};
use ferry_tests::{Guest, Pair, binary, host::free_port};
use libtest_mimic::Trial;
use rustix::process::geteuid;

use crate::scenario::{on_kvm, without_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = on_kvm![
        an_unreadable_kernel_is_named,
        a_kernel_that_is_no_elf_is_refused,
        an_elf_without_a_pvh_note_is_refused,
        memory_beyond_the_host_is_refused,
        a_name_in_use_is_refused,
        an_unknown_instance_is_not_found,
        an_unknown_host_is_not_found,
        a_guest_does_not_move_to_where_it_is,
        a_stopped_instance_does_not_move,
        a_bad_probe_option_is_told_by_the_guest,
    ];
    trials.extend(without_kvm![
        a_port_in_use_is_named,
        an_agent_that_is_not_there_is_exit_code_8,
        what_does_not_work_yet_is_a_usage_error_that_names_itself,
        an_address_beyond_loopback_needs_a_word,
        two_agents_do_not_share_a_data_directory,
    ]);
    if geteuid().is_root() {
        trials.extend(on_kvm![no_right_to_kvm_is_named]);
    }
    trials
}

fn run_with_kernel(pair: &Pair, kernel: &str, says: &str) -> Result<()> {
    pair.a.ferry(&Guest::new("g").arguments(kernel))?.exit(4)?.says(says)?;
    leaves_nothing(pair)
}

fn leaves_nothing(pair: &Pair) -> Result<()> {
    pair.a.ferry(&["show", "g"])?.exit(3)?;
    ensure!(pair.a.vmms().is_empty(), "a VMM is left");
    let left = fs::read_dir(pair.a.data_dir.join("instances"))
        .into_iter()
        .flatten()
        .count();
    ensure!(left == 0, "{left} folders are left");
    Ok(())
}

fn an_unreadable_kernel_is_named(pair: &mut Pair) -> Result<()> {
    run_with_kernel(pair, "/nonexistent/kernel.elf", "/nonexistent/kernel.elf")
}

fn a_kernel_that_is_no_elf_is_refused(pair: &mut Pair) -> Result<()> {
    let file = pair.folder().join("noise.elf");
    fs::write(&file, [0x5a; 65536])?;

    run_with_kernel(pair, &file.display().to_string(), "ELF")
}

fn an_elf_without_a_pvh_note_is_refused(pair: &mut Pair) -> Result<()> {
    let file = binary::ferry()?.display().to_string();

    run_with_kernel(pair, &file, "PVH")
}

fn memory_beyond_the_host_is_refused(pair: &mut Pair) -> Result<()> {
    let guest = Guest::new("g").memory_mib(64 << 20);

    pair.a
        .ferry(&guest.arguments(&pair.kernel()))?
        .exit(4)?
        .says("memory")?;

    leaves_nothing(pair)
}

fn a_name_in_use_is_refused(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;

    pair.a
        .ferry(&Guest::new("g").arguments(&pair.kernel()))?
        .exit(4)?
        .says("g")?;

    pair.runs_only_at(&pair.a, "g", &witness)
}

fn an_unknown_instance_is_not_found(pair: &mut Pair) -> Result<()> {
    for verb in [
        "show", "console", "logs", "start", "pause", "resume", "reboot", "stop", "delete",
    ] {
        pair.a.ferry(&[verb, "nobody"])?.exit(3)?.says("nobody")?;
    }
    pair.a
        .ferry(&["migrate", "nobody", "--to", "b"])?
        .exit(3)?
        .says("nobody")?;
    pair.a
        .ferry(&["migration", "show", "00000000-0000-4000-8000-000000000000"])?
        .exit(3)?;
    Ok(())
}

fn an_unknown_host_is_not_found(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;

    pair.a
        .ferry(&["migrate", "g", "--to", "atlantis"])?
        .exit(3)?
        .says("DESTINATION_UNKNOWN")?
        .says("atlantis")?;

    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_guest_does_not_move_to_where_it_is(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;

    pair.a.ferry(&["migrate", "g", "--to", "a"])?.exit(4)?;

    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_stopped_instance_does_not_move(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;
    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;

    pair.migrate("g", &[])?.exit(4)?.says("stopped")?;

    pair.a.wait_for_status("g", "stopped")?;
    Ok(())
}

fn a_bad_probe_option_is_told_by_the_guest(pair: &mut Pair) -> Result<()> {
    let told = pair.run(&Guest::new("g").work("wrok=idle"));

    ensure!(told.is_err_and(|error| format!("{error:#}").contains("wrok")));
    Ok(())
}

fn a_port_in_use_is_named(pair: &mut Pair) -> Result<()> {
    let taken = TcpListener::bind("127.0.0.1:0")?;
    pair.a.port = taken.local_addr()?.port();
    pair.expect_complaint("port");

    pair.a.spawn_agent()?;

    ensure!(pair.a.wait_ended()? == Some(1));
    let log = fs::read_to_string(&pair.a.log)?;
    ensure!(log.contains(&pair.a.port.to_string()), "{log}");
    Ok(())
}

fn an_agent_that_is_not_there_is_exit_code_8(pair: &mut Pair) -> Result<()> {
    pair.a.ferry(&["list"])?.exit(8)?.says(&pair.a.port.to_string())?;
    Ok(())
}

fn what_does_not_work_yet_is_a_usage_error_that_names_itself(pair: &mut Pair) -> Result<()> {
    for flag in ["--on-timeout=later", "--storage=move", "--no-such-flag"] {
        let name = flag.split('=').next().unwrap_or(flag);
        pair.a.ferry(&["migrate", "g", flag])?.exit(2)?.says(name)?;
    }
    pair.a
        .ferry(&["migrate", "g", "--mode", "lukewarm"])?
        .exit(2)?
        .says("lukewarm")?;
    pair.a
        .ferry(&["migrate", "g", "--cold", "--max-downtime", "1s"])?
        .exit(2)?
        .says("--cold")?
        .says("--max-downtime")?;
    Ok(())
}

fn an_address_beyond_loopback_needs_a_word(pair: &mut Pair) -> Result<()> {
    let listen = format!("0.0.0.0:{}", free_port()?);

    pair.a
        .plain_ferry(&["agent", "--host-id", "x", "--listen", &listen])?
        .exit(2)?
        .says("--insecure-network")?;
    Ok(())
}

fn two_agents_do_not_share_a_data_directory(pair: &mut Pair) -> Result<()> {
    pair.a.start()?;
    let folder = pair.a.data_dir.display().to_string();
    let listen = format!("127.0.0.1:{}", free_port()?);

    let told = pair
        .a
        .plain_ferry(&["agent", "--host-id", "x", "--listen", &listen, "--data-dir", &folder])?;

    told.exit(1)?.says(&folder)?;
    Ok(())
}

/// An agent without the right to /dev/kvm: started as `nobody`, from a copy of the binary that it may read.
fn no_right_to_kvm_is_named(pair: &mut Pair) -> Result<()> {
    const NOBODY: u32 = 65534;
    let kvm = fs::metadata("/dev/kvm")?.permissions().mode();
    if kvm & 0o006 == 0o006 {
        return Ok(());
    }
    pair.a.kill();
    fs::set_permissions(pair.folder(), fs::Permissions::from_mode(0o755))?;
    let copy = pair.folder().join("ferry");
    fs::copy(binary::ferry()?, &copy).context("failed to copy the binary")?;
    let home = pair.folder().join("nobody");
    fs::create_dir(&home)?;
    chown(&home, Some(NOBODY), Some(NOBODY))?;
    pair.a.become_user(NOBODY, &copy, &home);
    pair.expect_complaint("kvm");
    pair.a.start()?;

    pair.a
        .ferry(&Guest::new("g").arguments(&pair.kernel()))?
        .exit(4)?
        .says("/dev/kvm")?;

    leaves_nothing(pair)
}
