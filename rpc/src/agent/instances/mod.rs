//! The instances of this host: one owner of each one's row, VMM and task.

mod balloon;
mod instance;
mod lifecycle;
mod spec;
mod stopping;
mod watch;

pub(crate) use instance::{Agent, Instance, InstanceState, VmmNews};
pub(crate) use lifecycle::{NewRight, check_incoming};
pub(crate) use stopping::Press;
