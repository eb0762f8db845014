//! Saves this build's machine, and makes of it one that every host can have.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use ferry_proto::state::v1 as saved;
use ferry_vmm::{BootPayload, CpuModel, MachineConfig};
use prost::Message;

use super::super::micro::{payload, wait_for_count};
use super::text::Parts;
use super::{contents, guest, machine, machine_config};

/// Frequency of the saved machine's time stamp counter: a round number that is nobody's.
pub(super) const TSC_KHZ: u32 = 1_000_000;

/// No host has this boot.
const BOOT: &str = "golden";

/// Writes the machine of this build to a file that must not be there.
pub(super) fn write(file: &Path) -> Result<()> {
    let config = MachineConfig {
        cpu: CpuModel::X86_64V2,
        ..machine_config()
    };
    let (blank, console, _events) = machine(&config)?;
    let kernel: BootPayload = payload(&guest::code().elf(), "")?;
    let mut machine = blank.boot(kernel)?;
    machine.run()?;
    console.wait_for(guest::READY)?;
    wait_for_count(machine.memory(), guest::WAITING, 100)?;
    machine.pause()?;

    let image = tempfile::tempfile()?;
    let table = machine.memory().save_image(&image)?;
    let mut parts = Parts::default();
    parts.add("profile", of_any_host(&machine.profile().to_bytes())?);
    parts.add("state", state_of_any_host(&machine.export()?.to_bytes())?);
    parts.add("memory.pieces", table.to_bytes());
    parts.add("memory", contents(&image)?);
    let text = HEADER.to_owned() + &parts.to_text();
    ensure!(text.len() < 64 << 10, "it is too large to be kept among sources");
    let mut out = File::create_new(file).context("a golden machine that is there is never changed")?;
    Ok(out.write_all(text.as_bytes())?)
}

const HEADER: &str = "# A machine as a release saved it: vmm/tests/kvm/golden.rs restores it. Never changed; docs/snapshot.md says how the next one is written.\n";

fn of_any_host(profile: &[u8]) -> Result<Vec<u8>> {
    let profile = saved::MachineProfile {
        cpuid: cpuid(0),
        tsc_khz: TSC_KHZ,
        // Behind no host's.
        tsc: 1,
        boot_id: BOOT.to_owned(),
        ..saved::MachineProfile::decode(profile)?
    };
    Ok(profile.encode_to_vec())
}

fn state_of_any_host(state: &[u8]) -> Result<Vec<u8>> {
    let mut state = saved::MachineState::decode(state)?;
    for unit in &mut state.units {
        let index = unit.name.strip_prefix("vcpu").map(str::parse);
        match (unit.schema.as_str(), index) {
            ("ferry.vcpu", Some(index)) => {
                let vcpu = vcpu_of_any_host(saved::Vcpu::decode(&*unit.body)?, index?);
                unit.body = vcpu.encode_to_vec();
            }
            ("ferry.clock", _) => unit.body = clock(saved::Clock::decode(&*unit.body)?).encode_to_vec(),
            ("ferry.pit", _) => {
                let mut pit = saved::IntervalTimer::decode(&*unit.body)?;
                forget_when_loaded(&mut pit.state);
                unit.body = pit.encode_to_vec();
            }
            _ => {}
        }
    }
    Ok(state.encode_to_vec())
}

fn clock(clock: saved::Clock) -> saved::Clock {
    saved::Clock {
        host_tsc: 1,
        boot_id: BOOT.to_owned(),
        tsc_khz: TSC_KHZ,
        ..clock
    }
}

/// `struct kvm_pit_channel_state` is 24 bytes, of which the last 8 are a time of the host's clock.
fn forget_when_loaded(pit: &mut [u8]) {
    for channel in pit.chunks_exact_mut(24).take(3) {
        channel[16..].fill(0);
    }
}

/// Registers that every host has and can set: system calls, page attributes, memory types.
const MSRS: [u32; 10] = [
    0x174,
    0x175,
    0x176,
    0x277,
    0x2ff,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
];

fn vcpu_of_any_host(vcpu: saved::Vcpu, index: u32) -> saved::Vcpu {
    let all = vcpu.msr_indices.iter().zip(&vcpu.msr_values);
    let kept: Vec<_> = all.filter(|(index, _)| MSRS.contains(index)).collect();
    saved::Vcpu {
        msr_indices: kept.iter().map(|(index, _)| **index).collect(),
        msr_values: kept.iter().map(|(_, value)| **value).collect(),
        xsave: floating_point(),
        tsc: 1,
        tsc_offset: None,
        cpuid: cpuid(index),
        ..vcpu
    }
}

/// What of an XSAVE area is the guest's: registers but for the mask of MXCSR, which is the processor's, and which of them are in use.
pub(super) const FLOATING_POINT: [Range<usize>; 3] = [0..28, 32..416, 512..520];

/// The least XSAVE area, as after FNINIT, with something in the first vector register.
fn floating_point() -> Vec<u8> {
    let mut area = vec![0; 4096];
    // FCW, MXCSR and its mask, XMM0, and XSTATE_BV: x87 and SSE (Intel SDM 1, 13.4).
    area[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
    area[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    area[28..32].copy_from_slice(&0xffff_u32.to_le_bytes());
    area[160..176].copy_from_slice(b"a golden machine");
    area[512] = 3;
    area
}

/// What a processor of the level x86-64-v2 has, without XSAVE, and KVM's clock.
fn cpuid(vcpu: u32) -> Vec<saved::CpuidEntry> {
    let leaf = |function, [eax, ebx, ecx, edx]: [u32; 4]| saved::CpuidEntry {
        function,
        index: 0,
        flags: 0,
        eax,
        ebx,
        ecx,
        edx,
    };
    let text = |text: &[u8; 12], at: usize| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]);
    let (vendor, kvm) = (b"GenuineIntel", b"KVMKVMKVM\0\0\0");
    vec![
        leaf(0, [1, text(vendor, 0), text(vendor, 8), text(vendor, 4)]),
        leaf(1, [0x6f1, vcpu << 24 | 2 << 16 | 8 << 8, 0x8098_2201, 0x078b_fbff]),
        leaf(0x4000_0000, [0x4000_0001, text(kvm, 0), text(kvm, 4), text(kvm, 8)]),
        leaf(0x4000_0001, [0x0100_0009, 0, 0, 0]),
        leaf(0x8000_0000, [0x8000_0008, 0, 0, 0]),
        leaf(0x8000_0001, [0, 0, 1, 0x2010_0800]),
        leaf(0x8000_0008, [0x3024, 0, 0, 0]),
    ]
}
