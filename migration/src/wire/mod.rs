//! What travels between the two VMMs of a migration; `docs/wire.md` has the byte layouts.

mod control;
mod frame;
mod handshake;
mod holding;
mod messages;
mod spoken;
mod texts;

pub use control::ControlError;
#[cfg(test)]
pub(crate) use control::written_plainly;
pub(crate) use control::{read_message, write_message};
pub use frame::FrameError;
#[cfg(any(fuzzing, test))]
pub(crate) use frame::summed_up;
pub(crate) use frame::{
    Content, FrameReader, FrameWriter, MAX_DATA_PAGES, MAX_RUNS, Pages, StreamIdentity, Sums, Wish,
};
pub(crate) use handshake::{LATE_PAGES_SINCE, RESUMES_SINCE, VERIFY_SINCE, Versions, Wishes, check_hello, hello};
pub use handshake::{OLDEST_PROTOCOL, PROTOCOL};
pub(crate) use holding::{Holdings, holding_to_wire};
pub use messages::StreamTotals;
pub(crate) use messages::{
    RUNS_PER_PART, attempt_from_wire, attempt_to_wire, digest_from_wire, gaps_and_lengths, population_to_wire,
    runs_from_wire,
};
pub(crate) use spoken::{Spoken, kind_of_said};
pub use texts::shorten;
pub(crate) use texts::shorten_all;
