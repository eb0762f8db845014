//! Nova's LiveMigrationTask: find the source, choose the destination, have both check, cast until there is a receipt.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_proto::agent::v1::{
    Check, CheckDestinationRequest, HostInfo, HostVerdict, InstanceInfo, InstanceRequest, LiveMigrateReply,
    LiveMigrateRequest, LiveMigrationCast, MigrationRequest, Refusal,
};
use ferry_proto::{required, wire_uuid};
use uuid::Uuid;

use super::scheduler::{self, Candidate, Verdict, Wanted};
use crate::agent::context::RequestContext;
use crate::agent::events::Subject;
use crate::agent::failure::Failure;
use crate::agent::instances::Agent;
use crate::agent::journal::MigrationRow;
use crate::agent::mode::Mode;
use crate::agent::outgoing::{check_options, request_id};
use crate::agent::peers::{CALL_TIME, ComputeClient, ConductorClient};
use crate::agent::prediction::check_sample;
use crate::agent::reason::Reason;

/// How many hosts are asked to check before the task gives up: Nova's migrate_max_retries, and the first.
const MOST_TRIES: usize = 5;
/// How long a cast is sent again while it has no receipt.
const CAST_TIME: Duration = Duration::from_secs(20);
/// The first pause between two casts; each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

impl Agent {
    /// The whole task. The same request id again is the same migration.
    ///
    /// # Errors
    /// One of the closed list of reasons, or a cast without a receipt: then the source may have it.
    pub(super) async fn live_migrate(
        self: &Arc<Self>,
        context: &RequestContext,
        request: LiveMigrateRequest,
    ) -> Result<LiveMigrateReply, Failure> {
        check_sample(request.sample_ms)?;
        let (source, instance) = self.find(context, &request.instance).await?;
        let subject = Subject {
            instance: wire_uuid("id", &instance.id)?,
            name: instance.name.clone(),
            migration: None,
        };
        if request.dry_run {
            return self.dry_run(context, request, (source, instance)).await;
        }
        let migrated = self.choose_and_cast(context, request, (source.clone(), instance)).await;
        if let Err(failure) = &migrated {
            self.record_refusal(context, &source, subject, failure).await;
        }
        migrated
    }

    async fn choose_and_cast(
        self: &Arc<Self>,
        context: &RequestContext,
        request: LiveMigrateRequest,
        (source, instance): (String, InstanceInfo),
    ) -> Result<LiveMigrateReply, Failure> {
        let migration = request_id(&request.request_id)?;
        let options = check_options(required("options", request.options)?)?;
        if let Some(reply) = self.received_before(context, migration, &source).await? {
            return Ok(reply);
        }
        let candidates = self.candidates(context).await;
        self.check_all_know(&options)?;
        let named = Some(request.destination).filter(|named| !named.is_empty());
        let wanted = Wanted {
            source: &source_info(&candidates, &source)?,
            memory_bytes: instance.memory_bytes,
            vcpus: instance.vcpus,
        };
        let considered = considered(&wanted, candidates, named.as_deref())?;
        let verdicts = scheduler::judge(&wanted, &considered);

        let check = CheckDestinationRequest {
            instance: instance.id.clone(),
            source: source.clone(),
            storage: options.storage.clone(),
            no_disk_over_commit: options.no_disk_over_commit,
            mode: Mode::of(&options)?.as_str().to_owned(),
            dry_run: false,
            transport: options.transport.clone(),
        };
        let hosts = self.check_in_turn(context, verdicts, &check).await?;
        let destination = hosts.iter().find(|host| host.taken).map(|host| host.host.clone());
        let reply = LiveMigrateReply {
            migration: String::new(),
            source: source.clone(),
            destination: destination.clone().unwrap_or_default(),
            hosts,
            ..LiveMigrateReply::default()
        };
        let Some(destination) = destination else {
            return Err(nobody(&instance, named.as_deref(), &reply.hosts));
        };
        let record = LiveMigrationCast {
            migration: migration.to_string(),
            instance: instance.id,
            destination,
            options: Some(options),
            rpc_version: String::new(),
            expected_epoch: instance.epoch,
        };
        // Once it is cast it is no more this call's: it is sent until there is a receipt, whoever waits for that.
        context.check()?;
        self.cast(&context.without_deadline(), &source, record).await?;
        Ok(LiveMigrateReply {
            migration: migration.to_string(),
            ..reply
        })
    }

    /// What was answered to this request before, if it was received. The record is this host's, or that of the host which has
    /// the instance, before and after the move: nobody else is asked, for each host that is silent would be waited for.
    async fn received_before(
        &self,
        context: &RequestContext,
        id: Uuid,
        host: &str,
    ) -> Result<Option<LiveMigrateReply>, Failure> {
        let find = move |connection: &rusqlite::Connection| MigrationRow::find(connection, id);
        let here = self.journal.read(find).await?.map(|row| row.info);
        let info = match here {
            None if host != self.host() => {
                let peer = self.peers.named(host)?;
                let forwarded = MigrationRequest {
                    migration: id.to_string(),
                    forwarded: true,
                };
                let show = |mut client: ConductorClient| async move { client.show_migration(forwarded).await };
                // An answer that is lost makes no second migration either: the cast is one by its id.
                peer.ask_conductor(context, CALL_TIME, show).await.ok()
            }
            here => here,
        };
        Ok(info.map(|info| LiveMigrateReply {
            migration: info.id,
            source: info.source,
            destination: info.destination,
            ..LiveMigrateReply::default()
        }))
    }

    /// The instance and the host that has it: this one, else the first peer that says so.
    async fn find(&self, context: &RequestContext, name_or_id: &str) -> Result<(String, InstanceInfo), Failure> {
        let not_here = match self.instance(name_or_id).await {
            Ok(instance) => {
                let info = instance.state.lock().await.info(self.host());
                return Ok((self.host().to_owned(), info));
            }
            Err(not_here) => not_here,
        };
        for peer in self.peers.all() {
            let request = InstanceRequest {
                instance: name_or_id.to_owned(),
            };
            let show = |mut client: ComputeClient| async move { client.show_instance(request).await };
            match peer.ask(context, CALL_TIME, show).await {
                // One that is on its way there is its source's still.
                Ok(info) if info.status != "incoming" => return Ok((peer.host.clone(), info)),
                _ => {}
            }
        }
        Err(not_here)
    }

    /// Has the hosts that passed the filters check, the best first, until one can have the instance.
    async fn check_in_turn(
        self: &Arc<Self>,
        context: &RequestContext,
        verdicts: Vec<Verdict>,
        request: &CheckDestinationRequest,
    ) -> Result<Vec<HostVerdict>, Failure> {
        let mut hosts: Vec<HostVerdict> = Vec::new();
        let mut tries = MOST_TRIES;
        for verdict in verdicts {
            let is_decided = hosts.iter().any(|host| host.taken);
            let mut host = told(verdict);
            if host.reason.is_none() && tries == 0 && !is_decided {
                host.why = format!("not asked, for the {MOST_TRIES} before it had refused");
            } else if host.reason.is_none() && !is_decided {
                tries -= 1;
                let api = self.compute_rpcapi(context, &host.host)?;
                match api.check_can_live_migrate_destination(request.clone()).await {
                    Ok(reply) => {
                        take(&mut host, reply.checks);
                        host.taken = host.refusals.is_empty();
                    }
                    // What keeps the source from giving it keeps it from giving it to anyone.
                    Err(failure) if is_the_sources(&failure) => return Err(failure),
                    Err(failure) => leave(&mut host, &failure),
                }
            }
            hosts.push(host);
        }
        Ok(hosts)
    }

    /// Casts until there is a receipt: a cast that was lost is sent again, one that was not is the same migration.
    async fn cast(
        self: &Arc<Self>,
        context: &RequestContext,
        source: &str,
        record: LiveMigrationCast,
    ) -> Result<(), Failure> {
        let api = self.compute_rpcapi(context, source)?;
        let (began, mut pause) = (Instant::now(), FIRST_PAUSE);
        loop {
            match api.live_migration(&record).await {
                Ok(receipt) => {
                    tracing::info!(migration = %record.migration, source, replay = receipt.replay, "cast");
                    return Ok(());
                }
                Err(Failure::Unavailable(silence)) if began.elapsed() < CAST_TIME => {
                    tracing::info!(migration = %record.migration, silence, "no receipt, casting again");
                }
                Err(Failure::Unavailable(silence)) => {
                    return Err(Failure::Unavailable(format!(
                        "whether migration {} was accepted is unknown, there is no receipt: {silence}",
                        record.migration
                    )));
                }
                Err(failure) => return Err(failure),
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    }
}

/// What the source says of itself.
pub(super) fn source_info(candidates: &[Candidate], source: &str) -> Result<HostInfo, Failure> {
    let found = candidates.iter().find(|candidate| candidate.host == source);
    match found.map(|candidate| &candidate.answer) {
        Some(Ok(info)) => Ok(info.clone()),
        Some(Err(silence)) => Err(Failure::denied(
            Reason::SourceDown,
            format!("host {source} is down: {silence}"),
        )),
        None => Err(Failure::denied(
            Reason::SourceDown,
            format!("host {source}, which has the instance, is not known here"),
        )),
    }
}

/// The hosts that are looked at: the named one, else all but the source.
pub(super) fn considered(
    wanted: &Wanted<'_>,
    candidates: Vec<Candidate>,
    named: Option<&str>,
) -> Result<Vec<Candidate>, Failure> {
    let source = &wanted.source.host;
    let Some(named) = named else {
        let others: Vec<_> = candidates
            .into_iter()
            .filter(|candidate| candidate.host != *source)
            .collect();
        return match others.is_empty() {
            true => Err(Failure::denied(
                Reason::NoValidHost,
                "this agent knows no other host: start it with --peer",
            )),
            false => Ok(others),
        };
    };
    if named == source {
        return Err(Failure::denied(
            Reason::DestinationIsSource,
            format!("the instance is on host {named} already"),
        ));
    }
    let known: Vec<_> = candidates.iter().map(|candidate| candidate.host.clone()).collect();
    let found: Vec<_> = candidates
        .into_iter()
        .filter(|candidate| candidate.host == named)
        .collect();
    match found.is_empty() {
        true => Err(Failure::denied(
            Reason::DestinationUnknown,
            format!("host {named:?} is not known here (known hosts: {})", known.join(", ")),
        )),
        false => Ok(found),
    }
}

/// What the scheduler said, for people and scripts.
pub(super) fn told(verdict: Verdict) -> HostVerdict {
    let mut host = HostVerdict {
        host: verdict.host,
        why: verdict.facts,
        ..HostVerdict::default()
    };
    match verdict.outcome {
        Ok(weight) => host.weight = Some(weight),
        Err(left) => left
            .into_iter()
            .for_each(|left| refuse(&mut host, left.reason, left.text)),
    }
    host
}

/// What the host's own checks came to: those that are not ok are why it is left.
pub(super) fn take(host: &mut HostVerdict, checks: Vec<Check>) {
    for failed in checks.iter().filter(|check| !check.ok) {
        let reason = failed.reason.as_deref().and_then(Reason::parse);
        refuse(host, reason.unwrap_or(Reason::Other), failed.found.clone());
    }
    host.checks = checks;
}

pub(super) fn leave(host: &mut HostVerdict, failure: &Failure) {
    let reason = match failure {
        Failure::Unavailable(_) => Reason::DestinationDown,
        _ => failure.reason().unwrap_or(Reason::Other),
    };
    refuse(host, reason, failure.chain());
}

/// One more reason why a host is left; the first one is the one that is told where there is room for one.
fn refuse(host: &mut HostVerdict, reason: Reason, why: String) {
    if host.refusals.is_empty() {
        host.reason = Some(reason.code().to_owned());
        host.remedy = Some(reason.remedy().to_owned());
        host.why.clone_from(&why);
    }
    host.refusals.push(Refusal {
        reason: reason.code().to_owned(),
        host: host.host.clone(),
        why,
        remedy: reason.remedy().to_owned(),
    });
}

/// Whether it is the source that says no.
pub(super) fn is_the_sources(failure: &Failure) -> bool {
    matches!(
        failure.reason(),
        Some(Reason::InstanceState | Reason::InstanceBusy | Reason::InstanceChanged | Reason::SourceDown)
    )
}

/// Nobody can have the instance: of a named host the reason is its own.
fn nobody(instance: &InstanceInfo, named: Option<&str>, hosts: &[HostVerdict]) -> Failure {
    let why = |host: &HostVerdict| {
        format!(
            "host {}: {}",
            host.host,
            host.why.trim_start_matches(&format!("host {}: ", host.host))
        )
    };
    match (named, hosts) {
        (Some(_), [only]) => {
            let reason = only.reason.as_deref().and_then(Reason::parse).unwrap_or(Reason::Other);
            Failure::denied(reason, why(only))
        }
        _ => Failure::denied(
            Reason::NoValidHost,
            format!(
                "no host can have instance {}: {}",
                instance.name,
                hosts.iter().map(why).collect::<Vec<_>>().join("; ")
            ),
        ),
    }
}
