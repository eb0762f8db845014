//! `ferry agent`: the daemon of one host.
//!
//! It owns the host's instances, the journal and every decision; it never touches guest memory and never waits for a vCPU.
//!
//! | module | is |
//! | --- | --- |
//! | [`serve`](serve()), `recovery` | start, and what is found again after a restart |
//! | `instances`, `images`, `console` | what users do with instances |
//! | `snapshots` | an instance written to a folder, and made of one |
//! | `backends` | what their disks and network cards work on |
//! | `outgoing` | one task per migration out of here: a script, then the switchover by `handover::SourceAgent` |
//! | `incoming`, `data_port` | one task per migration into here: `handover::DestinationAgent` |
//! | `transport` | the streams of a migration through both agents, where there is no way to the data port |
//! | `mode`, `steps` | how a guest moves, and the steps of both sides with their undos |
//! | `peers`, `compute_rpcapi`, `versions` | other agents, and what they are told at which version |
//! | `compute`, `conductor` | the gRPC services: convert, call, map the error; the conductor's task checks, chooses and casts |
//! | `failure`, `unread` | what is answered when something is not done, or could not be read |
//! | `checks`, `claims`, `reason` | whether this host can have an instance, and why not |
//! | `prediction` | what a migration would come to |
//! | `resolving` | a person ends a migration that nobody can decide |
//! | `context`, `who`, `sock_diag` | in which request, for whom and until when something is done |
//! | `events` | what was done to each instance, and what failed |
//! | `health` | what standard gRPC clients ask of any server |
//! | `journal`, `spawn`, `vmm_client` | SQLite, VMM processes, their sockets |

mod backends;
mod checks;
mod claims;
mod compute;
mod compute_rpcapi;
mod conductor;
mod config;
mod console;
mod context;
mod data_port;
mod data_room;
mod events;
mod failure;
mod health;
mod host;
mod huge_pages;
mod images;
mod incoming;
mod instances;
mod journal;
mod marks;
mod mode;
mod outgoing;
mod peer_journal;
mod peers;
mod prediction;
mod reason;
mod recovery;
mod resolving;
mod serve;
mod snapshots;
mod sock_diag;
mod spawn;
mod steps;
mod transport;
mod unread;
mod versions;
mod vmm_client;
pub(crate) mod vmm_user;
mod who;

pub(crate) use backends::{NIC_RATES, is_interface_name};
pub use claims::AllocationRatios;
pub use config::AgentConfig;
pub(crate) use host::remove_leftovers;
pub(crate) use journal::RowWrite;
pub(crate) use peers::Call;
pub use serve::serve;
#[cfg(any(fuzzing, test))]
pub(crate) use snapshots::read_hostile_manifest;
pub use spawn::cgroup_root;
pub(crate) use steps::{POST_COPY, SourceStep};
pub(crate) use transport::Transport;
#[cfg(any(fuzzing, test))]
pub(crate) use transport::read_hostile_messages;
pub use versions::RpcVersion;
pub use vmm_user::UserRange;
