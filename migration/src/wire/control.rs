//! The control stream: protobuf messages, each after eight bytes of magic number and length.

use std::io::{self, Read, Write};

use prost::decode_length_delimiter;

use super::frame::{FrameError, read_or_end};
use super::spoken::Spoken;

/// The longest message: the state of a machine with hundreds of vCPUs stays far below.
const MAX_MESSAGE: u32 = 8 << 20;

/// The longest message of a kind that has no machine's state in it. A part of a table is the longest: 64 Ki numbers of ten bytes.
const MAX_SHORT: usize = 1 << 20;

/// The most entries of the lists of one message. The longest list is the one of the sums of 4096 ranges for each of 2 regions of memory and
/// 16 disks. An entry may be two bytes on the wire and 32 in memory.
const MAX_ENTRIES: usize = 128 << 10;

/// The first bytes of every message, `FCTL` in ASCII.
const MAGIC: [u8; 4] = *b"FCTL";

/// The last field of every short message, in the bytes of its key: number 0x1a2b3c4d, a fixed32, the CRC-32 of what is before it. No such field is declared: who does not know it passes
/// over it, as over any field that is new, and who knows it takes a message without it for one of a peer that does not. A number of five bytes is not the end of any other message
/// by accident. A long message is a machine's state, or nearly; that is digested in the manifest, and must be a single field.
const SUM_KEY: [u8; 5] = [0xed, 0xc4, 0xe7, 0x8a, 0x0d];
const SUM_BYTES: usize = SUM_KEY.len() + size_of::<u32>();

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
    /// A message longer than its kind can be.
    #[error("a message of {0} bytes, at most {MAX_SHORT} are allowed for its kind")]
    TooLongForKind(usize),
    /// A message of longer lists than allowed.
    #[error("a message of {0} entries, at most {MAX_ENTRIES} are allowed")]
    TooMany(usize),
    /// A message that was damaged on its way.
    #[error("a message was damaged on its way: its checksum is {found:#010x} and not {told:#010x}, as it says")]
    Damaged {
        /// What it says.
        told: u32,
        /// What it adds up to.
        found: u32,
    },
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
/// The connection's error; [`ControlError::TooLong`] or [`ControlError::TooLongForKind`] before anything is written.
pub(crate) fn write_message<M: Spoken>(socket: &mut impl Write, message: &M) -> Result<(), ControlError> {
    let said = message.encoded_len();
    let is_summed = said + SUM_BYTES <= MAX_SHORT;
    let length = if is_summed { said + SUM_BYTES } else { said };
    let prefix = u32::try_from(length).ok().filter(|&length| length <= MAX_MESSAGE);
    let prefix = prefix.ok_or(ControlError::TooLong(length as u64))?;
    let mut bytes = Vec::with_capacity(8 + length);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&prefix.to_le_bytes());
    message.encode_raw(&mut bytes);
    if is_summed {
        let sum = crc32fast::hash(&bytes[8..]);
        bytes.extend_from_slice(&SUM_KEY);
        bytes.extend_from_slice(&sum.to_le_bytes());
    }
    check_length::<M>(&bytes[8..])?;
    socket.write_all(&bytes).map_err(ControlError::Io)
}

/// Reads one message. Its texts are short and its lists bounded: what a peer says may be kept and told on.
///
/// # Errors
/// [`ControlError::Closed`] at the end of the stream, otherwise what is wrong with it.
pub(crate) fn read_message<M: Spoken>(socket: &mut impl Read) -> Result<M, ControlError> {
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
    check_length::<M>(&body)?;
    let mut message = M::decode(undamaged(&body)?).map_err(ControlError::Malformed)?;
    message.shorten_texts();
    match message.entries() {
        0..=MAX_ENTRIES => Ok(message),
        entries => Err(ControlError::TooMany(entries)),
    }
}

/// What is before the checksum, which it has to be of; all of it where there is none.
fn undamaged(body: &[u8]) -> Result<&[u8], ControlError> {
    let Some((said, key, sum)) = body.split_last_chunk().and_then(|(before, &sum)| {
        let (said, key) = before.split_last_chunk()?;
        Some((said, *key, sum))
    }) else {
        return Ok(body);
    };
    if key != SUM_KEY {
        return Ok(body);
    }
    let (told, found) = (u32::from_le_bytes(sum), crc32fast::hash(said));
    if told == found {
        Ok(said)
    } else {
        Err(ControlError::Damaged { told, found })
    }
}

/// Before it is decoded: a long message must be a single field, of a kind that may be long. So a list hides neither before nor behind it.
fn check_length<M: Spoken>(body: &[u8]) -> Result<(), ControlError> {
    /// Protobuf's wire type of a field with a length, in the low three bits of its key.
    const WITH_LENGTH: u32 = 2;

    if body.len() <= MAX_SHORT {
        return Ok(());
    }
    let mut rest = body;
    let (key, length) = (decode_length_delimiter(&mut rest), decode_length_delimiter(&mut rest));
    let may_be_long = |&field: &u32| key == Ok((field << 3 | WITH_LENGTH) as usize);
    match M::LONG_KINDS.iter().any(may_be_long) && length == Ok(rest.len()) {
        true => Ok(()),
        false => Err(ControlError::TooLongForKind(body.len())),
    }
}

/// One message as a peer writes it that knows no checksums; what is made of it by chance is looked at by whoever reads it, then.
#[cfg(test)]
pub(crate) fn written_plainly(message: &impl Spoken) -> Vec<u8> {
    let body = message.encode_to_vec();
    [&MAGIC[..], &(body.len() as u32).to_le_bytes(), &body].concat()
}

#[cfg(test)]
mod tests {
    use ferry_proto::stream::v1::{
        Barrier, Disarm, FromDestination, FromSource, Hello, Refused, State, StreamTotals, from_destination,
        from_source,
    };
    use proptest::prelude::*;
    use prost::Message as _;

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
    fn a_message_of_a_peer_without_checksums_is_read_and_theirs_is_read_by_such_a_peer() {
        let plain = written_plainly(&message());
        assert_eq!(read_message::<FromSource>(&mut &*plain).unwrap(), message());
        let summed = written(&message());
        assert_eq!(FromSource::decode(&summed[8..]).unwrap(), message());
        let mut key = Vec::new();
        prost::encoding::encode_key(0x1a2b_3c4d, prost::encoding::WireType::ThirtyTwoBit, &mut key);
        assert_eq!(key, SUM_KEY);
    }

    #[test]
    fn no_damaged_bit_of_what_is_said_goes_unnoticed() {
        let whole = written(&message());
        let said = 8..whole.len() - SUM_BYTES;
        for bit in said.start * 8..said.end * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let heard = read_message::<FromSource>(&mut &*bytes);
            assert!(
                matches!(heard, Err(ControlError::Damaged { .. })),
                "bit {bit}: {heard:?}"
            );
        }
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

    fn framed(bodies: &[Vec<u8>]) -> Vec<u8> {
        let body = bodies.concat();
        [
            b"FCTL".as_slice(),
            &u32::try_from(body.len()).unwrap().to_le_bytes(),
            &body,
        ]
        .concat()
    }

    fn said(message: from_source::Message) -> Vec<u8> {
        FromSource { message: Some(message) }.encode_to_vec()
    }

    fn state(bytes: usize) -> from_source::Message {
        from_source::Message::State(State {
            attempt: None,
            machine_state: vec![0; bytes],
        })
    }

    fn barrier(totals: usize) -> from_source::Message {
        from_source::Message::Barrier(Barrier {
            round: 1,
            totals: vec![StreamTotals::default(); totals],
        })
    }

    #[test]
    fn only_a_state_may_be_long() {
        let long = 4 << 20;
        assert!(read_message::<FromSource>(&mut &*framed(&[said(state(long))])).is_ok());
        let hello = from_source::Message::Hello(Hello {
            profile: vec![0; long],
            ..Hello::default()
        });
        for bodies in [vec![said(hello)], vec![said(barrier(long / 2))]] {
            let read = read_message::<FromSource>(&mut &*framed(&bodies));
            assert!(matches!(read, Err(ControlError::TooLongForKind(_))), "{read:?}");
        }
    }

    #[test]
    fn a_long_list_does_not_hide_beside_a_state() {
        let list = said(barrier(2 << 20));
        let behind = framed(&[said(state(5)), list.clone()]);
        let before = framed(&[list, said(state(5))]);
        for bytes in [behind, before] {
            let read = read_message::<FromSource>(&mut &*bytes);
            assert!(matches!(read, Err(ControlError::TooLongForKind(_))), "{read:?}");
        }
    }

    #[test]
    fn the_field_of_a_state_is_no_long_kind_of_a_destination() {
        let refused = Refused {
            reasons: vec!["x".repeat(2 << 20)],
        };
        let body = FromDestination {
            message: Some(from_destination::Message::Refused(refused)),
        };
        let read = read_message::<FromDestination>(&mut &*framed(&[body.encode_to_vec()]));
        assert!(matches!(read, Err(ControlError::TooLongForKind(_))), "{read:?}");
    }

    #[test]
    fn more_entries_than_any_message_has_are_refused() {
        let entries = MAX_ENTRIES + 1;
        let read = read_message::<FromSource>(&mut &*framed(&[said(barrier(entries))]));
        assert!(
            matches!(read, Err(ControlError::TooMany(found)) if found == entries),
            "{read:?}"
        );
        assert!(read_message::<FromSource>(&mut &*framed(&[said(barrier(MAX_ENTRIES))])).is_ok());
    }

    #[test]
    fn a_part_of_a_table_is_never_too_long() {
        let part = ferry_proto::stream::v1::Population {
            populated: vec![u64::MAX; 2 * crate::wire::RUNS_PER_PART],
            ..Default::default()
        };
        let message = FromSource {
            message: Some(from_source::Message::Population(part)),
        };
        assert_eq!(read_message::<FromSource>(&mut &*written(&message)).unwrap(), message);
    }

    #[test]
    fn a_peers_texts_are_cut_where_they_come_in() {
        let text = "x".repeat(500 << 10);
        let refused = FromDestination {
            message: Some(from_destination::Message::Refused(Refused {
                reasons: vec![text.clone(); 2],
            })),
        };
        let mut bytes = Vec::new();
        write_message(&mut bytes, &refused).unwrap();
        let heard: FromDestination = read_message(&mut &*bytes).unwrap();
        assert!(heard.encoded_len() < 3000, "{}", heard.encoded_len());

        let disarm = Disarm {
            attempt: None,
            reason: text,
        };
        let disarm = said(from_source::Message::Disarm(disarm));
        let heard: FromSource = read_message(&mut &*framed(&[disarm])).unwrap();
        assert!(heard.encoded_len() < 1100, "{}", heard.encoded_len());
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
