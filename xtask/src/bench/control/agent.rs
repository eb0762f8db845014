//! An agent as its peers and the command line ask it, without a process for each question.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ferry_proto::agent::v1::compute_client::ComputeClient;
use ferry_proto::agent::v1::conductor_client::ConductorClient;
use ferry_proto::agent::v1::{
    InstanceInfo, InstanceRequest, InstanceSpec, ListInstancesRequest, LiveMigrationCast, MigrationOptions,
    RunInstanceRequest,
};
use ferry_tests::Host;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

/// The least memory that a guest may have.
const MEMORY: u64 = 4 << 20;

/// Connections to one agent; clones share them.
#[derive(Clone)]
pub(super) struct Agent {
    channel: Channel,
}

impl Agent {
    pub(super) async fn connect(host: &Host) -> Result<Self> {
        let endpoint = Endpoint::from_shared(host.url())?.tcp_nodelay(true);
        let channel = endpoint.connect().await.context("failed to connect to an agent")?;
        Ok(Self { channel })
    }

    pub(super) fn compute(&self) -> ComputeClient<Channel> {
        ComputeClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    pub(super) fn conductor(&self) -> ConductorClient<Channel> {
        ConductorClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// Boots a guest of the least memory and pauses it: it costs a process and no processor.
    pub(super) async fn run_paused(&self, name: &str, kernel: &str) -> Result<String> {
        let spec = InstanceSpec {
            name: name.to_owned(),
            memory_bytes: MEMORY,
            vcpus: 1,
            cpu: "host".to_owned(),
            dirty: "log".to_owned(),
            kernel: kernel.to_owned(),
            cmdline: "work=idle heartbeat_ms=1000".to_owned(),
            ..InstanceSpec::default()
        };
        let run = RunInstanceRequest { spec: Some(spec) };
        let id = self.compute().run_instance(run).await?.into_inner().id;
        let instance = InstanceRequest { instance: id.clone() };
        self.compute().pause_instance(instance).await?;
        Ok(id)
    }

    pub(super) async fn instances(&self) -> Result<Vec<InstanceInfo>> {
        let listed = self.compute().list_instances(ListInstancesRequest {}).await?;
        Ok(listed.into_inner().instances)
    }

    /// Casts a migration to `destination` and tells how long its receipt took, in milliseconds.
    pub(super) async fn cast(&self, migration: &str, instance: &str, destination: &str, hold_at: &str) -> Result<f64> {
        let cast = LiveMigrationCast {
            migration: migration.to_owned(),
            instance: instance.to_owned(),
            destination: destination.to_owned(),
            options: Some(MigrationOptions {
                max_downtime_us: 1_000_000,
                timeout_ms: 900_000,
                hold_at: hold_at.to_owned(),
                ..MigrationOptions::default()
            }),
            rpc_version: ferry_proto::RPC_VERSION.to_owned(),
            expected_epoch: 0,
        };
        let began = Instant::now();
        self.compute().live_migration(cast).await?;
        Ok(ms(began.elapsed()))
    }

    /// One call that asks nothing of the agent but an answer.
    pub(super) async fn round_trip(&self) -> Result<f64> {
        let mut client = HealthClient::new(self.channel.clone());
        let began = Instant::now();
        client.check(HealthCheckRequest::default()).await?;
        Ok(ms(began.elapsed()))
    }
}

/// How long writes of 4 KiB with an fsync take on the file system of this folder, in milliseconds.
pub(super) fn fsyncs(folder: &Path, count: usize) -> Result<Vec<f64>> {
    let path = folder.join("fsync");
    let mut file = fs::File::create(&path)?;
    let mut samples = Vec::with_capacity(count);
    for _ in 0..count {
        let began = Instant::now();
        file.write_all(&[0x5a; 4096])?;
        file.sync_data()?;
        samples.push(ms(began.elapsed()));
    }
    fs::remove_file(&path)?;
    Ok(samples)
}

/// What of a process's memory is its own share, in MiB.
pub(super) fn pss_mib(process: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib: f64 = line
        .and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok())
        .context("no Pss in smaps_rollup")?;
    Ok(kib / 1024.0)
}

pub(super) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
