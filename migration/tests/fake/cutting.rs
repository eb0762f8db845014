//! A man in the middle of the control stream, who cuts the whole link when something is said.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use ferry_migration::Link;
use ferry_proto::stream::v1::{FromDestination, FromSource, from_destination, from_source};
use prost::Message;

/// Whether what was said arrives before the link is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    Before,
    After,
}

/// Cuts the link at each of these words once, in their order.
pub struct Cutter(Mutex<Vec<(&'static str, Cut)>>);

impl Cutter {
    pub fn new(at: &[(&'static str, Cut)]) -> Arc<Self> {
        Arc::new(Self(Mutex::new(at.iter().rev().copied().collect())))
    }

    /// Whether every word was said.
    pub fn is_done(&self) -> bool {
        self.0.lock().unwrap().is_empty()
    }

    /// The same link, with this one between its control streams.
    pub fn between(self: &Arc<Self>, mut near: Link, mut far: Link) -> (Link, Link) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let pair = || {
            let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (one, listener.accept().unwrap().0)
        };
        let ((near_end, to_near), (far_end, to_far)) = (pair(), pair());
        let all: Vec<TcpStream> = [&to_near, &to_far]
            .into_iter()
            .chain(&near.pages)
            .chain(&far.pages)
            .map(|socket| socket.try_clone().unwrap())
            .collect();
        let all = Arc::new(all);
        for (from, to, name) in [
            (&to_near, &to_far, source_word as fn(&[u8]) -> &'static str),
            (&to_far, &to_near, destination_word),
        ] {
            let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
            let (cutter, all) = (self.clone(), all.clone());
            thread::spawn(move || cutter.pass(&from, &to, name, &all));
        }
        (near.control, far.control) = (near_end, far_end);
        (near, far)
    }

    fn pass(&self, mut from: &TcpStream, mut to: &TcpStream, name: fn(&[u8]) -> &'static str, all: &[TcpStream]) {
        let cut = || {
            for socket in all {
                let _ = socket.shutdown(Shutdown::Both);
            }
        };
        loop {
            let mut message = vec![0; 8];
            if from.read_exact(&mut message).is_err() {
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
            let length = u32::from_le_bytes(message[4..].try_into().unwrap()) as usize;
            message.resize(8 + length, 0);
            if from.read_exact(&mut message[8..]).is_err() {
                return cut();
            }
            let how = self.take(name(&message[8..]));
            if how == Some(Cut::Before) || to.write_all(&message).is_err() || how == Some(Cut::After) {
                return cut();
            }
        }
    }

    fn take(&self, word: &str) -> Option<Cut> {
        let mut at = self.0.lock().unwrap();
        let &(wanted, cut) = at.last()?;
        (wanted == word).then(|| {
            at.pop();
            cut
        })
    }
}

fn source_word(bytes: &[u8]) -> &'static str {
    use from_source::Message as Said;
    match FromSource::decode(bytes).unwrap().message {
        Some(Said::Hello(_)) => "hello",
        Some(Said::Population(_)) => "population",
        Some(Said::Barrier(_)) => "barrier",
        Some(Said::Proceed(_)) => "proceed",
        _ => "something else",
    }
}

fn destination_word(bytes: &[u8]) -> &'static str {
    use from_destination::Message as Reply;
    match FromDestination::decode(bytes).unwrap().message {
        Some(Reply::HelloReply(_)) => "hello-reply",
        Some(Reply::PopulationReady(_)) => "population-ready",
        Some(Reply::BarrierReached(_)) => "barrier-reached",
        Some(Reply::Holding(_)) => "holding",
        _ => "something else",
    }
}
