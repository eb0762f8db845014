//! Waits on a condition with a deadline; never for a time.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Asks every 10 ms until there is an answer.
///
/// # Errors
/// If `ask` fails, or there is no answer within `deadline`.
pub fn until<T>(what: &str, deadline: Duration, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let late = Instant::now() + deadline;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() > late {
            bail!("waited {:.1} s in vain: {what}", deadline.as_secs_f64());
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// How long a local call may take on a busy machine.
pub const CALL: Duration = Duration::from_secs(30);

/// How long a whole migration may take on a busy machine.
pub const MOVE: Duration = Duration::from_secs(60);
