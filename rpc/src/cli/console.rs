//! `console` and `logs`: what a guest and its VMM said on one host, and typing into the guest.

use std::io::{IsTerminal, Read};
use std::time::Duration;

use ferry_proto::agent::v1::{ConsoleInputRequest, ConsoleOutput, ConsoleRequest};
use serde_json::json;
use tokio::sync::mpsc;
use tonic::Streaming;

use super::arguments::{ConsoleArguments, Named};
use super::client::{Agent, ComputeClient, PATIENCE, within};
use super::failure::{Exit, Failure, Outcome};
use super::output::{self, Format, note};
use super::terminal::RawTerminal;

pub(super) async fn console(agent: &Agent, arguments: ConsoleArguments, format: Format) -> Outcome {
    let name = arguments.named.name;
    let mut client = agent.compute().await?;
    let follow = arguments.follow || arguments.attach;
    let request = ConsoleRequest {
        instance: name.clone(),
        follow,
    };
    let opened = client.console(request).await;
    let stream = opened
        .map_err(|status| Failure::of_status(&format!("console of {name}"), &status))?
        .into_inner();
    if arguments.attach {
        attach(client, name, stream).await
    } else {
        print(&format!("console of {name}"), stream, format).await
    }
}

pub(super) async fn logs(agent: &Agent, named: Named, follow: bool, format: Format) -> Outcome {
    let what = format!("logs of {}", named.name);
    let request = ConsoleRequest {
        instance: named.name,
        follow,
    };
    let opened = agent.compute().await?.logs(request).await;
    print(
        &what,
        opened
            .map_err(|status| Failure::of_status(&what, &status))?
            .into_inner(),
        format,
    )
    .await
}

async fn print(what: &str, mut stream: Streaming<ConsoleOutput>, format: Format) -> Outcome {
    let mut printer = Printer::new(format);
    let outcome = loop {
        tokio::select! {
            message = stream.message() => match message {
                Ok(Some(output)) => printer.print(&output.bytes)?,
                Ok(None) => break Ok(Exit::Done),
                Err(status) => break Err(Failure::of_status(what, &status)),
            },
            _ = tokio::signal::ctrl_c() => break Ok(Exit::Interrupted),
        }
    };
    printer.end()?;
    outcome
}

/// Prints what the guest prints and sends what is typed, until Ctrl-], the end of the guest's stay here, or Ctrl-C
/// where no terminal takes it.
async fn attach(mut client: ComputeClient, name: String, mut stream: Streaming<ConsoleOutput>) -> Outcome {
    let on_terminal = std::io::stdin().is_terminal();
    if on_terminal {
        note("attached: Ctrl-] leaves");
    }
    // Restores the terminal however this function is left.
    let raw = on_terminal.then(RawTerminal::enter).transpose()?;
    let mut typed = read_stdin();
    let mut open = true;
    let outcome = loop {
        tokio::select! {
            message = stream.message() => match message {
                Ok(Some(output)) => output::bytes(&output.bytes)?,
                Ok(None) => break Ok(Exit::Done),
                Err(status) => break Err(Failure::of_status(&format!("console of {name}"), &status)),
            },
            input = typed.recv(), if open => match input {
                None => open = false,
                Some(bytes) => {
                    let (bytes, leave) = until_leaving(&bytes, on_terminal);
                    if let Err(status) = send(&mut client, &name, bytes).await {
                        break Err(status);
                    }
                    if leave {
                        break Ok(Exit::Done);
                    }
                }
            },
            _ = tokio::signal::ctrl_c() => break Ok(Exit::Interrupted),
        }
    };
    drop(raw);
    if on_terminal {
        note("");
    }
    outcome
}

async fn send(client: &mut ComputeClient, name: &str, bytes: &[u8]) -> Result<(), Failure> {
    if bytes.is_empty() {
        return Ok(());
    }
    let request = ConsoleInputRequest {
        instance: name.to_owned(),
        bytes: bytes.to_vec(),
    };
    let answered = client
        .console_input(within(PATIENCE + Duration::from_secs(1), request))
        .await;
    answered
        .map(|_| ())
        .map_err(|status| Failure::of_status(&format!("type into {name}"), &status))
}

/// What to send of what was typed, and whether the key that leaves was among it. Only a terminal has that key.
fn until_leaving(bytes: &[u8], on_terminal: bool) -> (&[u8], bool) {
    match bytes.iter().position(|&byte| on_terminal && byte == LEAVE) {
        Some(at) => (&bytes[..at], true),
        None => (bytes, false),
    }
}

/// Reads stdin on a thread of its own: a blocked read cannot be cancelled. The thread dies with the process.
fn read_stdin() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        let mut stdin = std::io::stdin().lock();
        while let Ok(count @ 1..) = stdin.read(&mut buffer) {
            if sender.blocking_send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Bytes as they are for people; for programs an object for each line.
struct Printer {
    format: Format,
    partial: Vec<u8>,
}

impl Printer {
    fn new(format: Format) -> Self {
        Self {
            format,
            partial: Vec::new(),
        }
    }

    fn print(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        if self.format == Format::Human {
            return output::bytes(bytes);
        }
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.partial.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                self.end()?;
            }
        }
        Ok(())
    }

    /// Prints a last line that has no end yet.
    fn end(&mut self) -> Result<(), Failure> {
        if self.partial.is_empty() {
            return Ok(());
        }
        let line = std::mem::take(&mut self.partial);
        let text = String::from_utf8_lossy(&line);
        output::json_line(&json!({ "line": text.trim_end_matches(['\r', '\n']) }))
    }
}

/// Ctrl-]
const LEAVE: u8 = 0x1d;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_leaving_key_counts_on_a_terminal_only() {
        assert_eq!(until_leaving(b"ls\x1drest", true), (&b"ls"[..], true));
        assert_eq!(until_leaving(b"ls\x1drest", false), (&b"ls\x1drest"[..], false));
        assert_eq!(until_leaving(b"ls\n", true), (&b"ls\n"[..], false));
    }
}
