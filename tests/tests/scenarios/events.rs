//! What is written down of what was done: events and faults, the request that they belong to, and whose it was.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ferry_proto::agent::v1::InstanceRequest;
use ferry_proto::agent::v1::compute_client::ComputeClient;
use ferry_tests::{
    Guest, Host, Pair, process, until,
    waiting::{CALL, MOVE},
};
use libtest_mimic::Trial;
use rustix::process::Signal;
use serde_json::Value;
use tonic::Code;

use crate::scenario::{expect_a_lost_peer_and, on_kvm};

pub(crate) fn trials() -> Vec<Trial> {
    on_kvm![
        both_hosts_tell_of_a_move_under_one_request,
        what_another_host_refused_is_told_where_the_instance_is,
        a_guest_that_was_deleted_has_events,
        an_action_cut_off_by_its_agents_death_is_interrupted,
        a_migration_goes_on_with_its_event_when_its_agent_comes_back,
        a_lost_answer_names_the_request_to_look_for,
        what_nobody_waits_for_any_more_is_not_begun,
        a_field_that_cannot_be_used_is_named,
    ]
}

/// What was done to an instance at this host, the newest first.
fn events(host: &Host, name: &str) -> Result<Vec<Value>> {
    host.ferry(&["events", name])?.exit(0)?.json_lines()
}

/// Action, result and request of each.
fn told(events: &[Value]) -> Vec<[&str; 3]> {
    events
        .iter()
        .map(|event| ["action", "result", "request"].map(|field| event[field].as_str().unwrap_or("none")))
        .collect()
}

fn both_hosts_tell_of_a_move_under_one_request(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    for verb in ["pause", "resume"] {
        pair.a
            .ferry(&[verb, "g", "--request-id", &format!("req-{verb}")])?
            .exit(0)?;
    }
    pair.a
        .ferry(&["migrate", "g", "--to", "a", "--request-id", "req-refused"])?
        .exit(4)?
        .says("(request req-refused)")?;

    let shown = pair.a.show("g")?;
    let fault = &shown["fault"];
    ensure!(
        fault["reason"] == "DESTINATION_IS_SOURCE"
            && fault["code"] == "FAILED_PRECONDITION"
            && fault["request"] == "req-refused",
        "{shown}"
    );
    let shown = shown["events"].as_array().context("no events")?.clone();
    ensure!(shown == events(&pair.a, "g")?, "{shown:?}");
    ensure!(
        told(&shown)[..3]
            == [
                ["migrate", "error", "req-refused"],
                ["resume", "success", "req-resume"],
                ["pause", "success", "req-pause"],
            ],
        "{shown:?}"
    );

    let moved = pair
        .migrate("g", &["--request-id", "req-move"])?
        .exit(0)?
        .migration()?
        .is("completed", "b")?;

    let at_a = events(&pair.a, "g")?;
    ensure!(told(&at_a)[0] == ["migrate", "success", "req-move"], "{at_a:?}");
    let at_b = pair.b.show("g")?;
    let came = &at_b["events"][0];
    ensure!(
        told(std::slice::from_ref(came)) == [["migrate-in", "success", "req-move"]],
        "{at_b}"
    );
    ensure!(at_b["fault"].is_null(), "{at_b}");
    for event in [&at_a[0], came] {
        ensure!(event["migration"] == moved.record["id"], "{event}");
        ensure!(event["instance"] == at_b["id"] && event["name"] == "g", "{event}");
    }
    let (asked, passed_on) = (&at_a[0]["actor"], came["actor"].as_str().context("no actor")?);
    let asked = asked.as_str().context("no actor")?;
    ensure!(
        asked.contains("uid ") && !asked.contains("says"),
        "the kernel knows who asked: {asked}"
    );
    ensure!(
        passed_on.starts_with(&format!("agent a for {asked}, says ")),
        "host b knows it from host a: {passed_on}"
    );
    pair.runs_only_at(&pair.b, "g", &witness)
}

fn what_another_host_refused_is_told_where_the_instance_is(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;

    pair.b
        .ferry(&["migrate", "g", "--to", "a", "--request-id", "req-refused"])?
        .exit(4)?
        .says("DESTINATION_IS_SOURCE")?;

    let shown = pair.a.show("g")?;
    let (fault, event) = (&shown["fault"], &shown["events"][0]);
    ensure!(
        fault["reason"] == "DESTINATION_IS_SOURCE" && fault["request"] == "req-refused",
        "{shown}"
    );
    ensure!(
        told(std::slice::from_ref(event)) == [["migrate", "error", "req-refused"]],
        "{shown}"
    );
    ensure!(
        event["actor"]
            .as_str()
            .is_some_and(|actor| actor.starts_with("agent b for ")),
        "{event}"
    );
    let asked = events(&pair.b, "g")?;
    ensure!(told(&asked)[..] == [["migrate", "error", "req-refused"]], "{asked:?}");
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_guest_that_was_deleted_has_events(pair: &mut Pair) -> Result<()> {
    pair.run(&Guest::new("g"))?;
    let id = pair.a.show("g")?["id"].as_str().context("no id")?.to_owned();
    pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;

    for named in ["g", &id] {
        let kept = events(&pair.a, named)?;
        let words: Vec<_> = told(&kept)
            .iter()
            .map(|[action, result, _]| [*action, *result])
            .collect();
        ensure!(words == [["delete --force", "success"], ["run", "success"]], "{kept:?}");
    }
    let newest = pair.a.ferry(&["events", "g", "--limit", "1"])?.exit(0)?.json_lines()?;
    ensure!(newest.len() == 1, "{newest:?}");
    pair.a.ferry(&["events", "nobody"])?.exit(3)?;
    Ok(())
}

fn an_action_cut_off_by_its_agents_death_is_interrupted(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    let vmm = pair.a.vmm()?;

    // Its VMM does not answer, so that its agent dies in the middle of it.
    process::signal(vmm, Signal::STOP)?;
    let pause = pair.a.begin(&["pause", "g", "--request-id", "req-cut"])?;
    let begun = until("the pause has begun", CALL, || {
        let events = events(&pair.a, "g")?;
        Ok((told(&events)[0] == ["pause", "none", "req-cut"]).then_some(()))
    });
    pair.a.kill();
    process::signal(vmm, Signal::CONT)?;
    begun?;
    pause.wait()?.exit(8)?.says("req-cut")?;
    pair.a.start()?;

    let after = events(&pair.a, "g")?;
    ensure!(told(&after)[0] == ["pause", "interrupted", "req-cut"], "{after:?}");
    ensure!(after[0]["finished"].is_string(), "{after:?}");
    // Whether the VMM had read the order before its agent died is nobody's to say.
    if pair.a.ferry(&["show", "g"])?.exit(0)?.json()?["status"] == "paused" {
        pair.a.ferry(&["resume", "g"])?.exit(0)?;
    }
    pair.runs_only_at(&pair.a, "g", &witness)
}

fn a_migration_goes_on_with_its_event_when_its_agent_comes_back(pair: &mut Pair) -> Result<()> {
    expect_a_lost_peer_and(pair, &["VMM", "source", "stream", "interrupted"]);
    let work = "fill=random fill_mib=64 work=idle heartbeat_ms=20";
    let witness = pair.run(&Guest::new("g").work(work))?;
    let slow = ["--bandwidth", "160Mbit", "--detach", "--request-id", "req-move"];
    let id = pair.migrate("g", &slow)?.exit(0)?.migration()?.text("id")?.to_owned();

    pair.a.kill();
    pair.a.start()?;

    let open = events(&pair.a, "g")?;
    ensure!(
        told(&open)[0][0] == "migrate" && told(&open)[0][1] != "interrupted",
        "{open:?}"
    );
    let record = pair.wait_over(&id)?;
    let wanted = match record.text("status")? {
        "completed" => "success",
        _ => "error",
    };
    let closed = until("the event is closed", MOVE, || {
        let events = events(&pair.a, "g")?;
        Ok(Some(events).filter(|events| told(events)[0][1] != "none"))
    })?;
    ensure!(told(&closed)[0] == ["migrate", wanted, "req-move"], "{closed:?}");
    ensure!(closed[0]["migration"] == id.as_str(), "{closed:?}");
    let host = if record.text("guest_location")? == "a" {
        &pair.a
    } else {
        &pair.b
    };
    pair.runs_only_at(host, "g", &witness)
}

fn a_lost_answer_names_the_request_to_look_for(pair: &mut Pair) -> Result<()> {
    let agent = pair.a.pid().context("no agent runs")?;
    process::signal(agent, Signal::STOP)?;
    let silent = pair.a.ferry(&["list", "--request-id", "req-lost"]);
    process::signal(agent, Signal::CONT)?;

    let answer = silent?.exit(8)?.says("req-lost")?;

    ensure!(answer.json()?["request"] == "req-lost", "{answer}");
    let refused = pair.a.ferry(&["list", "--request-id", "not/an/id"])?;
    refused.exit(2)?.says("--request-id")?;
    Ok(())
}

fn what_nobody_waits_for_any_more_is_not_begun(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;
    let vmm = pair.a.vmm()?;

    // Its VMM does not answer, so that the instance is busy while somebody else waits for it, and gives up.
    process::signal(vmm, Signal::STOP)?;
    let pause = pair.a.begin(&["pause", "g"])?;
    let given_up = until("the pause has begun", CALL, || {
        Ok((told(&events(&pair.a, "g")?)[0][..2] == ["pause", "none"]).then_some(()))
    })
    .and_then(|()| resume_within(&pair.a, "g", Duration::from_secs(2)))
    // The agent counts from when it was asked.
    .and_then(|code| {
        until("the agent has given it up, too", CALL, || {
            Ok((told(&events(&pair.a, "g")?)[0][..2] == ["resume", "error"]).then_some(code))
        })
    });
    process::signal(vmm, Signal::CONT)?;

    let code = given_up?;
    ensure!(matches!(code, Code::DeadlineExceeded | Code::Cancelled), "{code:?}");
    pause.wait()?.exit(0)?;
    let shown = pair.a.wait_for_status("g", "paused")?;
    let resume = &shown["events"][0];
    ensure!(resume["action"] == "resume" && resume["result"] == "error", "{shown}");
    ensure!(shown["fault"]["code"] == "DEADLINE_EXCEEDED", "{shown}");
    pair.a.ferry(&["resume", "g"])?.exit(0)?;
    pair.runs_only_at(&pair.a, "g", &witness)
}

/// Has an instance resumed by a caller that waits no longer than this for it, and gives back how that ended.
fn resume_within(host: &Host, name: &str, patience: Duration) -> Result<Code> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = ComputeClient::connect(host.url()).await?;
        let mut request = tonic::Request::new(InstanceRequest {
            instance: name.to_owned(),
        });
        request.set_timeout(patience);
        Ok(match client.resume_instance(request).await {
            Ok(_) => Code::Ok,
            Err(status) => status.code(),
        })
    })
}

fn a_field_that_cannot_be_used_is_named(pair: &mut Pair) -> Result<()> {
    let witness = pair.run(&Guest::new("g"))?;

    let refused = pair.a.ferry(&["balloon", "g", "--size", "4097K"])?.exit(4)?.json()?;

    ensure!(
        refused["reason"] == "INVALID_FIELD" && refused["field"] == "memory_bytes",
        "{refused}"
    );
    let shown = pair.a.show("g")?;
    ensure!(
        shown["fault"]["code"] == "INVALID_ARGUMENT" && shown["fault"]["request"] == refused["request"],
        "{shown}"
    );
    pair.runs_only_at(&pair.a, "g", &witness)
}
