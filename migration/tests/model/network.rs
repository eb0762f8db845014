//! What is under way between the actors.
//!
//! Between agents a message that was sent stays in the network for ever: it may be delivered late, twice, after a later one,
//! or never. That is loss, doubling and reordering in one, and it makes a state small. Only the answer of a call has to find
//! its caller still waiting, as an RPC's does. Between an agent and its VMM there is a Unix socket: in order, and what a
//! killed agent wrote into it is still there for the VMM to read.

use std::fmt;

use ferry_migration::handover::{Attempt, Decision, Epoch};
use uuid::Uuid;

/// Attempt `number` of a migration; 0 where none was armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Id {
    pub(crate) migration: u8,
    pub(crate) number: u32,
}

/// Attempts have numbers up to this: the VMM asks for two, and each restart of the agent may take one more.
pub(crate) const MOST_ATTEMPTS: u32 = 4;
/// Migrations have numbers up to this.
pub(crate) const MOST_MIGRATIONS: u8 = 2;

impl Id {
    /// Its place in a table of all.
    pub(crate) fn index(self) -> usize {
        assert!(self.number <= MOST_ATTEMPTS, "attempt {self} is beyond the table");
        (usize::from(self.migration) - 1) * (MOST_ATTEMPTS as usize + 1) + self.number as usize
    }

    /// How many there are.
    pub(crate) const COUNT: usize = MOST_MIGRATIONS as usize * (MOST_ATTEMPTS as usize + 1);

    /// All, in the order of their places.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (1..=MOST_MIGRATIONS).flat_map(|migration| (0..=MOST_ATTEMPTS).map(move |number| Self { migration, number }))
    }

    /// The tuple (vm, M, n, e) that production carries.
    pub(crate) fn attempt(self, epoch: Epoch) -> Attempt {
        Attempt {
            instance: INSTANCE,
            migration: Uuid::from_u128(self.migration.into()),
            attempt: self.number,
            epoch,
        }
    }

    /// Back from the tuple.
    pub(crate) fn of(attempt: Attempt) -> Self {
        Self {
            migration: attempt.migration.as_u128() as u8,
            number: attempt.attempt,
        }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "M{}/{}", self.migration, self.number)
    }
}

/// The one instance.
pub(crate) const INSTANCE: Uuid = Uuid::from_u128(7);

/// What one agent says to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Message {
    /// A to B: expect this attempt.
    Expect(Id),
    /// A to B: what is D, I claim SRC.
    Decide(Id),
    /// B to A, of its own accord: D is RUNNING, or SRC.
    Told(Id, Decision),
    /// A to B: the migration is over before GO.
    RolledBack(u8),
}

impl Message {
    fn bit(self) -> u64 {
        let kinds = Id::COUNT;
        let place = match self {
            Self::Expect(id) => id.index(),
            Self::Decide(id) => kinds + id.index(),
            Self::Told(id, Decision::Running) => 2 * kinds + id.index(),
            Self::Told(id, _) => 3 * kinds + id.index(),
            Self::RolledBack(migration) => 4 * kinds + usize::from(migration) - 1,
        };
        1 << place
    }
}

/// Every message between the agents that was ever sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Network(u64);

impl Network {
    pub(crate) fn send(&mut self, message: Message) {
        self.0 |= message.bit();
    }

    pub(crate) fn has(self, message: Message) -> bool {
        self.0 & message.bit() != 0
    }
}

/// What answers of a call are under way to the caller that waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Answers(u8);

/// One answer of a call between agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Is(Decision),
    Error,
}

impl Answer {
    pub(crate) const ALL: [Self; 5] = [
        Self::Is(Decision::Open),
        Self::Is(Decision::Claimed),
        Self::Is(Decision::Running),
        Self::Is(Decision::Source),
        Self::Error,
    ];

    fn bit(self) -> u8 {
        1 << match self {
            Self::Is(Decision::Open) => 0,
            Self::Is(Decision::Claimed) => 1,
            Self::Is(Decision::Running) => 2,
            Self::Is(Decision::Source) => 3,
            Self::Error => 4,
        }
    }
}

impl Answers {
    pub(crate) fn add(&mut self, answer: Answer) {
        self.0 |= answer.bit();
    }

    pub(crate) fn all(self) -> impl Iterator<Item = Answer> {
        Answer::ALL.into_iter().filter(move |answer| self.0 & answer.bit() != 0)
    }
}

/// A call of agent A that is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Call {
    Expect(Id),
    Decide(Id),
}

/// The socket between an agent and its VMM. Answers and events are told apart by the agent as soon as it reads them, so
/// one may overtake the other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Socket<Order, Reply, Event> {
    /// An agent holds the other end.
    pub(crate) open: bool,
    pub(crate) orders: Vec<Order>,
    pub(crate) replies: Vec<Reply>,
    pub(crate) events: Vec<Event>,
}

impl<Order, Reply, Event> Socket<Order, Reply, Event> {
    pub(crate) fn new(open: bool) -> Self {
        Self {
            open,
            orders: Vec::new(),
            replies: Vec::new(),
            events: Vec::new(),
        }
    }

    /// The agent gives an order. Without a connection it goes nowhere.
    pub(crate) fn order(&mut self, order: Order) {
        if self.open {
            self.orders.push(order);
        }
    }

    pub(crate) fn reply(&mut self, reply: Reply) {
        if self.open {
            self.replies.push(reply);
        }
    }

    pub(crate) fn event(&mut self, event: Event) {
        if self.open {
            self.events.push(event);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.orders.is_empty() && self.replies.is_empty() && self.events.is_empty()
    }

    /// The agent is dead: nobody reads what the VMM says, but the VMM still reads.
    pub(crate) fn agent_died(&mut self) {
        self.open = false;
        self.replies.clear();
        self.events.clear();
    }

    /// The VMM is dead: nobody reads orders, but the agent still reads.
    pub(crate) fn vmm_died(&mut self) {
        self.orders.clear();
    }

    /// The connection broke, both ends live.
    pub(crate) fn broke(&mut self) {
        *self = Self::new(false);
    }

    /// The VMM accepted a new connection. Rule 1: what the old one still held is thrown away.
    pub(crate) fn accepted(&mut self, old: OldOrders) {
        self.open = true;
        self.replies.clear();
        self.events.clear();
        if old == OldOrders::ThrownAway {
            self.orders.clear();
        }
    }
}

/// What becomes of orders in a socket when a new connection is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OldOrders {
    ThrownAway,
    /// A mistake.
    StillObeyed,
}

/// The control stream from VMM A to VMM B.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Stream {
    /// No more is sent on it. What was written may still arrive.
    pub(crate) closed: bool,
    /// GO, written and not read.
    pub(crate) go: Option<Id>,
}
