//! Feeds the fuzz targets in every test run, on any compiler: samples that mean something, changed at random.
//!
//! It does not see which code an input reaches; `cargo fuzz` does (`fuzz/README.md`), with the same targets. Each input is made from the samples and
//! a number of its own, so that the number alone makes it again.
//!
//! | variable | is |
//! | --- | --- |
//! | `FERRY_FUZZ_SECONDS` | how long each target is fed, 3 by default; 0: one input |
//! | `FERRY_FUZZ_SEED` | the number of the first input; those after it count on |
//! | `FERRY_FUZZ_CORPUS` | a folder to write the samples to, one folder in it for each target: what `cargo fuzz` begins with |
#![forbid(unsafe_code)]

mod mutation;
mod random;

use std::env;
use std::fmt::Write;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::process;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use mutation::input;
use random::Random;

/// How long a target is fed where nobody says.
const SECONDS: u64 = 3;

/// An input with which a target is not done after so long never ends: one takes microseconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// Gives `take` the samples, then what is made of them, until the time is over, and prints how many it were and from which number on. An input
/// may not leave anything behind that changes what the next one does.
///
/// # Panics
/// As `take` does, after the input and its number were printed. A target that hangs ends the process, with the same words.
pub fn feed(target: &str, samples: &[Vec<u8>], take: impl Fn(&[u8])) {
    if let Some(corpus) = env::var_os("FERRY_FUZZ_CORPUS") {
        write_samples(&Path::new(&corpus).join(target), samples);
    }
    let time = Duration::from_secs(number_from("FERRY_FUZZ_SECONDS").unwrap_or(SECONDS));
    let first = number_from("FERRY_FUZZ_SEED").unwrap_or_else(|| RandomState::new().hash_one(target) >> 1);
    let began = Instant::now();
    let (told, heard) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || watch(target, &heard));
        // Dropped at the end, also when a panic passes: the watchman leaves.
        let told = told;
        for (index, sample) in samples.iter().enumerate() {
            guarded(&format!("{target}: sample {index}"), sample, &take);
        }
        let mut number = first;
        loop {
            let input = input(&mut Random::new(number), samples);
            // The watchman listens as long as this thread lives.
            let _ = told.send(number);
            guarded(&format!("{target}: {}", again(number)), &input, &take);
            number += 1;
            if began.elapsed() >= time {
                break;
            }
        }
        println!("{target}: {} inputs from FERRY_FUZZ_SEED={first} on", number - first);
    });
}

/// The words that make an input again.
fn again(number: u64) -> String {
    format!("FERRY_FUZZ_SEED={number} FERRY_FUZZ_SECONDS=0 makes this input again")
}

fn guarded(name: &str, input: &[u8], take: &impl Fn(&[u8])) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| take(input))) {
        eprintln!("{name}; it is {}", hex(input));
        resume_unwind(panic);
    }
}

/// Ends the process when no further input comes for too long.
fn watch(target: &str, heard: &mpsc::Receiver<u64>) {
    let mut last = None;
    loop {
        match heard.recv_timeout(PATIENCE) {
            Ok(number) => last = Some(number),
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                let which = last.map_or_else(|| "a sample".to_owned(), again);
                eprintln!("{target}: not done after {} s: {which}", PATIENCE.as_secs());
                process::abort();
            }
        }
    }
}

fn number_from(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is not a number")),
    )
}

fn write_samples(folder: &Path, samples: &[Vec<u8>]) {
    fs::create_dir_all(folder).expect("a folder for samples");
    for (index, sample) in samples.iter().enumerate() {
        fs::write(folder.join(format!("sample-{index}")), sample).expect("a sample's file");
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // A string takes everything.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn samples_come_first_and_then_what_is_made_of_them() {
        let taken = RefCell::new(Vec::new());
        let samples = [b"one".to_vec(), b"another".to_vec()];
        feed("inputs", &samples, |bytes| {
            if taken.borrow().len() < 100 {
                taken.borrow_mut().push(bytes.to_vec());
            }
        });
        let taken = taken.into_inner();
        assert_eq!(taken[..2], samples);
        assert!(taken[2..].iter().any(|input| !samples.contains(input)));
    }

    #[test]
    fn number_makes_the_same_input_again() {
        let samples = [vec![7; 100], (0..=255).collect()];
        let made: Vec<_> = (0..200)
            .map(|number| input(&mut Random::new(number), &samples))
            .collect();
        let again: Vec<_> = (0..200)
            .map(|number| input(&mut Random::new(number), &samples))
            .collect();
        assert_eq!(made, again);
        assert!(made.windows(2).any(|pair| pair[0] != pair[1]));
    }

    #[test]
    #[should_panic(expected = "a four")]
    fn panic_of_a_target_is_one_of_the_test() {
        feed("panics", &[vec![1, 2, 3]], |bytes| {
            assert!(!bytes.contains(&4), "a four")
        });
    }
}
