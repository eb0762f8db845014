//! The terminal: raw while typing into a guest, and a line that is drawn again and again.

use std::io::{self, IsTerminal, Write};

use rustix::termios::{LocalModes, OptionalActions, OutputModes, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::failure::{Exit, Failure};

/// The terminal on stdin with each key passed on at once, Ctrl-C too, until this is dropped.
pub(super) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// # Errors
    /// Stdin is not a terminal, or will not change.
    pub(super) fn enter() -> Result<Self, Failure> {
        let failed = |error| Failure::new(Exit::Failed, format!("set the terminal to raw: {error}"));
        let before = tcgetattr(io::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        // Guests may end lines without a carriage return.
        raw.output_modes |= OutputModes::OPOST;
        raw.local_modes.remove(LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Flush, &raw).map_err(failed)?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing better can be done about a terminal that went away.
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.before);
    }
}

/// A line on stderr that is redrawn in place, where stderr is a terminal.
#[derive(Debug)]
pub(super) struct LiveLine {
    on_terminal: bool,
    drawn: bool,
}

impl LiveLine {
    pub(super) fn new() -> Self {
        Self {
            on_terminal: io::stderr().is_terminal(),
            drawn: false,
        }
    }

    pub(super) fn is_live(&self) -> bool {
        self.on_terminal
    }

    /// Shows the text instead of what was there; does nothing where there is no terminal.
    pub(super) fn draw(&mut self, text: &str) {
        if !self.on_terminal {
            return;
        }
        let columns = tcgetwinsize(io::stderr()).map_or(80, |size| usize::from(size.ws_col).max(20));
        let shown: String = text.chars().take(columns - 1).collect();
        let mut stderr = io::stderr().lock();
        // A terminal that went away shows nothing; the work goes on.
        let _ = write!(stderr, "\r\x1b[2K{shown}").and_then(|()| stderr.flush());
        self.drawn = true;
    }

    /// Removes the line, so that other text may be printed.
    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.drawn) {
            let mut stderr = io::stderr().lock();
            let _ = write!(stderr, "\r\x1b[2K").and_then(|()| stderr.flush());
        }
    }
}

impl Drop for LiveLine {
    fn drop(&mut self) {
        self.clear();
    }
}
