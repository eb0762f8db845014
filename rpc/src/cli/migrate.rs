//! `migrate`: casts a migration and waits for its end, unless told otherwise.

use std::time::{Duration, Instant};

use ferry_proto::agent::v1::{LiveMigrateReply, LiveMigrateRequest, MigrationInfo, MigrationOptions};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::sleep;

use super::account::{account, whereabouts};
use super::arguments::MigrateArguments;
use super::client::{Agent, LONG_PATIENCE, within};
use super::failure::{Exit, Failure, Outcome, is_lost_connection};
use super::output::{self, Format, note};
use super::progress::Progress;
use super::{migrations, placement, watch};

pub(super) async fn run(agent: &Agent, arguments: MigrateArguments, format: Format) -> Outcome {
    let request = request(&arguments);
    if arguments.dry_run {
        return placement::dry_run(agent, request, format).await;
    }
    let chooses = arguments.to.is_none();
    // From here on Ctrl-C leaves a migration that may have been accepted, and says which.
    let mut interrupt = interrupts()?;
    let id = request.request_id.clone();
    let accepted = tokio::select! {
        accepted = cast(agent, request) => accepted?,
        _ = interrupt.recv() => {
            note(&format!(
                "interrupted before the agent answered: if migration {id} was accepted, it goes on (ferry migration watch {id})"
            ));
            match format {
                Format::Human => output::text(&id)?,
                Format::Json => output::json_line(&unseen(&id, ""))?,
            }
            return Ok(Exit::Interrupted);
        }
    };
    if chooses && let Some(why) = placement::choice(&accepted) {
        note(&why);
    }
    if arguments.detach {
        return detach(agent, &accepted, format).await;
    }
    note(&format!(
        "migration {} accepted by {}",
        accepted.migration, accepted.source
    ));
    wait(
        agent,
        &accepted.migration,
        arguments.wait,
        Show::Last(format),
        &mut interrupt,
    )
    .await
}

/// Every Ctrl-C from now on: none ends the process by itself any more.
pub(super) fn interrupts() -> Result<Signal, Failure> {
    signal(SignalKind::interrupt()).map_err(|error| Failure::new(Exit::Failed, format!("listen for Ctrl-C: {error}")))
}

/// What is printed of a migration that is waited for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Show {
    /// Its end.
    Last(Format),
    /// Each snapshot as JSON.
    EachAsJson,
}

/// Waits for the end of a migration, at most as long as `limit`, and says what came of it.
pub(super) async fn wait(
    agent: &Agent,
    id: &str,
    limit: Option<Duration>,
    show: Show,
    interrupt: &mut Signal,
) -> Outcome {
    let mut progress = Progress::new();
    let mut last: Option<MigrationInfo> = None;
    let mut printed = Ok(());
    let ended = {
        let observe = |info: &MigrationInfo| {
            if let Show::EachAsJson = show
                && printed.is_ok()
            {
                printed = output::json_line(info);
            }
            progress.snapshot(info);
            last = Some(info.clone());
        };
        tokio::select! {
            ended = watch::follow(agent, id, observe) => Ok(ended),
            () = after(limit) => Err(("--wait ran out", Exit::WaitRanOut)),
            _ = interrupt.recv() => Err(("interrupted", Exit::Interrupted)),
        }
    };
    progress.end();
    printed?;
    match ended {
        Ok(Ok(info)) => over(&info, show),
        Ok(Err(failure)) => {
            let known = last
                .map(|info| format!("; when it was last heard of, {}", whereabouts(&info)))
                .unwrap_or_default();
            Err(Failure {
                message: format!("{}{known}", failure.message),
                ..failure
            })
        }
        Err((why, exit)) => {
            if last.is_none() {
                // Not needed to leave, only to say where things stand.
                last = migrations::show(agent, id).await.ok();
            }
            leave(id, last.as_ref(), why, exit, show)
        }
    }
}

fn over(info: &MigrationInfo, show: Show) -> Outcome {
    match show {
        Show::Last(Format::Human) => output::text(&account(info))?,
        Show::Last(Format::Json) => {
            output::json_line(info)?;
            note(&whereabouts(info));
        }
        Show::EachAsJson => note(&whereabouts(info)),
    }
    Ok(watch::exit_of(info))
}

/// Leaves a migration that goes on: it is not ours to stop.
fn leave(id: &str, last: Option<&MigrationInfo>, why: &str, exit: Exit, show: Show) -> Outcome {
    let known = last
        .map(|info| format!("; so far, {}", whereabouts(info)))
        .unwrap_or_default();
    note(&format!(
        "{why}: migration {id} goes on (ferry migration watch {id}){known}"
    ));
    match (show, last) {
        (Show::Last(Format::Json), Some(info)) => output::json_line(info)?,
        (Show::Last(Format::Json), None) => output::json_line(&unseen(id, ""))?,
        (Show::Last(Format::Human), _) => output::text(id)?,
        (Show::EachAsJson, _) => {}
    }
    Ok(exit)
}

async fn detach(agent: &Agent, accepted: &LiveMigrateReply, format: Format) -> Outcome {
    match format {
        Format::Human => {
            note(&format!(
                "accepted by {}; watch it with: ferry migration watch {}",
                accepted.source, accepted.migration
            ));
            output::text(&accepted.migration)?;
        }
        Format::Json => {
            let shown = migrations::show(agent, &accepted.migration).await;
            output::json_line(&shown.unwrap_or_else(|_| unseen(&accepted.migration, &accepted.source)))?;
        }
    }
    Ok(Exit::Done)
}

/// All that is known of a migration that no snapshot came of.
fn unseen(id: &str, source: &str) -> MigrationInfo {
    MigrationInfo {
        id: id.to_owned(),
        source: source.to_owned(),
        status: "accepted".to_owned(),
        ..Default::default()
    }
}

fn request(arguments: &MigrateArguments) -> LiveMigrateRequest {
    LiveMigrateRequest {
        instance: arguments.named.name.clone(),
        destination: arguments.to.clone().unwrap_or_default(),
        options: Some(MigrationOptions {
            // A cold one has no budget, and an agent that does not know it refuses one without.
            max_downtime_us: match arguments.cold {
                true => 0,
                false => u64::try_from(arguments.max_downtime.as_micros()).unwrap_or(u64::MAX),
            },
            timeout_ms: u64::try_from(arguments.timeout.as_millis()).unwrap_or(u64::MAX),
            streams: arguments.streams,
            bandwidth_bytes_per_s: arguments.bandwidth.unwrap_or(0),
            digests: arguments.digests,
            verify: arguments.verify,
            hold_at: arguments.hold_at.clone(),
            storage: arguments.storage.clone(),
            no_disk_over_commit: arguments.disk_over_commit == "no",
            max_throttle_percent: if arguments.auto_converge {
                arguments.max_throttle
            } else {
                0
            },
            on_timeout: if arguments.cold {
                String::new()
            } else {
                arguments.on_timeout.clone()
            },
            resume_window_ms: arguments
                .resume_window
                .map_or(0, |window| u64::try_from(window.as_millis()).unwrap_or(u64::MAX).max(1)),
            mode: if arguments.cold { "cold" } else { &arguments.mode }.to_owned(),
            transport: arguments.transport.clone(),
            compress: arguments.compress.to_string(),
        }),
        request_id: uuid::Uuid::new_v4().to_string(),
        dry_run: arguments.dry_run,
        sample_ms: if arguments.dry_run { arguments.sample } else { 0 },
    }
}

/// Asks for the migration. Where the answer is lost the same request is sent again: its id makes it the same migration.
pub(super) async fn cast(agent: &Agent, request: LiveMigrateRequest) -> Result<LiveMigrateReply, Failure> {
    let what = format!("migrate {}", request.instance);
    let mut client = agent.conductor().await?;
    let began = Instant::now();
    loop {
        let status = match client.live_migrate(within(LONG_PATIENCE, request.clone())).await {
            Ok(reply) => return Ok(reply.into_inner()),
            Err(status) => status,
        };
        if !is_lost_connection(&status) || began.elapsed() > RETRY {
            return Err(Failure::of_status(&what, &status));
        }
        sleep(Duration::from_millis(300)).await;
        if let Ok(again) = agent.conductor().await {
            client = again;
        }
    }
}

async fn after(limit: Option<Duration>) {
    match limit {
        Some(limit) => sleep(limit).await,
        None => std::future::pending().await,
    }
}

const RETRY: Duration = Duration::from_secs(10);
