//! What goes into a source's run, and what it tells while it runs.

use std::fmt::Write as _;
use std::num::{NonZeroU32, NonZeroU64};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::compress::{Compression, Tally};
use crate::error_chain;
use crate::guest::{DiskWaits, FrameRun, GuestError, GuestWas, StopTimes, Throttled};
use crate::handover::{Attempt, Epoch};
use crate::link::{Link, Liveness};
use crate::policy::{Decision, Forecast};
use crate::postcopy::Lateness;
use crate::source::{Copied, NewTerms, Terms};

/// How one migration is to be done.
#[derive(Clone, Debug)]
pub struct SourceParameters {
    /// The instance that moves.
    pub instance: Uuid,
    /// The migration.
    pub migration: Uuid,
    /// The epoch under which the guest runs here.
    pub epoch: Epoch,
    /// Whether the guest runs while it is copied.
    pub manner: Manner,
    /// Whether pages may come after GO.
    pub lateness: Lateness,
    /// How long the whole copy may take.
    pub timeout: Duration,
    /// What happens then.
    pub on_timeout: OnTimeout,
    /// How much of the time vCPUs may be kept from running, in percent, where the guest writes more than the link carries; `None`: they are
    /// left alone.
    pub most_throttle: Option<NonZeroU32>,
    /// The most bytes a second over all page streams while the guest runs, or is copied cold; the last pages are sent without it.
    pub bandwidth: Option<NonZeroU64>,
    /// Whether its user had paused the guest.
    pub guest_was: GuestWas,
    /// Whether both sides compare digests of all memory and state before the guest is handed over. For tests: the blackout
    /// grows by the time it takes, which the budget leaves out.
    pub digests: bool,
    /// Whether both sides keep digests of pages as they go, and compare them before the guest is handed over. What differs is sent again, once. Not
    /// where pages may come late.
    pub verify: bool,
    /// What is to be done about compression.
    pub compression: Compression,
    /// Both ends are on one host: what compression would take of the processors is taken from the other end and from the copying, so it is left
    /// alone unless its user names a way, or caps the bandwidth.
    pub one_host: bool,
    /// What the switchover costs beside the last pages, as learned from earlier ones.
    pub overhead: Overhead,
    /// When the destination counts as dead.
    pub liveness: Liveness,
    /// How long a link that is lost before the switchover is asked for may take to be made again; zero: the migration ends with it.
    pub resume_window: Duration,
}

/// Whether the guest runs while it is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// It does, in rounds, until it has to stand still for no longer than this, everything counted.
    Live {
        /// The budget.
        max_downtime: Duration,
    },
    /// It stands still from before the first page until it runs at the destination, or on here: one pass, however long that takes.
    Cold,
}

/// What happens to a guest whose copy is not done in its time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnTimeout {
    /// The migration is given up, and the guest runs on here.
    #[default]
    Abort,
    /// It is completed as by [`SourceOrder::ForceComplete`], and there is no other end to its time: the rest of the copy ends, because
    /// the guest stands still for it, or it comes late where pages may.
    Pause,
}

/// The parts of a blackout that do not depend on the last pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overhead {
    /// Stopping the guest. Exporting its state is in `start`, where that was learned from earlier moves: they tell it together with loading it.
    pub stop: Duration,
    /// Loading the state, the claim and the start at the destination, without the way there.
    pub start: Duration,
}

impl Default for Overhead {
    /// A guess for a way that no guest has moved on yet, as measured on small hosts (`docs/performance.md`). Too low, it has a switchover called off
    /// that takes longer; too high, it would have a budget called infeasible that is not.
    fn default() -> Self {
        Self {
            stop: Duration::from_millis(1),
            start: Duration::from_millis(2),
        }
    }
}

/// An order to a running source.
#[derive(Debug)]
pub enum SourceOrder {
    /// Give up, unless GO was sent.
    Abort {
        /// Why, for the record and for the destination.
        reason: String,
    },
    /// Switch over after the round that goes on, whatever the budget for the downtime: all that is still to be sent then is sent while the
    /// guest stands still, or comes late where pages may. The timeout holds, and an abort.
    ForceComplete,
    /// Other terms hold from now on: the bandwidth at once, the rest with the next decision.
    Retune(NewTerms),
    /// Another link to the destination, in place of one that is lost.
    Reconnect(Box<Link>),
}

/// What a running source tells. Never blocks it.
#[derive(Clone, Debug)]
pub enum SourceReport {
    /// The destination accepted the handshake.
    Accepted {
        /// The protocol version that both speak.
        protocol: u32,
    },
    /// Tracking is on and the first pass begins.
    Copying {
        /// Pages that the host has ever populated.
        populated_pages: u64,
        /// What there is to move.
        copied: Copied,
    },
    /// About four times a second while copying.
    Progress(Progress),
    /// A round was acknowledged by the destination, and what was decided on it.
    Round {
        /// What was measured.
        round: RoundSummary,
        /// How far the copy is with it.
        copied: Copied,
        /// How long writes to copied disks waited so far.
        disk_waits: DiskWaits,
        /// What follows from it.
        decided: Decided,
    },
    /// Something was decided beside the rounds.
    Decided(Decided),
    /// The budget allows the switchover: a grant for this attempt is awaited while small rounds go on.
    Converged {
        /// The attempt to arm.
        attempt: u32,
        /// How long the blackout is expected to last.
        predicted: Duration,
    },
    /// A grant is held: the guest is being stopped.
    Switching {
        /// The attempt.
        attempt: Attempt,
    },
    /// The switchover was called off, the guest runs on, rounds go on; the next attempt is one higher.
    Disarmed {
        /// The attempt that was traded for CANCELLED.
        attempt: Attempt,
        /// Why, in words.
        reason: String,
    },
    /// The link is lost, the guest is what it was, and another link is waited for.
    LinkLost {
        /// Why, in words.
        reason: String,
        /// For so long from now on.
        patience: Duration,
    },
    /// The destination said over another link what it holds, and the copy goes on.
    Resumed {
        /// Pages of the round that was cut which need not be sent again.
        held_pages: u64,
        /// Pages that are still to be sent, as far as is known.
        due_pages: u64,
    },
}

/// How far the copy is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// The round that is being sent, from 1.
    pub round: u32,
    /// Pages of this round not yet handed to a stream.
    pub remaining_pages: u64,
    /// Bytes put on all page streams so far.
    pub bytes_sent: u64,
    /// Pages found to be zero so far, told and not sent.
    pub zero_pages: u64,
    /// Pages left out so far because the guest said that they are free.
    pub hinted_pages: u64,
    /// Bytes a second, measured since the last progress.
    pub throughput_bytes_per_s: u64,
    /// How far the copy is.
    pub copied: Copied,
    /// How long writes to copied disks waited so far.
    pub disk_waits: DiskWaits,
}

/// One round, from its first page to the destination's acknowledgement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundSummary {
    /// Its number, from 1.
    pub number: u32,
    /// Pages in it, zero pages too.
    pub pages: u64,
    /// Pages that are not in it although they were due, because the guest said that they are free.
    pub hinted_pages: u64,
    /// Pages of it that were zero.
    pub zero_pages: u64,
    /// Bytes put on the page streams.
    pub bytes: u64,
    /// Bytes that compression saved of them.
    pub saved: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// Pages that the guest had dirtied by its end. 0 for the last round, which runs while the guest stands still.
    pub dirty_pages: u64,
}

/// A decision as the migration's report has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decided {
    /// The round that it was made on, or that went on.
    pub round: u32,
    /// What was decided, in a word for scripts.
    pub deed: &'static str,
    /// The grounds, for a person.
    pub words: String,
    /// The blackout if the guest had been stopped then; `None` where the decision is not about that.
    pub blackout: Option<Duration>,
    /// What the copy was expected to come to.
    pub forecast: Forecast,
    /// For how much of the time vCPUs are kept from running from then on, in percent.
    pub throttle: u32,
    /// How long the round took that it was made on; `None` where it was made on none.
    pub took: Option<Duration>,
    /// Who wrote, and where, as far as that is known.
    pub written: Written,
}

/// Who wrote since the decision before, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Pages of each vCPU; empty where nothing tells them apart.
    pub by_vcpu: Vec<u64>,
    /// The parts of memory that have most of the dirty pages, and how many; the busiest first.
    pub parts: Vec<(FrameRun, u64)>,
}

impl Decided {
    /// What the policy decided on a round.
    pub(super) fn on(round: &RoundSummary, decision: &Decision) -> Self {
        Self {
            round: round.number,
            deed: decision.verdict.as_str(),
            words: decision.words.clone(),
            blackout: Some(decision.predicted),
            forecast: decision.forecast,
            throttle: decision.throttle,
            took: Some(round.elapsed),
            written: Written::default(),
        }
    }

    /// Who wrote, and where.
    pub(super) fn written(self, written: Written) -> Self {
        Self { written, ..self }
    }

    /// What the guest may write to copied disks until the next decision.
    pub(super) fn holding_back(mut self, blocks: Option<u64>) -> Self {
        if let Some(blocks) = blocks {
            let _ = write!(
                self.words,
                "; writes to copied disks wait where they would leave more than {blocks} blocks and half of what is sent"
            );
        }
        self
    }

    /// Which vCPUs that comes to, or why none is throttled.
    pub(super) fn throttled(mut self, throttled: Result<Throttled, GuestError>) -> Self {
        let whom = match throttled {
            Ok(Throttled::None) => return self,
            Err(cause) => {
                self.throttle = 0;
                format!("none, for they cannot be: {}", error_chain(&cause))
            }
            Ok(Throttled::All) => "all vCPUs, for the dirty log does not tell which of them write".to_owned(),
            Ok(Throttled::Writers(1)) => "the vCPU that writes".to_owned(),
            Ok(Throttled::Writers(count)) => format!("the {count} vCPUs that write"),
        };
        self.words = format!("{}; throttled: {whom}", self.words);
        self
    }

    /// The time is up, and the migration is completed all the same.
    pub(super) fn time_up((round, throttle): (u32, u32), terms: &Terms, lateness: Lateness) -> Self {
        let (deed, what) = match lateness {
            Lateness::Never => ("pause", "the guest stands still until the rest of it has been sent"),
            Lateness::AtOnce | Lateness::WhenItPays | Lateness::WhenItMustEnd => {
                ("time-up", "the guest is handed over, and what is left then comes late")
            }
        };
        Self {
            round,
            deed,
            words: format!(
                "its {:.1} s are up: after this round {what}",
                terms.timeout.as_secs_f64()
            ),
            blackout: None,
            forecast: Forecast::default(),
            throttle,
            took: None,
            written: Written::default(),
        }
    }

    /// A switchover was called off, after the guest stood still for so long; `None`: it stands still all the time.
    pub(super) fn called_off((round, throttle): (u32, u32), stood_still: Option<Duration>, reason: &str) -> Self {
        let still =
            stood_still.map(|time| format!(", after the guest stood still for {:.1} ms", time.as_secs_f64() * 1e3));
        Self {
            round,
            deed: "called-off",
            words: format!("the switchover was called off{}: {reason}", still.unwrap_or_default()),
            blackout: stood_still,
            forecast: Forecast::default(),
            throttle,
            took: None,
            written: Written::default(),
        }
    }

    /// What the destination holds differs from what was sent.
    pub(super) fn send_again((round, throttle): (u32, u32), what: &str) -> Self {
        Self {
            round,
            deed: "verify",
            words: format!("{what} differ at the destination: they are sent again"),
            blackout: None,
            forecast: Forecast::default(),
            throttle,
            took: None,
            written: Written::default(),
        }
    }

    /// Pages are compressed otherwise from now on.
    pub(super) fn compress((round, throttle): (u32, u32), words: String) -> Self {
        Self {
            round,
            deed: "compress",
            words,
            blackout: None,
            forecast: Forecast::default(),
            throttle,
            took: None,
            written: Written::default(),
        }
    }

    /// What its user decided while this round went on.
    pub(super) fn retuned((round, throttle): (u32, u32), terms: &Terms) -> Self {
        Self {
            round,
            deed: "retune",
            words: format!("its user allows from now on: {}", terms.words()),
            blackout: None,
            forecast: Forecast::default(),
            throttle,
            took: None,
            written: Written::default(),
        }
    }
}

/// Everything measured by a source, whatever its outcome.
#[derive(Clone, Debug, Default)]
pub struct SourceSummary {
    /// The rounds, in order; the last one is that of the blackout if there was one.
    pub rounds: Vec<RoundSummary>,
    /// What was decided on them and beside them, in order.
    pub decisions: Vec<Decided>,
    /// Bytes put on all page streams.
    pub bytes_sent: u64,
    /// Zero pages told and not sent.
    pub zero_pages: u64,
    /// Pages that were not sent in the first pass, or need not come late, because the guest said that they are free. What it wrote to them since was sent all the same.
    pub hinted_pages: u64,
    /// For how much of the time vCPUs were kept from running in the end, in percent.
    pub throttle: u32,
    /// Page streams used.
    pub streams: u32,
    /// Bytes a second over the running rounds; `None` before the first one ended.
    pub throughput_bytes_per_s: Option<u64>,
    /// Bytes a second that the guest dirtied, by the last measured round; `None` before the first one ended.
    pub dirty_bytes_per_s: Option<u64>,
    /// The smallest round trip of the control stream lately; `None` if none was measured.
    pub round_trip: Option<Duration>,
    /// Pages that come after GO.
    pub late_pages: u64,
    /// What came of comparing digests, if it came to that.
    pub verified: Option<Verified>,
    /// What came of compression.
    pub compression: Tally,
    /// How far the copy came; `None` before the first pass.
    pub copied: Option<Copied>,
    /// How long writes to copied disks waited.
    pub disk_waits: DiskWaits,
    /// The blackout's source part; `None` if the guest was never stopped, or went on running.
    pub blackout: Option<Blackout>,
}

/// What came of comparing the digests that both sides kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Pages that hold something and were compared. The others were compared as zero.
    pub pages: u64,
    /// Ranges of pages that differed, and were sent again, in all attempts.
    pub ranges_sent_again: u64,
    /// How long the guest stood still for that, the last time.
    pub blackout: Duration,
}

/// The source's part of a blackout.
#[derive(Clone, Copy, Debug)]
pub struct Blackout {
    /// When the pause began.
    pub pause_began: Instant,
    /// When GO had been traded and given to the control stream.
    pub go_sent: Instant,
    /// The stop: vCPUs, then devices.
    pub stop: StopTimes,
    /// Exporting the state.
    pub state: Duration,
    /// Fetching the last dirty log and sending the last pages. Of a cold move, whose pages are all last ones: everything from the stop
    /// on that is not the state, the wait for the grant too.
    pub last_pages: Duration,
    /// Comparing digests, and digesting all memory; zero where neither is asked for.
    pub verify: Duration,
}
