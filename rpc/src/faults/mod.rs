//! Where a migration can be cut, and the way for a test to cut it there.
//!
//! A [`Site`] is a place at which an actor can die or a message can be lost: each effect of the switchover's cores,
//! each row of the journal, each call between agents, each order and report between an agent and its VMM, each message
//! between the VMMs. Sites derive from those enums by matches without a wildcard: a new effect or message that has no site does
//! not compile, and neither does a matrix (`tests/tests/matrix/`) that does not say how it is reached.
//!
//! An agent that was started with the hidden `--fault-gate SOCKET` asks there, before and after each site, and waits for the
//! word: to go on, or to lose or to double the message. Without the flag a site is one load of a `OnceLock`. VMMs have no gate,
//! because their jail has no way out to one: what they and their agent say to each other is cut at the agent's end of the channel,
//! where a message that is held is the same bytes in the same order, and what VMMs say to each other is cut on the wire by whoever
//! stands between them.

mod gate;
mod sites;

pub use gate::{Word, open};
pub(crate) use gate::{reach, reach_blocking, reach_row};
pub use sites::{Kind, Moment, Site};
pub(crate) use sites::{answer_to, order, report};
