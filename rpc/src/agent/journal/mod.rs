//! `journal.db`: instances, migrations and the decision register, durable.
//!
//! SQLite in WAL mode with `synchronous=FULL`, written by one thread; a write is answered once it is on the disk. It can
//! be read with `sqlite3` while the agent runs. Nothing is checkpointed while a switchover is between ARM and CONFIRM,
//! so that the one write inside the blackout is one append and one fsync.

mod decisions;
mod instances;
mod migrations;
mod schema;
mod writer;

pub(crate) use decisions::DecisionRow;
pub(crate) use instances::{InstanceRow, Status};
pub(crate) use migrations::{MigrationRow, Role};
pub(crate) use writer::{Journal, JournalError};
