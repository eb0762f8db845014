//! ACPI's tables: how a guest finds processors, interrupt lines and devices, switches off, and hears of its power button and of a new generation id.
//!
//! ```text
//!   RSDP ─► XSDT ─► FADT ─► FACS
//!              │       └──► DSDT: the devices
//!              └──► MADT: processors, interrupt controllers
//! ```
//!
//! There is no fixed hardware but the power management registers with the power button: no timer, no general purpose events, no
//! embedded controller. ACPI mode is always on.

mod aml;
mod dsdt;
mod tables;

pub(super) use self::tables::tables;
