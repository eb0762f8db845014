//! The agent's start and end.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ferry_proto::agent::v1::compute_server::ComputeServer;
use ferry_proto::agent::v1::conductor_server::ConductorServer;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc};
use tokio_stream::StreamExt;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use uuid::Uuid;

use super::compute::ComputeService;
use super::compute_rpcapi::check_version;
use super::conductor::ConductorService;
use super::config::AgentConfig;
use super::context::RequestContext;
use super::health::Health;
use super::instances::{Agent, restart_when_due};
use super::journal::{Journal, RowWrite};
use super::marks::Marks;
use super::outgoing::Queue;
use super::peers::Peers;
use super::prediction::Probes;
use super::snapshots::{UNFINISHED, Unfinished};
use super::transport::{self, StreamsService};
use super::unread::WithReasons;
use super::{data_port, health, host, recovery};

/// How long calls in flight may take when the agent is asked to end.
const LAST_CALLS: Duration = Duration::from_secs(1);

/// Serves until SIGTERM or SIGINT; guests go on, and are found again by the next agent of this data directory.
///
/// # Errors
/// A port is taken, the data directory cannot be used or is another agent's, or the journal cannot be opened.
pub async fn serve(config: AgentConfig) -> anyhow::Result<()> {
    config.check()?;
    transport::keep_freed_memory();
    let _lock = open_data_dir(&config.data_dir)?;
    let unfinished = Unfinished::of(&config.data_dir.join(UNFINISHED));
    // Not waited for, and not when the agent ends: they may be on a file system that is slow.
    thread::spawn(move || unfinished.remove());
    let grpc = bind("--listen", config.listen).await?;
    let data = bind("--data-listen", config.data_listen).await?;
    if config.is_exposed() {
        tracing::warn!(
            "--insecure-network: anyone who reaches {} or {} owns this host's guests",
            config.listen,
            config.data_listen
        );
    }

    let (due, restarts) = mpsc::unbounded_channel();
    let agent = Arc::new(build(config, &grpc, &data, due).await?);
    recovery::recover(&agent)
        .await
        .context("failed to find the instances of this host again")?;
    let listening = tokio::spawn(Peers::listen(agent.peers.all().cloned().collect()));
    tokio::spawn(restart_when_due(Arc::clone(&agent), restarts));
    let data_port = tokio::spawn(data_port::serve(Arc::clone(&agent), data));
    tracing::info!(
        host = agent.host(),
        url = agent.url,
        data = agent.data_address,
        "agent ready"
    );

    let (health, health_service) = Health::begin(agent.journal.writable()).await;
    let reflection = health::reflection()?;
    let rpc_cap = agent.config.rpc_cap;
    let ending = Arc::new(Notify::new());
    let asked = Arc::clone(&ending);
    // The server's own `tcp_nodelay` says nothing of connections that it is handed: an answer of several frames would wait 40 ms for the caller's
    // delayed acknowledgement of the first.
    let grpc = TcpIncoming::from(grpc).with_nodelay(Some(true)).map(|accepted| {
        // Pages may come by it. A caller that has hung up already is noticed when it is served.
        accepted.inspect(|stream| drop(data_port::fit_buffers(stream)))
    });
    let serving = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .initial_stream_window_size(transport::WINDOW)
        .initial_connection_window_size(transport::WINDOW)
        .max_frame_size(transport::FRAME)
        .layer(WithReasons)
        .add_service(ComputeServer::with_interceptor(
            ComputeService(Arc::clone(&agent)),
            move |request| check_version(rpc_cap, request).and_then(RequestContext::receive),
        ))
        .add_service(ConductorServer::with_interceptor(
            ConductorService(Arc::clone(&agent)),
            RequestContext::receive,
        ))
        .add_service(InterceptedService::new(
            StreamsService::new(Arc::clone(&agent)),
            move |request| check_version(rpc_cap, request).and_then(RequestContext::receive),
        ))
        .add_service(health_service)
        .add_service(reflection)
        .serve_with_incoming_shutdown(grpc, async move {
            ended().await;
            // Whoever watches hears it while the connections are still there.
            health.end().await;
            asked.notify_one();
        });
    // Calls in flight may end; whoever follows a console would keep the agent for ever.
    let patience = async {
        ending.notified().await;
        tokio::time::sleep(LAST_CALLS).await;
    };
    tokio::select! {
        served = serving => served.context("failed to serve gRPC")?,
        () = patience => {}
    }
    data_port.abort();
    listening.abort();
    tracing::info!("agent ends, guests go on");
    Ok(())
}

async fn build(
    config: AgentConfig,
    grpc: &TcpListener,
    data: &TcpListener,
    due: mpsc::UnboundedSender<Uuid>,
) -> anyhow::Result<Agent> {
    let journal_path = config.data_dir.join("journal.db");
    let journal = Journal::open(&journal_path)?;
    own(&journal, &config.host_id).await?;
    let url = match &config.advertise {
        Some(url) => url.clone(),
        None => format!("http://{}", grpc.local_addr()?),
    };
    let data_address = data.local_addr()?.to_string();
    let marks = Marks::of(&fs::canonicalize(&config.data_dir)?).context("failed to make a folder on tmpfs")?;
    let peers = Peers::new(&config.host_id, &config.peers)?;
    Ok(Agent {
        journal,
        boot_id: host::boot_id().context("failed to read the host's boot id")?,
        url,
        data_address,
        marks,
        instances: Default::default(),
        outgoing: Default::default(),
        incoming: Default::default(),
        expected_images: Default::default(),
        reservations: Default::default(),
        room: Default::default(),
        peers,
        probes: Probes::default(),
        queue: Queue::new(config.max_outgoing),
        due,
        config,
    })
}

/// A journal is one host's: another host's would claim guests that are not here.
async fn own(journal: &Journal, host_id: &str) -> anyhow::Result<()> {
    let mine = host_id.to_owned();
    let owner: String = journal
        .write(RowWrite::Beginning, move |transaction| {
            transaction.execute("INSERT OR IGNORE INTO meta VALUES('host', ?1)", [mine])?;
            transaction.query_row("SELECT value FROM meta WHERE key='host'", (), |row| row.get(0))
        })
        .await?;
    if owner != host_id {
        bail!("the data directory belongs to host {owner:?}, this agent is {host_id:?}: set --host-id or --data-dir");
    }
    Ok(())
}

async fn bind(flag: &str, address: std::net::SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!("failed to listen on {address}: is another agent running there? choose another address with {flag}")
    })
}

/// A process that an agent was about to start when it was killed has the lock until it is the program that it becomes.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);

/// Makes the data directory and locks it: two agents on one would both own its guests.
fn open_data_dir(folder: &Path) -> anyhow::Result<File> {
    let make = |path: &Path| -> anyhow::Result<()> {
        fs::create_dir_all(path).with_context(|| format!("failed to make the directory {}", path.display()))?;
        fs::set_permissions(path, Permissions::from_mode(0o700))
            .with_context(|| format!("failed to restrict the directory {}", path.display()))
    };
    make(folder)?;
    make(&folder.join("instances"))?;
    // What was sent for migrations that never came to be.
    let images = folder.join("images");
    let _ = fs::remove_dir_all(&images);
    make(&images)?;
    let path = folder.join("agent.lock");
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("failed to open {}", path.display()))?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(fs::TryLockError::WouldBlock) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
            Err(fs::TryLockError::WouldBlock) => {
                bail!(
                    "another agent runs on {}: end it, or choose another --data-dir",
                    folder.display()
                )
            }
            Err(fs::TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("failed to lock {}", path.display()));
            }
        }
    }
}

async fn ended() {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("failed to listen for signals: only SIGKILL ends this agent");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
