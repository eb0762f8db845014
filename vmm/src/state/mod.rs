//! The saved state of a machine and the profile that goes ahead of it: plain data, versioned, hostile until decoded.
//!
//! On the wire it is `ferry.state.v1`: an envelope of named units, each with schema and version. A unit that is unknown, missing, there twice, of
//! another version or with bytes left over is an error; nothing in here panics on any input.

mod envelope;
mod profile;
mod vcpu;
mod whole;

pub use envelope::StateError;
pub use profile::{MachineProfile, UnitKind};
pub use whole::MachineState;
pub(crate) use whole::{IrqchipState, unit_kinds};
