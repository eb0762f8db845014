//! Waits for the power button, which the kernel offers as a key of an input device.

use std::fs::File;
use std::io::{self, Read};

/// `struct input_event` of `linux/input.h` where a time has 64-bit fields: seconds, microseconds, type, code, value.
const EVENT_BYTES: usize = 24;

const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
const PRESSED: i32 = 1;

/// Returns once the button was pressed.
pub fn run(device: &str) -> io::Result<()> {
    let mut events = File::open(device)?;
    println!("BUTTON ready");
    let mut event = [0; EVENT_BYTES];
    loop {
        events.read_exact(&mut event)?;
        if is_press(&event) {
            println!("BUTTON pressed");
            return Ok(());
        }
    }
}

fn is_press(event: &[u8; EVENT_BYTES]) -> bool {
    let [.., t0, t1, c0, c1, v0, v1, v2, v3] = *event;
    let (kind, code) = (u16::from_le_bytes([t0, t1]), u16::from_le_bytes([c0, c1]));
    (kind, code, i32::from_le_bytes([v0, v1, v2, v3])) == (EV_KEY, KEY_POWER, PRESSED)
}
