//! PREPARE at the destination: a paused VMM, its machine built, its memory mapped, and a task that looks after it.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use ferry_migration::handover::DestinationAgent;
use ferry_proto::agent::v1::{
    DiskSize, InstanceSpec, MigrationInfo, MigrationOptions, PreLiveMigrationReply, PreLiveMigrationRequest,
};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::{InvalidField, required, wire_uuid};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::asking::Questions;
use super::decisions::Part;
use super::driver::Driver;
use super::handle::{Incoming, Tuple};
use super::late::LateSession;
use super::reservations::Reservation;
use crate::agent::backends::room::{self, Promised};
use crate::agent::backends::storage::{self, Coming, Here, Plan, Storage};
use crate::agent::backends::{Occasion, Whose};
use crate::agent::context::RequestContext;
use crate::agent::events::{Action, Subject};
use crate::agent::failure::Failure;
use crate::agent::instances::Agent;
use crate::agent::journal::{InstanceRow, MigrationRow, Role, RowWrite, Status};
use crate::agent::mode::Mode;
use crate::agent::outgoing::{MOST_RESUME_WINDOW_MS, MOST_STREAMS, late_streams, now_ms, now_text};
use crate::agent::peer_journal::journal_of;
use crate::agent::reason::Reason;
use crate::agent::steps::DestinationStep;
use crate::agent::transport::Transport;
use crate::agent::versions::RpcVersion;
use crate::agent::{data_port, images};
use crate::lock_file::Holder;

/// The highest epoch of a guest that is taken. The journal has 63 bits for it, and each start takes the next one.
const MOST_EPOCH: u64 = 1 << 62;

/// A request whose fields were checked.
struct Guest {
    migration: Uuid,
    instance: Uuid,
    spec: InstanceSpec,
    epoch: u64,
    source: String,
    streams: u16,
    user_paused: bool,
    mode: Mode,
    transport: Transport,
    /// What it is to be once it is here; empty where the source does not know the word.
    guest_was: String,
    storage: Storage,
    disk_sizes: Vec<DiskSize>,
    may_over_commit: bool,
    /// Numbers of the disks whose contents come along.
    copied_disks: Vec<u32>,
    /// What they are promised.
    room: Option<room::Promise>,
    resume_window_ms: u64,
    /// Of the source.
    journal: Option<Uuid>,
}

impl Guest {
    fn check(request: PreLiveMigrationRequest, agent: &Agent) -> Result<Self, Failure> {
        let cap = agent.config.rpc_cap;
        let version = request.rpc_version.parse::<RpcVersion>();
        if !version.is_ok_and(|version| cap.understands(version)) {
            return Err(Failure::denied(
                Reason::RpcVersion,
                format!(
                    "host {} speaks RPC version {cap}, the source {:?}",
                    agent.host(),
                    request.rpc_version
                ),
            ));
        }
        let streams = u16::try_from(request.streams)
            .ok()
            .filter(|streams| (1..=MOST_STREAMS).contains(streams));
        let streams = streams.ok_or_else(|| InvalidField {
            field: "streams",
            problem: format!("{} is not between 1 and {MOST_STREAMS}", request.streams),
        })?;
        agent.peers.named(&request.source)?;
        let storage = Storage::parse(&request.storage).map_err(|problem| InvalidField {
            field: "storage",
            problem,
        })?;
        if !["", "running", "paused", "stopped"].contains(&request.guest_was.as_str()) {
            return Err(InvalidField {
                field: "guest_was",
                problem: format!("{:?} is not one of running, paused, stopped", request.guest_was),
            }
            .into());
        }
        if request.epoch > MOST_EPOCH {
            return Err(InvalidField {
                field: "epoch",
                problem: format!("{} is above {MOST_EPOCH}", request.epoch),
            }
            .into());
        }
        let spec = required("spec", request.spec)?;
        for hash in [&spec.kernel, &spec.initrd] {
            if !(images::is_hash(hash) || hash.is_empty() && std::ptr::eq(hash, &spec.initrd)) {
                return Err(InvalidField {
                    field: "spec.kernel",
                    problem: "is not an image's hash".to_owned(),
                }
                .into());
            }
        }
        Ok(Self {
            migration: wire_uuid("migration", &request.migration)?,
            instance: wire_uuid("instance", &request.instance)?,
            spec,
            epoch: request.epoch,
            source: request.source,
            streams,
            // A machine whose guest is not to run is never given a permit to.
            user_paused: request.user_paused || request.guest_was == "stopped",
            mode: Mode::parse(&request.mode)?,
            transport: Transport::parse(&request.transport)?,
            guest_was: request.guest_was,
            storage,
            disk_sizes: request.disk_sizes,
            may_over_commit: !request.no_disk_over_commit,
            copied_disks: Vec::new(),
            room: None,
            resume_window_ms: request.resume_window_ms.min(MOST_RESUME_WINDOW_MS),
            journal: journal_of(&request.journal)?,
        })
    }
}

impl Guest {
    fn tuple(&self) -> Tuple {
        Tuple {
            instance: self.instance,
            epoch: self.epoch,
            source: self.source.clone(),
            journal: self.journal,
        }
    }

    fn whose(&self) -> Whose {
        Whose {
            instance: self.instance,
            known_epoch: self.epoch,
            occasion: Occasion::Prepare,
        }
    }

    fn coming(&self) -> Coming {
        Coming {
            instance: self.instance,
            source: self.source.clone(),
            epoch: self.epoch,
            sizes: self.disk_sizes.clone(),
            may_over_commit: self.may_over_commit,
        }
    }

    /// Paths of the disks that come along.
    fn paths(&self) -> Vec<String> {
        let disks = self
            .copied_disks
            .iter()
            .filter_map(|&number| self.spec.disks.get(number as usize));
        disks.map(|disk| disk.path.clone()).collect()
    }
}

impl Agent {
    /// Nova's pre_live_migration. Idempotent: the same migration prepares once.
    ///
    /// # Errors
    /// This host cannot have the instance; nothing of it is left then.
    pub(crate) async fn pre_live_migration(
        self: &Arc<Self>,
        context: &RequestContext,
        request: PreLiveMigrationRequest,
    ) -> Result<PreLiveMigrationReply, Failure> {
        let mut guest = Guest::check(request, self)?;
        let mut reply = PreLiveMigrationReply {
            missing_images: Vec::new(),
            data_address: self.data_address.clone(),
            secret: Vec::new(),
            destination: self.host().to_owned(),
            copied_disks: Vec::new(),
            journal: self.journal.id().to_string(),
        };
        if let Some(incoming) = self.incoming.find(guest.migration) {
            if incoming.of != guest.tuple() {
                return Err(self.is_of_another(guest.migration));
            }
            reply.secret = incoming.secret.to_vec();
            reply.copied_disks.clone_from(&incoming.copied_disks);
            return Ok(reply);
        }
        let id = guest.migration;
        if let Some(reason) = self.incoming.why_buried(id) {
            return Err(Failure::Refused(format!("migration {id} was given up: {reason}")));
        }
        let known = self
            .journal
            .read(move |connection| MigrationRow::find(connection, id))
            .await?;
        match known {
            // It was asked for a moment before, and is in the journal already.
            Some(row) if row.role == Role::Destination && !row.over => return Err(self.prepares_already(&guest.spec)),
            Some(_) => {
                let over = format!("migration {id} is over on host {}, or not for it", self.host());
                return Err(Failure::Refused(over));
            }
            None => {}
        }
        self.clear_the_way(guest.instance).await;
        let reserved = self.reserve(id, guest.instance, &guest.spec).await?;
        while guest.room.is_none() {
            let promised = self.room.count();
            let plan = self
                .plan_storage(&guest.spec, guest.storage, guest.coming(), Vec::new())
                .await?;
            guest.room = self.room.promise(id, &plan.needs, promised);
            guest.copied_disks = plan.copied;
        }
        // Before anything is sent here: a disk or a bridge that is missing is the more likely reason to say no.
        drop(
            self.open_backends(&without_disks(&guest.spec, &guest.copied_disks), guest.whose())
                .await?,
        );
        reply.missing_images = self.missing_images(&guest.spec);
        if reply.missing_images.is_empty() {
            reply.copied_disks.clone_from(&guest.copied_disks);
            let hashes = [guest.spec.kernel.clone(), guest.spec.initrd.clone()];
            match self.prepare(context, guest, reserved).await? {
                Some(incoming) => reply.secret = incoming.secret.to_vec(),
                // Another migration of the same kernel was faster to take it.
                None => reply.missing_images = hashes.into_iter().filter(|hash| !hash.is_empty()).collect(),
            }
        }
        if !reply.missing_images.is_empty() {
            let folder = self.image_folder();
            self.expected_images
                .expect(&reply.missing_images, &folder, Instant::now());
        }
        Ok(reply)
    }

    fn is_of_another(&self, migration: Uuid) -> Failure {
        Failure::Refused(format!(
            "migration {migration} is of another instance, epoch or source on host {}",
            self.host()
        ))
    }

    fn make_room(&self, guest: &Guest) -> Result<(), Failure> {
        let holder = Holder {
            host: self.host().to_owned(),
            instance: guest.instance,
            name: guest.spec.name.clone(),
            epoch: 0,
            pid: std::process::id(),
        };
        let (copied, sizes) = (&guest.copied_disks, &guest.disk_sizes);
        room::make_room(&guest.spec, copied, sizes, guest.may_over_commit, &holder)
    }

    /// What becomes of each disk here, where these others come along. Looks only, and changes nothing.
    ///
    /// # Errors
    /// Names the disk and why it can neither be shared nor copied.
    pub(crate) async fn plan_storage(
        &self,
        spec: &InstanceSpec,
        storage: Storage,
        coming: Coming,
        others: Vec<Promised>,
    ) -> Result<Plan, Failure> {
        let spec = spec.clone();
        let mut promised = self.room.all();
        promised.extend(others);
        let here = Here {
            host: self.host().to_owned(),
            boot_id: self.boot_id.clone(),
            allowed: self.config.is_exposed().then(|| self.config.image_dirs.clone()),
            promised,
        };
        let plan = move || storage::plan(&spec, storage, &coming, &here);
        // A network file system may take its time.
        tokio::task::spawn_blocking(plan)
            .await
            .map_err(|error| Failure::host("failed to look at the instance's disks")(std::io::Error::other(error)))?
    }

    /// Where images wait until their instance is prepared.
    pub(crate) fn image_folder(&self) -> std::path::PathBuf {
        self.config.data_dir.join("images")
    }

    fn missing_images(&self, spec: &InstanceSpec) -> Vec<String> {
        let folder = self.image_folder();
        let is_missing = |hash: &&String| !hash.is_empty() && !folder.join(images::file_name(hash)).exists();
        [&spec.kernel, &spec.initrd]
            .into_iter()
            .filter(is_missing)
            .cloned()
            .collect()
    }

    /// Images wait by their content's hash, and one may be another migration's just as well: who renames it first has it. False:
    /// one of them is not there any more.
    fn take_images(&self, spec: &InstanceSpec, folder: &Path) -> Result<bool, Failure> {
        for hash in [&spec.kernel, &spec.initrd].into_iter().filter(|hash| !hash.is_empty()) {
            let name = images::file_name(hash);
            match std::fs::rename(self.image_folder().join(&name), folder.join(&name)) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
                Err(error) => return Err(Failure::host(format!("failed to take over the image {hash}"))(error)),
            }
        }
        Ok(true)
    }

    /// None: the images are another migration's by now, and nothing was made.
    async fn prepare(
        self: &Arc<Self>,
        context: &RequestContext,
        mut guest: Guest,
        reserved: Reservation,
    ) -> Result<Option<Arc<Incoming>>, Failure> {
        let secret = data_port::random().map_err(Failure::host("failed to make a secret"))?;
        let instance_row = InstanceRow {
            id: guest.instance,
            status: Status::Incoming,
            epoch: guest.epoch,
            known_epoch: guest.epoch,
            spec: guest.spec.clone(),
            migration: Some(guest.migration),
            reason: None,
            boot_id: self.boot_id.clone(),
            restarts: Default::default(),
        };
        let row = MigrationRow {
            id: guest.migration,
            instance: guest.instance,
            role: Role::Destination,
            peer: guest.source.clone(),
            epoch: guest.epoch,
            over: false,
            armed: 0,
            said: None,
            resumed: None,
            user_paused: guest.user_paused,
            options: MigrationOptions {
                resume_window_ms: guest.resume_window_ms,
                ..MigrationOptions::default()
            },
            info: first_info(&guest, self.host()),
            began: now_ms(),
            peer_journal: guest.journal,
        };
        let folder = self.make_folder(guest.instance)?;
        let prepared = self.take_images(&guest.spec, &folder);
        if let Ok(false) = prepared {
            self.remove_folder(guest.instance);
            return Ok(None);
        }
        let (both, saved) = ((instance_row.clone(), row.clone()), prepared.is_ok());
        let subject = Subject::migration(guest.instance, &guest.spec.name, guest.migration);
        let event = subject.begins(context, Action::MigrateIn);
        let journalled = match prepared {
            Ok(_) => self
                .journal
                .write(RowWrite::Reserved, move |transaction| {
                    both.0.save(transaction)?;
                    both.1.save(transaction)?;
                    event.begin(transaction)
                })
                .await
                .map_err(Failure::from),
            Err(failure) => Err(failure),
        };
        if let Err(failure) = journalled {
            tracing::info!(saved, "a migration into here could not be prepared");
            self.remove_folder(guest.instance);
            return Err(failure);
        }

        let instance = self.instances.add(instance_row);
        let (requests, request_receiver) = mpsc::unbounded_channel();
        let incoming = Arc::new(Incoming {
            id: guest.migration,
            context: context.without_deadline(),
            of: guest.tuple(),
            secret,
            copied_disks: guest.copied_disks.clone(),
            requests,
        });
        let (news, news_receiver) = mpsc::unbounded_channel();
        let mut state = instance.state.lock().await;
        state.news = Some(news);
        // Known before it is built, so that giving up is heard meanwhile.
        self.incoming.add(Arc::clone(&incoming));
        // The row and the handle are what others find from here on.
        drop(reserved);
        if let Some(reason) = self.incoming.why_buried(guest.migration) {
            incoming.give_up(&reason);
        }
        // What is made here was journalled before, so that it is removed whatever happens.
        let made = self.make_room(&guest);
        let step = match &made {
            Ok(()) => DestinationStep::Build,
            Err(_) => DestinationStep::MakeRoom,
        };
        let built = match made {
            Ok(()) => self.build_incoming(&guest, &instance, &mut state).await,
            Err(failure) => Err(failure),
        };
        drop(state);

        let driver = Driver {
            agent: Arc::clone(self),
            incoming: Arc::clone(&incoming),
            instance,
            core: DestinationAgent::prepared(),
            row,
            step,
            streams: guest.streams,
            copied_bytes: storage::copied_bytes(&guest.copied_disks, &guest.disk_sizes),
            copied_disks: guest.copied_disks.clone(),
            connections: Default::default(),
            part: Part::default(),
            reason: None,
            called_off: false,
            claimed_boot: self.boot_id.clone(),
            late_streams: guest.mode.may_be_late().then(|| late_streams(guest.streams)),
            late: None,
            late_session: LateSession::default(),
            _room: guest.room.take(),
            is_adopted: false,
            ended_late: None,
            questions: Questions::new(Instant::now()),
        };
        let failed = built.as_ref().err().map(Failure::chain);
        tokio::spawn(driver.run(request_receiver, news_receiver, failed));
        built.map(|()| Some(incoming))
    }

    async fn build_incoming(
        self: &Arc<Self>,
        guest: &Guest,
        instance: &Arc<crate::agent::instances::Instance>,
        state: &mut crate::agent::instances::InstanceState,
    ) -> Result<(), Failure> {
        let backends = self
            .open_to_copy(&guest.spec, guest.whose(), &guest.copied_disks)
            .await?;
        // One that is there could only be an earlier attempt's of the very same migration.
        self.marks.remove(guest.migration);
        let folder = self.marks.folder(guest.migration);
        std::fs::create_dir_all(&folder)
            .map_err(Failure::host(format!("failed to make the folder {}", folder.display())))?;
        let mark = self.marks.mark(guest.migration);
        let (vmm, events) = self.spawn_vmm(guest.instance, Some(folder)).await?;
        self.attach(instance, state, vmm.clone(), events);
        let build = wire::Build {
            spec: Some(state.machine_spec(self.host(), backends.disks, backends.nics)),
            incoming: true,
            started_mark: mark.to_string_lossy().into_owned(),
        };
        vmm.order_with(Command::Build(build), backends.descriptors)
            .await
            .map_err(Failure::vmm("failed to build the machine"))?;
        Ok(())
    }
}

/// What must be here already: the instance without the disks that come along.
pub(crate) fn without_disks(spec: &InstanceSpec, numbers: &[u32]) -> InstanceSpec {
    let mut spec = spec.clone();
    let mut number = 0u32..;
    spec.disks
        .retain(|_| number.next().is_none_or(|number| !numbers.contains(&number)));
    spec
}

fn first_info(guest: &Guest, host: &str) -> MigrationInfo {
    MigrationInfo {
        id: guest.migration.to_string(),
        instance: guest.instance.to_string(),
        name: guest.spec.name.clone(),
        source: guest.source.clone(),
        destination: host.to_owned(),
        status: "preparing".to_owned(),
        mode: guest.mode.as_str().to_owned(),
        transport: guest.transport.as_str().to_owned(),
        guest_was: guest.guest_was.clone(),
        step: DestinationStep::Reserve.to_string(),
        guest_location: Some(guest.source.clone()),
        started: Some(now_text()),
        streams: guest.streams.into(),
        copied_disks: guest.paths(),
        ..MigrationInfo::default()
    }
}
