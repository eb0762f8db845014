//! `migration list`, `show`, `report`, `watch`, `abort`, `force-complete`, `retune`, `resolve`.

use std::time::Duration;

use ferry_migration::handover::Wish;
use ferry_proto::agent::v1::{ListMigrationsRequest, MigrationInfo, MigrationRequest, ResolveRequest, RetuneRequest};
use tonic::{Code, Status};

use super::account::{account, report, whereabouts};
use super::arguments::{MigrationVerb, ResolveArguments, RetuneArguments};
use super::client::{Agent, LONG_PATIENCE, PATIENCE, within};
use super::failure::{Exit, Failure, Outcome};
use super::migrate::{self, Show};
use super::output::{Format, Listing};
use super::progress::{moment, table};

pub(super) async fn run(agent: &Agent, verb: MigrationVerb, format: Format) -> Outcome {
    match verb {
        MigrationVerb::List { details } => {
            let instance = String::new();
            list(agent, ListMigrationsRequest { instance, details }, format).await?;
            Ok(Exit::Done)
        }
        MigrationVerb::Show(identified) => {
            format.one(&show(agent, &identified.id).await?, in_full)?;
            Ok(Exit::Done)
        }
        MigrationVerb::Report(identified) => {
            format.one(&show(agent, &identified.id).await?, report)?;
            Ok(Exit::Done)
        }
        MigrationVerb::Watch(identified) => {
            let mut interrupt = migrate::interrupts()?;
            // Asked first, so that an unknown id is not found instead of being watched for.
            let info = show(agent, &identified.id).await?;
            let each = match format {
                Format::Json => Show::EachAsJson,
                Format::Human => Show::Last(Format::Human),
            };
            migrate::wait(agent, &info.id, None, each, &mut interrupt).await
        }
        MigrationVerb::Abort(identified) => {
            format.one(&abort(agent, &identified.id).await?, in_full)?;
            Ok(Exit::Done)
        }
        MigrationVerb::ForceComplete(identified) => {
            format.one(&force_complete(agent, &identified.id).await?, in_full)?;
            Ok(Exit::Done)
        }
        MigrationVerb::Retune(arguments) => {
            format.one(&retune(agent, arguments).await?, in_full)?;
            Ok(Exit::Done)
        }
        MigrationVerb::Resolve(arguments) => {
            format.one(&resolve(agent, arguments).await?, in_full)?;
            Ok(Exit::Done)
        }
    }
}

/// What is known of one migration.
pub(super) async fn show(agent: &Agent, id: &str) -> Result<MigrationInfo, Failure> {
    check("show", id)?;
    let request = named(id, PATIENCE);
    let answered = agent.conductor().await?.show_migration(request).await;
    let info = answered.map_err(|status| Failure::of_status(&format!("show migration {id}"), &status))?;
    Ok(info.into_inner())
}

/// Prints all of them once the last one is here: each part is made ready while the agent is at the next.
async fn list(agent: &Agent, wanted: ListMigrationsRequest, format: Format) -> Result<(), Failure> {
    let failed = |status: Status| Failure::of_status("list migrations", &status);
    let mut conductor = agent.conductor().await?;
    let asked = || within(PATIENCE, wanted.clone());
    let mut listed = Listing::new(format);
    match conductor.list_migration_parts(asked()).await {
        Ok(parts) => {
            let mut parts = parts.into_inner();
            while let Some(part) = parts.message().await.map_err(failed)? {
                listed.add(part.migrations, MigrationInfo::add_json)?;
            }
        }
        // An agent of before gives all of them in one message, and all that it knows of each.
        Err(status) if status.code() == Code::Unimplemented => {
            let whole = conductor.list_migrations(asked()).await.map_err(failed)?;
            listed.add(whole.into_inner().migrations, MigrationInfo::add_json)?;
        }
        Err(status) => return Err(failed(status)),
    }
    listed.print(table)
}

async fn abort(agent: &Agent, id: &str) -> Result<MigrationInfo, Failure> {
    check("abort", id)?;
    let request = named(id, LONG_PATIENCE);
    let answered = agent.conductor().await?.abort_migration(request).await;
    let info = answered.map_err(|status| Failure::of_status(&format!("abort migration {id}"), &status))?;
    Ok(info.into_inner())
}

async fn force_complete(agent: &Agent, id: &str) -> Result<MigrationInfo, Failure> {
    check("complete", id)?;
    let request = named(id, PATIENCE);
    let answered = agent.conductor().await?.force_complete_migration(request).await;
    let info = answered.map_err(|status| Failure::of_status(&format!("complete migration {id} by force"), &status))?;
    Ok(info.into_inner())
}

async fn retune(agent: &Agent, arguments: RetuneArguments) -> Result<MigrationInfo, Failure> {
    let id = arguments.identified.id;
    check("retune", &id)?;
    let whole = |number: u128| u64::try_from(number).unwrap_or(u64::MAX);
    let request = RetuneRequest {
        migration: id.clone(),
        forwarded: false,
        max_downtime_us: arguments.max_downtime.map(|time| whole(time.as_micros())),
        timeout_ms: arguments.timeout.map(|time| whole(time.as_millis())),
        bandwidth_bytes_per_s: arguments.bandwidth,
    };
    let answered = agent
        .conductor()
        .await?
        .retune_migration(within(PATIENCE, request))
        .await;
    let info = answered.map_err(|status| Failure::of_status(&format!("retune migration {id}"), &status))?;
    Ok(info.into_inner())
}

async fn resolve(agent: &Agent, arguments: ResolveArguments) -> Result<MigrationInfo, Failure> {
    let id = arguments.identified.id;
    check("resolve", &id)?;
    let wish = if arguments.run_here {
        Wish::RunHere
    } else {
        Wish::DiscardHere
    };
    let request = within(
        LONG_PATIENCE,
        ResolveRequest {
            migration: id.clone(),
            wish: wish.as_str().to_owned(),
            confirm: arguments.confirm,
            host_is_gone: arguments.host_is_gone,
        },
    );
    let answered = agent.conductor().await?.resolve_migration(request).await;
    let info = answered.map_err(|status| Failure::of_status(&format!("resolve migration {id}"), &status))?;
    Ok(info.into_inner())
}

fn named(id: &str, patience: Duration) -> tonic::Request<MigrationRequest> {
    let request = MigrationRequest {
        migration: id.to_owned(),
        forwarded: false,
    };
    within(patience, request)
}

/// What is no UUID is no migration's id.
fn check(verb: &str, id: &str) -> Result<(), Failure> {
    let unknown = |_| {
        Failure::new(
            Exit::NotFound,
            format!("{verb} migration {id}: there is none of this id"),
        )
    };
    uuid::Uuid::parse_str(id).map(|_| ()).map_err(unknown)
}

fn in_full(info: &MigrationInfo) -> String {
    if info.ended.is_some() {
        account(info)
    } else {
        format!("{}\n{}", moment(info), whereabouts(info))
    }
}
