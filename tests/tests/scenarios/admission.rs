//! Migrations that come to one host in the same moment: no more of them pass its checks than it can have.

use std::collections::HashSet;

use anyhow::{Result, ensure};
use ferry_proto::agent::v1::compute_client::ComputeClient;
use ferry_proto::agent::v1::{ImageChunk, InstanceSpec, PreLiveMigrationRequest, RollbackRequest};
use ferry_tests::Pair;
use libtest_mimic::Trial;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::scenario::{has_nothing, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        of_migrations_that_come_together_no_more_are_prepared_than_may_come,
        of_migrations_that_come_together_no_more_are_prepared_than_there_is_room_for,
        a_migration_that_is_asked_for_twice_in_one_moment_is_prepared_once,
    ]
}

const AT_ONCE: u128 = 8;

fn of_migrations_that_come_together_no_more_are_prepared_than_may_come(pair: &mut Pair) -> Result<()> {
    restart_b(pair, &["--max-concurrent-incoming", "1"])?;
    let answers = come_together(pair, (0..AT_ONCE).map(|number| guest(number, number)))?;
    one_of(&answers, "takes 1 migrations")?;
    has_nothing(&pair.b)
}

fn of_migrations_that_come_together_no_more_are_prepared_than_there_is_room_for(pair: &mut Pair) -> Result<()> {
    let processors = std::thread::available_parallelism()?.get();
    let one_guest = (2.0 / processors as f64).to_string();
    restart_b(
        pair,
        &["--max-concurrent-incoming", "100", "--cpu-allocation-ratio", &one_guest],
    )?;
    let answers = come_together(pair, (0..AT_ONCE).map(|number| guest(number, number)))?;
    one_of(&answers, "vCPUs for guests, 2 of them claimed")?;
    has_nothing(&pair.b)
}

fn a_migration_that_is_asked_for_twice_in_one_moment_is_prepared_once(pair: &mut Pair) -> Result<()> {
    restart_b(pair, &["--max-concurrent-incoming", "100"])?;
    let answers = come_together(pair, (0..AT_ONCE).map(|_| guest(0, 0)))?;
    let prepared = answers.iter().flatten().count();
    ensure!(prepared > 0, "{answers:?}");
    // Those that came while the first was being prepared are told to ask again; later ones have its answer.
    for refused in answers.iter().filter_map(|answer| answer.as_ref().err()) {
        ensure!(refused.message().contains("prepares instance g0 already"), "{refused}");
    }
    ensure!(
        answers
            .iter()
            .flatten()
            .all(|secret| Some(secret) == answers.iter().flatten().next())
    );
    has_nothing(&pair.b)
}

fn restart_b(pair: &mut Pair, arguments: &[&str]) -> Result<()> {
    pair.b.arguments.extend(arguments.iter().map(|&word| word.to_owned()));
    pair.b.terminate()?;
    pair.b.start()
}

fn uuid(number: u128) -> String {
    format!("00000000-0000-4000-8000-{number:012x}")
}

/// What guest `number` has for a kernel: nothing boots it, and each has its own.
fn kernel(number: u128) -> Vec<u8> {
    format!("kernel {number}").into_bytes()
}

fn guest(migration: u128, number: u128) -> (u128, PreLiveMigrationRequest) {
    let spec = InstanceSpec {
        name: format!("g{number}"),
        memory_bytes: 64 << 20,
        vcpus: 2,
        cpu: "host".to_owned(),
        dirty: "log".to_owned(),
        kernel: blake3::hash(&kernel(number)).to_hex().to_string(),
        ..InstanceSpec::default()
    };
    let request = PreLiveMigrationRequest {
        migration: uuid(migration),
        instance: uuid(100 + number),
        spec: Some(spec),
        epoch: 1,
        source: "a".to_owned(),
        streams: 1,
        rpc_version: ferry_proto::RPC_VERSION.to_owned(),
        ..PreLiveMigrationRequest::default()
    };
    (number, request)
}

/// Has B prepare all of these at once, and gives all of them up again: the secret of each, or why not.
fn come_together(
    pair: &Pair,
    guests: impl Iterator<Item = (u128, PreLiveMigrationRequest)>,
) -> Result<Vec<Result<Vec<u8>, Status>>> {
    let guests: Vec<_> = guests.collect();
    Runtime::new()?.block_on(async {
        let channel = Endpoint::from_shared(pair.b.url())?.connect().await?;
        // The kernel of each is sent as a source sends it: once B has said that it is missing.
        let mut sent = HashSet::new();
        for (number, request) in &guests {
            let mut client = ComputeClient::new(channel.clone());
            let hash = request
                .spec
                .as_ref()
                .map_or_else(String::new, |spec| spec.kernel.clone());
            if !sent.insert(hash.clone()) {
                continue;
            }
            let told = client.pre_live_migration(request.clone()).await?.into_inner();
            ensure!(told.missing_images.contains(&hash), "{told:?}");
            let bytes = kernel(*number);
            let chunks = tokio_stream::iter([ImageChunk { hash, bytes }]);
            client.put_image(chunks).await?;
        }
        let mut coming = JoinSet::new();
        for (_, request) in guests.clone() {
            let mut client = ComputeClient::new(channel.clone());
            coming.spawn(async move { client.pre_live_migration(request).await });
        }
        let mut answers = Vec::new();
        while let Some(answer) = coming.join_next().await {
            answers.push(answer?.map(|reply| reply.into_inner().secret));
        }
        for (_, request) in guests {
            give_up(channel.clone(), request).await?;
        }
        Ok(answers)
    })
}

async fn give_up(channel: Channel, request: PreLiveMigrationRequest) -> Result<()> {
    let rollback = RollbackRequest {
        migration: request.migration,
        source: request.source,
        reason: "it was only to be prepared".to_owned(),
    };
    ComputeClient::new(channel).rollback_live_migration(rollback).await?;
    Ok(())
}

/// One is prepared, and all others are refused in these words.
fn one_of(answers: &[Result<Vec<u8>, Status>], words: &str) -> Result<()> {
    let prepared = answers.iter().flatten().filter(|secret| !secret.is_empty()).count();
    ensure!(prepared == 1, "{prepared} were prepared: {answers:?}");
    for refused in answers.iter().filter_map(|answer| answer.as_ref().err()) {
        ensure!(refused.code() == Code::FailedPrecondition, "{refused}");
        ensure!(refused.message().contains(words), "{refused}");
    }
    Ok(())
}
