//! Nova's conductor: checks whether an instance can migrate, chooses where to, and casts the migration to its source.
//!
//! | module | is |
//! | --- | --- |
//! | `service` | the gRPC service: convert, call, map the error |
//! | [`task`] | Nova's LiveMigrationTask, from the request to the receipt |
//! | `dry_run` | the same without a cast: every reason against it, and what it would come to |
//! | [`scheduler`] | filters and weighers, pure |
//! | `hosts` | the hosts as this one sees them |
//! | `listing` | the journal's migrations, some at a time |
//! | `refusals` | what is refused, written down here and where the instance is |
//!
//! It keeps nothing: a migration's record is its source's. An agent that dies here leaves nothing half done, and its caller
//! asks again with the same request id, which makes it the same migration.

mod dry_run;
mod hosts;
mod listing;
mod refusals;
mod scheduler;
mod service;
mod task;

pub(crate) use service::ConductorService;
