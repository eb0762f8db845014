//! The guest itself: a kernel of a few thousand instructions that lives in ring 3.
//!
//! `start.s` brings each vCPU to ring 3 and calls [`ring3_main`]. vCPU 0 reads the command line and the memory map, maps
//! memory, finds the clock's frequency, wakes the others, and then all do the same: fill, work, look at the clock.
//! There are no interrupts, no exceptions (one is a triple fault) and no way back to ring 0.

#![no_std]
#![no_main]

#[path = "../cmdline.rs"]
mod cmdline;
#[path = "../device_work.rs"]
mod device_work;
#[path = "../histogram.rs"]
mod histogram;
#[path = "../pattern.rs"]
mod pattern;
#[path = "../report.rs"]
mod report;
#[path = "../rng.rs"]
mod rng;

mod frequency;
mod front;
mod machine;
mod memory;
mod plan;
mod serial;
mod shared;
mod smp;
mod start_info;
mod transfers;
mod virtio;
mod work;

use core::fmt;
use core::panic::PanicInfo;

use cmdline::Options;
use front::Front;
use memory::Memory;
use plan::Plan;
use report::Line;
use serial::{Serial, Text};
use transfers::Job;
use work::Worker;

/// Where each vCPU arrives in ring 3, on a stack of its own.
#[unsafe(no_mangle)]
extern "C" fn ring3_main(cpu: u32) -> ! {
    if cpu > 0 {
        let plan = smp::arrive(cpu);
        Worker::new(plan, cpu, None).run()
    }
    let mut serial = Serial::new();
    serial.print(Line::Probe {
        version: env!("PROBE_VERSION"),
    });
    serial.flush();
    let mut text = [0; start_info::LONGEST_COMMAND_LINE];
    match prepare(&mut text) {
        Ok((plan, job)) => {
            let front = Front::new(plan, serial, job);
            Worker::new(plan, 0, Some(front)).run()
        }
        Err(problem) => {
            serial.print(Line::Error(Text::of(problem).as_str()));
            serial.flush();
            machine::halt()
        }
    }
}

/// Why the guest cannot do what it was asked.
enum Problem<'a> {
    Option(cmdline::BadOption<'a>),
    StartInfo(&'static str),
    Size { asked_mib: u64, free_mib: u64 },
    NoClock,
    CpuSilent(u32),
    Device(&'static str),
}

/// Everything up to the moment when all vCPUs may fill.
fn prepare(text: &mut [u8; start_info::LONGEST_COMMAND_LINE]) -> Result<(&'static Plan, Option<Job>), Problem<'_>> {
    let machine = start_info::read(text).map_err(Problem::StartInfo)?;
    let options = Options::parse(machine.command_line).map_err(Problem::Option)?;
    let mut memory = match (machine.memory, options.mem_mib) {
        (Some(memory), _) => memory,
        (None, Some(mib)) => Memory::assume(mib),
        (None, None) => {
            let text = "no memory map from the VMM and no mem= on the command line";
            return Err(Problem::StartInfo(text));
        }
    };
    memory.map().map_err(Problem::StartInfo)?;
    let frequency = frequency::find(options.tsc_khz).ok_or(Problem::NoClock)?;
    let stacks = memory.take_stacks(options.cpus).map_err(Problem::StartInfo)?;
    let job = Job::prepare(&options, &mut memory).map_err(Problem::Device)?;
    let plan = Plan::publish(options, &mut memory, frequency).map_err(|free_mib| Problem::Size {
        asked_mib: options.fill_mib + options.work_size_mib(),
        free_mib,
    })?;
    smp::wake(options.cpus, stacks, plan).map_err(Problem::CpuSilent)?;
    Ok((plan, job))
}

impl fmt::Display for Problem<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Option(bad) => bad.fmt(f),
            Self::StartInfo(text) | Self::Device(text) => f.write_str(text),
            Self::Size { asked_mib, free_mib } => write!(
                f,
                "fill_mib and work_mib ask for {asked_mib} MiB, {free_mib} MiB are free"
            ),
            Self::NoClock => f.write_str("no tsc_khz=, nothing in CPUID and no timer to measure against"),
            Self::CpuSilent(cpu) => write!(f, "vCPU {cpu} did not come up"),
        }
    }
}

/// Says where, and stops this vCPU; a host that counts heartbeats sees the rest.
#[panic_handler]
fn panicked(info: &PanicInfo<'_>) -> ! {
    let mut serial = Serial::new();
    // It may have happened in the middle of a line.
    serial.print("");
    let text = match info.location() {
        Some(at) => Text::of(format_args!("panic at {}:{}", at.file(), at.line())),
        None => Text::of("panic"),
    };
    serial.print(Line::Error(text.as_str()));
    serial.flush();
    machine::halt()
}
