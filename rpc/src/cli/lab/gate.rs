//! The other end of the agents' `--fault-gate` in a lab: everything passes but one site, where the first to come is held.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::super::failure::{Exit, Failure};
use crate::faults::{Moment, Site};

/// Whom the gate is for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Hold {
    /// Whoever comes by this moment of the site first.
    Wanted(String),
    /// Somebody waits there.
    Held,
    /// Nobody: all go on.
    Nobody,
}

/// The gate. Dropping it lets everything pass.
pub(in crate::cli) struct Gate {
    hold: watch::Sender<Hold>,
    socket: PathBuf,
    accepting: JoinHandle<()>,
}

impl Gate {
    /// A gate in this folder, at which nobody is held yet.
    ///
    /// # Errors
    /// Its socket cannot be made.
    pub(in crate::cli) fn open(folder: &Path) -> Result<Self, Failure> {
        let socket = folder.join("gate.sock");
        let listener = UnixListener::bind(&socket)
            .map_err(|error| Failure::new(Exit::Failed, format!("listen on {}: {error}", socket.display())))?;
        let hold = watch::channel(Hold::Nobody).0;
        let state = hold.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream, state.clone()));
            }
        });
        Ok(Self {
            hold,
            socket,
            accepting,
        })
    }

    /// What agents are told of it.
    pub(in crate::cli) fn arguments(&self) -> [String; 2] {
        ["--fault-gate".to_owned(), self.socket.display().to_string()]
    }

    /// From now on the first to come by this moment of the site is held.
    pub(in crate::cli) fn hold(&self, moment: Moment, site: Site) {
        self.hold.send_replace(Hold::Wanted(format!("{moment} {site}")));
    }

    /// Waits until somebody is held. False: nobody came by in that time.
    pub(in crate::cli) async fn wait_held(&self, patience: Duration) -> bool {
        let mut hold = self.hold.subscribe();
        let held = hold.wait_for(|hold| *hold == Hold::Held);
        matches!(timeout(patience, held).await, Ok(Ok(_)))
    }

    /// Whoever is held goes on, and nobody is held any more.
    pub(in crate::cli) fn let_pass(&self) {
        self.hold.send_replace(Hold::Nobody);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.let_pass();
        self.accepting.abort();
    }
}

/// One question, `HOST MOMENT SITE`, and its answer. Whoever asked may have been killed where it was held.
async fn answer(stream: UnixStream, hold: watch::Sender<Hold>) {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    if BufReader::new(reader).read_line(&mut line).await.is_err() {
        return;
    }
    let passage = line.trim_end().split_once(' ').map_or("", |(_, passage)| passage);
    let is_held = hold.send_if_modified(|hold| {
        let is_wanted = matches!(hold, Hold::Wanted(wanted) if wanted == passage);
        if is_wanted {
            *hold = Hold::Held;
        }
        is_wanted
    });
    if is_held {
        let _ = hold.subscribe().wait_for(|hold| *hold == Hold::Nobody).await;
    }
    let _ = writer.write_all(b"go\n").await;
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(socket: &Path, question: &str) -> String {
        let stream = UnixStream::connect(socket).await.unwrap();
        let (reader, mut writer) = stream.into_split();
        writer.write_all(question.as_bytes()).await.unwrap();
        let mut word = String::new();
        BufReader::new(reader).read_line(&mut word).await.unwrap();
        word
    }

    #[tokio::test]
    async fn the_first_at_the_site_is_held_and_nobody_else() {
        let folder = tempfile::tempdir().unwrap();
        let gate = Gate::open(folder.path()).unwrap();
        assert_eq!(ask(&gate.socket, "a before order.grant\n").await, "go\n");
        gate.hold(Moment::Before, Site::OrderGrant);
        assert_eq!(ask(&gate.socket, "a after order.grant\n").await, "go\n");
        assert!(!gate.wait_held(Duration::ZERO).await);

        let socket = gate.socket.clone();
        let held = tokio::spawn(async move { ask(&socket, "a before order.grant\n").await });
        assert!(gate.wait_held(Duration::from_secs(10)).await);
        assert_eq!(ask(&gate.socket, "a before order.grant\n").await, "go\n");
        assert!(!held.is_finished());
        gate.let_pass();
        assert_eq!(held.await.unwrap(), "go\n");
    }
}
