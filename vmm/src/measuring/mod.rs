//! For those who measure migrations, here and in peers: the host's free memory, processor time, and the limit of a copy.

mod cpu;
mod fetch;
mod limit;
mod warm;

pub use cpu::{CpuMeter, process_children};
pub use fetch::{LeastFetch, least_fetch};
pub use limit::{RawCopy, raw_copy};
pub use warm::warm_host_memory;
