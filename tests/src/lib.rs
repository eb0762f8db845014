//! The harness: agents as processes of the built binary `ferry`, guests on real KVM, and a witness of what they live through.
//!
//! It sees Ferry as a user does: the command line with `-o json`, exit codes, processes, and the console log of each guest.
//! Nothing here links the product. Everything that a [`Pair`] started is gone when it is dropped, after a panic too.

#![forbid(unsafe_code)]

pub mod answer;
pub mod binary;
mod carried;
pub mod complaints;
pub mod disk;
pub mod echo;
pub mod guest;
pub mod hanging;
pub mod host;
pub mod huge_pages;
pub mod intrusion;
pub mod linux;
pub mod loop_device;
pub mod memory_limit;
pub mod messages;
pub mod network;
pub mod pair;
pub mod passing;
pub mod process;
pub mod relay;
pub mod shaped;
pub mod switch;
pub mod tampering;
pub mod waiting;
pub mod witness;

pub use answer::{Answer, Migration};
pub use guest::Guest;
pub use hanging::HangingDisk;
pub use host::{Call, Host};
pub use huge_pages::HugePages;
pub use loop_device::LoopDevice;
pub use network::Network;
pub use pair::Pair;
pub use relay::Relay;
pub use shaped::ShapedLink;
pub use switch::Switch;
pub use tampering::{Cut, CutPoint, Tampering};
pub use waiting::until;
pub use witness::Witness;
