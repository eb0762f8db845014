//! Booting, running, pausing, resetting and ending.

use std::fs::File;

use anyhow::{Result, bail, ensure};
use ferry_vmm::{
    Arming, BootPayload, CpuModel, HUGE_PAGE_SIZE, KernelError, LoadError, MachineConfig, MachineError, MachineEvent,
    MemoryError, RunState,
};

use super::Case;
use super::micro::{CODE, Code, Rig, blank, config, payload, read, wait_for_count};

pub(crate) const CASES: &[Case] = &[
    ("guest_prints_on_the_serial_console", guest_prints_on_the_serial_console),
    ("string_output_arrives_whole", string_output_arrives_whole),
    ("console_input_reaches_the_guest", console_input_reaches_the_guest),
    ("paused_guest_stands_still", paused_guest_stands_still),
    ("thousand_pauses_lose_no_kick", thousand_pauses_lose_no_kick),
    ("running_guest_is_dropped_in_time", running_guest_is_dropped_in_time),
    ("power_off_is_told", power_off_is_told),
    (
        "panic_is_told_and_the_guest_runs_on",
        panic_is_told_and_the_guest_runs_on,
    ),
    ("triple_fault_is_told", triple_fault_is_told),
    ("code_outside_memory_is_told", code_outside_memory_is_told),
    ("reset_starts_from_the_beginning", reset_starts_from_the_beginning),
    (
        "failed_reset_refuses_to_run_until_one_succeeds",
        failed_reset_refuses_to_run,
    ),
    (
        "file_that_is_no_kernel_is_refused_by_name",
        file_that_is_no_kernel_is_refused,
    ),
    (
        "kernel_that_cannot_be_read_is_refused_by_name",
        kernel_that_cannot_be_read_is_refused,
    ),
    (
        "memory_larger_than_the_host_is_refused_by_name",
        memory_larger_than_the_host_is_refused,
    ),
    ("machine_without_vcpus_is_refused", machine_without_vcpus_is_refused),
    ("processor_models_boot", processor_models_boot),
    (
        "memory_beyond_the_hole_is_reachable",
        memory_beyond_the_hole_is_reachable,
    ),
    (
        "huge_pages_come_from_their_pool_or_are_refused",
        huge_pages_come_from_their_pool,
    ),
];

/// Where guests count.
const COUNTER: u32 = 0x20_0000;

fn guest_prints_on_the_serial_console() -> Result<()> {
    let mut rig = Rig::boot(&Code::default().print("hello\n").halt())?;
    rig.machine.run()?;
    rig.console.wait_for("hello\n")
}

fn string_output_arrives_whole() -> Result<()> {
    let mut rig = Rig::boot(&Code::default().print_string("all at once\n").print("done").halt())?;
    rig.machine.run()?;
    rig.console.wait_for("done")?;
    ensure!(rig.console.text() == "all at once\ndone", "{:?}", rig.console.text());
    Ok(())
}

fn console_input_reaches_the_guest() -> Result<()> {
    let mut rig = Rig::boot(&Code::default().echo().echo().print("!").halt())?;
    let input = rig.machine.console_input();
    ensure!(input.push(b"early") == 0, "a paused machine takes no input");
    rig.machine.run()?;
    ensure!(input.push(b"ok") == 2, "the port has room");
    rig.console.wait_for("ok!")
}

fn paused_guest_stands_still() -> Result<()> {
    let mut rig = Rig::boot(&Code::default().count(COUNTER))?;
    let memory = rig.machine.memory().clone();
    rig.machine.run()?;
    wait_for_count(&memory, COUNTER, 1000)?;
    rig.machine.pause()?;
    let before = memory.digest(memory.shape().runs()[0])?;
    std::thread::sleep(std::time::Duration::from_millis(20));
    ensure!(
        memory.digest(memory.shape().runs()[0])? == before,
        "memory changed while paused"
    );
    let count = read(&memory, COUNTER)?;
    rig.machine.run()?;
    wait_for_count(&memory, COUNTER, count + 1000)?;
    Ok(())
}

fn thousand_pauses_lose_no_kick() -> Result<()> {
    let two = MachineConfig { vcpus: 2, ..config() };
    let mut rig = Rig::boot_with(&two, &Code::default().count(COUNTER))?;
    for round in 0..1000 {
        rig.machine.run()?;
        // Different moments of the way into the guest.
        for _ in 0..round % 50 * 100 {
            std::hint::spin_loop();
        }
        rig.machine.pause()?;
    }
    let count = read(rig.machine.memory(), COUNTER)?;
    rig.machine.run()?;
    wait_for_count(rig.machine.memory(), COUNTER, count + 1)?;
    Ok(())
}

fn running_guest_is_dropped_in_time() -> Result<()> {
    let mut rig = Rig::boot(&Code::default().count(COUNTER))?;
    rig.machine.run()?;
    wait_for_count(rig.machine.memory(), COUNTER, 1)?;
    let start = std::time::Instant::now();
    drop(rig);
    ensure!(start.elapsed().as_secs() < 2, "took {:?}", start.elapsed());
    Ok(())
}

fn power_off_is_told() -> Result<()> {
    let mut rig = Rig::boot(&Code::default().out_word(0x604, 0x2000).halt())?;
    rig.machine.run()?;
    ensure!(rig.event()? == MachineEvent::PoweredOff);
    rig.machine.pause()?;
    rig.machine.export()?;
    Ok(())
}

fn panic_is_told_and_the_guest_runs_on() -> Result<()> {
    let mut rig = Rig::boot(&Code::default().out_byte(0x505, 1).print("after").halt())?;
    rig.machine.run()?;
    ensure!(rig.event()? == MachineEvent::Panicked);
    rig.console.wait_for("after")
}

fn triple_fault_is_told() -> Result<()> {
    // lidt [zeroes]; ud2: no handler for the fault, none for the double fault.
    let [a, b, c, d] = (CODE + 0x1000).to_le_bytes();
    let mut rig = Rig::boot(&Code::default().raw(&[0x0f, 0x01, 0x1d, a, b, c, d, 0x0f, 0x0b]))?;
    rig.machine.run()?;
    ensure!(rig.event()? == MachineEvent::TripleFault);
    Ok(())
}

fn code_outside_memory_is_told() -> Result<()> {
    // mov eax, 0xd0000000; jmp eax: nothing is there.
    let mut rig = Rig::boot(&Code::default().raw(&[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0]))?;
    rig.machine.run()?;
    match rig.event()? {
        MachineEvent::Failed { vcpu: 0, reason } => ensure!(reason.contains("0xd0000000"), "{reason}"),
        MachineEvent::TripleFault => {}
        other => bail!("unexpected {other:?}"),
    }
    Ok(())
}

fn reset_starts_from_the_beginning() -> Result<()> {
    // What is only in memory after the first start makes the second one visible.
    let code = Code::default()
        .print("start\n")
        .store(CODE + 0x2000, 7)
        .out_byte(0xcf9, 6)
        .print("not reached")
        .halt();
    let mut rig = Rig::boot(&code)?;
    rig.machine.run()?;
    ensure!(rig.event()? == MachineEvent::ResetRequested);
    ensure!(read(rig.machine.memory(), CODE + 0x2000)? == 7);
    rig.machine.start_dirty_tracking(Arming::All)?;
    rig.machine.reset(payload(&code.elf(), "")?)?;
    ensure!(rig.machine.run_state() == RunState::Paused);
    ensure!(
        read(rig.machine.memory(), CODE + 0x2000)? == 0,
        "the kernel's zeroes are zero again"
    );
    let dirty = rig.machine.fetch_dirty()?;
    ensure!(dirty.contains(u64::from(CODE) / 4096), "what the reset loads is dirty");
    ensure!(
        dirty.contains(u64::from(CODE) / 4096 + 2),
        "what the reset clears is dirty"
    );
    rig.machine.stop_dirty_tracking()?;
    rig.machine.run()?;
    ensure!(rig.event()? == MachineEvent::ResetRequested);
    ensure!(rig.console.text() == "start\nstart\n", "{:?}", rig.console.text());
    Ok(())
}

fn failed_reset_refuses_to_run() -> Result<()> {
    let code = Code::default().print("up").halt();
    let mut rig = Rig::boot(&code)?;
    ensure!(
        rig.machine
            .reset(payload(b"no kernel at all, whatever its length may be", "")?)
            .is_err()
    );
    ensure!(matches!(rig.machine.run(), Err(MachineError::NotLoaded)));
    rig.machine.reset(payload(&code.elf(), "")?)?;
    rig.machine.run()?;
    rig.console.wait_for("up")
}

fn file_that_is_no_kernel_is_refused() -> Result<()> {
    let (blank, ..) = blank(&config())?;
    let error = blank
        .boot(payload(b"MZ this is something else", "")?)
        .expect_err("no kernel");
    ensure!(
        matches!(error, MachineError::Load(LoadError::Kernel(KernelError::Unknown))),
        "{error:?}"
    );
    Ok(())
}

fn kernel_that_cannot_be_read_is_refused() -> Result<()> {
    let (blank, ..) = blank(&config())?;
    let folder = BootPayload {
        kernel: File::open("/")?,
        initrd: None,
        cmdline: String::new(),
    };
    let error = blank.boot(folder).expect_err("a folder");
    ensure!(
        matches!(error, MachineError::Load(LoadError::Kernel(KernelError::Unreadable(_)))),
        "{error:?}"
    );
    Ok(())
}

fn memory_larger_than_the_host_is_refused() -> Result<()> {
    let huge = MachineConfig {
        memory_bytes: 1 << 46,
        ..config()
    };
    let error = blank(&huge).err().expect("64 TiB");
    let error = error.downcast_ref::<MachineError>().expect("its own error");
    ensure!(
        matches!(error, MachineError::Memory(MemoryError::LargerThanHost { .. })),
        "{error:?}"
    );
    Ok(())
}

fn machine_without_vcpus_is_refused() -> Result<()> {
    let error = blank(&MachineConfig { vcpus: 0, ..config() }).err().expect("no vCPU");
    ensure!(error.to_string().contains("0 vCPUs"), "{error}");
    Ok(())
}

fn processor_models_boot() -> Result<()> {
    for cpu in [CpuModel::X86_64V2, CpuModel::X86_64V3] {
        let mut rig = Rig::boot_with(&MachineConfig { cpu, ..config() }, &Code::default().print("up").halt())?;
        rig.machine.run()?;
        rig.console.wait_for("up")?;
    }
    Ok(())
}

fn memory_beyond_the_hole_is_reachable() -> Result<()> {
    let large = MachineConfig {
        memory_bytes: 5 << 30,
        ..config()
    };
    let mut rig = Rig::boot_with(&large, &Code::default().store(0xbfff_f000, 5).print("up").halt())?;
    ensure!(rig.machine.memory().shape().regions.len() == 2);
    rig.machine.run()?;
    rig.console.wait_for("up")?;
    ensure!(read(rig.machine.memory(), 0xbfff_f000)? == 5);
    Ok(())
}

fn huge_pages_come_from_their_pool() -> Result<()> {
    let pooled = MachineConfig {
        memory_bytes: 16 * HUGE_PAGE_SIZE,
        hugepages: true,
        ..config()
    };
    let free: u64 = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    match blank(&pooled) {
        Ok(_) => ensure!(free >= 16, "the host has only {free} huge pages"),
        Err(error) => ensure!(free < 16 && error.to_string().contains("pool of huge pages"), "{error}"),
    }
    Ok(())
}
