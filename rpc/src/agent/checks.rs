//! Nova's pair of checks: whether a destination can have an instance of a source. It looks only, and changes nothing;
//! PREPARE checks all of it again, and holds what it then has.

use std::sync::{Arc, Mutex, PoisonError};

use ferry_proto::agent::v1::{
    Check, CheckDestinationReply, CheckDestinationRequest, CheckSourceReply, CheckSourceRequest, InstanceSpec,
};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::{InvalidField, required, wire_uuid};
use ferry_vmm::{HostCapabilities, HostError, MachineProfile};

use super::backends::storage::{self, Coming, Storage};
use super::backends::{Occasion, Whose};
use super::context::RequestContext;
use super::failure::Failure;
use super::incoming::without_disks;
use super::instances::{Agent, check_incoming};
use super::journal::Status;
use super::mode::Mode;
use super::reason::Reason;
use super::transport::Transport;

impl Agent {
    /// Nova's check_can_live_migrate_source: the destination asks what it is to have.
    ///
    /// # Errors
    /// The instance is not here, or cannot migrate now.
    pub(crate) async fn check_can_live_migrate_source(
        &self,
        request: CheckSourceRequest,
    ) -> Result<CheckSourceReply, Failure> {
        self.check_destination(&request.destination)?;
        let instance = self.instance(&request.instance).await?;
        let state = instance.state.lock().await;
        let (mode, transport) = (Mode::parse(&request.mode)?, Transport::parse(&request.transport)?);
        state.check_can_migrate(mode)?;
        // One that is off has none.
        let vmm = match state.row.status {
            Status::Stopped => None,
            _ => Some(state.vmm()?.clone()),
        };
        let (spec, epoch) = (state.row.spec.clone(), state.row.epoch);
        drop(state);
        // A VMM of an earlier build does not know the question.
        let mut machine_profile = Vec::new();
        if let Some(vmm) = vmm {
            let send = wire::Send {
                cold: mode == Mode::Cold,
                lateness: mode.lateness().to_owned(),
                carried: transport == Transport::Grpc,
                ..Default::default()
            };
            vmm.check_knows(&Command::Send(send))
                .map_err(Failure::vmm("failed to ask for such a move"))?;
            if let Ok(Body::Profiled(profiled)) = vmm.order(Command::Profile(wire::Profile {})).await {
                machine_profile = profiled.profile;
            }
        }
        Ok(CheckSourceReply {
            disk_sizes: storage::sizes(&spec),
            spec: Some(spec),
            epoch,
            machine_profile,
        })
    }

    /// Nova's check_can_live_migrate_destination: all checks, also those after one that says no.
    ///
    /// # Errors
    /// The source does not tell what it has, or refuses to give it.
    pub(crate) async fn check_can_live_migrate_destination(
        self: &Arc<Self>,
        context: &RequestContext,
        request: CheckDestinationRequest,
    ) -> Result<CheckDestinationReply, Failure> {
        let storage = Storage::parse(&request.storage).map_err(|problem| InvalidField {
            field: "storage",
            problem,
        })?;
        let id = wire_uuid("instance", &request.instance)?;
        let asked = CheckSourceRequest {
            instance: request.instance,
            destination: self.host().to_owned(),
            mode: request.mode,
            transport: request.transport,
        };
        let source = self.compute_rpcapi(context, &request.source)?;
        let told = match source.check_can_live_migrate_source(asked).await {
            // It could not tell the source that the guest runs here.
            Err(Failure::Unavailable(silence)) => {
                let found = format!("host {} cannot ask the source: {silence}", self.host());
                return Ok(CheckDestinationReply {
                    checks: vec![check("source", found, Some(Reason::SourceDown))],
                    destination: self.host().to_owned(),
                });
            }
            told => told?,
        };
        let spec = required("spec", told.spec)?;

        let mut checks = Vec::new();
        let mut note = |name: &str, reason: Reason, outcome: Result<String, Failure>| {
            checks.push(match outcome {
                Ok(found) => check(name, found, None),
                Err(failure) => {
                    let failure = failure.because(reason);
                    check(name, failure.chain(), Some(failure.reason().unwrap_or(Reason::Other)))
                }
            });
        };
        // A copy that is stale for certain is no reason to say no, whoever asks.
        self.clear_the_way(id).await;
        let free = check_incoming(self, id, &spec).await;
        note(
            "instance",
            Reason::AlreadyThere,
            free.map(|()| "neither it nor its name is there".to_owned()),
        );
        let claim = self.check_claim(&spec).await;
        note(
            "claim",
            Reason::Memory,
            claim.map(|()| "memory and vCPUs are there".to_owned()),
        );
        note("machine", Reason::Machine, check_machine(told.machine_profile).await);
        let coming = Coming {
            instance: id,
            source: request.source,
            epoch: told.epoch,
            sizes: told.disk_sizes,
        };
        let planned = self.plan_storage(&spec, storage, coming).await;
        let copied = planned.as_ref().cloned().unwrap_or_default();
        note(
            "disks",
            Reason::Disks,
            planned.map(|copied| storage_words(spec.disks.len(), copied.len())),
        );
        let whose = Whose {
            instance: id,
            known_epoch: told.epoch,
            occasion: Occasion::Prepare,
        };
        // Opened and closed again: a tap that it makes goes with it. Disks of which room is still to be made are not there.
        let mut without = without_disks(&spec, &copied);
        let cards = InstanceSpec {
            disks: Vec::new(),
            ..without.clone()
        };
        let opened = self.open_backends(&cards, whose).await.map(drop);
        note(
            "network",
            Reason::Network,
            opened.map(|()| format!("{} cards can be had", cards.nics.len())),
        );
        without.nics.clear();
        let opened = self.open_backends(&without, whose).await.map(drop);
        note(
            "images",
            Reason::Disks,
            opened.map(|()| format!("{} disks can be opened", without.disks.len())),
        );
        Ok(CheckDestinationReply {
            checks,
            destination: self.host().to_owned(),
        })
    }
}

fn check(name: &str, found: String, reason: Option<Reason>) -> Check {
    Check {
        name: name.to_owned(),
        ok: reason.is_none(),
        found,
        reason: reason.map(|reason| reason.code().to_owned()),
    }
}

fn storage_words(disks: usize, copied: usize) -> String {
    format!("{} to be shared, {copied} to be copied", disks - copied.min(disks))
}

/// Whether this host can run such a machine: processor, time stamp counter, memory, devices.
async fn check_machine(profile: Vec<u8>) -> Result<String, Failure> {
    if profile.is_empty() {
        return Ok("no VMM tells yet what it needs; compared before anything is sent".to_owned());
    }
    let unreadable = |error| Failure::Refused(format!("the source's machine profile does not parse: {error}"));
    let profile = MachineProfile::from_bytes(&profile).map_err(unreadable)?;
    let looked = tokio::task::spawn_blocking(move || {
        let lacks = |host: &HostCapabilities| host.check(&profile).iter().map(ToString::to_string).collect::<Vec<_>>();
        let known = host_before().map_err(|error| crate::error_chain(&error))?;
        match lacks(&known) {
            none if none.is_empty() => Ok(none),
            // Before it is refused: kernel modules may have been loaded anew.
            _ => look_at_host()
                .map(|host| lacks(&host))
                .map_err(|error| crate::error_chain(&error)),
        }
    });
    let found: Result<Vec<String>, String> = looked
        .await
        .map_err(|error| Failure::host("failed to look at this host's KVM")(std::io::Error::other(error)))?;
    match found.map_err(Failure::Refused)? {
        lacks if lacks.is_empty() => Ok("processor, clock and devices fit".to_owned()),
        lacks => Err(Failure::Refused(lacks.join("; "))),
    }
}

/// What this host offered when it was last looked at.
static HOST: Mutex<Option<Arc<HostCapabilities>>> = Mutex::new(None);

/// What this host offers, as it was seen before if it was: to look makes a VM for a moment, 25 ms of waiting for the kernel. The VMM that is to
/// have the guest looks again.
fn host_before() -> Result<Arc<HostCapabilities>, HostError> {
    let before = HOST.lock().unwrap_or_else(PoisonError::into_inner).clone();
    before.map_or_else(look_at_host, Ok)
}

/// Looks at this host. May wait for the kernel.
fn look_at_host() -> Result<Arc<HostCapabilities>, HostError> {
    let host = Arc::new(ferry_vmm::host()?);
    *HOST.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&host));
    Ok(host)
}
