//! Asking at the gate: one connection for each question, one line there and one word back.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::OnceLock;

use super::{Moment, Site, sites};
use crate::agent::RowWrite;

/// What the gate says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Go on.
    Go,
    /// The message is lost, and the connection with it where there is one that stays.
    Lose,
    /// The message comes twice.
    Double,
}

struct Gate {
    socket: PathBuf,
    host: String,
}

static GATE: OnceLock<Gate> = OnceLock::new();

/// From now on this process, agent of `host`, asks on `socket` at each site. Once for a process.
pub fn open(socket: PathBuf, host: String) {
    tracing::warn!(socket = %socket.display(), "--fault-gate: whoever listens there stops this agent and loses its messages");
    // A second gate has nobody that listens: the first stays.
    let _ = GATE.set(Gate { socket, host });
}

/// Asks and waits, in a task.
pub(crate) async fn reach(site: Site, moment: Moment) -> Word {
    if GATE.get().is_none() {
        return Word::Go;
    }
    let asked = tokio::task::spawn_blocking(move || reach_blocking(Some(site), moment));
    asked.await.unwrap_or(Word::Go)
}

/// Asks and waits beside a durable write, in a task. A row without a site goes on.
pub(crate) async fn reach_row(row: RowWrite, moment: Moment) {
    if let Some(site) = sites::row(row) {
        reach(site, moment).await;
    }
}

/// Asks and waits, in a thread that may. What has no site goes on.
pub(crate) fn reach_blocking(site: Option<Site>, moment: Moment) -> Word {
    match (GATE.get(), site) {
        (Some(gate), Some(site)) => gate.ask(site, moment),
        _ => Word::Go,
    }
}

impl Gate {
    /// Where nobody listens, or hangs up, it goes on.
    fn ask(&self, site: Site, moment: Moment) -> Word {
        let asked = || -> std::io::Result<Word> {
            let mut stream = UnixStream::connect(&self.socket)?;
            writeln!(stream, "{} {moment} {site}", self.host)?;
            let mut word = String::new();
            BufReader::new(stream).read_line(&mut word)?;
            Ok(match word.trim_end() {
                "lose" => Word::Lose,
                "double" => Word::Double,
                _ => Word::Go,
            })
        };
        asked().unwrap_or(Word::Go)
    }
}
