//! Nova's pair of checks: whether a destination can have an instance of a source. It looks only, and changes nothing;
//! PREPARE checks all of it again, and holds what it then has.

use std::sync::{Arc, Mutex, PoisonError};

use ferry_proto::agent::v1::{
    Check, CheckDestinationReply, CheckDestinationRequest, CheckSourceReply, CheckSourceRequest, InstanceSpec, Refusal,
};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::{InvalidField, required, wire_uuid};
use ferry_vmm::{DirtyMode, HostCapabilities, HostError, MachineProfile};

use super::backends::room::Promised;
use super::backends::storage::{self, Coming, Storage};
use super::backends::{Occasion, Whose};
use super::context::RequestContext;
use super::data_port;
use super::data_room;
use super::failure::Failure;
use super::huge_pages;
use super::incoming::without_disks;
use super::instances::{Agent, why_not_incoming};
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
        if !(request.dry_run && request.destination.is_empty()) {
            self.check_destination(&request.destination)?;
        }
        let instance = self.instance(&request.instance).await?;
        if request.dry_run {
            self.ask_origin(&instance).await;
        }
        let state = instance.state.lock().await;
        let (mode, transport) = (Mode::parse(&request.mode)?, Transport::parse(&request.transport)?);
        let mut refused = state.why_not_migrate(mode);
        if request.dry_run
            && let Err(unsettled) = state.check_settled()
        {
            refused.push(unsettled);
        }
        // One that is off has none.
        let vmm = match state.row.status {
            Status::Stopped => None,
            _ => match state.vmm() {
                Ok(vmm) => Some(vmm.clone()),
                // What is crashed has none either.
                Err(_) if !refused.is_empty() => None,
                Err(failure) => {
                    refused.push(failure);
                    None
                }
            },
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
            let knows = vmm.check_knows(&Command::Send(send));
            let failed = knows.map_err(Failure::vmm("failed to ask for such a move"));
            refused.extend(failed.err());
            if let Ok(Body::Profiled(profiled)) = vmm.order(Command::Profile(wire::Profile {})).await {
                machine_profile = profiled.profile;
            }
        }
        let unreached = match request.data_address.as_str() {
            "" => String::new(),
            address => match data_port::reach(address).await {
                Ok(()) => String::new(),
                Err(error) => format!("host {} does not get to {address}: {error}", self.host()),
            },
        };
        let refusals = refused.iter().map(|failure| refusal(self.host(), failure)).collect();
        match refused.into_iter().next() {
            Some(first) if !request.dry_run => Err(first),
            _ => Ok(CheckSourceReply {
                disk_sizes: storage::sizes(&spec, &machine_profile, &self.boot_id),
                spec: Some(spec),
                epoch,
                machine_profile,
                refusals,
                unreached,
            }),
        }
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
        let mode = Mode::parse(&request.mode)?;
        let source = self.compute_rpcapi(context, &request.source)?;
        // A real migration gets there, or ends, in a moment. A source of before would not try.
        let is_tried =
            request.dry_run && source.knows_dry_runs() && Transport::parse(&request.transport)? == Transport::Tcp;
        let asked = CheckSourceRequest {
            instance: request.instance,
            destination: self.host().to_owned(),
            mode: request.mode,
            dry_run: request.dry_run,
            transport: request.transport,
            data_address: if is_tried {
                self.data_address.clone()
            } else {
                String::new()
            },
        };
        let told = match source.check_can_live_migrate_source(asked).await {
            // It could not tell the source that the guest runs here.
            Err(Failure::Unavailable(silence)) => {
                let found = format!("host {} cannot ask the source: {silence}", self.host());
                return Ok(CheckDestinationReply {
                    checks: vec![check("source", found, Some(Reason::SourceDown))],
                    destination: self.host().to_owned(),
                    copied_disk_bytes: 0,
                });
            }
            told => told?,
        };
        let spec = required("spec", told.spec)?;

        let mut checks = Vec::new();
        // A copy that is stale for certain is no reason to say no, whoever asks.
        self.clear_the_way(id).await;
        let taken = why_not_incoming(self, id, &spec).await;
        note(&mut checks, "instance", Reason::AlreadyThere, taken, || {
            "neither it nor its name is there".to_owned()
        });
        let lacks = self.lacks(&spec).await;
        note(&mut checks, "claim", Reason::Memory, lacks, || {
            "memory and vCPUs are there".to_owned()
        });
        // A real migration is noted there, or ends.
        if request.dry_run {
            let (found, full) = told_apart(data_room::check(&self.config.data_dir));
            note(&mut checks, "data directory", Reason::DataDirectory, full, || {
                found.unwrap_or_default()
            });
        }
        if spec.hugepages {
            let (found, too_few) = told_apart(huge_pages::check(spec.memory_bytes));
            note(&mut checks, "huge pages", Reason::HugePages, too_few, || {
                found.unwrap_or_default()
            });
        }
        if is_tried {
            let unreached = Some(told.unreached).filter(|why| !why.is_empty());
            let unreached = unreached.map(Failure::Refused).into_iter().collect();
            note(&mut checks, "data port", Reason::DataPort, unreached, || {
                format!("the source gets to {}", self.data_address)
            });
        }
        let (fits, misfits) = told_apart(check_machine(told.machine_profile, tracking(&spec)).await);
        note(&mut checks, "machine", Reason::Machine, misfits, || {
            fits.unwrap_or_default()
        });
        if mode.may_be_late() {
            let (found, denied) = told_apart(check_late_pages().await);
            note(&mut checks, "late pages", Reason::LatePages, denied, || {
                found.unwrap_or_default()
            });
        }
        let coming = Coming {
            instance: id,
            source: request.source,
            epoch: told.epoch,
            sizes: told.disk_sizes,
            may_over_commit: !request.no_disk_over_commit,
        };
        let Planned { copied, failed, .. } = self.plan_each(&spec, storage, &coming).await;
        let (unplanned, failures): (Vec<_>, Vec<_>) = failed.into_iter().unzip();
        note(&mut checks, "disks", Reason::Disks, failures, || {
            storage_words(spec.disks.len(), copied.len())
        });
        let whose = Whose {
            instance: id,
            known_epoch: told.epoch,
            occasion: Occasion::Prepare,
        };
        // Opened and closed again: a tap that it makes goes with it. Disks of which room is still to be made are not there, and of one that can be
        // neither shared nor copied that is said already.
        let without = without_disks(&spec, &[&copied[..], &unplanned].concat());
        let each_card = without.nics.iter().map(|nic| InstanceSpec {
            disks: Vec::new(),
            nics: vec![nic.clone()],
            ..without.clone()
        });
        let missing = self.open_each(each_card, whose).await;
        note(&mut checks, "network", Reason::Network, missing, || {
            format!("{} cards can be had", without.nics.len())
        });
        let each_disk = without.disks.iter().map(|disk| InstanceSpec {
            disks: vec![disk.clone()],
            nics: Vec::new(),
            ..without.clone()
        });
        let missing = self.open_each(each_disk, whose).await;
        note(&mut checks, "images", Reason::Disks, missing, || {
            format!("{} disks can be opened", without.disks.len())
        });
        let size = |number: &u32| coming.sizes.get(*number as usize);
        Ok(CheckDestinationReply {
            checks,
            destination: self.host().to_owned(),
            copied_disk_bytes: copied.iter().filter_map(size).map(storage::bytes_to_copy).sum(),
        })
    }

    /// What would become of each disk here.
    async fn plan_each(&self, spec: &InstanceSpec, storage: Storage, coming: &Coming) -> Planned {
        let mut all = Planned::default();
        for (number, disk) in (0u32..).zip(&spec.disks) {
            let only = InstanceSpec {
                disks: vec![disk.clone()],
                ..spec.clone()
            };
            let its_size = coming.sizes.get(number as usize).cloned().into_iter().collect();
            let coming = Coming {
                sizes: its_size,
                ..coming.clone()
            };
            match self.plan_storage(&only, storage, coming, all.needs.clone()).await {
                Ok(plan) if plan.copied.is_empty() => {}
                Ok(plan) => {
                    all.copied.push(number);
                    all.needs.extend(plan.needs);
                }
                Err(failure) => all.failed.push((number, failure)),
            }
        }
        all
    }

    /// What is wrong with what each of these specs has of disks and cards.
    async fn open_each(&self, specs: impl Iterator<Item = InstanceSpec>, whose: Whose) -> Vec<Failure> {
        let mut failures = Vec::new();
        for spec in specs {
            failures.extend(self.open_backends(&spec, whose).await.err());
        }
        failures
    }
}

/// Disks by what would become of them, by number; the others would be shared.
#[derive(Default)]
struct Planned {
    copied: Vec<u32>,
    /// What they need.
    needs: Vec<Promised>,
    /// Those that can neither be shared nor copied, and why.
    failed: Vec<(u32, Failure)>,
}

/// A refusal as users see it, of the host that refuses.
pub(crate) fn refusal(host: &str, failure: &Failure) -> Refusal {
    let reason = failure.reason().unwrap_or(Reason::Other);
    Refusal {
        reason: reason.code().to_owned(),
        host: host.to_owned(),
        why: failure.chain(),
        remedy: reason.remedy().to_owned(),
    }
}

/// Writes down what a check came to: what was found, or each failure by itself. A refusal without a reason of its own has this one.
fn note(checks: &mut Vec<Check>, name: &str, reason: Reason, failures: Vec<Failure>, found: impl FnOnce() -> String) {
    if failures.is_empty() {
        checks.push(check(name, found(), None));
    }
    for failure in failures {
        let failure = failure.because(reason);
        checks.push(check(
            name,
            failure.chain(),
            Some(failure.reason().unwrap_or(Reason::Other)),
        ));
    }
}

fn told_apart<T>(outcome: Result<T, Failure>) -> (Option<T>, Vec<Failure>) {
    match outcome {
        Ok(found) => (Some(found), Vec::new()),
        Err(failure) => (None, vec![failure]),
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

/// How writes of such a guest are found.
fn tracking(spec: &InstanceSpec) -> DirtyMode {
    match spec.dirty.as_str() {
        "ring" => DirtyMode::Ring,
        _ => DirtyMode::Log,
    }
}

/// Whether pages may come to this host after their guest: its VMM opens what it needs for that as the agent's user.
async fn check_late_pages() -> Result<String, Failure> {
    let looked = tokio::task::spawn_blocking(ferry_vmm::probe_watching).await;
    looked
        .map_err(|error| Failure::host("failed to ask for userfaultfd")(std::io::Error::other(error)))?
        .map_err(|error| Failure::Refused(crate::error_chain(&error)))?;
    Ok("userfaultfd is permitted".to_owned())
}

/// Whether this host can run such a machine: processor, time stamp counter, memory, devices, and how its writes are found.
async fn check_machine(profile: Vec<u8>, dirty: DirtyMode) -> Result<String, Failure> {
    let unreadable = |error| Failure::Refused(format!("the source's machine profile does not parse: {error}"));
    let profile = match profile.is_empty() {
        // One that is off has no VMM to tell.
        true => None,
        false => Some(MachineProfile::from_bytes(&profile).map_err(unreadable)?),
    };
    let fits = match profile {
        Some(_) => "processor, clock and devices fit",
        None => "no VMM tells yet what it needs; compared before anything is sent",
    };
    let looked = tokio::task::spawn_blocking(move || {
        let lacks = |host: &HostCapabilities| {
            let of_the_machine = profile.iter().flat_map(|profile| host.check(profile));
            let lacks = of_the_machine.chain(host.check_tracking(dirty));
            lacks.map(|lack| lack.to_string()).collect::<Vec<_>>()
        };
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
        lacks if lacks.is_empty() => Ok(fits.to_owned()),
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
