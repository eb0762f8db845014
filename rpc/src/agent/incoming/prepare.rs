//! PREPARE at the destination: a paused VMM, its machine built, its memory mapped, and a task that looks after it.

use std::path::Path;
use std::sync::Arc;

use ferry_migration::handover::DestinationAgent;
use ferry_proto::agent::v1::{InstanceSpec, MigrationInfo, PreLiveMigrationReply, PreLiveMigrationRequest};
use ferry_proto::vmm::v1 as wire;
use ferry_proto::vmm::v1::order::Order as Command;
use ferry_proto::{InvalidField, required, wire_uuid};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::driver::{Driver, Part};
use super::handle::Incoming;
use crate::agent::backends::{Occasion, Opened, Whose};
use crate::agent::failure::Failure;
use crate::agent::instances::{Agent, check_incoming};
use crate::agent::journal::{InstanceRow, MigrationRow, Role, Status};
use crate::agent::outgoing::{MOST_STREAMS, now_ms, now_text};
use crate::agent::{data_port, images};

/// A request whose fields were checked.
struct Guest {
    migration: Uuid,
    instance: Uuid,
    spec: InstanceSpec,
    epoch: u64,
    source: String,
    streams: u16,
    user_paused: bool,
}

impl Guest {
    fn check(request: PreLiveMigrationRequest, agent: &Agent) -> Result<Self, Failure> {
        let major = |version: &str| version.split('.').next().map(str::to_owned);
        if major(&request.rpc_version) != major(ferry_proto::RPC_VERSION) {
            return Err(Failure::Refused(format!(
                "host {} speaks RPC version {}, the source {:?}",
                agent.host(),
                ferry_proto::RPC_VERSION,
                request.rpc_version
            )));
        }
        let streams = u16::try_from(request.streams)
            .ok()
            .filter(|streams| (1..=MOST_STREAMS).contains(streams));
        let streams = streams.ok_or_else(|| InvalidField {
            field: "streams",
            problem: format!("{} is not between 1 and {MOST_STREAMS}", request.streams),
        })?;
        agent.peers.named(&request.source)?;
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
            user_paused: request.user_paused,
        })
    }
}

impl Agent {
    /// Nova's pre_live_migration. Idempotent: the same migration prepares once.
    ///
    /// # Errors
    /// This host cannot have the instance; nothing of it is left then.
    pub(crate) async fn pre_live_migration(
        self: &Arc<Self>,
        request: PreLiveMigrationRequest,
    ) -> Result<PreLiveMigrationReply, Failure> {
        let guest = Guest::check(request, self)?;
        let mut reply = PreLiveMigrationReply {
            missing_images: Vec::new(),
            data_address: self.data_address.clone(),
            secret: Vec::new(),
            destination: self.host().to_owned(),
        };
        if let Some(incoming) = self.incoming.find(guest.migration) {
            reply.secret = incoming.secret.to_vec();
            return Ok(reply);
        }
        let id = guest.migration;
        if let Some(reason) = self.incoming.why_buried(id) {
            return Err(Failure::Refused(format!("migration {id} was given up: {reason}")));
        }
        if self
            .journal
            .read(move |connection| MigrationRow::find(connection, id))
            .await?
            .is_some()
        {
            return Err(Failure::Refused(format!(
                "migration {id} is over on host {}, or not for it",
                self.host()
            )));
        }
        check_incoming(self, guest.instance, &guest.spec).await?;
        let whose = Whose {
            instance: guest.instance,
            known_epoch: guest.epoch,
            occasion: Occasion::Prepare,
        };
        // Before anything is sent here: a disk or a bridge that is missing is the more likely reason to say no.
        let backends = self.open_backends(&guest.spec, whose).await?;
        reply.missing_images = self.missing_images(&guest.spec);
        if reply.missing_images.is_empty() {
            reply.secret = self.prepare(guest, backends).await?.secret.to_vec();
        }
        Ok(reply)
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

    fn take_images(&self, spec: &InstanceSpec, folder: &Path) -> Result<(), Failure> {
        for hash in [&spec.kernel, &spec.initrd].into_iter().filter(|hash| !hash.is_empty()) {
            let name = images::file_name(hash);
            std::fs::rename(self.image_folder().join(&name), folder.join(&name))
                .map_err(Failure::host(format!("failed to take over the image {hash}")))?;
        }
        Ok(())
    }

    async fn prepare(self: &Arc<Self>, guest: Guest, backends: Opened) -> Result<Arc<Incoming>, Failure> {
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
            options: Default::default(),
            info: first_info(&guest, self.host()),
            began: now_ms(),
        };
        let folder = self.make_folder(guest.instance)?;
        let prepared = self.take_images(&guest.spec, &folder);
        let (both, saved) = ((instance_row.clone(), row.clone()), prepared.is_ok());
        let journalled = match prepared {
            Ok(()) => self
                .journal
                .write(move |transaction| {
                    both.0.save(transaction)?;
                    both.1.save(transaction)
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
            source: guest.source.clone(),
            secret,
            requests,
        });
        let (news, news_receiver) = mpsc::unbounded_channel();
        let mut state = instance.state.lock().await;
        state.news = Some(news);
        // Known before it is built, so that giving up is heard meanwhile.
        self.incoming.add(Arc::clone(&incoming));
        if let Some(reason) = self.incoming.why_buried(guest.migration) {
            incoming.give_up(&reason);
        }
        let built = self.build_incoming(&guest, &instance, &mut state, backends).await;
        drop(state);

        let driver = Driver {
            agent: Arc::clone(self),
            incoming: Arc::clone(&incoming),
            instance,
            core: DestinationAgent::prepared(),
            row,
            streams: guest.streams,
            connections: Default::default(),
            part: Part::default(),
            reason: None,
            claimed_boot: self.boot_id.clone(),
        };
        let failed = built.as_ref().err().map(Failure::chain);
        tokio::spawn(driver.run(request_receiver, news_receiver, failed));
        built.map(|()| incoming)
    }

    async fn build_incoming(
        self: &Arc<Self>,
        guest: &Guest,
        instance: &Arc<crate::agent::instances::Instance>,
        state: &mut crate::agent::instances::InstanceState,
        backends: Opened,
    ) -> Result<(), Failure> {
        let folder = self.mark_folder(guest.migration);
        std::fs::create_dir_all(&folder)
            .map_err(Failure::host(format!("failed to make the folder {}", folder.display())))?;
        let mark = self.started_mark(guest.migration);
        // A mark of this name could only be an earlier attempt of the very same migration.
        let _ = std::fs::remove_file(&mark);
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

fn first_info(guest: &Guest, host: &str) -> MigrationInfo {
    MigrationInfo {
        id: guest.migration.to_string(),
        instance: guest.instance.to_string(),
        name: guest.spec.name.clone(),
        source: guest.source.clone(),
        destination: host.to_owned(),
        status: "preparing".to_owned(),
        mode: "precopy".to_owned(),
        guest_location: Some(guest.source.clone()),
        started: Some(now_text()),
        streams: guest.streams.into(),
        ..MigrationInfo::default()
    }
}
