//! Migrations out of this host: agent A's part.
//!
//! Each has one task. [`script`] reads as Nova's `_do_live_migration`: queue, prepare, connect, send; then [`switchover`]
//! drives `handover::SourceAgent` to the end, which says what has become of the guest, and [`ending`] carries that out.

mod begin;
mod calls;
mod connecting;
mod ending;
mod figures;
mod handle;
mod late_pages;
mod network_gap;
mod options;
mod preparing;
mod queue;
mod reconnecting;
mod retuning;
mod script;
mod serving;
mod streams;
mod switchover;

pub(crate) use begin::{recover, request_id, wait_on, waits};
pub(in crate::agent) use connecting::{Wanted, connect};
pub(crate) use figures::note_completed;
pub(crate) use handle::{MOST_STREAMS, Outgoing, OutgoingMigrations, PeerNews, now_ms, now_text};
pub(crate) use options::{MOST_RESUME_WINDOW_MS, check_options, compression};
pub(crate) use queue::Queue;
pub(crate) use retuning::check_retuning;
pub(crate) use serving::recover_serving;
pub(crate) use streams::{at_once, late_streams, page_streams};
