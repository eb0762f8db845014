//! A peer written by hand from docs/wire.md, for saying what the engine never says.

use std::io::{self, Read, Write};
use std::net::TcpStream;

use ferry_migration::Link;
use ferry_migration::handover::Attempt;
use ferry_proto::stream::v1::{
    self, FromDestination, FromSource, from_destination::Message as Reply, from_source::Message as Said,
};
use prost::Message;

use super::scene::{attempt, shape};

/// Writes one control message.
pub fn say(socket: &TcpStream, message: &impl Message) {
    try_to_say(socket, message).unwrap();
}

/// Writes one control message to somebody who may have hung up.
pub fn try_to_say(socket: &TcpStream, message: &impl Message) -> io::Result<()> {
    write_body(socket, &message.encode_to_vec())
}

fn write_body(mut socket: &TcpStream, body: &[u8]) -> io::Result<()> {
    let mut bytes = b"FCTL".to_vec();
    bytes.extend_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
    bytes.extend_from_slice(body);
    socket.write_all(&bytes)
}

/// Writes one control message whose checksum is another message's.
pub fn say_damaged(socket: &TcpStream, message: &impl Message) {
    let mut body = message.encode_to_vec();
    let sum = !crc32fast::hash(&body);
    prost::encoding::encode_key(0x1a2b_3c4d, prost::encoding::WireType::ThirtyTwoBit, &mut body);
    body.extend_from_slice(&sum.to_le_bytes());
    write_body(socket, &body).unwrap();
}

/// Reads one control message; `None` at the end of the stream.
pub fn hear<M: Message + Default>(mut socket: &TcpStream) -> Option<M> {
    let mut prefix = [0; 8];
    socket.read_exact(&mut prefix).ok()?;
    assert_eq!(&prefix[..4], b"FCTL");
    let mut body = vec![0; u32::from_le_bytes(prefix[4..].try_into().unwrap()) as usize];
    socket.read_exact(&mut body).ok()?;
    Some(M::decode(&*body).unwrap())
}

/// A source by hand, at one end of a link.
pub struct RawSource {
    pub link: Link,
}

impl RawSource {
    pub fn say(&self, message: Said) {
        say(&self.link.control, &FromSource { message: Some(message) });
    }

    /// The next reply that is no sign of life; `None` if the destination hung up.
    pub fn reply(&self) -> Option<Reply> {
        loop {
            match hear::<FromDestination>(&self.link.control)?.message {
                Some(Reply::Ping(_) | Reply::Pong(_)) => {}
                message => return Some(message.unwrap()),
            }
        }
    }

    /// What is said first when nothing is wrong.
    pub fn hello(&self) -> v1::Hello {
        let Attempt {
            instance,
            migration,
            epoch,
            ..
        } = attempt(1);
        let region = |region: &ferry_migration::guest::Region| v1::Region {
            start_frame: region.start_frame,
            frames: region.frames,
        };
        v1::Hello {
            protocol_newest: 1,
            protocol_oldest: 1,
            instance: instance.as_bytes().to_vec(),
            migration: migration.as_bytes().to_vec(),
            epoch: epoch.0,
            page_size: 4096,
            regions: shape().regions().iter().map(region).collect(),
            streams: self.link.pages.len() as u32,
            profile: b"cpu: sse2".to_vec(),
            late_streams: 0,
            verify: false,
            session: 0,
            codecs: Vec::new(),
        }
    }

    /// Goes as far as the first page.
    pub fn up_to_pages(&self) {
        self.up_to_pages_compressed(&[]);
    }

    /// The same, offering to compress pages in these formats.
    pub fn up_to_pages_compressed(&self, codecs: &[u32]) {
        self.say(Said::Hello(v1::Hello {
            // One that compresses nothing may be of the first version.
            protocol_newest: if codecs.is_empty() { 1 } else { 2 },
            codecs: codecs.to_vec(),
            ..self.hello()
        }));
        assert!(matches!(self.reply(), Some(Reply::HelloReply(reply)) if reply.refusals.is_empty()));
        self.say(Said::Population(v1::Population {
            last: true,
            ..v1::Population::default()
        }));
        assert!(matches!(self.reply(), Some(Reply::PopulationReady(_))));
        self.write(0, &opening(self.link.pages.len() as u32));
    }

    pub fn write(&self, stream: usize, bytes: &[u8]) {
        (&self.link.pages[stream]).write_all(bytes).unwrap();
    }
}

/// A frame's header and table, checksum and all.
pub struct RawFrame {
    pub magic: [u8; 4],
    pub version: u16,
    pub kind: u8,
    pub codec: u8,
    pub stream: u16,
    pub round: u32,
    pub sequence: u64,
    pub payload: u32,
    pub table: Vec<u8>,
    pub checksum_flip: u32,
}

impl RawFrame {
    /// The first frame of pages of stream 0: one page of data.
    pub fn page(frame: u64) -> Self {
        let mut table = frame.to_le_bytes().to_vec();
        table.extend_from_slice(&1u32.to_le_bytes());
        table.extend_from_slice(&1u32.to_le_bytes());
        Self {
            magic: *b"FPAG",
            version: 1,
            kind: 2,
            codec: 0,
            stream: 0,
            round: 1,
            sequence: 1,
            payload: 4096,
            table,
            checksum_flip: 0,
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut header = self.magic.to_vec();
        header.extend_from_slice(&self.version.to_le_bytes());
        header.extend_from_slice(&[self.kind, self.codec]);
        header.extend_from_slice(&self.stream.to_le_bytes());
        header.extend_from_slice(&u16::try_from(self.table.len() / 16).unwrap().to_le_bytes());
        header.extend_from_slice(&self.round.to_le_bytes());
        header.extend_from_slice(&self.sequence.to_le_bytes());
        header.extend_from_slice(&self.payload.to_le_bytes());
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&header);
        hasher.update(&self.table);
        header.extend_from_slice(&(hasher.finalize() ^ self.checksum_flip).to_le_bytes());
        header.extend_from_slice(&self.table);
        header
    }
}

/// The first frame of stream 0.
pub fn opening(streams: u32) -> Vec<u8> {
    let Attempt {
        instance,
        migration,
        epoch,
        ..
    } = attempt(1);
    let mut table = instance.as_bytes().to_vec();
    table.extend_from_slice(migration.as_bytes());
    table.extend_from_slice(&epoch.0.to_le_bytes());
    table.extend_from_slice(&streams.to_le_bytes());
    table.extend_from_slice(&0u32.to_le_bytes());
    RawFrame {
        kind: 1,
        round: 0,
        sequence: 0,
        payload: 0,
        table,
        ..RawFrame::page(0)
    }
    .bytes()
}
