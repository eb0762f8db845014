//! Ways in for the fuzz targets, which see only what is public.

use std::io::{Cursor, Seek, SeekFrom};

use ferry_proto::stream::v1::{self, from_source::Message as Said};
use uuid::Uuid;

use crate::guest::{FRAME_SIZE, MemoryShape, Region};
use crate::handover::Epoch;
use crate::wire::{FrameReader, StreamIdentity, Versions, check_hello, read_message, runs_from_wire};

fn shape() -> MemoryShape {
    let region = |start_frame, frames| Region { start_frame, frames };
    MemoryShape::new(vec![region(0, 4096), region(1 << 20, 1000)]).expect("in order and not empty")
}

fn identity() -> StreamIdentity {
    StreamIdentity {
        instance: Uuid::nil(),
        migration: Uuid::nil(),
        epoch: Epoch(1),
        streams: 1,
    }
}

/// A page stream: whatever is accepted lies in guest memory. And what asks for late pages.
pub fn page_frames(bytes: &[u8]) {
    let (mut reader, mut source) = (FrameReader::new(0), Cursor::new(bytes));
    while let Ok(Some(asked)) = reader.asked(&mut source, &shape()) {
        assert!(
            asked
                .touched
                .iter()
                .chain(asked.beside)
                .all(|&run| shape().contains(run))
        );
    }
    let (mut reader, mut source, shape) = (FrameReader::new(0), Cursor::new(bytes), shape());
    if !matches!(reader.open(&mut source, &identity()), Ok(Some(()))) {
        (reader, source) = (FrameReader::new(0), Cursor::new(bytes));
    }
    while let Ok(Some(pages)) = reader.pages(&mut source, &shape) {
        assert!(pages.data.iter().chain(pages.zero).all(|&run| shape.contains(run)));
        let data: u64 = pages.data.iter().map(|run| run.count * FRAME_SIZE).sum();
        if source.seek(SeekFrom::Current(data.cast_signed())).is_err() {
            return;
        }
    }
}

/// The control stream, read by either side.
pub fn control_messages(bytes: &[u8]) {
    let (shape, mut source) = (shape(), Cursor::new(bytes));
    while let Ok(message) = read_message::<v1::FromSource>(&mut source) {
        match message.message {
            Some(Said::Hello(hello)) => {
                let _ = check_hello(&hello, &identity(), &shape, Versions::OURS, |_| Vec::new());
            }
            Some(Said::Population(part)) => {
                let runs = runs_from_wire(&part.populated, &shape).unwrap_or_default();
                assert!(runs.into_iter().all(|run| shape.contains(run)));
            }
            Some(Said::Missing(part)) => {
                let runs = runs_from_wire(&part.runs, &shape).unwrap_or_default();
                assert!(runs.into_iter().all(|run| shape.contains(run)));
            }
            _ => {}
        }
    }
    let mut source = Cursor::new(bytes);
    while read_message::<v1::FromDestination>(&mut source).is_ok() {}
}
