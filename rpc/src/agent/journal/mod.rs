//! `journal.db`: instances, migrations, the decision register, who did what and what came of it, durable.
//!
//! SQLite in WAL mode with `synchronous=FULL`, written by one thread; a write is answered once it is on the disk, and those that
//! come together share one commit. It can be read with `sqlite3` while the agent runs. Nothing is checkpointed while a switchover is
//! between ARM and CONFIRM, so that the one write inside the blackout is one append and one fsync.
//!
//! Events and faults decide nothing. Those that come with a decision are written in its transaction; the others are
//! [noted](Journal::note): they outlive the agent, and need no fsync.

mod arrivals;
mod audit;
mod decisions;
mod events;
#[cfg(test)]
mod fault_tests;
mod faults;
mod identity;
mod instances;
mod migrations;
mod row_write;
mod schema;
mod together;
mod writer;

pub(crate) use arrivals::Arrival;
pub(crate) use audit::AuditRow;
pub(crate) use decisions::DecisionRow;
pub(crate) use events::{EventEnd, EventRow, MIGRATE, MIGRATE_IN, interrupt};
pub(crate) use faults::FaultRow;
pub(crate) use instances::{InstanceRow, Restarts, Status};
pub(crate) use migrations::{Depth, MigrationRow, Report, Role};
pub(crate) use row_write::RowWrite;
pub(crate) use writer::{Journal, JournalError};
