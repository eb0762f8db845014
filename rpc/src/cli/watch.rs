//! Watching a migration to its end, through restarts of the agent that is asked.

use std::time::{Duration, Instant};

use ferry_proto::agent::v1::{MigrationInfo, MigrationRequest};
use tokio::time::sleep;

use super::client::Agent;
use super::failure::{Exit, Failure, is_lost_connection};

/// Follows a migration until it is over, or has been indeterminate for a while, and returns the last snapshot.
///
/// A stream that breaks is opened again: agents are restarted for upgrades while their guests and migrations go on.
///
/// # Errors
/// The agent did not come back within some seconds, or knows of no such migration.
pub(super) async fn follow(
    agent: &Agent,
    id: &str,
    mut observe: impl FnMut(&MigrationInfo),
) -> Result<MigrationInfo, Failure> {
    let mut patience = Patience::default();
    loop {
        match follow_stream(agent, id, &mut observe, &mut patience).await {
            Ok(info) => return Ok(info),
            Err(Broken::Final(failure)) => return Err(failure),
            Err(Broken::Lost(failure)) => {
                let since = *patience.lost_since.get_or_insert_with(Instant::now);
                if since.elapsed() > RECONNECT {
                    return Err(failure);
                }
                sleep(patience.next_pause()).await;
            }
        }
    }
}

/// What the final snapshot means to the shell.
pub(super) fn exit_of(info: &MigrationInfo) -> Exit {
    match (info.status.as_str(), &info.guest_ended, &info.guest_location) {
        ("completed", None, _) => Exit::Done,
        ("indeterminate", _, _) => Exit::Indeterminate,
        (_, Some(_), _) | (_, None, None) => Exit::GuestEnded,
        _ => Exit::Failed,
    }
}

async fn follow_stream(
    agent: &Agent,
    id: &str,
    observe: &mut impl FnMut(&MigrationInfo),
    patience: &mut Patience,
) -> Result<MigrationInfo, Broken> {
    let what = format!("watch migration {id}");
    let broken = |status: &tonic::Status| {
        let failure = Failure::of_status(&what, status);
        if is_lost_connection(status) {
            Broken::Lost(failure)
        } else {
            Broken::Final(failure)
        }
    };
    let mut client = agent.conductor().await.map_err(|failure| match failure.exit {
        Exit::NoAnswer => Broken::Lost(failure),
        _ => Broken::Final(failure),
    })?;
    let request = MigrationRequest {
        migration: id.to_owned(),
        forwarded: false,
    };
    let mut stream = client
        .watch_migration(request)
        .await
        .map_err(|status| broken(&status))?
        .into_inner();
    let mut last = None;
    loop {
        // Silence is waited out in pieces: an indeterminate migration may have nothing new to tell.
        let message = match tokio::time::timeout(INDETERMINATE / 4, stream.message()).await {
            Ok(message) => message.map_err(|status| broken(&status))?,
            Err(_) if patience.is_indeterminate_for_good() => match last {
                Some(info) => return Ok(info),
                None => continue,
            },
            Err(_) => continue,
        };
        let Some(info) = message else {
            return Err(Broken::Lost(Failure::new(
                Exit::NoAnswer,
                format!("{what}: the agent ended the stream"),
            )));
        };
        patience.heard(&info);
        observe(&info);
        if is_over(&info) || patience.is_indeterminate_for_good() {
            return Ok(info);
        }
        last = Some(info);
    }
}

fn is_over(info: &MigrationInfo) -> bool {
    matches!(info.status.as_str(), "completed" | "cancelled" | "failed" | "error")
}

enum Broken {
    /// Worth another try.
    Lost(Failure),
    /// The agent's last word.
    Final(Failure),
}

/// How long things have been going badly.
#[derive(Default)]
struct Patience {
    lost_since: Option<Instant>,
    indeterminate_since: Option<Instant>,
    pauses: u32,
}

impl Patience {
    fn heard(&mut self, info: &MigrationInfo) {
        self.lost_since = None;
        self.pauses = 0;
        if info.status == "indeterminate" {
            self.indeterminate_since.get_or_insert_with(Instant::now);
        } else {
            self.indeterminate_since = None;
        }
    }

    fn is_indeterminate_for_good(&self) -> bool {
        self.indeterminate_since
            .is_some_and(|since| since.elapsed() >= INDETERMINATE)
    }

    fn next_pause(&mut self) -> Duration {
        self.pauses += 1;
        Duration::from_millis(50 << self.pauses.min(5))
    }
}

/// An agent that restarts is back within this.
const RECONNECT: Duration = Duration::from_secs(20);
/// A peer that restarts settles a decision within this.
const INDETERMINATE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(status: &str, location: Option<&str>, guest: Option<&str>) -> Exit {
        exit_of(&MigrationInfo {
            status: status.into(),
            guest_location: location.map(str::to_owned),
            guest_ended: guest.map(str::to_owned),
            ..Default::default()
        })
    }

    #[test]
    fn the_end_of_a_migration_becomes_its_exit_code() {
        assert_eq!(ended("completed", Some("b"), None), Exit::Done);
        for status in ["failed", "cancelled", "error"] {
            assert_eq!(ended(status, Some("a"), None), Exit::Failed, "{status}");
        }
        assert_eq!(ended("failed", None, Some("powered-off")), Exit::GuestEnded);
        assert_eq!(ended("failed", Some("a"), Some("panicked")), Exit::GuestEnded);
        assert_eq!(ended("error", None, None), Exit::GuestEnded);
        assert_eq!(ended("indeterminate", None, None), Exit::Indeterminate);
    }

    #[test]
    fn indeterminate_is_given_time_and_forgotten_when_it_passes() {
        let mut patience = Patience::default();
        let info = |status: &str| MigrationInfo {
            status: status.into(),
            ..Default::default()
        };
        patience.heard(&info("indeterminate"));
        assert!(!patience.is_indeterminate_for_good());
        patience.indeterminate_since = Instant::now().checked_sub(INDETERMINATE);
        assert!(patience.is_indeterminate_for_good());
        patience.heard(&info("switching"));
        assert!(!patience.is_indeterminate_for_good());
    }
}
