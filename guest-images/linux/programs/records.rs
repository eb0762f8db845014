//! Appends to a chain of records and makes each durable before the next.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Write};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::chain::{End, RECORD_BYTES, verify};

/// Checks what is in the file, then appends `per_second` records a second for ever; tells each second how far it is.
pub fn run(path: &str, per_second: u32) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)?;
    let mut end = match verify(BufReader::with_capacity(1 << 20, &file))? {
        Ok(end) => {
            println!("CHAIN ok n={}", end.records);
            end
        }
        Err(broken) => {
            println!("CHAIN broken at {broken}");
            return Ok(());
        }
    };
    cut(&mut file, end)?;
    let interval = Duration::from_secs(1) / per_second.max(1);
    let mut told = Instant::now();
    loop {
        let began = Instant::now();
        let record = end.append();
        if let Err(error) = file.write_all(&record).and_then(|()| file.sync_data()) {
            println!("RECORDS n={} {error}", end.records - 1);
            return Err(error);
        }
        if told.elapsed() >= Duration::from_secs(1) {
            println!("RECORDS n={} ok", end.records);
            told = Instant::now();
        }
        sleep(interval.saturating_sub(began.elapsed()));
    }
}

/// Takes away a record that was being written when the machine ended, and goes to the end.
fn cut(file: &mut File, end: End) -> io::Result<()> {
    use std::io::{Seek, SeekFrom};

    let len = end.records * RECORD_BYTES as u64;
    file.set_len(len)?;
    file.seek(SeekFrom::Start(len))?;
    Ok(())
}
