//! The migrations that are in this host's journal, some at a time.
//!
//! There may be thousands, of kilobytes each. The journal's thread reads so many of them that a switchover does not notice, and while
//! they are made sense of here and by whoever asked, it reads the next.

use std::sync::Arc;

use ferry_proto::agent::v1::{ListMigrationsReply, MigrationInfo};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::agent::failure::Failure;
use crate::agent::instances::Agent;
use crate::agent::journal::{Depth, MigrationRow, Report};

/// How many are in one part.
const PART: u32 = 256;
/// How many parts wait for whoever asked.
const AHEAD: usize = 2;

/// Parts of a list, the newest migration last.
pub(super) type Parts = ReceiverStream<Result<ListMigrationsReply, Status>>;

impl Agent {
    /// The migrations of the instance of this id or name, of all if it is empty. Whoever drops the parts ends it.
    pub(super) fn list_migrations(self: &Arc<Self>, wanted: String, depth: Depth) -> Parts {
        let (parts, listed) = mpsc::channel(AHEAD);
        let agent = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(failure) = agent.list_into(&parts, &wanted, depth).await {
                // Whoever asked may have gone.
                let _ = parts.send(Err(failure.into())).await;
            }
        });
        ReceiverStream::new(listed)
    }

    async fn list_into(
        &self,
        parts: &mpsc::Sender<Result<ListMigrationsReply, Status>>,
        wanted: &str,
        depth: Depth,
    ) -> Result<(), Failure> {
        let part = |after| {
            let journal = self.journal.clone();
            tokio::spawn(async move {
                journal
                    .read(move |connection| MigrationRow::reports(connection, after, PART, depth))
                    .await
            })
        };
        let mut reading = Some(part(0));
        while let Some(read) = reading.take() {
            let reports = read.await.map_err(|error| unreadable(std::io::Error::other(error)))??;
            if reports.len() == PART as usize
                && let Some(last) = reports.last()
            {
                reading = Some(part(last.row()));
            }
            let read = tokio::task::block_in_place(|| reports.iter().map(Report::read).collect::<Result<Vec<_>, _>>());
            let read = read.map_err(|error| unreadable(error.into()))?;
            let is_wanted = |info: &MigrationInfo| wanted.is_empty() || info.instance == wanted || info.name == wanted;
            let migrations = read
                .into_iter()
                .map(|info| depth.of(self.newest(info)))
                .filter(is_wanted);
            let part = ListMigrationsReply {
                migrations: migrations.collect(),
            };
            if parts.send(Ok(part)).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }
}

fn unreadable(source: std::io::Error) -> Failure {
    Failure::Host {
        what: "failed to read the journal's records of migrations".to_owned(),
        source,
    }
}
