//! The instances of this host: one owner of each one's row, VMM and task.

mod arrivals;
mod balloon;
mod instance;
mod lifecycle;
mod restarting;
mod spec;
mod stopping;
mod watch;

pub(crate) use instance::{Agent, Instance, InstanceState, VmmNews};
pub(crate) use lifecycle::{NewRight, check_incoming, why_not_incoming};
pub(crate) use restarting::restart_when_due;
pub(crate) use stopping::Press;
