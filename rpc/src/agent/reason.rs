//! Why a migration is refused: the closed list, with what to do about each.
//!
//! A refusal travels as a gRPC status with `google.rpc.ErrorInfo` (its `reason` is [`Reason::code`], its domain
//! [`DOMAIN`]), so that scripts and other agents need not read sentences. `docs/control-plane.md` has the list.

/// Whose reasons these are, in `google.rpc.ErrorInfo`.
pub(crate) const DOMAIN: &str = "ferry";

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $code:literal, $remedy:literal;)+) => {
        /// Why something about a migration is refused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub(crate) enum Reason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Reason {
            /// Each of them.
            pub(crate) const ALL: &[Self] = &[$(Self::$name),+];

            /// The word that scripts see.
            pub(crate) fn code(self) -> &'static str {
                match self { $(Self::$name => $code,)+ }
            }

            /// What to do about it.
            pub(crate) fn remedy(self) -> &'static str {
                match self { $(Self::$name => $remedy,)+ }
            }
        }
    };
}

reasons! {
    /// The instance is neither running nor paused.
    InstanceState = "INSTANCE_STATE", "start the instance, or wait until it is running or paused";
    /// The instance is migrating, or a snapshot of it is written.
    InstanceBusy = "INSTANCE_BUSY", "wait for what is in flight, or abort it";
    /// The instance was moved or started anew since it was checked.
    InstanceChanged = "INSTANCE_CHANGED", "ask again";
    /// The agent of the source does not answer.
    SourceDown = "SOURCE_DOWN", "look after the source's agent";
    /// The destination is the source.
    DestinationIsSource = "DESTINATION_IS_SOURCE", "name another host, or none";
    /// Nobody has heard of the destination.
    DestinationUnknown = "DESTINATION_UNKNOWN", "start the agents with --peer for each other";
    /// The agent of the destination does not answer.
    DestinationDown = "DESTINATION_DOWN", "look after the destination's agent, or name another host";
    /// Who answers at the destination's address is another host.
    DestinationIsOther = "DESTINATION_IS_OTHER", "correct --peer";
    /// The agent at the peer's address has another journal than the one that took part in the migration.
    JournalIsOther = "JOURNAL_IS_OTHER", "start the agent with the data directory that it had, or correct --peer";
    /// The peer speaks another version of the RPCs.
    RpcVersion = "RPC_VERSION", "upgrade the older agent, or set --rpc-cap on the newer one";
    /// The destination's build is older than the source's: it may not know what the guest's state holds.
    OlderVersion = "OLDER_VERSION", "upgrade the destination's agent";
    /// The destination has not enough memory that is not claimed.
    Memory = "INSUFFICIENT_MEMORY", "move something away from there, or raise its --ram-allocation-ratio";
    /// The destination has not enough processors that are not claimed.
    Vcpus = "INSUFFICIENT_VCPUS", "move something away from there, or raise its --cpu-allocation-ratio";
    /// The destination cannot run such a machine: processor, time stamp counter, devices, KVM.
    Machine = "INCOMPATIBLE_MACHINE", "name a host with the same kind of processor, or run the instance with --cpu x86-64-v2";
    /// The destination may not have pages come after their guest, and the migration's mode may need it to.
    LatePages = "LATE_PAGES", "set the sysctl vm.unprivileged_userfaultfd to 1 there, give its agent access to /dev/userfaultfd, or move by pre-copy without --on-timeout postcopy";
    /// The source does not get to the destination's data port.
    DataPort = "DATA_PORT", "let the source through to it (--data-listen there, firewalls), or move with --transport grpc";
    /// A guest that has its memory from the pool of huge pages finds too few there.
    HugePages = "HUGE_PAGES", "raise the sysctl vm.nr_hugepages there, or move something with huge pages away";
    /// The file system with the destination's data directory has no room left.
    DataDirectory = "DATA_DIRECTORY_FULL", "make room on the file system of its --data-dir";
    /// A disk can neither be shared nor copied there.
    Disks = "DISKS", "make the disk available there, or choose another --storage";
    /// A tap or bridge is missing there.
    Network = "NETWORK", "make the tap or bridge there, by the same name";
    /// The instance, its name or an address of its cards is there already.
    AlreadyThere = "ALREADY_THERE", "delete or rename what is there";
    /// The destination takes no further migration now.
    HostBusy = "HOST_BUSY", "wait, or raise its --max-concurrent-incoming";
    /// No host would take the instance.
    NoValidHost = "NO_VALID_HOST", "see what each host lacks: ferry migrate NAME --dry-run";
    /// The host says no for a reason of its own.
    Other = "REFUSED", "see what the host says";
}

impl Reason {
    /// Reads the word that [`Self::code`] gave.
    pub(crate) fn parse(code: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.code() == code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_read_back_and_told_in_the_documentation() {
        let told = include_str!("../../../docs/control-plane.md");
        for reason in Reason::ALL {
            assert_eq!(Reason::parse(reason.code()), Some(*reason));
            assert!(
                told.contains(&format!("`{}`", reason.code())),
                "{reason:?} is not documented"
            );
        }
        assert_eq!(Reason::parse("refused"), None);
    }
}
