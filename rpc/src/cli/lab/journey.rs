//! One move of the guest in a lab, and what it was like for the guest and for those who listen to it.

use std::time::{Duration, Instant};

use ferry_proto::agent::v1::{LiveMigrateRequest, MigrationInfo, MigrationOptions, MigrationPrediction};
use serde::Serialize;
use tokio::time::sleep;

use super::super::account::whereabouts;
use super::super::failure::{Exit, Failure};
use super::super::{migrate, watch};
use super::felt::Felt;
use super::hosts::{Lab, ProbeGuest};
use super::record::{Beat, Span};
use crate::agent::Transport;

/// Where to, and how.
#[derive(Debug, Clone, Copy)]
pub(in crate::cli) struct MoveOrder {
    /// From this host; to the other one.
    pub(in crate::cli) source: usize,
    pub(in crate::cli) streams: u32,
    pub(in crate::cli) transport: Transport,
    /// Digests are kept and compared.
    pub(in crate::cli) verify: bool,
    /// All of its memory comes late, and what nobody waits for with so many bytes a second; `None`: it comes in rounds.
    pub(in crate::cli) late: Option<u64>,
    /// How long to listen to the guest at the destination before the move is judged.
    pub(in crate::cli) listen: Duration,
}

impl MoveOrder {
    pub(in crate::cli) fn destination(&self) -> usize {
        1 - self.source
    }
}

/// What came of a move.
#[derive(Debug, Clone, Serialize)]
pub(in crate::cli) struct Move {
    /// What the agents measured.
    pub(in crate::cli) migration: MigrationInfo,
    /// The largest gap that the guest itself saw between two looks at its clock.
    pub(in crate::cli) guest_gap_ms: f64,
    /// What it got done, and its gaps, before, meanwhile and after.
    pub(in crate::cli) felt: Felt,
    /// The longest that the reader of its heartbeats waited for one.
    pub(in crate::cli) reader_gap_ms: f64,
    /// Heartbeats read, from the last one before the move on.
    pub(in crate::cli) heartbeats: u64,
    /// Heartbeats that never came.
    pub(in crate::cli) heartbeats_missing: u64,
    /// What was printed meanwhile and is no line, nor a half of one.
    pub(in crate::cli) unreadable: Vec<String>,
    /// Heartbeats that came twice, differently or from both hosts.
    pub(in crate::cli) heartbeats_doubled: u64,
    /// Pages that the guest wrote meanwhile, and how many that is a second by its clock.
    pub(in crate::cli) page_writes: u64,
    pub(in crate::cli) page_writes_per_s: f64,
    /// Pages that the guest read in full to check them.
    pub(in crate::cli) pages_checked: u64,
    /// Pages that did not hold what the guest had written.
    pub(in crate::cli) faults: u64,
    /// How often a vCPU's clock went backwards.
    pub(in crate::cli) clock_back: u64,
    /// Hosts whose agents say that it runs there.
    pub(in crate::cli) runners: Vec<String>,
    /// VMM processes on this machine that belong to the lab.
    pub(in crate::cli) vmm_processes: usize,
}

impl Move {
    /// Whether all is as it should be: one runner, no heartbeat lost or doubled, memory as it was written.
    pub(in crate::cli) fn is_clean(&self) -> bool {
        self.faults_found().is_empty()
    }

    /// All that is not as it should be, in words.
    pub(in crate::cli) fn faults_found(&self) -> Vec<String> {
        let (from, to) = (&self.migration.source, &self.migration.destination);
        let counts = [
            (self.heartbeats_missing, "heartbeats missing"),
            (self.heartbeats_doubled, "heartbeats doubled"),
            (self.faults, "pages damaged"),
            (self.clock_back, "times a clock went backwards"),
        ];
        let counted = counts.iter().filter(|(count, _)| *count > 0);
        let mut found: Vec<String> = counted
            .map(|(count, what)| format!("{from} → {to}: {count} {what}"))
            .collect();
        if self.runners != [to.clone()] {
            found.push(format!("{from} → {to}: runs on [{}]", self.runners.join(", ")));
        }
        if self.heartbeats_missing > 0 {
            found.extend(
                self.unreadable
                    .iter()
                    .map(|line| format!("{from} → {to}: cannot read {line:?}")),
            );
        }
        if self.vmm_processes != 1 {
            found.push(format!("{from} → {to}: {} VMM processes", self.vmm_processes));
        }
        found
    }
}

impl Lab {
    /// Moves the guest and listens to it.
    ///
    /// # Errors
    /// The migration did not complete, or the guest fell silent.
    pub(in crate::cli) async fn move_guest(
        &self,
        guest: &ProbeGuest,
        order: MoveOrder,
        observe: impl FnMut(&MigrationInfo),
    ) -> Result<Move, Failure> {
        let silent = || Failure::new(Exit::Failed, format!("{} prints no heartbeats", guest.name));
        let before = guest.last_beat().ok_or_else(silent)?;
        let migration = self.migrate(guest, order, observe).await?;
        let destination = order.destination();
        let landed = |record: &super::record::Record| record.since(before.heartbeat.seq, destination).nth(1).copied();
        let landed = guest.record.until(SILENCE, landed).await.ok_or_else(silent)?;
        sleep(order.listen).await;

        let (runners, vmm_processes) = self.settled_runners().await?;
        let mut record = guest.record.lock();
        let unreadable = record.settle(order.source, destination);
        let last = record.last().ok_or_else(silent)?;
        let span = record
            .span(before.heartbeat.seq, last.heartbeat.seq)
            .ok_or_else(silent)?;
        let felt = Felt::of(&record, before.heartbeat.seq, landed.heartbeat.seq).ok_or_else(silent)?;
        Ok(Move {
            migration,
            felt,
            guest_gap_ms: span.guest_gap.as_secs_f64() * 1000.0,
            reader_gap_ms: span.reader_gap.as_secs_f64() * 1000.0,
            heartbeats: span.heartbeats,
            heartbeats_missing: span.missing,
            unreadable,
            heartbeats_doubled: record.doubled,
            page_writes: span.writes,
            page_writes_per_s: span.write_rate,
            pages_checked: span.checked,
            faults: span.faults,
            clock_back: span.clock_back,
            runners,
            vmm_processes,
        })
    }

    /// Only the migration, to its end.
    pub(in crate::cli) async fn migrate(
        &self,
        guest: &ProbeGuest,
        order: MoveOrder,
        observe: impl FnMut(&MigrationInfo),
    ) -> Result<MigrationInfo, Failure> {
        let source = self.agent(order.source);
        let accepted = migrate::cast(source, self.request(guest, order)).await?;
        let info = watch::follow(source, &accepted.migration, observe).await?;
        if info.status != "completed" {
            let error = info.error.as_deref().unwrap_or("no reason was given");
            let text = format!("migration {} {}: {error}; {}", info.id, info.status, whereabouts(&info));
            return Err(Failure::new(Exit::Failed, text));
        }
        Ok(info)
    }

    fn request(&self, guest: &ProbeGuest, order: MoveOrder) -> LiveMigrateRequest {
        LiveMigrateRequest {
            instance: guest.id.clone(),
            destination: self.host(order.destination()).to_owned(),
            options: Some(MigrationOptions {
                max_downtime_us: 300_000,
                timeout_ms: 120_000,
                streams: order.streams,
                transport: order.transport.as_str().to_owned(),
                verify: order.verify,
                mode: order.late.map_or("precopy", |_| "postcopy").to_owned(),
                bandwidth_bytes_per_s: order.late.unwrap_or(0),
                ..Default::default()
            }),
            request_id: uuid::Uuid::new_v4().to_string(),
            ..Default::default()
        }
    }

    /// What the move is expected to come to, by what the guest writes in this time.
    ///
    /// # Errors
    /// The agent does not answer, or foretells nothing.
    pub(in crate::cli) async fn predict(
        &self,
        guest: &ProbeGuest,
        order: MoveOrder,
        sample: Duration,
    ) -> Result<MigrationPrediction, Failure> {
        let request = LiveMigrateRequest {
            dry_run: true,
            sample_ms: u32::try_from(sample.as_millis()).unwrap_or(u32::MAX),
            ..self.request(guest, order)
        };
        let reply = migrate::cast(self.agent(order.source), request).await?;
        let failed = |why: String| Failure::new(Exit::Failed, format!("the move was not foretold: {why}"));
        let prediction = reply.prediction.ok_or_else(|| failed("no answer to it".to_owned()))?;
        match prediction.unknown {
            Some(why) => Err(failed(why)),
            None => Ok(prediction),
        }
    }

    /// Who runs the guest, once the source's VMM has had a moment to end.
    async fn settled_runners(&self) -> Result<(Vec<String>, usize), Failure> {
        let began = Instant::now();
        loop {
            let (hosts, vmms) = self.runners().await?;
            if (hosts.len() == 1 && vmms == 1) || began.elapsed() > SILENCE {
                return Ok((hosts, vmms));
            }
            sleep(Duration::from_millis(20)).await;
        }
    }
}

impl ProbeGuest {
    /// The newest heartbeat.
    pub(in crate::cli) fn last_beat(&self) -> Option<Beat> {
        self.record.lock().last()
    }

    /// What the guest takes the frequency of its time stamp counter for.
    pub(in crate::cli) fn tsc_khz(&self) -> u64 {
        self.record.lock().tsc_khz.unwrap_or(0)
    }

    /// The heartbeats of a host from a sequence number on.
    pub(in crate::cli) fn beats_since(&self, seq: u64, host: usize) -> Vec<Beat> {
        self.record.lock().since(seq, host).copied().collect()
    }

    /// What the guest lived through from one heartbeat to another, after which it is at this host.
    pub(in crate::cli) fn life(&self, from: &Beat, to: &Beat, host: usize) -> Option<Life> {
        let mut record = self.record.lock();
        if host != from.host {
            record.settle(from.host, host);
        }
        let span = record.span(from.heartbeat.seq, to.heartbeat.seq)?;
        Some(Life {
            span,
            doubled: record.doubled,
        })
    }

    /// Page writes a second, by the guest's clock, over some time from now on.
    pub(in crate::cli) async fn write_rate_over(&self, time: Duration) -> f64 {
        let from = self.last_beat();
        sleep(time).await;
        let record = self.record.lock();
        let span = from
            .zip(record.last())
            .and_then(|(from, to)| record.span(from.heartbeat.seq, to.heartbeat.seq));
        span.map_or(0.0, |span| span.write_rate)
    }
}

/// What a guest lived through.
pub(in crate::cli) struct Life {
    span: Span,
    doubled: u64,
}

impl Life {
    pub(in crate::cli) fn heartbeats(&self) -> u64 {
        self.span.heartbeats
    }

    /// What is not as it should be, in words.
    pub(in crate::cli) fn faults_found(&self) -> Option<String> {
        let counts = [
            (self.span.missing, "heartbeats missing"),
            (self.doubled, "heartbeats doubled"),
            (self.span.faults, "pages damaged"),
            (self.span.clock_back, "times a clock went backwards"),
        ];
        let counted = counts.iter().filter(|(count, _)| *count > 0);
        let found: Vec<String> = counted.map(|(count, what)| format!("{count} {what}")).collect();
        (!found.is_empty()).then(|| found.join(", "))
    }
}

const SILENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::super::felt::Stretch;
    use super::*;

    const CALM: Stretch = Stretch {
        page_writes_per_s: 1.0,
        guest_gap_ms: 1.0,
    };

    fn clean() -> Move {
        Move {
            migration: MigrationInfo {
                destination: "b".into(),
                ..Default::default()
            },
            guest_gap_ms: 1.0,
            felt: Felt {
                before: CALM,
                during: CALM,
                after: CALM,
                slowdown: Some(0.0),
            },
            reader_gap_ms: 1.0,
            heartbeats: 10,
            heartbeats_missing: 0,
            unreadable: Vec::new(),
            heartbeats_doubled: 0,
            page_writes: 1,
            page_writes_per_s: 1.0,
            pages_checked: 1,
            faults: 0,
            clock_back: 0,
            runners: vec!["b".to_owned()],
            vmm_processes: 1,
        }
    }

    #[test]
    fn a_move_is_clean_only_if_nothing_at_all_is_wrong() {
        assert!(clean().is_clean());
        assert!(!Move { faults: 1, ..clean() }.is_clean());
        assert!(
            !Move {
                heartbeats_missing: 1,
                ..clean()
            }
            .is_clean()
        );
        assert!(
            !Move {
                heartbeats_doubled: 1,
                ..clean()
            }
            .is_clean()
        );
        assert!(
            !Move {
                clock_back: 1,
                ..clean()
            }
            .is_clean()
        );
        assert!(
            !Move {
                vmm_processes: 2,
                ..clean()
            }
            .is_clean()
        );
        assert!(
            !Move {
                runners: vec!["a".to_owned(), "b".to_owned()],
                ..clean()
            }
            .is_clean()
        );
    }
}
