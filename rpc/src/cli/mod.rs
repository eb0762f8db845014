//! The command line: verbs, what they print, and the exit codes that scripts depend on (`docs/cli.md`).
//!
//! The command line keeps no state. Each verb asks one agent (or is one), prints its result on stdout and its progress
//! on stderr, and returns an exit code or a failure, which is told here and nowhere else.

mod account;
mod agent;
mod arguments;
mod balloon;
mod bench;
mod client;
mod console;
mod demo;
mod devices;
mod doctor;
mod events;
mod failure;
mod hosts;
mod instances;
mod lab;
mod migrate;
mod migrations;
mod output;
mod placement;
mod prediction;
mod progress;
mod quantities;
mod selftest;
mod snapshots;
mod terminal;
mod watch;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches};

use self::arguments::{CommandLine, Verb};
use self::client::Agent;
use self::failure::{Exit, Failure, Outcome};
use self::output::Format;
use crate::request::RequestId;

/// Runs `ferry` with the process's own arguments and says how it ended.
///
/// Called once, by the binary's `main`, before any other thread exists.
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let line = match read(&arguments) {
        Ok(line) => line,
        Err(error) => return usage(&error, wants_json(&arguments)).into(),
    };
    let format = line.output;
    let request = line.request_id.clone().unwrap_or_else(RequestId::new);
    let is_asked = line.verb.asks_no_agent().is_none();
    match run(line, &request) {
        Ok(exit) => exit.into(),
        Err(failure) => tell(&failure, Some(&request).filter(|_| is_asked), format).into(),
    }
}

fn read(arguments: &[OsString]) -> Result<CommandLine, clap::Error> {
    let mut command = CommandLine::command();
    let matches = command.try_get_matches_from_mut(arguments)?;
    let line = CommandLine::from_arg_matches(&matches)?;
    let given = |id: &str| {
        let verb = matches.subcommand().map(|(_, verb)| verb);
        verb.and_then(|verb| verb.value_source(id)) == Some(ValueSource::CommandLine)
    };
    let ignored = [
        ("agent", line.verb.asks_no_agent()),
        ("request_id", line.verb.asks_no_agent()),
        ("output", line.verb.prints_no_result()),
    ];
    for (flag, verb) in ignored {
        if let Some(verb) = verb
            && given(flag)
        {
            let flag = flag.replace('_', "-");
            let text = format!("the argument '--{flag}' has no meaning for 'ferry {verb}'");
            return Err(command.error(ErrorKind::ArgumentConflict, text));
        }
    }
    Ok(line)
}

fn run(line: CommandLine, request: &RequestId) -> Outcome {
    let format = line.output;
    match line.verb {
        Verb::Agent(arguments) => agent::serve(arguments),
        Verb::Vmm(arguments) => agent::vmm(arguments),
        Verb::Demo => on_runtime(demo::run(format)),
        Verb::Bench(arguments) => on_runtime(bench::run(arguments, format)),
        Verb::Selftest(arguments) => on_runtime(selftest::run(arguments, format)),
        Verb::Doctor(arguments) => on_runtime(doctor::run(arguments, line.agent, format)),
        verb => on_runtime(ask(verb, Agent::within(line.agent, request.clone()), format)),
    }
}

/// The verbs that ask an agent.
async fn ask(verb: Verb, agent: Agent, format: Format) -> Outcome {
    match verb {
        Verb::Run(arguments) => instances::run(&agent, arguments, format).await,
        Verb::List { all } => instances::list(&agent, all, format).await,
        Verb::Show(named) => instances::show(&agent, named, format).await,
        Verb::Start(named) => instances::change(&agent, instances::Change::Start, named, format).await,
        Verb::Pause(named) => instances::change(&agent, instances::Change::Pause, named, format).await,
        Verb::Resume(named) => instances::change(&agent, instances::Change::Resume, named, format).await,
        Verb::Reboot(named) => instances::change(&agent, instances::Change::Reboot, named, format).await,
        Verb::Balloon(arguments) => balloon::balloon(&agent, arguments, format).await,
        Verb::Stop { named, force, timeout } => instances::stop(&agent, named, force, timeout, format).await,
        Verb::Delete { named, force } => instances::delete(&agent, named, force, format).await,
        Verb::Snapshot(arguments) => snapshots::snapshot(&agent, arguments, format).await,
        Verb::Restore(arguments) => snapshots::restore(&agent, arguments, format).await,
        Verb::Events { named, limit } => events::events(&agent, named, limit, format).await,
        Verb::Console(arguments) => console::console(&agent, arguments, format).await,
        Verb::Logs { named, follow } => console::logs(&agent, named, follow, format).await,
        Verb::Migrate(arguments) => migrate::run(&agent, arguments, format).await,
        Verb::Migration(verb) => migrations::run(&agent, verb, format).await,
        Verb::Host(verb) => hosts::run(&agent, verb, format).await,
        Verb::Agent(_) | Verb::Vmm(_) | Verb::Demo | Verb::Bench(_) | Verb::Selftest(_) | Verb::Doctor(_) => {
            Err(Failure::new(Exit::Usage, "this verb asks no agent"))
        }
    }
}

fn on_runtime(verb: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| Failure::new(Exit::Failed, format!("start the runtime: {error}")))?;
    let outcome = runtime.block_on(verb);
    // A thread that waits for a key press would otherwise hold the exit up.
    runtime.shutdown_background();
    outcome
}

/// Tells a failure: on stderr for people, and as the last object on stdout for programs.
fn tell(failure: &Failure, request: Option<&RequestId>, format: Format) -> Exit {
    // What is bad usage was not asked.
    let request = request.filter(|_| failure.exit != Exit::Usage);
    if !failure.message.is_empty() {
        output::note(&format!("error: {}", failure.told_of(request)));
        if format == Format::Json {
            let mut object = serde_json::json!({ "error": failure.message, "code": failure.exit.number() });
            if let Some(host) = &failure.moved_to {
                object["moved_to"] = host.as_str().into();
            }
            if let Some(reason) = &failure.reason {
                object["reason"] = reason.as_str().into();
            }
            if let Some(field) = &failure.field {
                object["field"] = field.as_str().into();
            }
            if let Some(request) = request {
                object["request"] = request.as_str().into();
            }
            // Nothing is left to tell a closed stdout.
            let _ = output::json_line(&object);
        } else if let Some(host) = &failure.moved_to {
            output::note(&format!("moved_to: {host}"));
        }
    }
    failure.exit
}

/// Help and version are results; everything else that clap says is bad usage.
fn usage(error: &clap::Error, json: bool) -> Exit {
    let asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    // Nothing is left to tell a closed terminal.
    let _ = error.print();
    if asked_for {
        return Exit::Done;
    }
    if json {
        let text = error.render().to_string();
        let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        let _ = output::json_line(&serde_json::json!({ "error": first, "code": Exit::Usage.number() }));
    }
    Exit::Usage
}

/// Whether JSON was asked for, on a command line that could not be read.
fn wants_json(arguments: &[OsString]) -> bool {
    let words: Vec<&str> = arguments.iter().filter_map(|word| word.to_str()).collect();
    let pair = words.windows(2).any(|pair| matches!(pair, ["-o" | "--output", "json"]));
    pair || words
        .iter()
        .any(|word| matches!(*word, "-ojson" | "-o=json" | "--output=json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Result<CommandLine, clap::Error> {
        let words: Vec<OsString> = text.split(' ').map(OsString::from).collect();
        read(&words)
    }

    #[test]
    fn the_definition_holds_together() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn what_is_for_tests_is_not_in_the_help() {
        let mut command = CommandLine::command();
        let help = command
            .find_subcommand_mut("agent")
            .unwrap()
            .render_long_help()
            .to_string();
        assert!(help.contains("--data-dir") && !help.contains("fault-gate"), "{help}");
        assert!(line("ferry agent --fault-gate s").is_ok());
    }

    #[test]
    fn defaults_are_those_of_the_contract() {
        let Verb::Migrate(migrate) = line("ferry migrate web --to b").unwrap().verb else {
            panic!("not migrate")
        };
        assert_eq!(migrate.max_downtime.as_millis(), 300);
        assert_eq!(migrate.timeout.as_secs(), 900);
        assert_eq!((migrate.streams, migrate.bandwidth, migrate.wait), (0, None, None));
        assert_eq!(migrate.transport, "tcp");
        assert_eq!(migrate.compress.to_string(), "auto");
        let Verb::Run(run) = line("ferry run web --kernel k").unwrap().verb else {
            panic!("not run")
        };
        assert_eq!((run.memory, run.vcpus), (512 << 20, 1));
        assert_eq!(
            (run.cpu.as_str(), run.dirty.as_str(), run.cmdline.as_str()),
            ("host", "log", "")
        );
        assert_eq!(line("ferry list").unwrap().agent, "http://127.0.0.1:7400");
    }

    #[test]
    fn flags_that_do_not_work_yet_are_named() {
        for flag in ["--disk", "--net"] {
            let error = line(&format!("ferry run web --kernel k {flag} x")).unwrap_err();
            assert_eq!(
                (error.exit_code(), error.to_string().contains(flag)),
                (2, true),
                "{flag}"
            );
        }
        for flag in ["--max-throttle", "--storage"] {
            let error = line(&format!("ferry migrate web {flag}")).unwrap_err();
            assert_eq!(
                (error.exit_code(), error.to_string().contains(flag)),
                (2, true),
                "{flag}"
            );
        }
        let error = line("ferry migrate web --mode lukewarm").unwrap_err().to_string();
        assert!(error.contains("--mode") && error.contains("lukewarm"), "{error}");
    }

    #[test]
    fn bad_values_name_their_flag() {
        for (text, flag) in [
            ("ferry run web --kernel k --memory 5", "--memory"),
            ("ferry migrate web --bandwidth 5GB", "--bandwidth"),
            ("ferry migrate web --max-downtime 0s", "--max-downtime"),
            ("ferry migrate web --streams 0", "--streams"),
            ("ferry migrate web --transport pigeon", "--transport"),
            ("ferry migrate web --compress zstd:20", "--compress"),
            ("ferry bench --transport pigeon", "--transport"),
            ("ferry agent --peer b", "--peer"),
            ("ferry run a/b --kernel k", "NAME"),
            ("ferry restore snap --name a/b", "--name"),
            ("ferry snapshot web", "--to"),
            ("ferry run web --kernel k --disk web.img", "--disk"),
            ("ferry run web --kernel k --net br0", "--net"),
            ("ferry run web --kernel k --restart sometimes", "--restart"),
            ("ferry migration resolve x --confirm web", "--run-here"),
            ("ferry migration resolve x --run-here", "--confirm"),
            (
                "ferry migration resolve x --run-here --discard-here --confirm web",
                "--discard-here",
            ),
        ] {
            let error = line(text).unwrap_err();
            assert_eq!(
                (error.exit_code(), error.to_string().contains(flag)),
                (2, true),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn flags_that_a_verb_would_ignore_are_refused() {
        assert!(
            line("ferry demo --agent http://127.0.0.1:1")
                .unwrap_err()
                .to_string()
                .contains("--agent")
        );
        assert!(
            line("ferry agent -o json")
                .unwrap_err()
                .to_string()
                .contains("--output")
        );
        assert!(line("ferry --agent http://127.0.0.1:1 list -o json").is_ok());
        assert!(line("ferry list --agent 127.0.0.1:7500").is_ok());
    }

    #[test]
    fn a_restored_instance_needs_a_name_unless_it_is_the_same_one() {
        let error = line("ferry restore snap").unwrap_err();
        assert!(error.to_string().contains("--name"), "{error}");
        assert!(line("ferry restore snap --same-identity").is_ok());
        assert!(line("ferry restore snap --name web-2 --same-identity").is_ok());
    }

    #[test]
    fn what_a_cold_migration_has_no_use_for_is_refused_by_name() {
        for (flag, value) in [
            ("--max-downtime", "1s"),
            ("--on-timeout", "abort"),
            ("--mode", "precopy"),
        ] {
            let error = line(&format!("ferry migrate web --cold {flag} {value}")).unwrap_err();
            let text = error.to_string();
            assert!(
                error.exit_code() == 2 && text.contains("--cold") && text.contains(flag),
                "{text}"
            );
        }
        assert!(line("ferry migrate web --cold --timeout 1h --bandwidth 1Gbit --storage copy").is_ok());
    }

    #[test]
    fn detaching_and_waiting_exclude_each_other() {
        assert!(line("ferry migrate web --detach --wait 5s").is_err());
    }

    #[test]
    fn json_is_wanted_even_on_a_line_that_cannot_be_read() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert!(wants_json(&words("ferry nonsense -o json")));
        assert!(!wants_json(&words("ferry nonsense")));
    }
}
