//! The queue of migrations out of this host: Nova's max_concurrent_live_migrations, first come first served.
//!
//! A migration enters it in the transaction that accepts it, so that the queue has the order of the journal's rows; an agent that
//! restarts makes the same queue of them. It waits in its [`Place`] for its [`Turn`], which goes to the next when it is dropped, as the
//! place does.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// The queue; clones share it.
#[derive(Clone)]
pub(crate) struct Queue(Arc<Mutex<Line>>);

struct Line {
    /// Turns that nobody has. Less than none where an agent was started anew with fewer than it had under way.
    free: isize,
    waiting: VecDeque<oneshot::Sender<Turn>>,
}

/// A number in the queue. Dropping it gives it up.
pub(crate) struct Place {
    turn: oneshot::Receiver<Turn>,
    /// As long as somebody waits in it, there is a queue.
    _queue: Queue,
}

/// The right to be under way, one of so many. Dropping it makes it the next one's.
pub(crate) struct Turn(Queue);

impl Queue {
    /// A queue out of which so many are under way at a time.
    pub(crate) fn new(at_once: usize) -> Self {
        Self(Arc::new(Mutex::new(Line {
            free: isize::try_from(at_once).unwrap_or(isize::MAX),
            waiting: VecDeque::new(),
        })))
    }

    /// Takes the next number.
    pub(crate) fn enter(&self) -> Place {
        let (give, turn) = oneshot::channel();
        self.line().waiting.push_back(give);
        self.move_up();
        Place {
            turn,
            _queue: self.clone(),
        }
    }

    /// The turn of one that is under way since before this agent started, whether or not there is one left.
    pub(crate) fn already_out(&self) -> Turn {
        self.line().free -= 1;
        Turn(self.clone())
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn move_up(&self) {
        loop {
            let mut line = self.line();
            if line.free <= 0 {
                return;
            }
            let Some(next) = line.waiting.pop_front() else {
                return;
            };
            if next.is_closed() {
                continue;
            }
            line.free -= 1;
            drop(line);
            // Who gives its place up in this moment drops the turn, and with that it is the next one's.
            let _ = next.send(Turn(self.clone()));
        }
    }
}

impl Place {
    /// Waits for the turn.
    pub(crate) async fn turn(self) -> Turn {
        self.turn
            .await
            .expect("the queue drops nobody who waits, and lives as long as the place")
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.line().free += 1;
        self.0.move_up();
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::{Pin, pin};
    use std::task::{Context, Poll, Waker};

    use super::*;

    /// The turn, if it has come.
    fn come(place: Pin<&mut impl Future<Output = Turn>>) -> Option<Turn> {
        match place.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(turn) => Some(turn),
            Poll::Pending => None,
        }
    }

    #[test]
    fn turns_come_in_the_order_of_the_numbers_whoever_asks_first() {
        let queue = Queue::new(1);
        let (first, second, third) = (queue.enter(), queue.enter(), queue.enter());
        let (mut third, mut second, mut first) = (pin!(third.turn()), pin!(second.turn()), pin!(first.turn()));
        assert!(come(third.as_mut()).is_none() && come(second.as_mut()).is_none());
        let turn = come(first.as_mut()).unwrap();
        assert!(come(second.as_mut()).is_none());

        drop(turn);
        assert!(come(third.as_mut()).is_none());
        let turn = come(second.as_mut()).unwrap();
        drop(turn);
        assert!(come(third.as_mut()).is_some());
    }

    #[test]
    fn so_many_are_under_way_at_a_time() {
        let queue = Queue::new(2);
        let places = [queue.enter(), queue.enter(), queue.enter()];
        let [mut one, mut two, mut three] = places.map(|place| Box::pin(place.turn()));
        let turns = (come(one.as_mut()), come(two.as_mut()));
        assert!(turns.0.is_some() && turns.1.is_some());
        assert!(come(three.as_mut()).is_none());
        drop(turns.1);
        assert!(come(three.as_mut()).is_some());
    }

    #[test]
    fn a_place_that_is_given_up_is_the_next_ones_at_once() {
        let queue = Queue::new(1);
        let (first, second, third) = (queue.enter(), queue.enter(), queue.enter());
        // The turn that it had and did not take is not lost either.
        drop(first);
        let mut third = pin!(third.turn());
        assert!(come(third.as_mut()).is_none());
        drop(second);
        assert!(come(third.as_mut()).is_some());
    }

    #[test]
    fn one_that_was_under_way_before_counts_and_may_be_one_too_many() {
        let queue = Queue::new(1);
        let (one, two) = (queue.already_out(), queue.already_out());
        let mut next = pin!(queue.enter().turn());
        drop(one);
        assert!(come(next.as_mut()).is_none());
        drop(two);
        assert!(come(next.as_mut()).is_some());
    }
}
