//! vCPUs as threads: one each, named `vcpu0` and so on, started paused, told what to do by commands.
//!
//! ```text
//!            Run                      Finish
//!   Paused ───────► Running ────────────────► Finished
//!     ▲  ▲             │  │                      ▲
//!     │  └── Pause ────┘  │ the guest stopped     │
//!     └───────────────────┘ itself       Finish ──┘ (from Paused)
//! ```

mod kick;
mod thread;
mod throttle;

pub(crate) use thread::{ANSWER_DEADLINE, Pending, VcpuError, VcpuHandle, VcpuSetup};
pub(crate) use throttle::Throttle;
pub use throttle::{LONGEST_REST, MOST_PERCENT};
