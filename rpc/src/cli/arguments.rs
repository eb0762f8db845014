//! The command line as clap reads it. It is a contract (`docs/cli.md`): what does not work yet is not here, so that
//! it exits 2 and is named.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand};
use ferry_migration::Compression;
use ferry_proto::{OLDEST_VMM_PROTOCOL, VMM_PROTOCOL};

use super::devices::{self, DiskArgument, NicArgument};
use super::output::Format;
use super::quantities as parse;
use crate::agent::{AllocationRatios, RpcVersion, UserRange};
use crate::request::RequestId;

/// Runs virtual machines on KVM and moves them, running, from one host to another.
#[derive(Debug, Parser)]
#[command(
    name = "ferry",
    version,
    disable_help_subcommand = true,
    arg_required_else_help = true
)]
pub(super) struct CommandLine {
    #[command(subcommand)]
    pub(super) verb: Verb,
    /// The agent to ask
    #[arg(long, global = true, env = "FERRY_AGENT", value_name = "URL", default_value = "http://127.0.0.1:7400", value_parser = parse::agent_url)]
    pub(super) agent: String,
    /// What the request is called in what the agents write down of it [default: a new id]
    #[arg(long, global = true, env = "FERRY_REQUEST_ID", value_name = "ID", value_parser = parse::request_id)]
    pub(super) request_id: Option<RequestId>,
    /// How results are printed
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Human, hide_possible_values = false)]
    pub(super) output: Format,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Serve this host's instances until SIGTERM; the instances go on without it
    Agent(AgentArguments),
    /// Boot an instance
    Run(RunArguments),
    /// List the asked host's instances
    List {
        /// Ask its peers too
        #[arg(long)]
        all: bool,
    },
    /// Show an instance
    Show(Named),
    /// Print what was done to an instance on the asked host, also to one that is gone
    Events {
        #[command(flatten)]
        named: Named,
        /// The newest N; 0 for all that are kept
        #[arg(long, value_name = "N", default_value_t = 50)]
        limit: u32,
    },
    /// Print what the guest printed on the asked host
    Console(ConsoleArguments),
    /// Print the log of the instance's VMM
    Logs {
        #[command(flatten)]
        named: Named,
        /// Go on printing
        #[arg(long)]
        follow: bool,
    },
    /// Boot a stopped or crashed instance
    Start(Named),
    /// Stop an instance's vCPUs
    Pause(Named),
    /// Let a paused instance go on
    Resume(Named),
    /// Boot a running instance anew
    Reboot(Named),
    /// Ask a running guest to have this much of its memory, and wait until it has given the rest back
    Balloon(BalloonArguments),
    /// Ask an instance's guest to switch off, or end it; what it is made of is kept
    Stop {
        #[command(flatten)]
        named: Named,
        /// Do not ask the guest: pull the plug
        #[arg(long)]
        force: bool,
        /// How long the guest may take to power off
        #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = parse::duration)]
        timeout: Duration,
    },
    /// Remove an instance and all that is kept of it
    Delete {
        #[command(flatten)]
        named: Named,
        /// Even if it runs or migrates
        #[arg(long)]
        force: bool,
    },
    /// Write a running or paused instance to a new folder on the asked host
    Snapshot(SnapshotArguments),
    /// Make an instance of a snapshot's folder
    Restore(RestoreArguments),
    /// Move an instance to another host: a running or paused one, or a stopped one with `--cold`
    Migrate(MigrateArguments),
    /// Look after migrations
    #[command(subcommand)]
    Migration(MigrationVerb),
    /// Look at hosts
    #[command(subcommand)]
    Host(HostVerb),
    /// Check what this host has of what Ferry needs
    Doctor(DoctorArguments),
    /// Move a busy guest there and back between two agents on this machine
    Demo,
    /// Measure migrations of named workloads on this machine
    Bench(BenchArguments),
    /// Check this host, move a guest there and back, and kill each part of a migration once: for CI
    Selftest(SelftestArguments),
    /// The process around one VM; agents start it
    #[command(hide = true)]
    Vmm(VmmArguments),
}

#[derive(Debug, Args)]
pub(super) struct VmmArguments {
    #[arg(long)]
    pub(super) instance_dir: PathBuf,
    /// Where the started mark will be
    #[arg(long)]
    pub(super) mark_dir: Option<PathBuf>,
    /// The user and group to become
    #[arg(long)]
    pub(super) user: Option<u32>,
    /// Speak this version of the protocol with the agent at most
    #[arg(long, value_parser = vmm_protocol())]
    pub(super) protocol_cap: Option<u32>,
    /// Only tell what this host does not allow of the jail, a JSON object each
    #[arg(long)]
    pub(super) rehearse: bool,
}

#[derive(Debug, Args)]
pub(super) struct Named {
    /// The instance's name or id
    #[arg(value_name = "NAME")]
    pub(super) name: String,
}

#[derive(Debug, Args)]
pub(super) struct AgentArguments {
    /// What this host is called [default: the machine's name]
    #[arg(long, value_name = "HOST", value_parser = parse::host_id)]
    pub(super) host_id: Option<String>,
    /// Where to answer the command line and other agents
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400")]
    pub(super) listen: SocketAddr,
    /// Where to accept page streams; port 0 takes a free one and tells the peers
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    pub(super) data_listen: SocketAddr,
    /// Where peers reach this agent [default: the listen address]
    #[arg(long, value_name = "ADDR", value_parser = parse::agent_url)]
    pub(super) advertise: Option<String>,
    /// The journal and the instances [default: /var/lib/ferry, or ~/.local/state/ferry where not root]
    #[arg(long, value_name = "DIR")]
    pub(super) data_dir: Option<PathBuf>,
    /// Another agent
    #[arg(long = "peer", value_name = "HOST=URL", value_parser = parse::peer)]
    pub(super) peers: Vec<(String, String)>,
    /// Where kernels, initrds, disks and folders of snapshots may lie when the network is not loopback
    #[arg(long = "image-dir", value_name = "DIR")]
    pub(super) image_dirs: Vec<PathBuf>,
    /// Listen beyond loopback although peers do not authenticate each other yet
    #[arg(long)]
    pub(super) insecure_network: bool,
    /// The numbers of users that VMMs become, where the agent is root [default: 1879048192-2147483647]
    #[arg(long, value_name = "FIRST-LAST", value_parser = parse::user_range)]
    pub(super) vmm_users: Option<UserRange>,
    /// How many times the host's memory its guests may claim when one migrates here
    #[arg(long, value_name = "X", default_value_t = AllocationRatios::default().ram, value_parser = parse::ratio)]
    pub(super) ram_allocation_ratio: f64,
    /// How many times the host's processors its guests may claim when one migrates here
    #[arg(long, value_name = "X", default_value_t = AllocationRatios::default().cpu, value_parser = parse::ratio)]
    pub(super) cpu_allocation_ratio: f64,
    /// Migrations out of here at the same time; others are queued
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = parse::migrations)]
    pub(super) max_concurrent_live_migrations: usize,
    /// Migrations into here at the same time; others wait at their sources
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = parse::migrations)]
    pub(super) max_concurrent_incoming: usize,
    /// Speak this version of the RPCs at most, for a fleet whose other agents are older
    #[arg(long, value_name = "VERSION", default_value_t = RpcVersion::NEWEST)]
    pub(super) rpc_cap: RpcVersion,
    /// For tests: where to ask, before and after each step of a migration, whether to go on
    #[arg(long, value_name = "SOCKET", hide = true)]
    pub(super) fault_gate: Option<PathBuf>,
    /// For tests: its VMMs speak this version of the protocol with their agent at most, as those of an earlier build do
    #[arg(long, value_name = "VERSION", hide = true, value_parser = vmm_protocol())]
    pub(super) vmm_protocol_cap: Option<u32>,
}

fn vmm_protocol() -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(u64::from(OLDEST_VMM_PROTOCOL)..=u64::from(VMM_PROTOCOL))
}

#[derive(Debug, Args)]
pub(super) struct RunArguments {
    /// Its name, unique on its host
    #[arg(value_name = "NAME", value_parser = parse::instance_name)]
    pub(super) name: String,
    /// An ELF file with a PVH note, a vmlinux or a bzImage, read by the agent
    #[arg(long, value_name = "FILE")]
    pub(super) kernel: PathBuf,
    /// An initial RAM disk, read by the agent
    #[arg(long, value_name = "FILE")]
    pub(super) initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    pub(super) cmdline: String,
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse::memory_size)]
    pub(super) memory: u64,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=254))]
    pub(super) vcpus: u32,
    /// The CPU that the guest sees
    #[arg(long, value_name = "MODEL", default_value = "host", value_parser = ["host", "x86-64-v2", "x86-64-v3"])]
    pub(super) cpu: String,
    /// How KVM tells which pages were written
    #[arg(long, value_name = "HOW", default_value = "log", value_parser = ["log", "ring"])]
    pub(super) dirty: String,
    /// Whether its agent starts it again when it ends without its user: after a crash, or also after it switched itself off
    #[arg(long, value_name = "WHEN", default_value = "never", value_parser = ["never", "on-crash", "always"])]
    pub(super) restart: String,
    /// Take guest memory from the pool of huge pages
    #[arg(long)]
    pub(super) hugepages: bool,
    /// A raw image or a block device, opened by the agent; may be given again
    #[arg(long = "disk", value_name = "path=FILE[,readonly=on][,serial=TEXT]", value_parser = devices::disk)]
    pub(super) disks: Vec<DiskArgument>,
    /// A network card on a tap, or on a bridge by a tap of its own, sending and receiving at RATE each at most; may be given again
    #[arg(long = "net", value_name = "tap=NAME|bridge=NAME[,mac=ADDRESS][,rate=RATE]", value_parser = devices::nic)]
    pub(super) nics: Vec<NicArgument>,
}

#[derive(Debug, Args)]
pub(super) struct BalloonArguments {
    #[command(flatten)]
    pub(super) named: Named,
    /// What the guest is to have, up to what the instance was given
    #[arg(long, value_name = "SIZE", value_parser = parse::memory_size)]
    pub(super) size: u64,
    /// How long the guest may take; it stays asked
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = parse::duration)]
    pub(super) timeout: Duration,
}

#[derive(Debug, Args)]
pub(super) struct SnapshotArguments {
    #[command(flatten)]
    pub(super) named: Named,
    /// The folder to be made; disks are not written to it
    #[arg(long, value_name = "DIR")]
    pub(super) to: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct RestoreArguments {
    /// The snapshot's folder, read by the agent
    #[arg(value_name = "DIR")]
    pub(super) directory: PathBuf,
    /// What the instance is to be called
    #[arg(long, value_name = "NEW", value_parser = parse::instance_name, required_unless_present = "same_identity")]
    pub(super) name: Option<String>,
    /// Make it the instance that was snapshotted, with its id and MAC addresses: that must be gone
    #[arg(long)]
    pub(super) same_identity: bool,
}

#[derive(Debug, Args)]
pub(super) struct ConsoleArguments {
    #[command(flatten)]
    pub(super) named: Named,
    /// Go on printing
    #[arg(long, conflicts_with = "attach")]
    pub(super) follow: bool,
    /// Go on printing, and type into it; Ctrl-] leaves
    #[arg(long)]
    pub(super) attach: bool,
}

#[derive(Debug, Args)]
pub(super) struct MigrateArguments {
    #[command(flatten)]
    pub(super) named: Named,
    /// The destination [default: the host that is best for it]
    #[arg(long, value_name = "HOST")]
    pub(super) to: Option<String>,
    /// How long the guest may stand still, everything counted
    #[arg(long, value_name = "DURATION", default_value = "300ms", value_parser = parse::duration)]
    pub(super) max_downtime: Duration,
    /// How long the copy may take, from when the guest's VMM is told to begin; what comes late after the handover does not count
    #[arg(long, value_name = "DURATION", default_value = "15m", value_parser = parse::duration)]
    pub(super) timeout: Duration,
    /// What happens when the time is up: the guest runs on where it is, or stands still until the rest of it is there, or runs there while
    /// the rest of it comes, as by `--mode postcopy`
    #[arg(long, value_name = "WHAT", default_value = "abort", value_parser = ["abort", "pause", "postcopy"])]
    pub(super) on_timeout: String,
    /// How memory moves. By the latter two the guest runs there before the rest of it comes: where the source's host is lost meanwhile, the
    /// guest is lost
    #[arg(long, value_name = "MODE", default_value = "precopy", value_parser = ["precopy", "postcopy", "hybrid"])]
    pub(super) mode: String,
    /// Keep vCPUs from running for a part of the time where the guest writes more than the link carries
    #[arg(long)]
    pub(super) auto_converge: bool,
    /// How much of the time that may be
    #[arg(long, value_name = "PERCENT", default_value_t = 99, requires = "auto_converge", value_parser = clap::value_parser!(u32).range(1..=99))]
    pub(super) max_throttle: u32,
    /// How long a link that is lost while the guest is copied may take to be made again; the guest runs meanwhile, and the copy goes on
    /// [default: the migration ends with it]
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    pub(super) resume_window: Option<Duration>,
    /// Page streams, each a TCP connection; `auto` goes by the CPUs, and by how long the way to the destination is
    #[arg(long, value_name = "N|auto", default_value = "auto", value_parser = parse::streams)]
    pub(super) streams: u32,
    /// How pages travel: straight from VMM to VMM by the destination's data port, or through both agents where only their own port is open
    #[arg(long, value_name = "HOW", default_value = "tcp", value_parser = ["tcp", "grpc"])]
    pub(super) transport: String,
    /// Do not send faster than this, for example 5Gbit, while the guest runs; the last pages, and late ones that it waits for, go at once
    /// [default: no limit]
    #[arg(long, value_name = "RATE", value_parser = parse::bandwidth)]
    pub(super) bandwidth: Option<u64>,
    /// How pages are compressed: where and as it pays, not at all, or all that get smaller by it
    #[arg(long, value_name = "auto|off|lz4|zstd[:LEVEL]", default_value = "auto", value_parser = parse::compression)]
    pub(super) compress: Compression,
    /// Keep digests of all that moves, on both hosts, and compare before the guest is handed over: what differs is sent again, once
    #[arg(long)]
    pub(super) verify: bool,
    /// What becomes of writable disks: `shared` ones are handed over, a `copy` moves with the guest and is removed at the source; `auto`
    /// takes each as the destination has it
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = ["auto", "shared", "copy"])]
    pub(super) storage: String,
    /// `no`: a disk that is copied must find room at the destination for all that it may ever hold, which is kept for it. `yes`: for what it
    /// holds now
    #[arg(long, value_name = "yes|no", default_value = "yes", value_parser = ["yes", "no"])]
    pub(super) disk_over_commit: String,
    /// The guest stands still from the first page on, and runs there when all is there; a stopped instance moves with its disks and stays stopped
    #[arg(long, conflicts_with_all = ["max_downtime", "on_timeout", "mode", "auto_converge"])]
    pub(super) cold: bool,
    /// Check and choose only: tell every reason why it would be refused, and what it would come to
    #[arg(long, conflicts_with_all = ["detach", "wait"])]
    pub(super) dry_run: bool,
    /// How long the guest is looked at for that, 30s at most; it costs a guest that writes a little of its speed
    #[arg(long, value_name = "DURATION|none", default_value = "3s", requires = "dry_run", value_parser = parse::sample)]
    pub(super) sample: u32,
    /// Print the migration's id and leave
    #[arg(long, conflicts_with = "wait")]
    pub(super) detach: bool,
    /// Leave with exit code 5 if it takes longer; the migration goes on
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    pub(super) wait: Option<Duration>,
    /// For tests: compare digests of all memory and state before the claim
    #[arg(long, hide = true)]
    pub(super) digests: bool,
    /// For tests: wait at this point until aborted
    #[arg(long, hide = true, value_name = "POINT", default_value = "")]
    pub(super) hold_at: String,
}

#[derive(Debug, Subcommand)]
pub(super) enum MigrationVerb {
    /// List the migrations that the asked host took part in
    List {
        /// With the rounds and decisions of each, as `show` has them; in a table there is no place for them
        #[arg(long)]
        details: bool,
    },
    /// Show a migration
    Show(Identified),
    /// Tell a migration's rounds, and what was decided on each of them and why
    Report(Identified),
    /// Watch a migration to its end; the exit code is that of `migrate`
    Watch(Identified),
    /// Call a migration off, as long as the guest has not been handed over
    Abort(Identified),
    /// Have a migration that copies switch over after its round, however long the guest stands still for that
    ForceComplete(Identified),
    /// Change what a migration that copies may take, or how fast late pages come
    Retune(RetuneArguments),
    /// End an indeterminate migration at the asked host, whose other host is gone for good
    Resolve(ResolveArguments),
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("terms").required(true).multiple(true).args(["max_downtime", "bandwidth", "timeout"]))]
pub(super) struct RetuneArguments {
    #[command(flatten)]
    pub(super) identified: Identified,
    /// How long the guest may stand still, everything counted
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    pub(super) max_downtime: Option<Duration>,
    /// Do not send faster than this, for example 5Gbit, while the guest runs; `none` takes a limit away
    #[arg(long, value_name = "RATE|none", value_parser = parse::cap)]
    pub(super) bandwidth: Option<u64>,
    /// How long the copy may take, from when the guest's VMM was told to begin
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    pub(super) timeout: Option<Duration>,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("wish").required(true).args(["run_here", "discard_here"]))]
pub(super) struct ResolveArguments {
    #[command(flatten)]
    pub(super) identified: Identified,
    /// The guest is to run on the asked host: it is booted anew there
    #[arg(long)]
    pub(super) run_here: bool,
    /// The guest is the other host's, or lost: what the asked host has of it is removed, but for its disks
    #[arg(long)]
    pub(super) discard_here: bool,
    /// The instance's name, typed to show that this one is meant
    #[arg(long, value_name = "NAME")]
    pub(super) confirm: String,
    /// The other host is gone for good: where it is no `--peer` any more, or another agent has its address
    #[arg(long)]
    pub(super) host_is_gone: bool,
}

#[derive(Debug, Args)]
pub(super) struct Identified {
    /// The migration's id
    #[arg(value_name = "ID")]
    pub(super) id: String,
}

#[derive(Debug, Subcommand)]
pub(super) enum HostVerb {
    /// List the asked host and its peers
    List,
    /// Show a host
    Show {
        /// The host's id
        #[arg(value_name = "HOST")]
        host: String,
    },
}

#[derive(Debug, Args)]
pub(super) struct DoctorArguments {
    /// The data directory to check [default: as `ferry agent`]
    #[arg(long, value_name = "DIR")]
    pub(super) data_dir: Option<PathBuf>,
    /// The address that an agent is to listen on
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400")]
    pub(super) listen: SocketAddr,
}

#[derive(Debug, Args)]
pub(super) struct SelftestArguments {
    /// Write what became of each check to this file, as JUnit has it
    #[arg(long, value_name = "FILE")]
    pub(super) junit: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct BenchArguments {
    /// Only these workloads, by name or part of it; may be given again
    #[arg(long = "workload", value_name = "NAME")]
    pub(super) workloads: Vec<String>,
    /// Migrations of each workload; medians are printed
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) runs: u32,
    /// Page streams, each a TCP connection
    #[arg(long, value_name = "N|auto", default_value = "auto", value_parser = parse::streams)]
    pub(super) streams: u32,
    /// How pages travel, as `migrate` has it
    #[arg(long, value_name = "HOW", default_value = "tcp", value_parser = ["tcp", "grpc"])]
    pub(super) transport: String,
    /// Each migration as by `migrate --verify`
    #[arg(long)]
    pub(super) verify: bool,
    /// List the workloads and leave
    #[arg(long)]
    pub(super) list: bool,
}

impl Verb {
    /// The name of a verb that asks no agent, so that `--agent` would be ignored in silence.
    pub(super) fn asks_no_agent(&self) -> Option<&'static str> {
        match self {
            Self::Agent(_) => Some("agent"),
            Self::Demo => Some("demo"),
            Self::Bench(_) => Some("bench"),
            Self::Selftest(_) => Some("selftest"),
            Self::Vmm(_) => Some("vmm"),
            _ => None,
        }
    }

    /// The name of a verb that has no result to print, so that `--output` would be ignored in silence.
    pub(super) fn prints_no_result(&self) -> Option<&'static str> {
        match self {
            Self::Agent(_) => Some("agent"),
            Self::Vmm(_) => Some("vmm"),
            Self::Console(console) if console.attach => Some("console --attach"),
            _ => None,
        }
    }
}
