//! The power button as a guest sees it: ACPI's registers, and the interrupt line where the older controller has it.

use anyhow::{Result, bail, ensure};
use ferry_vmm::{ButtonPress, MachineError};

use super::Case;
use super::micro::{Code, Rig, config, payload};
use super::saved_state::move_to_new;

pub(crate) const CASES: &[Case] = &[
    (
        "button_is_seen_and_its_interrupt_lasts_until_it_is_cleared",
        button_is_seen_and_its_interrupt_lasts,
    ),
    ("press_that_nobody_saw_moves_along", press_that_nobody_saw_moves_along),
    ("reset_forgets_the_press", reset_forgets_the_press),
    ("button_needs_a_guest_that_listens", button_needs_a_guest_that_listens),
    (
        "button_of_a_paused_machine_is_refused",
        button_of_a_paused_machine_is_refused,
    ),
];

/// ACPI's registers for the button: in the second byte of status, and of what is enabled, its lowest bit.
const STATUS: u16 = 0x601;
const ENABLE: u16 = 0x603;
const BUTTON: u8 = 1 << 0;

/// The second of the two older controllers, which has line 9 as its line 1: reads as the lines that wait. And which of its lines are
/// level-triggered.
const CONTROLLER: u16 = 0xa0;
const LEVEL_TRIGGERED: u16 = 0x4d1;
const LINE: u8 = 1 << 1;

/// Listens to the button and says so.
fn listens() -> Code {
    Code::default()
        .out_byte(LEVEL_TRIGGERED, LINE)
        .out_byte(ENABLE, BUTTON)
        .print("e")
}

/// Waits for the press and clears it; says what the interrupt line does.
fn sees(code: Code) -> Code {
    code.wait_set(STATUS, BUTTON)
        .print("s")
        .wait_set(CONTROLLER, LINE)
        .print("i")
        .out_byte(STATUS, BUTTON)
        .wait_clear(CONTROLLER, LINE)
        .wait_clear(STATUS, BUTTON)
        .print("c")
}

fn press(rig: &Rig) -> Result<()> {
    let pressed = rig.machine.press_power_button()?;
    ensure!(pressed == ButtonPress::Told, "{pressed:?}");
    Ok(())
}

fn button_is_seen_and_its_interrupt_lasts() -> Result<()> {
    let mut rig = Rig::boot(&sees(sees(listens())).halt())?;
    rig.machine.run()?;
    rig.console.wait_for("e")?;
    press(&rig)?;
    rig.console.wait_for("esic")?;
    press(&rig)?;
    rig.console.wait_for("esicsic")
}

fn press_that_nobody_saw_moves_along() -> Result<()> {
    let mut rig = Rig::boot(&sees(listens().echo()).halt())?;
    rig.machine.run()?;
    rig.console.wait_for("e")?;
    press(&rig)?;
    rig.machine.pause()?;

    let mut moved = move_to_new(&rig, &config())?;
    let (there, here) = (rig.machine.export()?, moved.machine.export()?);
    ensure!(there.digest() == here.digest(), "the state changed on its way");
    moved.machine.run()?;
    ensure!(moved.machine.console_input().push(b"x") == 1);

    moved.console.wait_for("xsic")
}

fn reset_forgets_the_press() -> Result<()> {
    let mut rig = Rig::boot(&listens().halt())?;
    rig.machine.run()?;
    rig.console.wait_for("e")?;
    press(&rig)?;

    let code = Code::default()
        .out_byte(LEVEL_TRIGGERED, LINE)
        .wait_clear(STATUS, BUTTON)
        .wait_clear(ENABLE, BUTTON)
        .wait_clear(CONTROLLER, LINE)
        .print("n");
    rig.machine.reset(payload(&code.halt().elf(), "")?)?;
    rig.machine.run()?;

    rig.console.wait_for("en")
}

fn button_needs_a_guest_that_listens() -> Result<()> {
    let mut rig = Rig::boot(&Code::default().print("r").halt())?;
    rig.machine.run()?;
    rig.console.wait_for("r")?;
    let pressed = rig.machine.press_power_button()?;
    ensure!(pressed == ButtonPress::NobodyListens, "{pressed:?}");
    Ok(())
}

fn button_of_a_paused_machine_is_refused() -> Result<()> {
    let mut rig = Rig::boot(&listens().halt())?;
    rig.machine.run()?;
    rig.console.wait_for("e")?;
    rig.machine.pause()?;
    match rig.machine.press_power_button() {
        Err(MachineError::Paused(_)) => Ok(()),
        other => bail!("{other:?}"),
    }
}
