//! `cargo xtask echo`: talks to the Linux guest's echo server and says what its client notices.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;
use ferry_tests::echo::{EchoClient, Echoes};

/// What `cargo xtask echo` takes.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The server, for example 10.9.0.2:7000.
    server: SocketAddr,
    /// How long to talk.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
}

/// Asks for so many seconds over one connection; each second prints how many answers came and the longest wait.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let tell = |Echoes { count, longest }| println!("{count} answers, longest wait {:.1} ms", milliseconds(longest));
    let client = EchoClient::start(options.server, tell)?;
    let deadline = Instant::now() + Duration::from_secs(options.seconds);
    while Instant::now() < deadline && !client.has_ended() {
        sleep(Duration::from_millis(50));
    }
    let Echoes { count, longest } = client.stop()?;
    println!(
        "{count} answers over one connection, each in its turn; longest wait {:.1} ms",
        milliseconds(longest)
    );
    Ok(ExitCode::SUCCESS)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
