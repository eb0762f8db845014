//! Copying memory while the guest runs: page sets, rounds, and the threads that send them.

mod bandwidth;
mod feed;
mod page_set;
mod sender;
mod streams;

pub(crate) use bandwidth::Bandwidth;
pub(crate) use feed::{Finished, Pace, Round, Standing};
pub use page_set::PageSet;
pub(crate) use page_set::{for_each_word, next_run, word_of, words_for};
pub(crate) use sender::{Contents, SendError, Sender, write_both};
pub(crate) use streams::Streams;
