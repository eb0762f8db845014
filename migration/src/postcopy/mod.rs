//! Pages that come late: after GO, when they are touched, or pushed behind.
//!
//! ```text
//!   source ──── Missing parts, GO ────► destination watches the missing pages, restores, runs
//!     ▲  ◄── which are missing now ───┐     │ a page is touched
//!     │  ◄── asks, urgent streams ────┴─────┘
//!     └─ pages: what was asked for on the urgent streams, all the rest on the others ─► supplied ─► AllHere
//! ```
//!
//! A *session* is one set of connections. When one of them breaks, all are cut, whoever waits for a page waits on, and the next set that
//! the agents make begins another session: the destination says anew which pages are missing, so nothing depends on what was under way.
//! The source's copy does not change any more, so a page may be sent twice.

mod asking;
mod choice;
mod destination;
mod gathering;
mod latency;
mod sending;
mod source;
mod table;
mod taking;
mod unsent;
mod waiting;

pub use choice::Lateness;
pub(crate) use choice::Shrinking;
pub(crate) use destination::Awaited;
pub use destination::{LateOutcome, LatePages, LateReport};
pub use latency::Latency;
pub use source::{PagesToServe, ServeOrder, ServeParameters, ServeReport, Served, serve};
pub(crate) use table::{Table, checksum, parts};

/// How many streams of a session are for pages that somebody waits for; they come first.
pub const URGENT_STREAMS: usize = 2;

/// Why a session ended before its time.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionLost {
    /// The peer said nothing for too long.
    #[error("the other side has been silent for {:.1}s", .0.as_secs_f64())]
    Silent(std::time::Duration),
    /// The control stream failed.
    #[error("the control stream of late pages was lost")]
    Control(#[source] crate::wire::ControlError),
    /// A page stream failed.
    #[error("stream {0} of late pages was lost")]
    Stream(u16, #[source] Option<crate::wire::FrameError>),
    /// The peer said something that makes no sense here.
    #[error("the other side misbehaved: {0}")]
    Misbehaved(String),
    /// The agent brought other connections.
    #[error("other connections took its place")]
    Replaced,
    /// The connections cannot be set up, or a thread cannot be had.
    #[error("this host could not set it up")]
    Host(#[source] std::io::Error),
}
