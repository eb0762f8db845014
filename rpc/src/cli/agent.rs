//! The verbs that are daemons: `ferry agent`, and the hidden `ferry vmm` that agents start.

use std::io::IsTerminal;
use std::path::PathBuf;

use ferry_proto::VMM_PROTOCOL;
use tracing_subscriber::EnvFilter;

use super::arguments::{AgentArguments, VmmArguments};
use super::failure::{Exit, Failure, Outcome};
use super::output;
use crate::agent::{AgentConfig, AllocationRatios};
use crate::vmm_process;

/// Serves until SIGTERM or SIGINT. The instances go on.
pub(super) fn serve(arguments: AgentArguments) -> Outcome {
    let fault_gate = arguments.fault_gate.clone();
    let config = configuration(arguments)?;
    log_to_stderr();
    if let Some(socket) = fault_gate {
        crate::faults::open(socket, config.host_id.clone());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(Exit::Failed, format!("start the runtime: {error}")))?;
    let served = runtime.block_on(crate::agent::serve(config));
    runtime.shutdown_background();
    served.map_err(Failure::from).map(|()| Exit::Done)
}

/// Is the process around one VM, until it ends. Its agent hands it a listening socket as standard input.
pub(super) fn vmm(arguments: VmmArguments) -> Outcome {
    let start = vmm_process::Start {
        folder: arguments.instance_dir,
        mark_folder: arguments.mark_dir,
        user: arguments.user,
        protocol: arguments.protocol_cap.unwrap_or(VMM_PROTOCOL),
    };
    if arguments.rehearse {
        vmm_process::rehearse(&start).iter().try_for_each(output::json_line)?;
        return Ok(Exit::Done);
    }
    log_to_stderr();
    vmm_process::main(start).map_err(Failure::from).map(|()| Exit::Done)
}

/// Where an agent keeps its data when it is not told.
pub(super) fn default_data_dir() -> Result<PathBuf, Failure> {
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/ferry"));
    }
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")));
    let state =
        state.ok_or_else(|| Failure::new(Exit::Usage, "neither HOME nor XDG_STATE_HOME is set: give --data-dir"))?;
    Ok(state.join("ferry"))
}

/// What this host is called when nobody says.
pub(super) fn default_host_id() -> Result<String, Failure> {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    super::quantities::host_id(&name).map_err(|problem| {
        Failure::new(
            Exit::Usage,
            format!("the machine's name {name:?} {problem}: give --host-id"),
        )
    })
}

fn configuration(arguments: AgentArguments) -> Result<AgentConfig, Failure> {
    let host_id = arguments.host_id.map_or_else(default_host_id, Ok)?;
    let data_dir = arguments.data_dir.map_or_else(default_data_dir, Ok)?;
    for (at, (host, _)) in arguments.peers.iter().enumerate() {
        if arguments.peers[..at].iter().any(|(earlier, _)| earlier == host) {
            return Err(Failure::new(Exit::Usage, format!("--peer {host} is given twice")));
        }
    }
    let config = AgentConfig {
        host_id,
        listen: arguments.listen,
        data_listen: arguments.data_listen,
        advertise: arguments.advertise,
        data_dir: std::path::absolute(&data_dir)
            .map_err(|error| Failure::new(Exit::Usage, format!("--data-dir {}: {error}", data_dir.display())))?,
        peers: arguments.peers,
        image_dirs: arguments.image_dirs,
        insecure_network: arguments.insecure_network,
        vmm_users: arguments.vmm_users.unwrap_or_default(),
        vmm_protocol_cap: arguments.vmm_protocol_cap,
        rpc_cap: arguments.rpc_cap,
        allocation: AllocationRatios {
            ram: arguments.ram_allocation_ratio,
            cpu: arguments.cpu_allocation_ratio,
        },
        max_outgoing: arguments.max_concurrent_live_migrations,
        max_incoming: arguments.max_concurrent_incoming,
    };
    config
        .check()
        .map_err(|error| Failure::new(Exit::Usage, format!("{error:#}")))?;
    Ok(config)
}

/// `FERRY_LOG` says what is logged, in the manner of tracing's filters; `info` by default.
fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("FERRY_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // Only a second call could fail, and then logging is there already.
    let _ = subscriber.with_ansi(std::io::stderr().is_terminal()).try_init();
}
