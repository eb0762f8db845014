//! What is promised to instances that are to become this host's, from the check on until they are among them: those of migrations that are being prepared,
//! new ones whose files are still being copied, those that a snapshot is restored to.
//!
//! A check that is followed by a wait is no promise: two could pass it together, and have more than there is, or the same. So who checks
//! writes down in the same turn what was checked, and whoever comes next finds that.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferry_proto::agent::v1::InstanceSpec;
use uuid::Uuid;

use crate::agent::failure::Failure;
use crate::agent::instances::{Agent, check_incoming};
use crate::agent::reason::Reason;

/// The promises, by migration; of an instance that comes by none, by its own id.
#[derive(Default)]
pub(crate) struct Reservations {
    /// Who has it checks and promises; the others wait.
    turn: tokio::sync::Mutex<()>,
    promised: Arc<Mutex<Promises>>,
}

type Promises = HashMap<Uuid, Promise>;

/// What one instance was promised.
#[derive(Clone, Debug)]
pub(crate) struct Promise {
    /// Who comes.
    pub(crate) instance: Uuid,
    /// Whether it comes by a migration.
    migrates: bool,
    /// What it claims, and what it is called.
    pub(crate) spec: InstanceSpec,
}

/// A promise. Dropping it takes it back, which changes nothing once the instance is among those of this host.
#[must_use = "what is promised is promised only while it is held"]
pub(crate) struct Reservation {
    id: Uuid,
    promised: Arc<Mutex<Promises>>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        lock(&self.promised).remove(&self.id);
    }
}

fn lock(promised: &Mutex<Promises>) -> MutexGuard<'_, Promises> {
    promised.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reservations {
    /// What is promised now. Read before the instances of this host are, it misses none that becomes one of them meanwhile.
    pub(crate) fn promises(&self) -> Vec<Promise> {
        lock(&self.promised).values().cloned().collect()
    }

    /// How many migrations there are with those that have a task.
    fn count_with(&self, live: &[Uuid]) -> usize {
        let promised = lock(&self.promised);
        let migrations = promised.iter().filter(|(_, promise)| promise.migrates);
        live.len() + migrations.filter(|(id, _)| !live.contains(id)).count()
    }

    /// Whether this instance is promised its place.
    pub(crate) fn expects(&self, instance: Uuid) -> bool {
        lock(&self.promised)
            .values()
            .any(|promise| promise.instance == instance)
    }

    /// Whether this migration, or another one of this instance, is being prepared.
    fn is_preparing(&self, migration: Uuid, instance: Uuid) -> bool {
        lock(&self.promised).contains_key(&migration) || self.expects(instance)
    }

    fn promise(&self, id: Uuid, promise: Promise) -> Reservation {
        lock(&self.promised).insert(id, promise);
        Reservation {
            id,
            promised: Arc::clone(&self.promised),
        }
    }
}

impl Agent {
    /// Promises a migration into here its place, its claim and its names, for as long as the reservation is held.
    ///
    /// # Errors
    /// This host cannot have it, or not now.
    pub(super) async fn reserve(
        &self,
        migration: Uuid,
        instance: Uuid,
        spec: &InstanceSpec,
    ) -> Result<Reservation, Failure> {
        let busy = |why: String| Err(Failure::denied(Reason::HostBusy, format!("host {} {why}", self.host())));
        let _turn = self.reservations.turn.lock().await;
        // Asked again, it is told what was prepared.
        let is_prepared = self.incoming.find(migration).is_some();
        if is_prepared || self.reservations.is_preparing(migration, instance) {
            return Err(self.prepares_already(spec));
        }
        if self.reservations.count_with(&self.incoming.ids()) >= self.config.max_incoming {
            return busy(format!(
                "takes {} migrations at the same time",
                self.config.max_incoming
            ));
        }
        if self.outgoing.has(instance) {
            return busy("still sees the instance off that is to come back".to_owned());
        }
        check_incoming(self, instance, spec).await?;
        self.check_claim(spec).await?;
        let promise = Promise {
            instance,
            migrates: true,
            spec: spec.clone(),
        };
        Ok(self.reservations.promise(migration, promise))
    }

    /// Promises an instance that comes by no migration its id, its name and the addresses of its network cards, for as long as the reservation is held.
    ///
    /// # Errors
    /// Another one of this host has them, or is promised them.
    pub(crate) async fn reserve_new(&self, instance: Uuid, spec: &InstanceSpec) -> Result<Reservation, Failure> {
        let _turn = self.reservations.turn.lock().await;
        check_incoming(self, instance, spec).await?;
        let promise = Promise {
            instance,
            migrates: false,
            spec: spec.clone(),
        };
        Ok(self.reservations.promise(instance, promise))
    }

    /// Who asked again before the answer was there is to ask once more.
    pub(super) fn prepares_already(&self, spec: &InstanceSpec) -> Failure {
        let why = format!("host {} prepares instance {} already", self.host(), spec.name);
        Failure::denied(Reason::HostBusy, why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn promise(instance: u128) -> Promise {
        Promise {
            instance: Uuid::from_u128(instance),
            migrates: true,
            spec: InstanceSpec::default(),
        }
    }

    #[test]
    fn what_is_promised_counts_until_it_is_taken_back() {
        let reservations = Reservations::default();
        let [one, two, three] = [1, 2, 3].map(Uuid::from_u128);
        let first = reservations.promise(one, promise(11));
        let second = reservations.promise(two, promise(12));
        // The second has a task by now, and counts once.
        assert_eq!(reservations.count_with(&[two, three]), 3);
        assert_eq!(reservations.promises().len(), 2);
        // One that is restored is no migration.
        let three_promised = Promise {
            migrates: false,
            ..promise(13)
        };
        let third = reservations.promise(Uuid::from_u128(13), three_promised);
        assert_eq!(reservations.count_with(&[two, three]), 3);
        assert!(reservations.expects(Uuid::from_u128(13)));
        drop((first, second, third));
        assert_eq!(reservations.count_with(&[three]), 1);
        assert!(reservations.promises().is_empty());
    }

    #[test]
    fn one_instance_is_prepared_for_one_migration() {
        let reservations = Reservations::default();
        let [one, two] = [1, 2].map(Uuid::from_u128);
        let _held = reservations.promise(one, promise(11));
        assert!(reservations.is_preparing(one, Uuid::from_u128(12)));
        assert!(reservations.is_preparing(two, Uuid::from_u128(11)));
        assert!(!reservations.is_preparing(two, Uuid::from_u128(12)));
    }
}
