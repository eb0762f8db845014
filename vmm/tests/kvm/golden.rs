//! Whole machines as releases saved them: they are restored and run, for ever.
//!
//! Each file in `golden/` is a machine with a guest in the middle of its work: profile, state, and memory with its table of pieces. With
//! `FERRY_WRITE_GOLDEN=1` this build's own is written there first, under its version; what is there is never changed.
//!
//! A state is of no particular processor: its features, its model-specific registers and its counter's frequency are made to be those that every
//! host has, which is why those are compared with what is given here, and not with this host's.

mod guest;
mod saving;
mod text;

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;

use anyhow::{Context, Result, bail, ensure};
use ferry_proto::state::v1 as saved;
use ferry_vmm::{
    Backends, BlankMachine, DiskAccess, DiskBackend, Incompatibility, MachineConfig, MachineProfile, MachineState,
    NicBackend, PieceTable, ThreadHook,
};
use prost::Message;

use self::text::Parts;
use super::Case;
use super::micro::{Console, Rig, config, read, wait_for_count};

pub(crate) const CASES: &[Case] = &[(
    "machines_that_releases_saved_run_on",
    machines_that_releases_saved_run_on,
)];

/// What its disk holds in the sector that it reads when it runs on.
const CONTENT: &str = "golden";
const SERIAL: &str = "golden";
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

fn machines_that_releases_saved_run_on() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kvm/golden");
    if std::env::var_os("FERRY_WRITE_GOLDEN").is_some() {
        let file = folder.join(concat!(env!("CARGO_PKG_VERSION"), ".txt"));
        saving::write(&file).with_context(|| format!("failed to write {}", file.display()))?;
    }
    let files = fs::read_dir(folder)?.map(|entry| Ok(entry?.path()));
    let files: Vec<PathBuf> = files.collect::<Result<_>>()?;
    let texts = files
        .iter()
        .filter(|file| file.extension().is_some_and(|extension| extension == "txt"));
    let mut tried = 0;
    for file in texts {
        runs_on(file).with_context(|| file.display().to_string())?;
        tried += 1;
    }
    ensure!(tried > 0, "there is no golden machine");
    Ok(())
}

/// Restores the machine, compares it with what was saved, and has its guest go on.
fn runs_on(file: &Path) -> Result<()> {
    let parts = Parts::from_text(&fs::read_to_string(file)?)?;
    let profile = MachineProfile::from_bytes(parts.of("profile")?)?;
    if !fits(&profile)? {
        return Ok(());
    }
    let (blank, console, events) = machine(&MachineConfig {
        expect_incoming: true,
        ..machine_config()
    })?;
    let mut image = tempfile::tempfile()?;
    image.write_all(parts.of("memory")?)?;
    let table = PieceTable::from_bytes(parts.of("memory.pieces")?, blank.memory().shape())?;
    blank.memory().load_image(&image, &table)?;
    let state = parts.of("state")?;
    let machine = blank.restore(&MachineState::from_bytes(state)?)?;
    let refused = machine.refused_msrs();
    ensure!(refused.is_empty(), "this host did not take the registers {refused:x?}");
    is_what_was_saved(state, &machine.export()?.to_bytes())?;
    goes_on(Rig {
        machine,
        console,
        events,
    })
}

/// Whether this host can have it, by the code that refuses a guest. Where it cannot, it says why: the saved machine has no more than every
/// processor of the last fifteen years.
fn fits(profile: &MachineProfile) -> Result<bool> {
    let host = ferry_vmm::host()?;
    let mut lacking = Vec::new();
    for found in host.check(profile) {
        match found {
            // A counter of one gigahertz is nobody's; that the guest's would run at another speed is as it should be.
            Incompatibility::TscFrequency { guest_khz, .. } if guest_khz == saving::TSC_KHZ => {}
            Incompatibility::CpuFeature(name) => lacking.push(name),
            other => bail!("it does not fit this host: {other}"),
        }
    }
    if !lacking.is_empty() {
        eprintln!("skipped: the processor lacks {}", lacking.join(", "));
    }
    Ok(lacking.is_empty())
}

/// What the restored machine saves is what was saved, but for what time and the host alone change.
fn is_what_was_saved(golden: &[u8], again: &[u8]) -> Result<()> {
    let (golden, again) = (
        saved::MachineState::decode(golden)?,
        saved::MachineState::decode(again)?,
    );
    ensure!(golden.units.len() == again.units.len(), "there are other units");
    for unit in &golden.units {
        let other = again.units.iter().find(|other| other.name == unit.name);
        let other = other.with_context(|| format!("{} is missing", unit.name))?;
        match unit.schema.as_str() {
            "ferry.vcpu" => is_the_same_vcpu(&saved::Vcpu::decode(&*unit.body)?, &saved::Vcpu::decode(&*other.body)?),
            "ferry.clock" => {
                let (then, now) = (saved::Clock::decode(&*unit.body)?, saved::Clock::decode(&*other.body)?);
                goes_on_since(&then, &now)
            }
            // Timers run in them.
            "ferry.irqchip" | "ferry.pit" => Ok(()),
            _ if other.version != unit.version || other.body == unit.body => Ok(()),
            _ => bail!("it is {:02x?}, saved was {:02x?}", other.body, unit.body),
        }
        .with_context(|| unit.name.clone())?;
    }
    Ok(())
}

fn is_the_same_vcpu(golden: &saved::Vcpu, again: &saved::Vcpu) -> Result<()> {
    ensure!(again.regs == golden.regs, "registers");
    ensure!(again.mp_state == golden.mp_state, "whether it runs");
    ensure!(again.xcrs == golden.xcrs, "extended control registers");
    ensure!(again.cpuid == golden.cpuid, "CPUID");
    for part in saving::FLOATING_POINT {
        let (found, expected) = (&again.xsave[part.clone()], &golden.xsave[part.clone()]);
        ensure!(found == expected, "bytes {part:?} of XSAVE are {found:02x?}");
    }
    let value = |index: &u32| {
        let at = again.msr_indices.iter().position(|other| other == index)?;
        again.msr_values.get(at).copied()
    };
    for (index, expected) in golden.msr_indices.iter().zip(&golden.msr_values) {
        let found = value(index);
        ensure!(
            found == Some(*expected),
            "register {index:#x} is {found:x?}, not {expected:#x}"
        );
    }
    Ok(())
}

/// The guest's clock has advanced by what has passed since.
fn goes_on_since(then: &saved::Clock, now: &saved::Clock) -> Result<()> {
    let (guest, host) = (
        now.kvm_clock_ns.saturating_sub(then.kvm_clock_ns),
        now.host_realtime_ns.saturating_sub(then.host_realtime_ns),
    );
    ensure!(
        guest.abs_diff(host) < 1_000_000_000,
        "{guest} ns passed in it, {host} ns elsewhere"
    );
    Ok(())
}

/// The guest waits for a byte where it was, and then uses all of its devices.
fn goes_on(mut rig: Rig) -> Result<()> {
    let before = read(rig.machine.memory(), guest::WAITING)?;
    let random = guest::RANDOM.map(|at| random(&rig, at));
    let [first, None] = random.map(Result::ok).map(Option::flatten) else {
        bail!("it has random bytes that it has not asked for");
    };
    rig.machine.run()?;
    wait_for_count(rig.machine.memory(), guest::WAITING, before + 100)?;
    ensure!(rig.console.text().is_empty(), "it printed {:?}", rig.console.text());

    ensure!(rig.machine.console_input().push(b"g") == 1);

    rig.console.wait_for(guest::OVER)?;
    let printed = rig.console.text();
    ensure!(printed == format!("g{CONTENT}{}", guest::OVER), "{printed:?}");
    wait_for_count(rig.machine.memory(), guest::DONE, 100)?;
    wait_for_count(rig.machine.memory(), guest::SECOND, 1)?;
    let second = random_after(&rig)?;
    ensure!(
        first.is_some() && second.is_some() && first != second,
        "{first:?} {second:?}"
    );
    Ok(())
}

fn random_after(rig: &Rig) -> Result<Option<[u32; 4]>> {
    random(rig, guest::RANDOM[1])
}

/// The random bytes there, if there are any.
fn random(rig: &Rig, at: u32) -> Result<Option<[u32; 4]>> {
    let mut words = [0; 4];
    for (word, offset) in words.iter_mut().zip((0..).step_by(4)) {
        *word = read(rig.machine.memory(), at + offset)?;
    }
    Ok(Some(words).filter(|words| *words != [0; 4]))
}

fn machine_config() -> MachineConfig {
    MachineConfig { vcpus: 2, ..config() }
}

/// A machine with a device of each kind.
fn machine(
    config: &MachineConfig,
) -> Result<(
    BlankMachine,
    Console,
    std::sync::mpsc::Receiver<ferry_vmm::MachineEvent>,
)> {
    let (console, (sender, events)) = (Console::default(), channel());
    let (tap, _) = UnixDatagram::pair()?;
    tap.set_nonblocking(true)?;
    let backends = Backends {
        disks: vec![DiskBackend {
            file: disk()?,
            access: DiskAccess::ReadWrite,
            serial: SERIAL.to_owned(),
            losses: Default::default(),
        }],
        nics: vec![NicBackend {
            tap: OwnedFd::from(tap),
            mac: MAC,
            rate: None,
        }],
    };
    let blank = BlankMachine::new(
        config,
        backends,
        Box::new(console.clone()),
        sender,
        &ThreadHook::default(),
    )?;
    Ok((blank, console, events))
}

fn disk() -> Result<File> {
    let file = tempfile::tempfile()?;
    file.set_len(64 << 9)?;
    file.write_all_at(CONTENT.as_bytes(), u64::from(guest::SECTORS[1]) << 9)?;
    Ok(file)
}

/// All of a file from its start.
fn contents(mut file: &File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}
