//! QEMU's machine protocol: one JSON object a line, answers and events mixed.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

/// A connection. A thread of its own reads, so that an event carries the time at which it came.
pub(super) struct Qmp {
    stream: UnixStream,
    messages: Receiver<(Instant, Value)>,
    events: VecDeque<(Instant, Value)>,
}

impl Qmp {
    /// Connects as soon as QEMU listens and leaves its negotiation mode.
    ///
    /// # Errors
    /// If QEMU does not listen or does not greet in time.
    pub(super) fn connect(socket: &Path, timeout: Duration) -> Result<Self> {
        let deadline = Instant::now() + timeout;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| format!("failed to reach {}", socket.display()));
                }
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        };
        let reader = stream.try_clone().context("failed to share the QMP socket")?;
        let (sender, messages) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(reader).lines().map_while(Result::ok) {
                let Ok(message) = serde_json::from_str(&line) else {
                    continue;
                };
                if sender.send((Instant::now(), message)).is_err() {
                    return;
                }
            }
        });
        let mut qmp = Self {
            stream,
            messages,
            events: VecDeque::new(),
        };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Executes one command and gives what it returned.
    ///
    /// # Errors
    /// QEMU's own error text, or that it did not answer.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.stream
            .write_all(line.as_bytes())
            .with_context(|| format!("failed to send {command}"))?;
        loop {
            let (at, mut message) = self
                .messages
                .recv_timeout(ANSWER)
                .with_context(|| format!("no answer to {command}"))?;
            if message.get("event").is_some() {
                self.events.push_back((at, message));
            } else if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            } else if let Some(error) = message.get("error") {
                bail!("{command}: {}", error["desc"]);
            }
        }
    }

    /// Waits for an event and gives the time at which it came, perhaps before this call.
    ///
    /// # Errors
    /// If it does not come in time, or the migration fails.
    pub(super) fn wait_for_event(&mut self, name: &str, timeout: Duration) -> Result<Instant> {
        let deadline = Instant::now() + timeout;
        loop {
            let (at, message) = match self.events.pop_front() {
                Some(event) => event,
                None => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    self.messages
                        .recv_timeout(left)
                        .map_err(|_| anyhow!("no event {name} in {} s", timeout.as_secs()))?
                }
            };
            if message["event"] == name {
                return Ok(at);
            }
            if message["event"] == "MIGRATION" && message["data"]["status"] == "failed" {
                bail!("QEMU says that the migration failed");
            }
        }
    }
}

/// How long a command may take.
const ANSWER: Duration = Duration::from_secs(30);
