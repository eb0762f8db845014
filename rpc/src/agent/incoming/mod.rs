//! Migrations into this host: agent B's part.
//!
//! Each has one task ([`driver`]) that owns its `handover::DestinationAgent` and is the only one that writes its row of
//! the decision register. Requests and the VMM's news reach it through channels.

mod asking;
mod decisions;
mod driver;
mod expected_images;
mod first_frames;
mod handle;
mod late;
mod prepare;
mod reconnecting;
mod reservations;
mod undoing;

pub(crate) use driver::recover;
pub(crate) use expected_images::ExpectedImages;
pub(crate) use handle::{Incoming, IncomingMigrations};
pub(crate) use prepare::without_disks;
pub(crate) use reservations::Reservations;
