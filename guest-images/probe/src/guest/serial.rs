//! The first serial port, output only.
//!
//! A line is queued whole and leaves one character at a time between two pieces of work, so that the clock is looked at
//! around every exit and a blackout that falls into the printing is seen like any other.

use core::fmt;

use crate::machine::{read_port, write_port};

const DATA: u16 = 0x3f8;
const FIFO_CONTROL: u16 = 0x3fa;
const LINE_CONTROL: u16 = 0x3fb;
const LINE_STATUS: u16 = 0x3fd;
const TRANSMITTER_EMPTY: u8 = 1 << 5;

/// Depth of a 16550's transmit FIFO: so many characters may follow one look at the line status.
const FIFO_DEPTH: u32 = 16;

const QUEUE_BYTES: usize = 4096;

/// The queue in front of the port. Only vCPU 0 has one.
pub struct Serial {
    queue: [u8; QUEUE_BYTES],
    head: usize,
    len: usize,
    room_in_fifo: u32,
}

impl Serial {
    /// Sets up the port; the speed is left as it is, no VMM heeds it.
    pub fn new() -> Self {
        write_port(LINE_CONTROL, 0x03);
        write_port(FIFO_CONTROL, 0x07);
        Self {
            queue: [0; QUEUE_BYTES],
            head: 0,
            len: 0,
            room_in_fifo: 0,
        }
    }

    /// Bytes that can be queued now.
    pub fn room(&self) -> usize {
        QUEUE_BYTES - self.len
    }

    /// Whether all that was queued is sent.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Queues a line. What does not fit is lost: callers that must not lose a line ask for `room` first.
    pub fn print(&mut self, line: impl fmt::Display) {
        // The queue takes everything, so formatting into it cannot fail.
        let _ = fmt::Write::write_fmt(self, format_args!("{line}\n"));
    }

    /// Sends one character if there is one and the port takes it.
    #[inline]
    pub fn step(&mut self) {
        if self.len == 0 {
            return;
        }
        if self.room_in_fifo == 0 {
            if read_port(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
                return;
            }
            self.room_in_fifo = FIFO_DEPTH;
        }
        write_port(DATA, self.queue[self.head]);
        self.room_in_fifo -= 1;
        self.head = (self.head + 1) % QUEUE_BYTES;
        self.len -= 1;
    }

    /// Sends all that is queued, or gives up when the port takes nothing for long: a guest that ends must not
    /// hang in its last words.
    pub fn flush(&mut self) {
        let mut patience = 1_000_000;
        while self.len > 0 && patience > 0 {
            let before = self.len;
            self.step();
            patience -= u32::from(before == self.len);
        }
    }
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if self.len < QUEUE_BYTES {
                self.queue[(self.head + self.len) % QUEUE_BYTES] = byte;
                self.len += 1;
            }
        }
        Ok(())
    }
}

/// Text put together in place, for the lines that cannot be written piece by piece; what does not fit is cut off.
pub struct Text {
    bytes: [u8; 256],
    len: usize,
}

impl Text {
    pub fn of(text: impl fmt::Display) -> Self {
        let mut this = Self {
            bytes: [0; 256],
            len: 0,
        };
        // Writing to it never fails.
        let _ = fmt::Write::write_fmt(&mut this, format_args!("{text}"));
        this
    }

    pub fn as_str(&self) -> &str {
        let bytes = &self.bytes[..self.len];
        core::str::from_utf8(bytes).unwrap_or("text cut off within a character")
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let taken = text.len().min(self.bytes.len() - self.len);
        self.bytes[self.len..self.len + taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.len += taken;
        Ok(())
    }
}
