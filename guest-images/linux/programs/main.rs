//! What the guest does besides living: one static program, named after the project, for all of it.
//!
//!     ferry-guest records FILE PER_SECOND
//!     ferry-guest echo PORT
//!     ferry-guest button DEVICE
//!     ferry-guest flood ADDRESS:PORT
//!     ferry-guest fill MIB SEED

mod button;
mod chain;
mod echo;
mod fill;
mod flood;
mod records;

use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["records", file, per_second] => records::run(file, per_second.parse().unwrap_or(20)),
        ["button", device] => button::run(device),
        ["echo", port] => echo::run(port.parse().unwrap_or(7000)),
        ["flood", server] => flood::run(server),
        ["fill", mib, seed] => fill::run(mib.parse().unwrap_or(32), seed.parse().unwrap_or(1)),
        _ => {
            eprintln!(
                "ferry-guest records FILE PER_SECOND | echo PORT | flood ADDRESS:PORT | button DEVICE | fill MIB SEED"
            );
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("ERROR {}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}
