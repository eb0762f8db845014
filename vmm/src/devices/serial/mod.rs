//! The serial console: a 16550 at ports 0x3f8 to 0x3ff, interrupt line 4. The registers are vm-superio's.

mod device;
mod state;

pub(crate) use device::SerialPort;
