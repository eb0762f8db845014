//! Kinds of kernels, and what a guest finds in memory when it starts.

use anyhow::{Result, ensure};
use ferry_vmm::{GuestMemory, MachineConfig, PAGE_SIZE};

use super::Case;
use super::micro::{Code, Rig, blank, config, payload, read_page};

pub(crate) const CASES: &[Case] = &[
    ("bzimage_starts_in_64_bit_mode", bzimage_starts_in_64_bit_mode),
    ("vmlinux_starts_in_64_bit_mode", vmlinux_starts_in_64_bit_mode),
    ("pvh_starts_in_32_bit_mode", pvh_starts_in_32_bit_mode),
    ("bzimage_starts_again_after_a_reset", bzimage_starts_again_after_a_reset),
    ("mp_table_lists_every_vcpu", mp_table_lists_every_vcpu),
    ("acpi_tables_add_up", acpi_tables_add_up),
    (
        "generation_id_survives_a_reset_and_changes_on_demand",
        generation_id_survives_a_reset,
    ),
];

/// Where firmware's tables lie.
const ACPI: u32 = 0xe_0000;
const GENERATION_ID: u32 = 0xe_f000;
const MP_TABLE: u32 = 0xf_0000;

/// Boots a kernel file with this command line.
fn boot(kernel: &[u8], cmdline: &str) -> Result<Rig> {
    let (blank, console, events) = blank(&config())?;
    Ok(Rig {
        machine: blank.boot(payload(kernel, cmdline)?)?,
        console,
        events,
    })
}

fn bzimage_starts_in_64_bit_mode() -> Result<()> {
    let code = Code::default().print_mode().print_cmdline(5).print("!").halt();
    let mut rig = boot(&code.bzimage(), "quiet")?;
    rig.machine.run()?;
    rig.console.wait_for("!")?;
    ensure!(rig.console.text() == "1quiet!", "{:?}", rig.console.text());
    Ok(())
}

fn vmlinux_starts_in_64_bit_mode() -> Result<()> {
    let code = Code::default().print_mode().print_cmdline(5).print("!").halt();
    let mut rig = boot(&code.vmlinux(), "quiet")?;
    rig.machine.run()?;
    rig.console.wait_for("!")?;
    ensure!(rig.console.text() == "1quiet!", "{:?}", rig.console.text());
    Ok(())
}

fn pvh_starts_in_32_bit_mode() -> Result<()> {
    let mut rig = Rig::boot(&Code::default().print_mode().print("!").halt())?;
    rig.machine.run()?;
    rig.console.wait_for("!")?;
    ensure!(rig.console.text() == "0!", "{:?}", rig.console.text());
    Ok(())
}

fn bzimage_starts_again_after_a_reset() -> Result<()> {
    let kernel = Code::default().print_mode().print_cmdline(1).halt().bzimage();
    let mut rig = boot(&kernel, "a")?;
    rig.machine.run()?;
    rig.console.wait_for("1a")?;
    rig.machine.reset(payload(&kernel, "b")?)?;
    rig.machine.run()?;
    rig.console.wait_for("1a1b")
}

fn mp_table_lists_every_vcpu() -> Result<()> {
    let three = MachineConfig { vcpus: 3, ..config() };
    let rig = Rig::boot_with(&three, &Code::default().halt())?;
    let page = read_page(rig.machine.memory(), MP_TABLE)?;
    let table = &page[16..16 + usize::from(u16::from_le_bytes([page[20], page[21]]))];
    ensure!(page.starts_with(b"_MP_") && table.starts_with(b"PCMP"), "no table");
    ensure!(sum(&page[..16]) == 0 && sum(table) == 0, "the sums are not zero");
    let processors = table[44..].chunks(20).take_while(|entry| entry[0] == 0).count();
    ensure!(processors == 3, "{processors} processors");
    Ok(())
}

fn acpi_tables_add_up() -> Result<()> {
    let rig = Rig::boot(&Code::default().halt())?;
    let memory = rig.machine.memory();
    let root = bytes(memory, ACPI, 36)?;
    ensure!(root.starts_with(b"RSD PTR "), "no root pointer");
    ensure!(sum(&root[..20]) == 0 && sum(&root) == 0, "the root's sums are not zero");
    let xsdt = table(memory, &root[24..28])?;
    for pointer in xsdt[36..].chunks_exact(8) {
        table(memory, &pointer[..4])?;
    }
    Ok(())
}

fn generation_id_survives_a_reset() -> Result<()> {
    let code = Code::default().halt();
    let mut rig = Rig::boot(&code)?;
    let first = bytes(rig.machine.memory(), GENERATION_ID, 16)?;
    ensure!(first != [0; 16], "there is none");
    rig.machine.reset(payload(&code.elf(), "")?)?;
    ensure!(
        bytes(rig.machine.memory(), GENERATION_ID, 16)? == first,
        "a reset changed it"
    );
    rig.machine.renew_generation_id()?;
    ensure!(
        bytes(rig.machine.memory(), GENERATION_ID, 16)? != first,
        "it did not change"
    );
    Ok(())
}

/// The table that four bytes point to, checked.
fn table(memory: &GuestMemory, pointer: &[u8]) -> Result<Vec<u8>> {
    let address = u32::from_le_bytes(pointer.try_into()?);
    let len = u32::from_le_bytes(bytes(memory, address + 4, 4)?.try_into().expect("four"));
    let table = bytes(memory, address, len)?;
    ensure!(sum(&table) == 0, "the sum of {} is not zero", table[..4].escape_ascii());
    Ok(table)
}

fn bytes(memory: &GuestMemory, address: u32, len: u32) -> Result<Vec<u8>> {
    let page = PAGE_SIZE as u32;
    let mut all = Vec::new();
    for start in (address / page * page..address + len).step_by(PAGE_SIZE as usize) {
        all.extend(read_page(memory, start)?);
    }
    let at = (address % page) as usize;
    Ok(all[at..at + len as usize].to_vec())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}
