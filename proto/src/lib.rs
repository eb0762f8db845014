//! Ferry's messages: what is generated from the `.proto` files.
//!
//! Three borders, three packages: [`agent`] between the command line and agents and among agents (gRPC), [`vmm`]
//! between an agent and its VMM processes (a Unix socket), [`stream`] between the two VMMs of a migration (TCP), and
//! [`state`], which is what a saved machine is made of. Field numbers are never reused, and a default value means the
//! old behaviour. What a message says is checked by whoever receives it: [`wire_uuid`] and its like say which field
//! was wrong.
#![forbid(unsafe_code)]

mod generated;
#[cfg(feature = "rpc")]
mod record;
mod validate;

pub use generated::{agent, state, stream, vmm};
pub use validate::{InvalidField, required, wire_uuid};

/// The services between the command line and agents, and among agents: an encoded `google.protobuf.FileDescriptorSet`.
pub const AGENT_DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/agent.descriptors"));
/// The version of the RPCs between agents, in Nova's manner: major, then minor.
pub const RPC_VERSION: &str = "4.3";
/// The newest version of the agent-VMM protocol that this build speaks.
pub const VMM_PROTOCOL: u32 = 2;
/// The oldest version of the agent-VMM protocol that this build speaks.
pub const OLDEST_VMM_PROTOCOL: u32 = 1;
