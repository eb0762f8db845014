//! How a guest asks for a reset, switches itself off or says that it panicked: the reset control register (0xcf9), the keyboard
//! controller's reset command (0x64), sleep enable (0x604) and the panic port (0x505). And how it is asked to switch itself off: ACPI's power management
//! events (0x600), of which the power button is the only one that happens.

mod device;
mod state;

pub use device::ButtonPress;
pub(crate) use device::{PowerControl, PowerRequest};
