//! Filling an empty machine from the files of a snapshot. All that is in them is hostile input: nothing is used before it was
//! checked, and what is cheap to check comes first.

use anyhow::{Context, ensure};
use ferry_migration::handover::Epoch;
use ferry_proto::vmm::v1::{self as wire, DiskMoment};
use ferry_proto::wire_uuid;
use ferry_vmm::{Arming, MachineProfile, MachineState, PieceTable};
use uuid::Uuid;

use super::files::{self, Files};
use crate::mac::MacAddress;
use crate::vmm_process::guest::{BlankGuest, LocalGuest};

/// The largest state that is read: 64 vCPUs have a tenth of it.
const LARGEST_STATE: usize = 16 << 20;
const LARGEST_PROFILE: usize = 1 << 20;

/// What the order says of the guest and its files.
pub(super) struct Origin {
    instance: Uuid,
    epoch: Epoch,
    pieces_digest: String,
    state_digest: String,
    profile_digest: String,
    disks: Vec<DiskMoment>,
    identity: Identity,
}

/// Which guest it becomes.
enum Identity {
    /// The one that was snapshotted.
    Same,
    /// Another one, whose network cards have these addresses.
    New(Vec<[u8; 6]>),
}

impl Origin {
    /// Reads the order.
    ///
    /// # Errors
    /// Names the field that cannot be read.
    pub(super) fn from_wire(order: &wire::Restore) -> anyhow::Result<Self> {
        let octets = |mac: &String| mac.parse().map(MacAddress::octets);
        let macs = order.macs.iter().map(octets).collect::<Result<_, _>>();
        Ok(Self {
            instance: wire_uuid("origin", &order.origin)?,
            epoch: Epoch(order.epoch),
            pieces_digest: order.pieces_digest.clone(),
            state_digest: order.state_digest.clone(),
            profile_digest: order.profile_digest.clone(),
            disks: order.disks.clone(),
            identity: match order.new_identity {
                true => Identity::New(macs.map_err(anyhow::Error::msg)?),
                false => Identity::Same,
            },
        })
    }
}

/// Makes the machine the guest that was snapshotted, or another one like it, paused.
pub(super) fn restore(blank: BlankGuest, files: &Files, origin: &Origin) -> anyhow::Result<LocalGuest> {
    // Held from here on, so that what is found out of them stays true.
    blank.disks.hold(origin.epoch)?;
    blank.disks.check_moments(&origin.disks, origin.instance)?;
    blank.disks.forget_cached();

    let profile = files::read("profile", &files.profile, LARGEST_PROFILE, &origin.profile_digest)?;
    check_profile(&blank, &MachineProfile::from_bytes(&profile)?)?;
    let state = files::read("state", &files.state, LARGEST_STATE, &origin.state_digest)?;
    let mut state = MachineState::from_bytes(&state).context("the file state is not one")?;
    let memory = blank.machine.memory();
    let table_len = PieceTable::len_for(memory.shape());
    let table = files::read("memory.pieces", &files.pieces, table_len, &origin.pieces_digest)?;
    let table = PieceTable::from_bytes(&table, memory.shape()).context("the file memory.pieces is not one")?;
    memory
        .load_image(&files.memory, &table)
        .context("the file memory cannot be loaded")?;

    if let Identity::New(macs) = &origin.identity {
        state = state.with_macs(macs)?;
    }
    let mut machine = blank.machine.restore(&state)?;
    if let Identity::New(_) = origin.identity {
        machine.renew_generation_id()?;
    }
    Ok(LocalGuest {
        machine,
        inbox: blank.inbox,
        payload: blank.payload,
        disks: blank.disks,
        announcer: blank.announcer,
        copied: Vec::new(),
        arming: Arming::All,
    })
}

/// The host can run it, and the machine is built like it.
fn check_profile(blank: &BlankGuest, profile: &MachineProfile) -> anyhow::Result<()> {
    ensure!(
        profile.shape == *blank.machine.memory().shape(),
        "the guest was snapshotted with other memory than snapshot.json says"
    );
    let missing = blank.machine.host().check(profile);
    let missing: Vec<_> = missing.iter().map(ToString::to_string).collect();
    ensure!(
        missing.is_empty(),
        "this host cannot run the guest: {}",
        missing.join("; ")
    );
    Ok(())
}
