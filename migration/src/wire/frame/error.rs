//! What can be wrong with a frame.

use std::io;

use uuid::Uuid;

use super::{MAX_DATA_PAGES, MAX_RUNS, VERSION};
use crate::compress::Codec;
use crate::guest::FRAME_SIZE;

/// Why a page stream cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The connection failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// Not a frame.
    #[error("a frame begins with {0:#010x} instead of the magic number")]
    Magic(u32),
    /// A layout that this build does not know.
    #[error("frame version {0}, this build reads {VERSION}")]
    Version(u16),
    /// A kind of frame that does not belong here.
    #[error("frame kind {found} where {expected} is expected")]
    Kind {
        /// What the header says.
        found: u8,
        /// What belongs here.
        expected: u8,
    },
    /// Reserved bits are set.
    #[error("reserved bits {0:#x} are set in a frame")]
    Reserved(u32),
    /// The frame was meant for another stream.
    #[error("a frame of stream {found} on stream {expected}")]
    Stream {
        /// What the header says.
        found: u16,
        /// This stream.
        expected: u16,
    },
    /// A frame is missing or doubled.
    #[error("frame {found} of the stream where {expected} is next")]
    Sequence {
        /// What the header says.
        found: u64,
        /// Frames read before it.
        expected: u64,
    },
    /// The frame belongs to another round.
    #[error("a frame of round {found} while round {expected} is open")]
    Round {
        /// What the header says.
        found: u32,
        /// The round whose barrier comes next.
        expected: u32,
    },
    /// The table is empty or longer than allowed.
    #[error("a table of {0} runs, allowed are 1 to {MAX_RUNS}")]
    Entries(u16),
    /// The header's length is not that of the table's pages.
    #[error("a frame length of {header} bytes, its table makes {table}")]
    Length {
        /// What the header says.
        header: u64,
        /// What the table's runs add up to.
        table: u64,
    },
    /// More pages than a frame may carry.
    #[error("a frame of {0} bytes of pages, at most {limit} are allowed", limit = MAX_DATA_PAGES * FRAME_SIZE)]
    TooLong(u64),
    /// Header or table were damaged.
    #[error("the checksum of a frame's header is {header:#010x}, computed was {computed:#010x}")]
    Checksum {
        /// What the header says.
        header: u32,
        /// What header and table give.
        computed: u32,
    },
    /// Its pages are compressed in a way that was not agreed on.
    #[error("frame {sequence} is compressed in format {number}, which was not agreed on")]
    Codec {
        /// Of the frame, on its stream.
        sequence: u64,
        /// What its header says.
        number: u8,
    },
    /// Compressed pages that say nothing, or are no fewer than plain ones.
    #[error("frame {sequence} has {sent} bytes of compressed pages in the place of {pages}")]
    BlockLength {
        /// Of the frame, on its stream.
        sequence: u64,
        /// Bytes that are sent.
        sent: u64,
        /// Bytes of the pages that its table names.
        pages: u64,
    },
    /// Compressed pages were damaged.
    #[error(
        "the compressed pages of frame {sequence} do not have the checksum that they came with; computed was {computed:#010x}"
    )]
    BlockChecksum {
        /// Of the frame, on its stream.
        sequence: u64,
        /// What they give.
        computed: u32,
    },
    /// Compressed pages do not come to what the table says.
    #[error("the {codec} block of frame {sequence} is not its {pages} bytes of pages: {reason}")]
    Block {
        /// Of the frame, on its stream.
        sequence: u64,
        /// The format.
        codec: Codec,
        /// Bytes of the pages that its table names.
        pages: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A run of an unknown kind.
    #[error("a run of unknown kind {0}")]
    RunKind(u32),
    /// Pages are told by what they changed, of which nothing is here.
    #[error("{count} pages from page {first:#x} on are told by what they changed, of which there is no copy here")]
    DeltaOfNothing {
        /// The run's first frame number.
        first: u64,
        /// Its length.
        count: u64,
    },
    /// Its table does not end with what its pages add up to.
    #[error("a frame does not say what its pages add up to")]
    NoSum,
    /// A run begins before the end of the one before it.
    #[error("the run at page {first:#x} overlaps or precedes the one before it")]
    Order {
        /// The run's first frame number.
        first: u64,
    },
    /// A run is not inside the guest's memory.
    #[error("{count} pages from page {first:#x} on are not guest memory")]
    OutsideMemory {
        /// The run's first frame number.
        first: u64,
        /// Its length.
        count: u64,
    },
    /// Pages that come late only together with others, without these.
    #[error("{count} pages from page {first:#x} on came late, of memory of which {unit} come together")]
    PartOfUnit {
        /// The run's first frame number.
        first: u64,
        /// Its length.
        count: u64,
        /// How many come together.
        unit: u64,
    },
    /// The stream was opened for another migration.
    #[error("the stream belongs to migration {0}, or to another epoch, number of streams or session of it")]
    Identity(Uuid),
}

impl FrameError {
    /// What an error while reading a frame's pages means.
    pub(crate) fn from_pages(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Truncated,
            _ => Self::Io(error),
        }
    }

    /// Whether the connection broke, rather than what it carried.
    pub(crate) fn is_connection(&self) -> bool {
        matches!(self, Self::Io(_) | Self::Truncated)
    }
}
