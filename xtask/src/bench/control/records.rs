//! Five thousand finished migrations in a journal: how long `migration list` takes.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use ferry_proto::agent::v1::ListMigrationsRequest;
use ferry_tests::{Guest, Pair};
use rusqlite::Connection;
use tokio::runtime::Runtime;

use super::agent::{Agent, ms};
use super::{Figure, median};
use crate::bench::two_hosts;

const RECORDS: usize = 5000;
const RUNS: usize = 11;

pub(super) fn measure(ferry: &Path) -> Result<Vec<Figure>> {
    let mut pair = two_hosts(ferry)?;
    pair.a.start()?;
    pair.b.start()?;
    pair.run(&Guest::new("g"))?;
    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;
    pair.a.terminate()?;
    multiply(&pair.a.data_dir.join("journal.db"))?;
    pair.a.start()?;

    let mut listed = Vec::new();
    for _ in 0..RUNS {
        let began = Instant::now();
        // Waited for by the kernel: the tests' own way looks each 10 ms whether it has ended.
        let answer = Command::new(ferry)
            .args(["migration", "list", "-o", "json"])
            .env("FERRY_AGENT", pair.a.url())
            .output()?;
        listed.push(ms(began.elapsed()));
        let lines = answer.stdout.iter().filter(|&&byte| byte == b'\n').count();
        ensure!(
            answer.status.success() && lines == RECORDS,
            "{lines} records are listed"
        );
    }
    let asked = Runtime::new()?.block_on(ask(&pair))?;
    Ok(vec![
        Figure::new(
            format!("ferry migration list, {RECORDS} records, median"),
            median(&listed),
            "ms",
        )
        .at_most(100.0),
        Figure::new("of it the agent's answer, median", median(&asked), "ms"),
    ])
}

async fn ask(pair: &Pair) -> Result<Vec<f64>> {
    let agent = Agent::connect(&pair.a).await?;
    let mut asked = Vec::new();
    for _ in 0..RUNS {
        let began = Instant::now();
        let parts = agent
            .conductor()
            .list_migration_parts(ListMigrationsRequest::default())
            .await?;
        let mut parts = parts.into_inner();
        let mut records = 0;
        while let Some(part) = parts.message().await? {
            records += part.migrations.len();
        }
        asked.push(ms(began.elapsed()));
        ensure!(records == RECORDS, "{records} records are answered");
    }
    Ok(asked)
}

/// As many rows as wanted like the one that is there, each with an id of its own, in whatever columns this build has.
fn multiply(journal: &Path) -> Result<()> {
    let connection = Connection::open(journal).context("failed to open the journal")?;
    let mut columns = connection.prepare("SELECT name FROM pragma_table_info('migrations')")?;
    let columns: Vec<String> = columns.query_map((), |row| row.get(0))?.collect::<Result<_, _>>()?;
    let id = "printf('00000000-0000-4000-8000-%012x', n)";
    let values = columns.iter().map(|column| match column.as_str() {
        "id" => id.to_owned(),
        "info" => format!("json_set(info, '$.id', {id})"),
        "began" => "began + n".to_owned(),
        other => other.to_owned(),
    });
    let (values, columns) = (values.collect::<Vec<_>>().join(","), columns.join(","));
    let more = RECORDS - 1;
    connection.execute_batch(&format!(
        "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {more})
         INSERT INTO migrations({columns}) SELECT {values} FROM (SELECT * FROM migrations LIMIT 1), numbers;"
    ))?;
    Ok(())
}
