//! The whole world at one moment: two hosts, their journals, agents, VMMs and sockets, and what is between them.

use ferry_migration::handover::{
    Decision, DestinationAgent, Epoch, GrantRegister, IllegalMove, Move, Permit, Permits, SourceAgent,
};

pub(crate) use crate::actors::{AgentA, AgentB, EventA, EventB, OrderA, PhaseA, PhaseB, ReplyA, ReplyB, VmmA, VmmB};
use crate::config::{Again, Config, Failures, Home};
use crate::invariants::Fault;
use crate::mutants::Mutant;
use crate::network::{INSTANCE, Id, Network, Socket, Stream};
pub(crate) use crate::rows::{InstanceRow, NotDurable, RowsA, RowsB, Status, Write};
use crate::rows::{first_row, incoming};

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Side {
    A,
    B,
}

/// Host A.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct HostA {
    /// It crashed and has not booted.
    pub(crate) down: bool,
    pub(crate) disk: RowsA,
    /// Writes fail.
    pub(crate) full: bool,
    pub(crate) agent: Option<AgentA>,
    pub(crate) vmm: Option<VmmA>,
    pub(crate) socket: Socket<OrderA, ReplyA, EventA>,
}

/// Host B.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct HostB {
    pub(crate) down: bool,
    pub(crate) boot: u8,
    /// The started mark, on tmpfs.
    pub(crate) mark: bool,
    pub(crate) disk: RowsB,
    pub(crate) full: bool,
    pub(crate) agent: Option<AgentB>,
    pub(crate) vmm: Option<VmmB>,
    pub(crate) socket: Socket<Permit, ReplyB, EventB>,
}

/// `inst/<id>/owner` in the store: moved whole, by compare-and-swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Owner {
    pub(crate) id: Id,
    pub(crate) phase: Decision,
    /// The boot of B in which it was written.
    pub(crate) boot: u8,
}

/// What only an onlooker knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Onlooker {
    /// The guest that was sent ran at B, or a paused one was taken over there.
    pub(crate) ran_at_b: bool,
    /// Epochs that were used, a bit each.
    pub(crate) epochs: u64,
    /// The guest's memory is lost, and nothing but deaths that excuse it could have kept it.
    pub(crate) excused: bool,
    /// VMM A was killed by a failure.
    pub(crate) vmm_a_died: bool,
    pub(crate) resolved: bool,
    pub(crate) user_paused: bool,
    pub(crate) fault: Option<Fault>,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) a: HostA,
    pub(crate) b: HostB,
    pub(crate) network: Network,
    pub(crate) stream: Stream,
    /// Who has the locks of the disks.
    pub(crate) locks: Option<Side>,
    /// The store, if D lives there.
    pub(crate) store: Option<Owner>,
    pub(crate) failures: Failures,
    pub(crate) onlooker: Onlooker,
}

impl World {
    /// The guest runs at A under epoch 1, B is prepared, the first rounds are copied.
    pub(crate) fn new(config: &Config) -> Self {
        let status = if config.paused { Status::Paused } else { Status::Running };
        let instance = InstanceRow {
            status,
            epoch: Epoch::FIRST,
            known: Epoch::FIRST,
            settled: true,
        };
        let rows = RowsA {
            migration: first_row(1, Epoch::FIRST),
            instance,
        };
        let disk = RowsB {
            migration: 1,
            epoch: Epoch::FIRST,
            paused: config.paused,
            decisions: [None; Id::COUNT],
            over: false,
            instance: incoming(Epoch::FIRST),
        };
        let mut permits = Permits::new(INSTANCE);
        permits
            .take(Permit {
                instance: INSTANCE,
                epoch: Epoch::FIRST,
                paused: config.paused,
            })
            .expect("the first permit is taken");
        Self {
            a: HostA {
                down: false,
                disk: rows,
                full: false,
                agent: Some(AgentA::new(rows, Some(SourceAgent::copying(Epoch::FIRST)))),
                vmm: Some(VmmA {
                    phase: PhaseA::Rounds,
                    running: !config.paused,
                    user_paused: config.paused,
                    grants: GrantRegister::default(),
                    permits,
                    migration: 1,
                    epoch: Epoch::FIRST,
                    next: 1,
                    announced: false,
                    abort: false,
                    send_ended: false,
                    anew: false,
                }),
                socket: Socket::new(true),
            },
            b: HostB {
                down: false,
                boot: 0,
                mark: false,
                disk,
                full: false,
                agent: Some(AgentB::new(DestinationAgent::prepared(), disk.instance, 0)),
                vmm: Some(VmmB::loading()),
                socket: Socket::new(true),
            },
            network: Network::default(),
            stream: Stream::default(),
            locks: Some(Side::A),
            store: None,
            failures: Failures::default(),
            onlooker: Onlooker {
                epochs: 1 << Epoch::FIRST.0,
                ..Onlooker::default()
            },
        }
    }

    /// The newest attempt that was armed.
    pub(crate) fn newest_armed(&self) -> Id {
        Id {
            migration: self.a.disk.migration.number,
            number: self.a.disk.migration.armed,
        }
    }

    /// D of an attempt.
    pub(crate) fn decision(&self, home: Home, id: Id) -> Option<Decision> {
        match home {
            Home::Journal => self.b.disk.decisions[id.index()].map(|(decision, _)| decision),
            Home::Store => match self.store {
                Some(owner) if owner.id == id => Some(owner.phase),
                // A newer attempt closed it.
                Some(owner) if newer(owner.id, id) => Some(Decision::Source),
                _ => None,
            },
        }
    }

    /// Moves the store's value by compare-and-swap. Who comes late is told what is there.
    pub(crate) fn swap(&mut self, config: &Config, id: Id, by: Move) -> Result<Decision, IllegalMove> {
        let from = self.decision(Home::Store, id);
        let moved = by.apply(from);
        let phase = match moved {
            Ok(phase) => phase,
            Err(_) if config.is(Mutant::NoCompareAndSwap) => match by {
                Move::Expect => Decision::Open,
                Move::Claim => Decision::Claimed,
                Move::Run => Decision::Running,
                Move::Refuse | Move::GiveBack(_) => Decision::Source,
            },
            Err(illegal) => return Err(illegal),
        };
        if from != Some(phase) {
            self.store = Some(Owner {
                id,
                phase,
                boot: self.b.boot,
            });
        }
        Ok(phase)
    }

    /// A VMM takes a right to run: nobody had it before.
    pub(crate) fn take_right(&mut self, epoch: Epoch) {
        // What a `resolve` at the destination leaves to the source is left out here, too.
        let place = match epoch.0 {
            low @ ..32 => low,
            high => 32 + (high & 31),
        };
        let bit = 1 << place;
        if self.onlooker.epochs & bit != 0 {
            self.onlooker.fault.get_or_insert(Fault::EpochTwice);
        }
        self.onlooker.epochs |= bit;
    }

    /// Takes the locks for a side, unless the other has them.
    pub(crate) fn lock(&mut self, side: Side) -> bool {
        if self.locks.is_some_and(|holder| holder != side) {
            return false;
        }
        self.locks = Some(side);
        true
    }

    /// What goes with VMM A's process.
    pub(crate) fn end_vmm_a(&mut self) {
        self.a.vmm = None;
        self.a.socket.vmm_died();
        self.stream.closed = true;
        if self.locks == Some(Side::A) {
            self.locks = None;
        }
    }

    /// What goes with VMM B's process.
    pub(crate) fn end_vmm_b(&mut self) {
        self.b.vmm = None;
        self.b.socket.vmm_died();
        self.stream.closed = true;
        self.stream.go = None;
        if self.locks == Some(Side::B) {
            self.locks = None;
        }
    }

    /// The next migration is prepared: as the first was, under the epoch that the guest has now.
    pub(crate) fn prepare_again(&mut self, config: &Config) {
        debug_assert_eq!(config.again, Again::Migration);
        let (Some(agent), Some(vmm)) = (&mut self.a.agent, &mut self.a.vmm) else {
            return;
        };
        let epoch = agent.rows.instance.epoch;
        agent.rows.migration = first_row(2, epoch);
        agent.core = Some(SourceAgent::copying(epoch));
        self.a.disk = agent.rows;
        *vmm = VmmA {
            phase: PhaseA::Rounds,
            migration: 2,
            epoch,
            next: 1,
            announced: false,
            abort: false,
            send_ended: false,
            ..vmm.clone()
        };
        self.b.disk = RowsB {
            migration: 2,
            epoch,
            paused: agent.rows.instance.status == Status::Paused,
            over: false,
            instance: incoming(epoch),
            ..self.b.disk
        };
        self.b.agent = Some(AgentB::new(
            DestinationAgent::prepared(),
            self.b.disk.instance,
            self.b.boot,
        ));
        self.b.vmm = Some(VmmB::loading());
        self.b.socket = Socket::new(true);
        self.b.mark = false;
        self.stream = Stream::default();
    }
}

/// Whether `left` comes after `right`.
fn newer(left: Id, right: Id) -> bool {
    (left.migration, left.number) > (right.migration, right.number)
}
