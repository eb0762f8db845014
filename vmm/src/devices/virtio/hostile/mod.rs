//! What fuzzing does with devices: each target makes of its bytes what a guest, or a peer with a saved state, may do to one.
//!
//! The first byte of an input says to which device. Nothing of an input is left when the next one comes: memory is zeroes again.

mod guest;
mod registers;
mod rings;
mod saved;

pub(crate) use self::registers::program as program_hostile_registers;
pub(crate) use self::rings::work_on as work_on_hostile_memory;
pub(crate) use self::saved::restore as restore_hostile_state;
