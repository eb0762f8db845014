//! How a guest asks for a reset, switches itself off or says that it panicked: the reset control register (0xcf9), the keyboard
//! controller's reset command (0x64), sleep enable (0x604) and the panic port (0x505). With them come ACPI's power management
//! events (0x600), which never happen.

mod device;
mod state;

pub(crate) use device::{PowerControl, PowerRequest};
