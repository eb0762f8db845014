//! The control stream between two VMMs, message by message, for whoever stands between them.

use std::fmt;
use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;

use crate::passing::{MESSAGE_HEADER, read_message};

/// Fields of what a source says in the oneof of its messages (`migration/src/wire/messages.rs`), for who looks for them.
pub mod from_source {
    /// The end of a round.
    pub const BARRIER: u32 = 3;
    /// The machine's state.
    pub const STATE: u32 = 4;
    /// Digests are asked for.
    pub const DIGEST_REQUEST: u32 = 5;
}

/// Fields of what a destination says.
pub mod from_destination {
    /// The answer to a round's end.
    pub const BARRIER_REACHED: u32 = 3;
    /// What late pages it lacks.
    pub const MISSING: u32 = 20;
    /// It has all late pages.
    pub const ALL_HERE: u32 = 21;
}

/// Which connection is what, of a migration that has one page stream and late pages.
pub mod of_one_stream {
    /// The control stream of late pages.
    pub const CONTROL: u16 = 1;
    /// On these pages are asked for and answered.
    pub const URGENT: std::ops::RangeInclusive<u16> = 2..=3;
    /// The one on which the others are pushed.
    pub const PUSHED: u16 = 4;
}

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaker {
    /// The source's VMM.
    Source,
    /// The destination's VMM.
    Destination,
}

/// On which side of passing a message on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// It is here, and not passed on yet.
    Before,
    /// It was passed on.
    After,
}

/// What becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passing {
    /// It is passed on.
    Once,
    /// It is passed on twice.
    Twice,
    /// The connection is cut in both directions.
    Cut,
}

/// Looks at each message, without magic number and length, before and after it is passed on; may take its time.
#[derive(Clone)]
pub struct Observer(Arc<Look>);

type Look = dyn Fn(Speaker, Side, &[u8]) -> Passing + Send + Sync;

impl Observer {
    /// Whoever looks like this.
    pub fn new(look: impl Fn(Speaker, Side, &[u8]) -> Passing + Send + Sync + 'static) -> Self {
        Self(Arc::new(look))
    }

    /// Passes on all that `from` says, until either side ends, and then ends the other.
    pub(crate) fn pass(&self, speaker: Speaker, from: &TcpStream, to: &TcpStream) {
        // However it ends: the side that is left learns of it by its own connection.
        let _ = self.pass_all(speaker, from, to);
        let _ = to.shutdown(Shutdown::Write);
    }

    fn pass_all(&self, speaker: Speaker, from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
        let cut = || {
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        };
        loop {
            let message = read_message(from)?;
            let said = &message[MESSAGE_HEADER..];
            let times = match (self.0)(speaker, Side::Before, said) {
                Passing::Once => 1,
                Passing::Twice => 2,
                Passing::Cut => {
                    cut();
                    return Ok(());
                }
            };
            let written = (0..times).try_for_each(|_| to.write_all(&message));
            // Also of one that nobody is there to take any more: it left.
            if (self.0)(speaker, Side::After, said) == Passing::Cut {
                cut();
                return Ok(());
            }
            written?;
        }
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Observer")
    }
}
