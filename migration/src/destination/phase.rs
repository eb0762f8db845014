//! The state machine: what follows from what the source says, and what is checked before the guest counts as here.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ferry_proto::stream::v1::{self, from_destination::Message as Reply, from_source::Message as Said};

use crate::destination::crew::Crew;
use crate::destination::hearing::Hearing;
use crate::destination::verifying::{self, Compared};
use crate::destination::{Arrived, DestinationError, DestinationParameters, DestinationReport, Digests};
use crate::digest;
use crate::error_chain;
use crate::guest::{GuestMemory, GuestWas};
use crate::handover::Attempt;
use crate::postcopy::{self, Table};
use crate::wire::{StreamTotals, attempt_from_wire, digest_from_wire, kind_of_said};

/// What the source does, as far as it told.
pub(super) enum Phase {
    /// Its guest runs. Attempts up to `disarmed` were called off.
    Copying { disarmed: u32 },
    /// Its guest stands still for this attempt.
    GuestStopped(Held),
}

/// The saved state, and what was computed since.
pub(super) struct Held {
    attempt: Attempt,
    state: Vec<u8>,
    memory_digest: Option<u128>,
    verify: Duration,
    /// What came of comparing, if that was asked for.
    compared: Option<Compared>,
    /// Pages that come late, as far as their table is here.
    missing: Option<Table>,
}

pub(super) enum Step {
    Next(Phase),
    Arrived(Box<Arrived>),
}

impl Phase {
    /// What follows from a message. Pages that it lists are awaited here.
    pub(super) fn step<M: GuestMemory>(
        self,
        message: Said,
        hearing: &mut Hearing<'_>,
        crew: &Crew<'_, '_, M>,
    ) -> Result<Step, DestinationError> {
        match (self, message) {
            (phase @ Self::Copying { .. }, Said::Barrier(barrier)) => {
                reach_barrier(barrier, hearing, crew)?;
                Ok(Step::Next(phase))
            }
            (Self::Copying { disarmed }, Said::State(state)) => {
                let attempt = checked_attempt(state.attempt, hearing)?;
                if attempt.attempt <= disarmed {
                    return Err(DestinationError::Misbehaved(format!("{attempt} was called off before")));
                }
                hearing.asked.report(DestinationReport::StateReceived { attempt });
                let (state, memory_digest, verify) = (state.machine_state, None, Duration::ZERO);
                Ok(Step::Next(Self::GuestStopped(Held {
                    attempt,
                    state,
                    memory_digest,
                    verify,
                    compared: None,
                    missing: None,
                })))
            }
            // Called off before the state was exported.
            (Self::Copying { disarmed }, Said::Disarm(disarm)) => {
                let attempt = disarm_attempt(disarm, hearing)?;
                Ok(Step::Next(Self::Copying {
                    disarmed: disarmed.max(attempt.attempt),
                }))
            }
            (Self::GuestStopped(held), Said::Disarm(disarm)) => {
                let attempt = disarm_attempt(disarm, hearing)?;
                if attempt != held.attempt {
                    return Err(DestinationError::Misbehaved(format!(
                        "it called off {attempt} in {}",
                        held.attempt
                    )));
                }
                Ok(Step::Next(Self::Copying {
                    disarmed: attempt.attempt,
                }))
            }
            (Self::GuestStopped(mut held), Said::Missing(part)) => {
                let attempt = checked_attempt(part.attempt.clone(), hearing)?;
                if attempt != held.attempt {
                    return Err(DestinationError::Misbehaved(format!(
                        "pages are missing of {attempt} in {}",
                        held.attempt
                    )));
                }
                let table = held.missing.get_or_insert_with(|| Table::new(crew.memory.shape()));
                table.take(&part, crew.memory).map_err(DestinationError::Misbehaved)?;
                verifying::leave_out(table, crew);
                Ok(Step::Next(Self::GuestStopped(held)))
            }
            (Self::GuestStopped(mut held), Said::Compare(compare)) => {
                let attempt = checked_attempt(compare.attempt.clone(), hearing)?;
                if attempt != held.attempt {
                    return Err(DestinationError::Misbehaved(format!(
                        "it compares {attempt} in {}",
                        held.attempt
                    )));
                }
                held.compared = Some(verifying::compare(compare, hearing, crew)?);
                Ok(Step::Next(Self::GuestStopped(held)))
            }
            // What differs is sent again, in a round of its own.
            (Self::GuestStopped(held), Said::Barrier(barrier)) if held.compared == Some(Compared::Differs) => {
                reach_barrier(barrier, hearing, crew)?;
                Ok(Step::Next(Self::GuestStopped(held)))
            }
            (Self::GuestStopped(held), Said::DigestRequest(request)) => {
                let attempt = checked_attempt(request.attempt, hearing)?;
                if attempt != held.attempt {
                    return Err(DestinationError::Misbehaved(format!(
                        "it asks for {attempt} in {}",
                        held.attempt
                    )));
                }
                hearing.await_totals(&crew.shared.delivered, &from_wire(request.totals))?;
                let began = Instant::now();
                let digest = digest::memory(crew.memory).map_err(|cause| DestinationError::Guest {
                    step: "digest its memory",
                    cause,
                })?;
                Ok(Step::Next(Self::GuestStopped(Held {
                    memory_digest: Some(digest),
                    verify: began.elapsed(),
                    ..held
                })))
            }
            (Self::GuestStopped(held), Said::Go(go)) => {
                check_manifest(held, go.manifest, hearing, crew).map(|arrived| Step::Arrived(Box::new(arrived)))
            }
            (phase, message) => Err(DestinationError::Misbehaved(format!(
                "it said {} while {}",
                kind_of_said(&message),
                phase.describe()
            ))),
        }
    }

    /// Up to which attempt all were called off, as long as the source's guest runs.
    pub(super) fn copying(&self) -> Option<u32> {
        match self {
            Self::Copying { disarmed } => Some(*disarmed),
            Self::GuestStopped(_) => None,
        }
    }

    fn describe(&self) -> &'static str {
        match self {
            Self::Copying { .. } => "copying",
            Self::GuestStopped(_) => "its guest was stopped",
        }
    }
}

fn reach_barrier<M: GuestMemory>(
    barrier: v1::Barrier,
    hearing: &mut Hearing<'_>,
    crew: &Crew<'_, '_, M>,
) -> Result<(), DestinationError> {
    let open = crew.shared.round.load(Ordering::Acquire);
    if barrier.round != open {
        return Err(DestinationError::Misbehaved(format!(
            "the barrier of round {} in round {open}",
            barrier.round
        )));
    }
    hearing.await_totals(&crew.shared.delivered, &from_wire(barrier.totals))?;
    make_durable(crew)?;
    let next = open
        .checked_add(1)
        .ok_or_else(|| DestinationError::Misbehaved("rounds without end".to_owned()))?;
    // Before the next round may begin: what is listed after a cut is of the open round only.
    crew.shared.whole.clear();
    crew.shared.round.store(next, Ordering::Release);
    hearing.say(Reply::BarrierReached(v1::BarrierReached { round: open }));
    hearing.asked.report(DestinationReport::RoundReceived {
        round: open,
        totals: crew.shared.sum(),
    });
    Ok(())
}

fn make_durable<M: GuestMemory>(crew: &Crew<'_, '_, M>) -> Result<(), DestinationError> {
    crew.memory.make_durable().map_err(|cause| DestinationError::Guest {
        step: "make durable what arrived",
        cause,
    })
}

/// GO is here: waits for what it lists and compares. Every reason against it is collected.
fn check_manifest<M: GuestMemory>(
    held: Held,
    manifest: Option<v1::Manifest>,
    hearing: &mut Hearing<'_>,
    crew: &Crew<'_, '_, M>,
) -> Result<Arrived, DestinationError> {
    let go_received = Instant::now();
    let refuse = |reason: String| DestinationError::ManifestRefused(vec![reason]);
    let manifest = manifest.ok_or_else(|| refuse("GO has no manifest".to_owned()))?;
    let attempt = attempt_from_wire(manifest.attempt).map_err(refuse)?;
    if attempt != held.attempt {
        return Err(refuse(format!("GO is for {attempt}, the state for {}", held.attempt)));
    }
    let totals = from_wire(manifest.totals);
    hearing
        .await_totals(&crew.shared.delivered, &totals)
        .map_err(|error| refuse(error_chain(&error)))?;
    make_durable(crew).map_err(|error| refuse(error_chain(&error)))?;
    let last_pages = go_received.elapsed();

    let mut reasons = Vec::new();
    let checksum = digest_from_wire(&manifest.state_checksum, "the state's checksum").map_err(refuse)?;
    if checksum != digest::bytes(&held.state) {
        reasons.push("the saved state is not the one that was sent".to_owned());
    }
    let mut compared = None;
    if let Some(digests) = &manifest.digests {
        let memory = digest_from_wire(&digests.memory, "the digest of memory").map_err(refuse)?;
        let state = digest_from_wire(&digests.state, "the digest of the state").map_err(refuse)?;
        compared = Some(Digests { memory, state });
        match held.memory_digest {
            Some(found) if found == memory => {}
            Some(found) => reasons.push(format!(
                "memory digests to {found:032x} here and to {memory:032x} at the source"
            )),
            None => reasons.push("digests are listed that were not asked for".to_owned()),
        }
    } else if held.memory_digest.is_some() {
        reasons.push("digests were asked for and are not listed".to_owned());
    }
    reasons.extend(verifying::check(
        crew.shared.digests.get(),
        held.compared.as_ref(),
        &totals,
    ));
    let missing = check_late(held.missing, manifest.late, &mut reasons);
    if !reasons.is_empty() {
        return Err(DestinationError::ManifestRefused(reasons));
    }
    hearing.asked.report(DestinationReport::GoReceived { attempt });
    let guest_was = if manifest.paused_by_user {
        GuestWas::PausedByUser
    } else {
        GuestWas::Running
    };
    let Held { state, verify, .. } = held;
    Ok(Arrived {
        attempt,
        state,
        guest_was,
        missing,
        digests: compared,
        go_received,
        last_pages,
        verify,
    })
}

/// The pages that come late, if the table that came is the one that the manifest lists.
fn check_late(
    table: Option<Table>,
    listed: Option<v1::LateTable>,
    reasons: &mut Vec<String>,
) -> Option<crate::PageSet> {
    let (table, listed) = match (table, listed) {
        (None, None) => return None,
        (Some(table), Some(listed)) => (table.whole(), listed),
        (Some(_), None) => {
            reasons.push("pages are missing that GO does not list".to_owned());
            return None;
        }
        (None, Some(_)) => {
            reasons.push("pages come late, and which they are was not told".to_owned());
            return None;
        }
    };
    let Some(missing) = table else {
        reasons.push("the table of missing pages has no end".to_owned());
        return None;
    };
    let checksum = digest_from_wire(&listed.checksum, "the checksum of the missing pages");
    if listed.pages != missing.count() || checksum != Ok(postcopy::checksum(&missing)) {
        reasons.push("the missing pages are not those that GO lists".to_owned());
    }
    (!missing.is_empty()).then_some(missing)
}

fn checked_attempt(wire: Option<v1::Attempt>, hearing: &Hearing<'_>) -> Result<Attempt, DestinationError> {
    let attempt = attempt_from_wire(wire).map_err(DestinationError::Misbehaved)?;
    let DestinationParameters {
        instance,
        migration,
        epoch,
        ..
    } = *hearing.asked.parameters;
    if attempt
        != (Attempt {
            instance,
            migration,
            epoch,
            ..attempt
        })
    {
        return Err(DestinationError::Misbehaved(format!(
            "{attempt} is not what is expected here"
        )));
    }
    Ok(attempt)
}

fn disarm_attempt(disarm: v1::Disarm, hearing: &Hearing<'_>) -> Result<Attempt, DestinationError> {
    let attempt = checked_attempt(disarm.attempt, hearing)?;
    hearing.asked.report(DestinationReport::Disarmed {
        attempt,
        reason: disarm.reason,
    });
    Ok(attempt)
}

pub(super) fn from_wire(totals: Vec<v1::StreamTotals>) -> Vec<StreamTotals> {
    totals.into_iter().map(StreamTotals::from).collect()
}
