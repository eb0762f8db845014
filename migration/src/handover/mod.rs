//! Who runs the guest: the pure cores of the switchover, one per actor.
//!
//! Four actors take part, and each can die alone: the agent and the VMM of the source, the agent and the VMM of the
//! destination. Nothing here does any input or output; agents and VMMs feed events in and carry effects out:
//!
//! | actor | core | owns |
//! | --- | --- | --- |
//! | agent A | [`SourceAgent`] | when to arm, when to ask, when to resume or destroy |
//! | VMM A | [`Grants`] | the fact GO: a grant is traded once, for GO-sent or for CANCELLED |
//! | VMM B, and every VMM | [`Permits`] | which epochs it has had |
//! | agent B | [`DestinationAgent`] | the decision register D(M,n) |
//! | an agent whose guest has no VMM | [`Fallen`] | who may start it again, and under which epoch |
//! | an agent that a person tells | [`Doubt`] | how `resolve` ends a migration that nobody can decide |
//!
//! Effects are carried out strictly in the order in which they are listed; a durable write that fails ends its list
//! and comes back as an event. `docs/handover.md` tells the whole protocol,
//! and `tests/model/` searches it exhaustively, around these very cores.

mod attempt;
mod destination_agent;
mod grants;
mod permits;
mod register;
mod resolve;
mod restart;
mod source_agent;

pub use attempt::{Attempt, Epoch, Permit};
pub use destination_agent::{DestinationAgent, DestinationEffect, DestinationEvent};
pub use grants::{GrantRefused, GrantRegister, Grants, Traded};
pub use permits::{PermitRefused, Permits};
pub use register::{Decision, HandBack, IllegalMove, Move};
pub use resolve::{Doubt, NotResolved, Peer, Side, Wish};
pub use restart::{BackOff, Ended, Fallen, Heard, Leaving, Origin, PeerCopy, RestartPolicy, Verdict, Wanted, heard};
pub use source_agent::{
    Copy as SourceCopy, Ending, SourceAgent, SourceEffect, SourceEvent, SourceState, pause_before_asking_again,
};
