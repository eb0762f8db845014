//! `events`, and what `show` tells of them.

use ferry_proto::agent::v1::{InstanceEvent, InstanceFault, ListEventsRequest};

use super::arguments::Named;
use super::client::{Agent, PATIENCE, within};
use super::failure::{Exit, Outcome};
use super::instances::answer;
use super::output::{Format, Table, or_dash};

pub(super) async fn events(agent: &Agent, named: Named, limit: u32, format: Format) -> Outcome {
    let what = format!("list the events of {}", named.name);
    let request = within(
        PATIENCE,
        ListEventsRequest {
            instance: named.name,
            limit,
        },
    );
    let events = answer(&what, agent.compute().await?.list_events(request).await)?.events;
    format.many(&events, table)?;
    Ok(Exit::Done)
}

/// A row for each event, the newest first.
pub(super) fn table(events: &[InstanceEvent]) -> Table {
    let mut table = Table::new(&["STARTED", "FINISHED", "ACTION", "RESULT", "REQUEST", "BY", "MESSAGE"]);
    for event in events {
        table.row([
            event.started.clone(),
            or_dash(event.finished.as_ref()),
            event.action.clone(),
            or_dash(event.result.as_ref()),
            event.request.clone(),
            event.actor.clone(),
            event.message.clone().unwrap_or_default(),
        ]);
    }
    table
}

/// The newest fault, on one line.
pub(super) fn fault_line(fault: &InstanceFault) -> String {
    let reason = fault
        .reason
        .as_ref()
        .map_or_else(String::new, |reason| format!(" {reason}"));
    format!(
        "{} {}{reason}: {} (request {})",
        fault.created, fault.code, fault.message, fault.request
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event() -> InstanceEvent {
        InstanceEvent {
            action: "pause".into(),
            actor: "root (uid 0)".into(),
            request: "req-1".into(),
            started: "2024-01-01T00:00:00.000Z".into(),
            ..Default::default()
        }
    }

    #[test]
    fn an_event_that_goes_on_has_no_result() {
        let shown = table(&[event()]).to_string();
        let row = shown.lines().nth(1).unwrap();
        let words: Vec<_> = row.split_whitespace().collect();
        assert_eq!(words[..5], ["2024-01-01T00:00:00.000Z", "-", "pause", "-", "req-1"]);
    }

    #[test]
    fn a_fault_names_its_reason_and_its_request() {
        let fault = InstanceFault {
            created: "now".into(),
            code: "FAILED_PRECONDITION".into(),
            reason: Some("DISKS".into()),
            message: "a disk is missing".into(),
            request: "req-1".into(),
            ..Default::default()
        };
        assert_eq!(
            fault_line(&fault),
            "now FAILED_PRECONDITION DISKS: a disk is missing (request req-1)"
        );
    }
}
