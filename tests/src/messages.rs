//! The control stream between two VMMs, message by message, for whoever stands between them.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;

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

    fn pass_all(&self, speaker: Speaker, mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
        let cut = || {
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        };
        loop {
            let mut message = vec![0; HEADER];
            from.read_exact(&mut message)?;
            let length = u32::from_le_bytes([message[4], message[5], message[6], message[7]]);
            message.resize(HEADER + length as usize, 0);
            from.read_exact(&mut message[HEADER..])?;
            let times = match (self.0)(speaker, Side::Before, &message[HEADER..]) {
                Passing::Once => 1,
                Passing::Twice => 2,
                Passing::Cut => {
                    cut();
                    return Ok(());
                }
            };
            let written = (0..times).try_for_each(|_| to.write_all(&message));
            // Also of one that nobody is there to take any more: it left.
            if (self.0)(speaker, Side::After, &message[HEADER..]) == Passing::Cut {
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

/// Magic number and length before a message.
const HEADER: usize = 8;
