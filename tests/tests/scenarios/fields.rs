//! Every field of every RPC: missing, huge, malformed. Each answer says what is wrong and where; nothing is begun, nothing is half made.
//!
//! The requests come from the very descriptors of the build: a field that is new is tried without a word here. They are as usual for a
//! host with one running guest but for what is wrong with them, so that what is looked at last is reached too.

mod calls;
mod values;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use ferry_tests::{Guest, Host, Pair, Witness};
use libtest_mimic::Trial;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, Value};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use self::calls::{Caller, Method, methods};
use self::values::{Dice, Wrong, wrong_in_one_field};
use crate::journal;
use crate::scenario::on_kvm;

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        each_wrong_field_of_each_rpc_is_refused_by_name_and_changes_nothing,
        requests_that_are_wrong_all_over_change_nothing,
        bytes_that_are_no_message_change_nothing,
    ]
}

/// A migration that nobody knows.
const UNKNOWN: &str = "5f0c6a52-6d0e-4b8f-9a8b-0a7d3c1e2f40";

/// How long requests with random faults are made: enough for some thousand.
const RANDOM: Duration = Duration::from_secs(15);

fn each_wrong_field_of_each_rpc_is_refused_by_name_and_changes_nothing(pair: &mut Pair) -> Result<()> {
    let stage = Stage::set(pair)?;
    let mut faults = Vec::new();
    let mut asked = 0;
    for method in methods()? {
        for wrong in wrong_in_one_field(&method.input, &|field| stage.usual(&method, field)) {
            asked += 1;
            if let Err(fault) = stage.ask(&method, &wrong) {
                faults.push(format!("{fault:#}"));
            }
        }
    }
    ensure!(
        faults.is_empty(),
        "{} of {asked} requests:\n{}",
        faults.len(),
        faults.join("\n")
    );
    let named = stage.named.get();
    eprintln!("{asked} requests, {named} of them refused for a field by its name");
    ensure!(asked > 500 && named > 200, "{asked} requests, {named} fields");
    stage.is_as_it_was()
}

fn requests_that_are_wrong_all_over_change_nothing(pair: &mut Pair) -> Result<()> {
    let stage = Stage::set(pair)?;
    let seed = match std::env::var("FERRY_SEED") {
        Ok(seed) => seed.parse().context("FERRY_SEED is no number")?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64,
    };
    eprintln!("FERRY_SEED={seed}");
    let mut dice = Dice(seed);
    let methods = methods()?;
    let began = Instant::now();
    let mut asked = 0;
    while began.elapsed() < RANDOM {
        for method in &methods {
            let Some(wrong) = dice.wrong_all_over(&method.input, &|field| stage.usual(method, field)) else {
                continue;
            };
            asked += 1;
            stage
                .ask(method, &wrong)
                .with_context(|| format!("FERRY_SEED={seed}"))?;
        }
    }
    eprintln!("{asked} requests");
    stage.is_as_it_was()
}

/// The codec's own refusals have a code and no reason: the request never came to be one.
fn bytes_that_are_no_message_change_nothing(pair: &mut Pair) -> Result<()> {
    let stage = Stage::set(pair)?;
    let no_utf8 = [0x0a, 2, 0xc3, 0x28];
    let cut_short = [0x0a, 200, 1, b'x'];
    let wrong_types = [0x08, 1, 0x11, 0, 0];
    let too_large = vec![0; 5 << 20];
    for method in methods()? {
        for bytes in [&no_utf8[..], &cut_short, &wrong_types, &too_large] {
            let answer = stage.caller.call_raw(&method, bytes.to_vec())?;
            // Nothing was read of a request without fields.
            let has_fields = method.input.fields().len() > 0;
            ensure!(
                !(has_fields && answer.is_ok()),
                "{} took {} bytes",
                method.name,
                bytes.len()
            );
            stage.is_unchanged(&method)?;
        }
    }
    stage.is_as_it_was()
}

/// A host with a running guest, and what there was on it before anything was asked.
struct Stage<'a> {
    pair: &'a Pair,
    witness: Witness,
    caller: Caller,
    running: String,
    stopped: String,
    /// Refusals that named a field.
    named: Cell<u32>,
    rows: RefCell<Vec<String>>,
    files: RefCell<BTreeSet<PathBuf>>,
}

impl<'a> Stage<'a> {
    fn set(pair: &'a mut Pair) -> Result<Self> {
        let pair = &*pair;
        let idle = Guest::new("s").memory_mib(64).work("work=idle");
        pair.a.ferry(&idle.arguments(&pair.kernel()))?.exit(0)?;
        pair.a.ferry(&["stop", "s", "--force"])?.exit(0)?;
        let id = |name: &str| -> Result<String> {
            let shown = pair.a.show(name)?;
            Ok(shown["id"].as_str().context("no id")?.to_owned())
        };
        let stopped = id("s")?;
        // What it printed is not the other one's.
        let console = pair.a.data_dir.join("instances").join(&stopped).join("console.log");
        fs::remove_file(&console).with_context(|| format!("failed to remove {}", console.display()))?;
        let witness = pair.run(&Guest::new("g"))?;
        Ok(Self {
            witness,
            caller: Caller::connect(&pair.a.url())?,
            running: id("g")?,
            stopped,
            named: Cell::new(0),
            rows: RefCell::new(rows(&pair.a)?),
            files: RefCell::new(files(&pair.a.data_dir)?),
            pair,
        })
    }

    /// What a field is in a request that could be meant.
    ///
    /// Each request would be refused for a reason of its own, were nothing wrong with it: nobody knows the migration, the instance does not
    /// run, the kernel is not there. What is valid all the same is so by far the rarer, and the state tells.
    fn usual(&self, method: &Method, field: &FieldDescriptor) -> Option<Value> {
        let is_move = ["LiveMigrate", "LiveMigration", "CreateMigration"].contains(&method.name.as_str());
        let is_arrival = ["PreLiveMigration", "Expect"].contains(&method.name.as_str());
        let text = |text: &str| Some(Value::String(text.to_owned()));
        match (field.name(), field.kind()) {
            ("instance", _) if is_move => text(&self.stopped),
            ("instance", _) if is_arrival => text(UNKNOWN),
            ("instance", _) => text(&self.running),
            ("migration", _) => text(UNKNOWN),
            ("request_id", _) => text(UNKNOWN),
            ("destination" | "source", _) => text("b"),
            ("source_url", _) => text(&self.pair.b.url()),
            ("name", _) => text("new"),
            // It is not there either, and the answer is that.
            ("kernel", _) if method.name == "PreLiveMigration" => text(&"ab".repeat(32)),
            ("kernel", _) => text("/nonexistent/kernel"),
            ("cpu", _) => text("host"),
            ("dirty", _) => text("log"),
            ("restart", _) => text("never"),
            ("storage", _) => text("auto"),
            ("transport", _) => text("grpc"),
            ("rpc_version", _) => text("4.2"),
            ("reason", _) if method.name == "RecordRefusal" => text("NO_VALID_HOST"),
            ("decision", _) => text("SRC"),
            ("wish", _) => text("run-here"),
            ("confirm", _) => text("g"),
            ("directory", _) => text("/nonexistent/snapshot"),
            ("hash", _) => text(&"ab".repeat(32)),
            ("memory_bytes", _) => Some(Value::U64(64 << 20)),
            ("vcpus" | "streams" | "attempt", _) => Some(Value::U32(1)),
            ("epoch" | "expected_epoch", _) => Some(Value::U64(1)),
            // It takes its time otherwise.
            ("sample_ms", _) => Some(Value::U32(0)),
            ("max_downtime_us", _) => Some(Value::U64(300_000)),
            ("timeout_ms", _) => Some(Value::U64(1000)),
            ("bytes", Kind::Bytes) => Some(Value::Bytes(Vec::new().into())),
            _ => None,
        }
    }

    /// Asks once, and judges the answer and what it left.
    fn ask(&self, method: &Method, wrong: &Wrong) -> Result<()> {
        let about = || format!("{} with {}", method.name, wrong.what);
        let answer = self.caller.call(method, &wrong.message).with_context(about)?;
        let judged = match answer {
            Ok(()) if may_answer(method) || is_dry_run(&wrong.message) => Ok(()),
            Ok(()) => Err(anyhow::anyhow!("was taken")),
            Err(status) => {
                self.named
                    .set(self.named.get() + u32::from(status.code() == Code::InvalidArgument));
                judge(&status)
            }
        };
        judged.with_context(about)?;
        self.is_unchanged(method).with_context(about)
    }

    /// No row, no file is new, gone or other.
    fn is_unchanged(&self, method: &Method) -> Result<()> {
        // A decision may be asked for of a migration that is unknown here: it is SRC for ever then, and that is written.
        let is_meant = |row: &&String| method.name == "Decide" && row.starts_with("decisions");
        let now = rows(&self.pair.a)?;
        let before = self.rows.replace(now.clone());
        let come = now.iter().filter(|row| !before.contains(row) && !is_meant(row));
        let gone = before.iter().filter(|row| !now.contains(row));
        let changed: Vec<_> = come.chain(gone).collect();
        ensure!(changed.is_empty(), "the journal's rows changed: {changed:.500?}");
        let now = files(&self.pair.a.data_dir)?;
        let before = self.files.replace(now.clone());
        let others: Vec<_> = now.symmetric_difference(&before).collect();
        ensure!(others.is_empty(), "files came or went: {others:?}");
        Ok(())
    }

    fn is_as_it_was(&self) -> Result<()> {
        let log = fs::read_to_string(&self.pair.a.log)?;
        ensure!(!log.contains("panicked"), "the agent panicked: {log}");
        self.pair.runs_only_at(&self.pair.a, "g", &self.witness)
    }
}

/// Of these an answer changes nothing.
fn may_answer(method: &Method) -> bool {
    matches!(
        method.name.as_str(),
        "Host"
            | "ListHosts"
            | "ListEvents"
            | "ListInstances"
            | "ListMigrations"
            | "ListMigrationParts"
            | "ShowInstance"
            | "CheckCanLiveMigrateSource"
            | "CheckCanLiveMigrateDestination"
            | "Console"
            | "Logs"
            | "Decide"
            | "FirstFrames"
            | "Heartbeat"
            | "LateLink"
            | "LatePages"
            | "PredictMigration"
            | "PreLiveMigration"
            | "ProbeLink"
            | "RecordRefusal"
            | "RollbackLiveMigration"
            | "PostLiveMigration"
    )
}

/// Of a migration that is only asked about, an answer says why there would be none.
fn is_dry_run(message: &DynamicMessage) -> bool {
    message
        .get_field_by_name("dry_run")
        .is_some_and(|value| *value == Value::Bool(true))
}

/// A refusal has a code of those that say whose fault it is, a reason, and where a field is at fault its name.
fn judge(status: &Status) -> Result<()> {
    let details = status.get_error_details();
    let reason = details.error_info().map(|info| info.reason.clone());
    match status.code() {
        Code::InvalidArgument => {
            let violations = details.bad_request().map(|bad| &bad.field_violations[..]);
            let named = violations
                .unwrap_or_default()
                .iter()
                .any(|violation| !violation.field.is_empty());
            ensure!(named, "no field is named: {status}");
        }
        Code::NotFound | Code::FailedPrecondition => {}
        _ => bail!("it is not told whose fault it is: {status}"),
    }
    ensure!(reason.is_some_and(|reason| !reason.is_empty()), "no reason: {status}");
    ensure!(
        status.message().len() < 4096,
        "an answer of {} bytes",
        status.message().len()
    );
    Ok(())
}

/// Every row of the journal but the audit table's, of which a refused request may have one.
fn rows(host: &Host) -> Result<Vec<String>> {
    let mut rows = Vec::new();
    for table in journal::of(host)?.tables()? {
        if !["audit", "events", "faults"].contains(&table.as_str()) {
            rows.extend(journal::of(host)?.rows(&table)?);
        }
    }
    Ok(rows)
}

/// Every file below the data directory.
fn files(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path.clone());
            }
            found.insert(path);
        }
    }
    Ok(found)
}
