//! A migration that is only asked about: nothing ends at the first reason against it, and the guest is sampled to tell what it would come to.

use std::sync::Arc;

use ferry_proto::agent::v1::{
    CheckDestinationRequest, CheckSourceRequest, HostInfo, HostVerdict, InstanceInfo, LiveMigrateReply,
    LiveMigrateRequest, MigrationOptions, MigrationPrediction, PredictMigrationRequest, Refusal,
};
use ferry_proto::required;

use super::scheduler::{self, Verdict, Wanted};
use super::task::{considered, is_the_sources, leave, source_info, take, told};
use crate::agent::checks::refusal;
use crate::agent::context::RequestContext;
use crate::agent::failure::Failure;
use crate::agent::instances::Agent;
use crate::agent::mode::Mode;
use crate::agent::outgoing::check_options;
use crate::agent::reason::Reason;

/// A host of which one of these is known is not asked what else it lacks: it does not answer, or the answer would be another's.
const NOT_ASKED: [Reason; 4] = [
    Reason::DestinationDown,
    Reason::DestinationIsOther,
    Reason::DestinationIsSource,
    Reason::RpcVersion,
];

/// What the scheduler knows by what a host said of itself a moment ago, and the host better: it says so with what is claimed of it now.
const KNOWN_BETTER: [Reason; 2] = [Reason::Memory, Reason::Vcpus];

impl Agent {
    /// Gathers what keeps an instance from moving, from its source and from each host that it could go to, and what its migration would come to.
    ///
    /// # Errors
    /// The request cannot be used, or names a host that nobody knows.
    pub(super) async fn dry_run(
        self: &Arc<Self>,
        context: &RequestContext,
        request: LiveMigrateRequest,
        (source, instance): (String, InstanceInfo),
    ) -> Result<LiveMigrateReply, Failure> {
        let options = check_options(required("options", request.options)?)?;
        let candidates = self.candidates(context).await;
        let mut refusals = Vec::new();
        let mut note = |failure: &Failure| refusals.push(refusal(self.host(), failure));
        let _ = self.check_all_know(&options).inspect_err(&mut note);
        let source_info = source_info(&candidates, &source).unwrap_or_else(|failure| {
            note(&failure);
            // As this host is: enough to judge the others by.
            HostInfo {
                host: source.clone(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                rpc_version: self.config.rpc_cap.to_string(),
                ..HostInfo::default()
            }
        });
        let named = Some(request.destination).filter(|named| !named.is_empty());
        let wanted = Wanted {
            source: &source_info,
            memory_bytes: instance.memory_bytes,
            vcpus: instance.vcpus,
        };
        let considered = match considered(&wanted, candidates, named.as_deref()) {
            Ok(considered) => considered,
            Err(unknown @ Failure::NotFound { .. }) => return Err(unknown),
            Err(nowhere) => {
                note(&nowhere);
                Vec::new()
            }
        };
        refusals.extend(self.sources_refusals(context, &source, &instance, &options).await);
        let check = CheckDestinationRequest {
            instance: instance.id.clone(),
            source: source.clone(),
            storage: options.storage.clone(),
            no_disk_over_commit: options.no_disk_over_commit,
            mode: Mode::of(&options)?.as_str().to_owned(),
            dry_run: true,
            transport: options.transport.clone(),
        };
        let mut hosts = Vec::new();
        let mut disk_bytes = 0;
        for verdict in scheduler::judge(&wanted, &considered) {
            let (mut host, copied_bytes) = self.ask(context, verdict, &check, &mut refusals).await?;
            if host.refusals.is_empty() && refusals.is_empty() && !hosts.iter().any(|host: &HostVerdict| host.taken) {
                host.taken = true;
            }
            if host.taken || hosts.is_empty() {
                disk_bytes = copied_bytes;
            }
            hosts.push(host);
        }
        let destination = hosts.iter().find(|host| host.taken).map(|host| host.host.clone());
        let prediction = match request.sample_ms {
            0 => None,
            sample_ms => {
                let there = destination.clone().or(named);
                let first = || hosts.first().map(|host| host.host.clone());
                let asked = PredictMigrationRequest {
                    instance: instance.id,
                    destination: there.or_else(first).unwrap_or_default(),
                    options: Some(options),
                    sample_ms,
                    disk_bytes,
                };
                Some(self.predicted(context, &source, asked).await)
            }
        };
        Ok(LiveMigrateReply {
            migration: String::new(),
            source,
            destination: destination.unwrap_or_default(),
            hosts,
            refusals,
            prediction,
        })
    }

    /// Why the source would not give it, wherever it is to go.
    async fn sources_refusals(
        self: &Arc<Self>,
        context: &RequestContext,
        source: &str,
        instance: &InstanceInfo,
        options: &MigrationOptions,
    ) -> Vec<Refusal> {
        let asked = CheckSourceRequest {
            instance: instance.id.clone(),
            destination: String::new(),
            mode: Mode::of(options).map_or("", Mode::as_str).to_owned(),
            dry_run: true,
            transport: options.transport.clone(),
            data_address: String::new(),
        };
        let api = match self.compute_rpcapi(context, source) {
            // One of before has no answer to this, and tells each destination.
            Ok(api) if api.knows_dry_runs() => api,
            Ok(_) => return Vec::new(),
            Err(failure) => return vec![refusal(self.host(), &failure)],
        };
        match api.check_can_live_migrate_source(asked).await {
            Ok(reply) => reply.refusals,
            Err(Failure::Unavailable(silence)) => {
                vec![refusal(source, &Failure::denied(Reason::SourceDown, silence))]
            }
            Err(failure) => vec![refusal(source, &failure)],
        }
    }

    /// Has a host check all that it could say no for, and how many bytes of disks would be copied there.
    async fn ask(
        self: &Arc<Self>,
        context: &RequestContext,
        verdict: Verdict,
        check: &CheckDestinationRequest,
        refusals: &mut Vec<Refusal>,
    ) -> Result<(HostVerdict, u64), Failure> {
        let is_silent = verdict
            .outcome
            .as_ref()
            .is_err_and(|left| left.iter().any(|left| NOT_ASKED.contains(&left.reason)));
        if is_silent {
            return Ok((told(verdict), 0));
        }
        let api = self.compute_rpcapi(context, &verdict.host)?;
        match api.check_can_live_migrate_destination(check.clone()).await {
            Ok(reply) => {
                let says = |reason: Reason| {
                    let is_it = |told: &str| Reason::parse(told) == Some(reason);
                    reply
                        .checks
                        .iter()
                        .any(|check| check.reason.as_deref().is_some_and(is_it))
                };
                let mut host = told(without(verdict, |reason| {
                    KNOWN_BETTER.contains(&reason) && says(reason)
                }));
                take(&mut host, reply.checks);
                Ok((host, reply.copied_disk_bytes))
            }
            Err(failure) => {
                let mut host = told(verdict);
                if is_the_sources(&failure) {
                    // A source of before tells one reason at a time, and each host the same.
                    let told = refusal(&check.source, &failure);
                    if !refusals.iter().any(|known| known.reason == told.reason) {
                        refusals.push(told);
                    }
                } else {
                    leave(&mut host, &failure);
                }
                Ok((host, 0))
            }
        }
    }

    /// What the source foretells, or why it does not.
    async fn predicted(
        self: &Arc<Self>,
        context: &RequestContext,
        source: &str,
        asked: PredictMigrationRequest,
    ) -> MigrationPrediction {
        let predicted = match self.compute_rpcapi(context, source) {
            Ok(api) => api.predict_migration(asked).await,
            Err(failure) => Err(failure),
        };
        predicted.unwrap_or_else(|failure| MigrationPrediction {
            unknown: Some(failure.chain()),
            ..MigrationPrediction::default()
        })
    }
}

/// The verdict without what is better told by the host. One that had nothing else against it is as if it had passed.
fn without(mut verdict: Verdict, is_told: impl Fn(Reason) -> bool) -> Verdict {
    if let Err(left) = &mut verdict.outcome {
        left.retain(|left| !is_told(left.reason));
    }
    verdict
}
