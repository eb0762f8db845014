//! The agent's state, and one instance in it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferry_migration::handover::{Epoch, Heard, Origin, heard};
use ferry_proto::agent::v1::InstanceInfo;
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::vmm::v1::{self as wire};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::restarting::policy_of;
use crate::agent::backends::room::Promises;
use crate::agent::claims::Claims;
use crate::agent::config::AgentConfig;
use crate::agent::failure::Failure;
use crate::agent::images;
use crate::agent::incoming::{ExpectedImages, IncomingMigrations, Reservations};
use crate::agent::journal::{Arrival, InstanceRow, Journal, RowWrite, Status};
use crate::agent::marks::Marks;
use crate::agent::mode::Mode;
use crate::agent::outgoing::{OutgoingMigrations, Queue};
use crate::agent::peers::Peers;
use crate::agent::prediction::Probes;
use crate::agent::reason::Reason;
use crate::agent::vmm_client::Vmm;

/// One host's agent: what all its tasks share.
pub(crate) struct Agent {
    pub(crate) config: AgentConfig,
    pub(crate) journal: Journal,
    pub(crate) boot_id: String,
    /// Where this agent is reached.
    pub(crate) url: String,
    /// Where its data port is reached.
    pub(crate) data_address: String,
    pub(crate) marks: Marks,
    pub(crate) instances: Instances,
    pub(crate) outgoing: OutgoingMigrations,
    pub(crate) incoming: IncomingMigrations,
    /// Images that may be sent here.
    pub(crate) expected_images: ExpectedImages,
    /// What is promised to those that are being prepared.
    pub(crate) reservations: Reservations,
    /// What is promised to disks that are copied here.
    pub(crate) room: Promises,
    pub(crate) peers: Peers,
    /// Who may send bytes here to see how fast they come.
    pub(crate) probes: Probes,
    /// The migrations out of here that wait for their turn.
    pub(crate) queue: Queue,
    /// Instances whose next start is in the journal, or whose end is still to be written there, to whoever sees to that.
    pub(crate) due: UnboundedSender<Uuid>,
}

impl Agent {
    /// This host's name.
    pub(crate) fn host(&self) -> &str {
        &self.config.host_id
    }

    /// The folder of an instance.
    pub(crate) fn folder(&self, id: Uuid) -> PathBuf {
        self.config.data_dir.join("instances").join(id.to_string())
    }

    /// Makes the folder of an instance, for this agent's eyes only.
    pub(crate) fn make_folder(&self, id: Uuid) -> Result<PathBuf, Failure> {
        let folder = self.folder(id);
        let failed = || Failure::host(format!("failed to make the instance's folder {}", folder.display()));
        fs::create_dir_all(&folder).map_err(failed())?;
        fs::set_permissions(&folder, Permissions::from_mode(0o700)).map_err(failed())?;
        Ok(folder)
    }

    /// Removes the folder of an instance and what belongs to it. What cannot be removed is told in the log.
    pub(crate) fn remove_folder(&self, id: Uuid) {
        let folder = self.folder(id);
        if let Err(error) = fs::remove_dir_all(&folder)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(folder = %folder.display(), %error, "failed to remove an instance's folder");
        }
        super::super::spawn::remove_cgroup(&id.to_string());
    }

    /// Makes a row durable.
    pub(crate) async fn save(&self, row: &InstanceRow) -> Result<(), Failure> {
        let row = row.clone();
        self.journal
            .write(RowWrite::Instance, move |transaction| row.save(transaction))
            .await
            .map_err(Failure::from)
    }
}

/// What a VMM says, to whoever looks after its instance at the moment.
#[derive(Debug)]
pub(crate) enum VmmNews {
    /// An event.
    Event(Box<Body>),
    /// The connection was made anew, and this is where the VMM stands; events may have been missed.
    Standing(Box<wire::Standing>),
    /// The process is dead.
    Gone,
}

/// One instance; its state has one lock, held for the length of an operation.
pub(crate) struct Instance {
    pub(crate) id: Uuid,
    /// Its name never changes: it is found by that without waiting for what is done to it, or to another.
    pub(crate) name: String,
    /// What it claims of the host while it claims anything; that never changes either.
    pub(crate) claim: Claims,
    pub(crate) state: tokio::sync::Mutex<InstanceState>,
    /// Whose turn it is to have its guest sampled.
    pub(crate) sampling: Arc<tokio::sync::Mutex<()>>,
}

impl Instance {
    /// An instance that is this host's no more, or not yet: none finds it.
    pub(crate) fn apart(row: InstanceRow) -> Arc<Self> {
        Arc::new(Self::new(row))
    }

    fn new(row: InstanceRow) -> Self {
        Self {
            id: row.id,
            name: row.spec.name.clone(),
            claim: Claims::of(&row.spec),
            sampling: Arc::default(),
            state: tokio::sync::Mutex::new(InstanceState {
                row,
                vmm: None,
                news: None,
                migrating: None,
                late: None,
                outcome: None,
                arrival: None,
                origin: Origin::Settled,
                doubted: None,
                is_unwritten: false,
            }),
        }
    }
}

/// What the agent knows of one instance.
pub(crate) struct InstanceState {
    pub(crate) row: InstanceRow,
    pub(crate) vmm: Option<Vmm>,
    /// Set while a migration looks after the VMM: its news go there.
    pub(crate) news: Option<UnboundedSender<VmmNews>>,
    /// The migration out of here that is in flight.
    pub(crate) migrating: Option<Uuid>,
    /// The migration that brought it here, while pages of its memory are still on their way.
    pub(crate) late: Option<Uuid>,
    /// Set while a snapshot is written or loaded: whoever waits for what becomes of it. Gone with the VMM.
    pub(crate) outcome: Option<oneshot::Sender<Body>>,
    /// The migration that brought it here, until its source has acknowledged that.
    pub(crate) arrival: Option<Arrival>,
    /// What that source said when it was last asked.
    pub(crate) origin: Origin,
    /// What it was, and why, before it was indeterminate here for that source's silence.
    pub(crate) doubted: Option<(Status, Option<String>)>,
    /// How it ended is not in the journal, which did not take it: an agent that restarted would call it crashed, and start it again.
    pub(crate) is_unwritten: bool,
}

impl InstanceState {
    /// The VMM, if there is one.
    ///
    /// # Errors
    /// The instance has no process.
    pub(crate) fn vmm(&self) -> Result<&Vmm, Failure> {
        self.vmm.as_ref().ok_or_else(|| {
            Failure::Refused(format!(
                "instance {} is {}: it has no VMM",
                self.row.spec.name, self.row.status
            ))
        })
    }

    /// How its VMM died, for people.
    pub(crate) async fn vmm_obituary(&self) -> String {
        match &self.vmm {
            Some(vmm) => vmm.obituary().await,
            None => "the VMM died".to_owned(),
        }
    }

    /// What will be told once the VMM says what became of a snapshot that it is about to be given.
    pub(crate) fn await_outcome(&mut self) -> oneshot::Receiver<Body> {
        let (tell, outcome) = oneshot::channel();
        self.outcome = Some(tell);
        outcome
    }

    /// Whether a snapshot is being written of it.
    fn is_snapshotting(&self) -> bool {
        self.outcome.is_some() && self.row.status != Status::Incoming
    }

    /// Whether a migration into here still has it. One that comes stopped is that from RUNNING on, and the machine that was held of it is
    /// not ended yet: who started it now would have the new machine ended in its place.
    pub(crate) fn is_arriving(&self) -> bool {
        match self.row.status {
            Status::Incoming => true,
            Status::Stopped => self.news.is_some() && self.migrating.is_none(),
            _ => false,
        }
    }

    /// Refuses what a user may not do to an instance that is migrating, or that a snapshot is written of.
    ///
    /// # Errors
    /// It is.
    pub(crate) fn check_idle(&self, what: &str) -> Result<(), Failure> {
        if self.is_snapshotting() {
            return Err(Failure::Refused(format!(
                "instance {} cannot {what} while a snapshot of it is written: wait for it, or add --force where the verb has it",
                self.row.spec.name
            )));
        }
        let arriving = self.row.migration.filter(|_| self.is_arriving());
        match self.migrating.or(arriving) {
            None => Ok(()),
            Some(migration) => Err(Failure::Refused(format!(
                "instance {} cannot {what} while migration {migration} is in flight: abort it first, or add --force where \
                 the verb has it",
                self.row.spec.name
            ))),
        }
    }

    /// Refuses what needs all of the guest's memory, or gives some of it up, while pages of it are on their way.
    ///
    /// # Errors
    /// They are.
    pub(crate) fn check_whole(&self, what: &str) -> Result<(), Failure> {
        match self.late {
            None => Ok(()),
            Some(migration) => Err(Failure::Refused(format!(
                "instance {} cannot {what} before the last page of its memory is here, which migration {migration} brings: wait for that",
                self.row.spec.name
            ))),
        }
    }

    /// A guest goes on only from a host that is certain to be the only one that has it: its source might come to take the epoch
    /// that the next host would run it under. That source has been asked ([`Agent::ask_origin`]) before this was locked.
    ///
    /// # Errors
    /// It has not acknowledged yet that the guest came here.
    pub(crate) fn check_settled(&self) -> Result<(), Failure> {
        match &self.arrival {
            None => Ok(()),
            Some(arrival) => Err(Failure::Refused(format!(
                "host {}, from which instance {} came, has not acknowledged that yet: it moves on once that host did",
                arrival.source, self.row.spec.name
            ))),
        }
    }

    /// Refuses a migration of an instance that has no guest to move this way, or that something else is done with.
    ///
    /// # Errors
    /// Says what it is, or what is in flight.
    pub(crate) fn check_can_migrate(&self, mode: Mode) -> Result<(), Failure> {
        self.why_not_migrate(mode).into_iter().next().map_or(Ok(()), Err)
    }

    /// Every reason why it cannot migrate this way now.
    pub(crate) fn why_not_migrate(&self, mode: Mode) -> Vec<Failure> {
        let busy = |failure: Failure| failure.because(Reason::InstanceBusy);
        let is_idle = self.check_idle("migrate").map_err(busy);
        let is_whole = self.check_whole("migrate").map_err(busy);
        [is_idle, is_whole, self.check_guest(mode)]
            .into_iter()
            .filter_map(Result::err)
            .collect()
    }

    /// Whether there is a guest to move this way.
    fn check_guest(&self, mode: Mode) -> Result<(), Failure> {
        let name = &self.row.spec.name;
        let why = match (self.row.status, mode) {
            (Status::Running | Status::Paused, _) => return Ok(()),
            (Status::Stopped, Mode::Cold) if self.row.restarts.due.is_none() => return Ok(()),
            (Status::Stopped, Mode::Cold) => {
                format!("instance {name} is about to be started again: `ferry stop` leaves it stopped")
            }
            (Status::Stopped, Mode::Precopy | Mode::Postcopy | Mode::Hybrid | Mode::Overtime) => {
                format!(
                    "instance {name} is stopped: only one that is running or paused can migrate; --cold moves a stopped one"
                )
            }
            (status, Mode::Precopy | Mode::Postcopy | Mode::Hybrid | Mode::Overtime) => {
                format!("instance {name} is {status}: only one that is running or paused can migrate")
            }
            (status, Mode::Cold) => {
                format!("instance {name} is {status}: only one that is running, paused or stopped can migrate cold")
            }
        };
        Err(Failure::denied(Reason::InstanceState, why))
    }

    /// As users see it.
    pub(crate) fn info(&self, host: &str) -> InstanceInfo {
        let row = &self.row;
        InstanceInfo {
            id: row.id.to_string(),
            name: row.spec.name.clone(),
            host: host.to_owned(),
            status: row.status.to_string(),
            task: match self.migrating {
                Some(_) => Some("migrating".to_owned()),
                None => self.is_snapshotting().then(|| "snapshotting".to_owned()),
            },
            epoch: row.epoch,
            migration: row.migration.map(|id| id.to_string()),
            memory_bytes: row.spec.memory_bytes,
            vcpus: row.spec.vcpus,
            cpu: row.spec.cpu.clone(),
            dirty: row.spec.dirty.clone(),
            cmdline: row.spec.cmdline.clone(),
            vmm_pid: self.vmm.as_ref().and_then(|vmm| u32::try_from(vmm.pid()).ok()),
            reason: row.reason.clone(),
            disks: row.spec.disks.clone(),
            nics: row.spec.nics.clone(),
            balloon: None,
            restart: policy_of(&row.spec).as_str().to_owned(),
            events: Vec::new(),
            fault: None,
            also_at: self.conflict().map(|(host, _)| host.to_owned()),
        }
    }

    /// The other host that has it, and its epoch there: somebody resolved its migration on both.
    pub(crate) fn conflict(&self) -> Option<(&str, Epoch)> {
        let (Some(arrival), Origin::Says(copy)) = (&self.arrival, self.origin) else {
            return None;
        };
        match heard(Epoch(self.row.epoch), copy) {
            Heard::Conflict(there) => Some((&arrival.source, there)),
            Heard::NotYet | Heard::Settled | Heard::Superseded(_) => None,
        }
    }

    /// What the VMM on `host` is told to build, with these disks and network cards.
    pub(crate) fn machine_spec(&self, host: &str, disks: Vec<wire::Disk>, nics: Vec<wire::Nic>) -> wire::MachineSpec {
        let spec = &self.row.spec;
        wire::MachineSpec {
            instance: self.row.id.to_string(),
            memory_bytes: spec.memory_bytes,
            vcpus: spec.vcpus,
            cpu: spec.cpu.clone(),
            dirty: spec.dirty.clone(),
            hugepages: spec.hugepages,
            kernel: images::file_name(&spec.kernel),
            initrd: if spec.initrd.is_empty() {
                String::new()
            } else {
                images::file_name(&spec.initrd)
            },
            cmdline: spec.cmdline.clone(),
            disks,
            nics,
            host: host.to_owned(),
            name: spec.name.clone(),
        }
    }
}

/// The instances by their id.
#[derive(Default)]
pub(crate) struct Instances(Mutex<HashMap<Uuid, Arc<Instance>>>);

impl Instances {
    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Arc<Instance>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an instance without a VMM.
    pub(crate) fn add(&self, row: InstanceRow) -> Arc<Instance> {
        let instance = Arc::new(Instance::new(row));
        self.lock().insert(instance.id, Arc::clone(&instance));
        instance
    }

    /// Adds an instance without a VMM, if none of its id is here.
    pub(crate) fn add_new(&self, row: InstanceRow) -> Option<Arc<Instance>> {
        match self.lock().entry(row.id) {
            Entry::Occupied(_) => None,
            Entry::Vacant(place) => Some(Arc::clone(place.insert(Arc::new(Instance::new(row))))),
        }
    }

    /// Takes an instance out.
    pub(crate) fn remove(&self, id: Uuid) {
        self.lock().remove(&id);
    }

    /// The instance with this id.
    pub(crate) fn by_id(&self, id: Uuid) -> Option<Arc<Instance>> {
        self.lock().get(&id).cloned()
    }

    /// All of them.
    pub(crate) fn all(&self) -> Vec<Arc<Instance>> {
        self.lock().values().cloned().collect()
    }

    /// The instance with this id or name.
    pub(crate) fn find(&self, name_or_id: &str) -> Option<Arc<Instance>> {
        if let Ok(id) = Uuid::parse_str(name_or_id)
            && let Some(instance) = self.by_id(id)
        {
            return Some(instance);
        }
        self.lock()
            .values()
            .find(|instance| instance.name == name_or_id)
            .cloned()
    }
}

impl Agent {
    /// The instance with this id or name.
    ///
    /// # Errors
    /// It is not here; the failure tells where it went, if it was.
    pub(crate) async fn instance(&self, name_or_id: &str) -> Result<Arc<Instance>, Failure> {
        match self.instances.find(name_or_id) {
            Some(instance) => Ok(instance),
            None => Err(self.not_here(name_or_id).await),
        }
    }

    /// That there is no instance with this id or name here, and where it went, if it was.
    pub(crate) async fn not_here(&self, name_or_id: &str) -> Failure {
        let wanted = name_or_id.to_owned();
        let found = self
            .journal
            .read(move |connection| InstanceRow::moved_to(connection, &wanted))
            .await;
        match found {
            Ok(moved_to) => Failure::NotFound {
                what: format!("instance {name_or_id:?}"),
                moved_to,
            },
            Err(error) => error.into(),
        }
    }

    /// Removes what is left of files of `folder` that belong to no instance. Called once, before anything runs.
    pub(crate) fn remove_orphans(folder: &Path, known: &[Uuid]) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let id = name.to_str().and_then(|name| Uuid::parse_str(name).ok());
            if let Some(id) = id
                && !known.contains(&id)
            {
                tracing::info!(instance = %id, "removing the folder of an instance that is not here any more");
                if let Err(error) = fs::remove_dir_all(entry.path()) {
                    tracing::warn!(%error, "failed to remove it");
                }
                super::super::spawn::remove_cgroup(&id.to_string());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ferry_proto::agent::v1::InstanceSpec;
    use tokio::sync::mpsc;

    use super::*;

    fn stopped() -> Instance {
        Instance::new(InstanceRow {
            id: Uuid::from_u128(1),
            status: Status::Stopped,
            epoch: 3,
            known_epoch: 3,
            spec: InstanceSpec::default(),
            migration: Some(Uuid::from_u128(2)),
            reason: None,
            boot_id: String::new(),
            restarts: Default::default(),
        })
    }

    #[tokio::test]
    async fn an_instance_that_came_stopped_is_its_migrations_until_its_machine_is_ended() {
        let instance = stopped();
        let mut state = instance.state.lock().await;
        assert!(state.check_idle("start").is_ok());
        let (news, _) = mpsc::unbounded_channel();
        state.news = Some(news);
        let refused = state.check_idle("start").unwrap_err().chain();
        assert!(refused.contains(&Uuid::from_u128(2).to_string()), "{refused}");
        assert!(state.check_can_migrate(Mode::Cold).is_err());
    }
}
