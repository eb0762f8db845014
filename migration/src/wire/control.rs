//! The control stream: protobuf messages, each after eight bytes of magic number and length.

use std::io::{self, Read, Write};

use prost::Message;

use super::frame::{FrameError, read_or_end};

/// The longest message: the state of a machine with hundreds of vCPUs stays far below.
const MAX_MESSAGE: u32 = 8 << 20;

/// The first bytes of every message, `FCTL` in ASCII.
const MAGIC: [u8; 4] = *b"FCTL";

/// Why the control stream cannot be used on.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The peer closed it.
    #[error("the peer closed the connection")]
    Closed,
    /// The connection failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// Not a message.
    #[error("a message begins with {0:02x?} instead of the magic number")]
    Magic([u8; 4]),
    /// A message longer than allowed.
    #[error("a message of {0} bytes, at most {MAX_MESSAGE} are allowed")]
    TooLong(u64),
    /// A message that does not parse.
    #[error("a message does not parse")]
    Malformed(#[source] prost::DecodeError),
}

impl ControlError {
    /// Whether the connection broke, rather than what it carried.
    pub(crate) fn is_connection(&self) -> bool {
        matches!(self, Self::Closed | Self::Io(_))
    }
}

/// Writes one message.
///
/// # Errors
/// The connection's error; [`ControlError::TooLong`] before anything is written.
pub(crate) fn write_message(socket: &mut impl Write, message: &impl Message) -> Result<(), ControlError> {
    let length = message.encoded_len();
    let prefix = u32::try_from(length).ok().filter(|&length| length <= MAX_MESSAGE);
    let prefix = prefix.ok_or(ControlError::TooLong(length as u64))?;
    let mut bytes = Vec::with_capacity(8 + length);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&prefix.to_le_bytes());
    message.encode_raw(&mut bytes);
    socket.write_all(&bytes).map_err(ControlError::Io)
}

/// Reads one message.
///
/// # Errors
/// [`ControlError::Closed`] at the end of the stream, otherwise what is wrong with it.
pub(crate) fn read_message<M: Message + Default>(socket: &mut impl Read) -> Result<M, ControlError> {
    let mut prefix = [0; 8];
    match read_or_end(socket, &mut prefix) {
        Ok(true) => {}
        Ok(false) | Err(FrameError::Truncated) => return Err(ControlError::Closed),
        Err(FrameError::Io(error)) => return Err(ControlError::Io(error)),
        Err(other) => return Err(ControlError::Io(io::Error::other(other))),
    }
    let [a, b, c, d, length @ ..] = prefix;
    if [a, b, c, d] != MAGIC {
        return Err(ControlError::Magic([a, b, c, d]));
    }
    let length = u32::from_le_bytes(length);
    if length > MAX_MESSAGE {
        return Err(ControlError::TooLong(length.into()));
    }
    let mut body = vec![0; length as usize];
    socket.read_exact(&mut body).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => ControlError::Closed,
        _ => ControlError::Io(error),
    })?;
    M::decode(&*body).map_err(ControlError::Malformed)
}

#[cfg(test)]
mod tests {
    use ferry_proto::stream::v1::{Barrier, FromSource, Hello, from_source};
    use proptest::prelude::*;

    use super::*;

    fn message() -> FromSource {
        let barrier = Barrier {
            round: 5,
            totals: Vec::new(),
        };
        FromSource {
            message: Some(from_source::Message::Barrier(barrier)),
        }
    }

    fn written(message: &FromSource) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_message(&mut bytes, message).unwrap();
        bytes
    }

    #[test]
    fn a_message_comes_out_as_it_went_in() {
        let bytes = written(&message());
        assert_eq!(read_message::<FromSource>(&mut &*bytes).unwrap(), message());
    }

    #[test]
    fn too_long_is_refused_on_both_sides_before_anything_is_allocated() {
        let hello = Hello {
            profile: vec![0; MAX_MESSAGE as usize],
            ..Hello::default()
        };
        let long = FromSource {
            message: Some(from_source::Message::Hello(hello)),
        };
        assert!(matches!(
            write_message(&mut Vec::new(), &long),
            Err(ControlError::TooLong(_))
        ));
        let claimed = [b"FCTL".as_slice(), &u32::MAX.to_le_bytes()].concat();
        assert!(matches!(
            read_message::<FromSource>(&mut &*claimed),
            Err(ControlError::TooLong(_))
        ));
    }

    #[test]
    fn something_else_on_the_port_is_named() {
        let error = read_message::<FromSource>(&mut b"GET / HTTP/1.1\r\n".as_slice()).unwrap_err();
        assert!(matches!(error, ControlError::Magic(found) if &found == b"GET "));
    }

    #[test]
    fn an_end_inside_a_message_is_a_closed_connection() {
        let bytes = written(&message());
        assert!(matches!(
            read_message::<FromSource>(&mut &bytes[..9]),
            Err(ControlError::Closed)
        ));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let framed = [b"FCTL".as_slice(), &u32::try_from(bytes.len()).unwrap().to_le_bytes(), &bytes].concat();
            let _ = read_message::<FromSource>(&mut &*framed);
            prop_assert!(read_message::<FromSource>(&mut &*bytes).is_err());
        }
    }
}
