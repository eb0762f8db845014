//! A client of the Linux guest's echo server: asks on and on over one connection, and notices what is lost or late.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::linux::BOOT;
use crate::waiting::{CALL, until};

/// What came of asking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Echoes {
    /// How many numbers came back, each in its turn.
    pub count: u64,
    /// The longest time from one answer to the next.
    pub longest: Duration,
}

/// A connection that is in use.
pub struct EchoClient {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Echoes>>,
}

impl EchoClient {
    /// Connects as soon as the server answers, and begins to ask. With `tell`, each second says how it goes.
    ///
    /// # Errors
    /// If nobody answers, not even after the time that a guest may take to boot.
    pub fn start(server: SocketAddr, tell: impl Fn(Echoes) + Send + 'static) -> Result<Self> {
        let stream = until(&format!("{server} answers"), BOOT, || {
            Ok(TcpStream::connect_timeout(&server, Duration::from_secs(2)).ok())
        })?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(CALL))?;
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = thread::spawn(move || ask(stream, &until, tell));
        Ok(Self { stop, thread })
    }

    /// Ends it.
    ///
    /// # Errors
    /// If the connection broke, or an answer was not to what was asked.
    pub fn stop(self) -> Result<Echoes> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("asking does not panic")
    }

    /// Whether it ended by itself: then [`stop`](Self::stop) says why.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }
}

fn ask(mut stream: TcpStream, stop: &AtomicBool, tell: impl Fn(Echoes)) -> Result<Echoes> {
    let mut all = Echoes::default();
    let mut second = Echoes::default();
    let (mut last, mut told) = (Instant::now(), Instant::now());
    while !stop.load(Ordering::Relaxed) {
        stream
            .write_all(&all.count.to_le_bytes())
            .context("the connection broke")?;
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).context("the connection broke")?;
        let answer = u64::from_le_bytes(answer);
        if answer != all.count {
            bail!("{} was answered with {answer}", all.count);
        }
        let waited = last.elapsed();
        last = Instant::now();
        for echoes in [&mut all, &mut second] {
            echoes.count += 1;
            echoes.longest = echoes.longest.max(waited);
        }
        if told.elapsed() >= Duration::from_secs(1) {
            tell(std::mem::take(&mut second));
            told = Instant::now();
        }
    }
    Ok(all)
}
