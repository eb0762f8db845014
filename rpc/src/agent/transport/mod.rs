//! How the streams of a migration get from one VMM to the other.
//!
//! ```text
//!   tcp    VMM A ═══════════════ a connection to the data port ═══════════════ VMM B
//!   grpc   VMM A ══ agent A ── an HTTP/2 connection to the agent's port ── agent B ══ VMM B
//! ```
//!
//! By `tcp` the agents open the connections, prove the migration's secret on each ([`data_port`]) and hand them over: from then on they are the
//! VMMs', and outlive the agents. By `grpc`, for where only the agents' own port is open, each VMM has the end of a pair of Unix sockets, and its
//! agent [pumps](pump) what it says through a call of `Streams.Carry`: one call for each stream, on a connection of its own, so that no stream waits
//! behind another. The same secret is proven on it. The VMMs notice no difference but one: the streams go with either agent. That is a cut
//! link, and nothing else: before GO the copy ends and the guest runs on at the source, GO itself may be lost, and late pages have other streams made.

mod call;
mod connector;
mod destination;
mod messages;
mod pump;
mod source;

use ferry_proto::InvalidField;
use ferry_proto::agent::v1::StreamPiece;
use ferry_proto::agent::v1::stream_piece::Piece;

pub(super) use connector::Connector;
pub(super) use destination::StreamsService;
#[cfg(any(fuzzing, test))]
pub(crate) use messages::read_hostile as read_hostile_messages;
pub(super) use source::connect;

/// How the VMMs of a migration reach each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Transport {
    /// By connections to the data port.
    #[default]
    Tcp,
    /// Through both agents, by calls to the destination's own port.
    Grpc,
}

impl Transport {
    /// The word of a message or a record; an empty one is that of agents who know no other than the first.
    ///
    /// # Errors
    /// It is none.
    pub(crate) fn parse(word: &str) -> Result<Self, InvalidField> {
        match word {
            "" | "tcp" => Ok(Self::Tcp),
            "grpc" => Ok(Self::Grpc),
            other => Err(InvalidField {
                field: "transport",
                problem: format!("{other:?} is not one of tcp, grpc"),
            }),
        }
    }

    /// As messages and records have it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Grpc => "grpc",
        }
    }
}

/// Bytes that a receiver takes in before it is known that its VMM takes them: HTTP/2's window, of the stream and of its connection.
///
/// So much is under way at most, whatever the network: 4 MiB are what 10 Gbit/s carry within 3 ms, and each stream has a window of its own. It
/// bounds what an agent keeps of a stream whose VMM does not read.
pub(super) const WINDOW: u32 = 4 << 20;

/// The largest frame of HTTP/2 that an agent takes: a piece and what is before it in its message. Its default, 16 KiB, cuts each piece into sixteen.
pub(super) const FRAME: u32 = messages::LONGEST as u32;

/// Has the allocator keep what is freed for what is allocated next, up to a few windows. Once, when an agent begins.
///
/// Each frame that comes is read into new memory of its size. glibc gives memory of that size back to the kernel when it is freed, and to touch it
/// anew cost a seventh of a move's processor time. To have freed a large block once is how its thresholds are raised without a call of its
/// own (`M_MMAP_THRESHOLD` in mallopt(3): it adjusts itself, and `M_TRIM_THRESHOLD` to twice as much).
pub(super) fn keep_freed_memory() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(2 * WINDOW as usize)));
}

fn piece(piece: Piece) -> StreamPiece {
    StreamPiece { piece: Some(piece) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_word_is_read_as_it_is_written_and_none_means_the_old_behaviour() {
        for transport in [Transport::Tcp, Transport::Grpc] {
            assert_eq!(Transport::parse(transport.as_str()), Ok(transport));
        }
        assert_eq!(Transport::parse(""), Ok(Transport::Tcp));
        assert!(Transport::parse("pigeon").unwrap_err().problem.contains("pigeon"));
    }
}
