//! `ferry balloon`: a guest is asked for memory, and waited for.

use std::time::Duration;

use ferry_proto::agent::v1::{Balloon, BalloonInstanceRequest, InstanceInfo, InstanceRequest};
use tokio::time::{Instant, sleep};

use super::arguments::BalloonArguments;
use super::client::{Agent, LONG_PATIENCE, PATIENCE, within};
use super::failure::{Exit, Failure, Outcome};
use super::instances::answer;
use super::output::{Format, human_bytes};

/// How often is looked what the guest has done.
const LOOK: Duration = Duration::from_millis(200);

pub(super) async fn balloon(agent: &Agent, arguments: BalloonArguments, format: Format) -> Outcome {
    let BalloonArguments { named, size, timeout } = arguments;
    let what = format!("balloon {}", named.name);
    let request = BalloonInstanceRequest {
        instance: named.name,
        memory_bytes: size,
    };
    let deadline = Instant::now() + timeout;
    let mut client = agent.compute().await?;
    let asked = client.balloon_instance(within(LONG_PATIENCE, request)).await;
    let mut info = answer(&what, asked)?;
    while !has_reached(&info, size) {
        if Instant::now() >= deadline {
            return Err(Failure::new(Exit::Failed, not_reached(&info, size, timeout)));
        }
        sleep(LOOK).await;
        let request = InstanceRequest {
            instance: info.id.clone(),
        };
        info = answer(&what, client.show_instance(within(PATIENCE, request)).await)?;
        if !matches!(info.status.as_str(), "running" | "paused") {
            let exit = match info.status.as_str() {
                "stopped" | "crashed" => Exit::GuestEnded,
                "indeterminate" => Exit::Indeterminate,
                _ => Exit::Failed,
            };
            let told = format!("{what}: the instance is {} now", info.status);
            return Err(Failure::new(exit, told));
        }
    }
    format.one(&info, |info| {
        format!(
            "{} has {} of its {}",
            info.name,
            human_bytes(size),
            human_bytes(info.memory_bytes)
        )
    })?;
    Ok(Exit::Done)
}

fn has_reached(info: &InstanceInfo, size: u64) -> bool {
    info.balloon.is_some_and(|balloon| balloon.actual_bytes == size)
}

fn not_reached(info: &InstanceInfo, size: u64, timeout: Duration) -> String {
    let why = match info.balloon {
        None => "its VMM does not say how much it has".to_owned(),
        Some(Balloon { target_bytes, .. }) if target_bytes != size => {
            format!("somebody asked it for {} meanwhile", human_bytes(target_bytes))
        }
        Some(Balloon { driver: false, .. }) => "it has no balloon driver, or its driver has not begun".to_owned(),
        Some(Balloon { actual_bytes, .. }) => format!("it has {}", human_bytes(actual_bytes)),
    };
    format!(
        "the guest of {} did not come to {} of its {} within {}: {why}; it stays asked",
        info.name,
        human_bytes(size),
        human_bytes(info.memory_bytes),
        humantime::format_duration(timeout)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(balloon: Option<Balloon>) -> InstanceInfo {
        InstanceInfo {
            name: "web".to_owned(),
            memory_bytes: 256 << 20,
            balloon,
            ..InstanceInfo::default()
        }
    }

    fn of(target: u64, actual: u64, driver: bool) -> Option<Balloon> {
        Some(Balloon {
            target_bytes: target << 20,
            actual_bytes: actual << 20,
            driver,
        })
    }

    #[test]
    fn why_it_was_not_reached_is_told() {
        let told = |balloon| not_reached(&info(balloon), 128 << 20, Duration::from_secs(60));
        assert!(told(of(128, 200, true)).contains("it has 200 MiB"));
        assert!(told(of(128, 256, false)).contains("no balloon driver"));
        assert!(told(of(64, 100, true)).contains("asked it for 64 MiB"));
        assert!(told(None).contains("128 MiB of its 256 MiB within 1m"));
    }

    #[test]
    fn it_is_reached_when_the_guest_says_so() {
        assert!(has_reached(&info(of(128, 128, true)), 128 << 20));
        assert!(!has_reached(&info(of(128, 129, true)), 128 << 20));
        assert!(!has_reached(&info(None), 128 << 20));
    }
}
