//! The other end of the agents' `--fault-gate`: lets everything pass but what a cell is about, and remembers what passed.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ferry_rpc::faults::{Moment, Site, Word};

/// What a cell and its course want of the gate.
#[derive(Default)]
struct State {
    /// The first passage of this kind is held.
    wanted: Option<(Moment, Site)>,
    held: bool,
    /// What those that are held are told, once it is known.
    word: Option<Word>,
    /// Messages that are lost each time, as the course wants it.
    losing: HashSet<(Moment, Site)>,
    passed: Vec<(String, Moment, Site)>,
}

/// The gate. Dropping it lets everything pass.
pub(crate) struct Gate {
    shared: Arc<Shared>,
    socket: PathBuf,
    acceptor: Option<JoinHandle<()>>,
}

pub(crate) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    over: AtomicBool,
}

impl Gate {
    /// A gate in this folder.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let socket = folder.join("gate.sock");
        let listener = UnixListener::bind(&socket).context("failed to listen for the agents' questions")?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            over: AtomicBool::new(false),
        });
        let asked = Arc::clone(&shared);
        let acceptor = thread::spawn(move || {
            for stream in listener.incoming() {
                if asked.over.load(Ordering::Relaxed) {
                    return;
                }
                let (Ok(stream), asked) = (stream, Arc::clone(&asked)) else {
                    continue;
                };
                thread::spawn(move || asked.answer(stream));
            }
        });
        Ok(Self {
            shared,
            socket,
            acceptor: Some(acceptor),
        })
    }

    /// Where agents ask.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The gate for whoever is in this process.
    pub(crate) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// The first to come by there is held until [`Gate::say`].
    pub(crate) fn hold(&self, moment: Moment, site: Site) {
        let mut state = self.shared.lock();
        (state.wanted, state.held, state.word) = (Some((moment, site)), false, None);
    }

    /// Whoever comes by there loses its message, each time, until [`Gate::heal`].
    pub(crate) fn lose(&self, moment: Moment, site: Site) {
        self.shared.lock().losing.insert((moment, site));
    }

    /// Nothing is lost any more.
    pub(crate) fn heal(&self) {
        self.shared.lock().losing.clear();
    }

    /// Waits until somebody is held, so long at most.
    pub(crate) fn wait_held(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.lock();
        while !state.held {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Whoever is held gets this word. Nobody else is held from then on.
    pub(crate) fn say(&self, word: Word) {
        self.shared.lock().word = Some(word);
        self.shared.changed.notify_all();
    }

    /// Whether somebody at this host (or on the `wire`) is past this moment of the site: it was let pass, or what is before it is done.
    pub(crate) fn is_past(&self, host: &str, moment: Moment, site: Site) -> bool {
        let state = self.shared.lock();
        let is_held_after = state.held && state.wanted == Some((Moment::After, site)) && moment == Moment::After;
        let mut passed = state.passed.iter();
        is_held_after || passed.any(|passage| (passage.0.as_str(), passage.1, passage.2) == (host, moment, site))
    }

    /// Every site that somebody came by.
    pub(crate) fn sites(&self) -> HashSet<Site> {
        self.shared.lock().passed.iter().map(|&(_, _, site)| site).collect()
    }

    /// What passed, for the message of a failed cell.
    pub(crate) fn story(&self) -> String {
        let state = self.shared.lock();
        let mut story = String::new();
        for (host, moment, site) in &state.passed {
            let _ = write!(story, "{host} {moment} {site}; ");
        }
        story
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        self.heal();
        self.say(Word::Go);
        let _ = UnixStream::connect(&self.socket);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One question of an agent.
    fn answer(&self, stream: UnixStream) {
        let mut line = String::new();
        if BufReader::new(&stream).read_line(&mut line).is_err() {
            return;
        }
        let Some((host, moment, site)) = parse(&line) else {
            return;
        };
        let word = match self.pass(host, moment, site) {
            Word::Go => "go",
            Word::Lose => "lose",
            Word::Double => "double",
        };
        // It may have been killed where it was held.
        let _ = writeln!(&stream, "{word}");
    }

    /// Somebody comes by; it returns when it may go on.
    pub(crate) fn pass(&self, host: &str, moment: Moment, site: Site) -> Word {
        let mut state = self.lock();
        let mut word = Word::Go;
        if state.wanted == Some((moment, site)) && !state.held && state.word.is_none() {
            state.held = true;
            self.changed.notify_all();
            while state.word.is_none() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            word = state.word.unwrap_or(Word::Go);
        } else if state.losing.contains(&(moment, site)) {
            word = Word::Lose;
        }
        state.passed.push((host.to_owned(), moment, site));
        word
    }
}

fn parse(line: &str) -> Option<(&str, Moment, Site)> {
    let mut words = line.split_whitespace();
    let host = words.next()?;
    let moment = match words.next()? {
        "before" => Moment::Before,
        "after" => Moment::After,
        _ => return None,
    };
    let name = words.next()?;
    let site = Site::ALL.iter().copied().find(|site| site.name() == name)?;
    Some((host, moment, site))
}
