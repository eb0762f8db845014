//! The connections of a migration: its first ones, those after a link was lost, and those of each later session of late pages.

use std::ops::Range;
use std::os::fd::OwnedFd;

use uuid::Uuid;

use super::script::Script;
use crate::agent::context::RequestContext;
use crate::agent::data_port;
use crate::agent::failure::Failure;
use crate::agent::instances::Agent;
use crate::agent::transport::{self, Transport};

/// Which connections, and where they go.
pub(in crate::agent) struct Wanted<'a> {
    pub(in crate::agent) data_address: &'a str,
    pub(in crate::agent) secret: &'a [u8],
    pub(in crate::agent) migration: Uuid,
    pub(in crate::agent) indexes: Range<u16>,
}

/// Makes connections to this host's VMM, in order, as the migration has it: to the data port, or through both agents.
///
/// # Errors
/// There is no way there, or the destination refuses one.
pub(in crate::agent) async fn connect(
    agent: &Agent,
    context: &RequestContext,
    (host, way): (&str, Transport),
    wanted: Wanted<'_>,
) -> Result<Vec<OwnedFd>, Failure> {
    let peer = agent.peers.named(host)?;
    let Wanted {
        data_address,
        secret,
        migration,
        indexes,
    } = wanted;
    match way {
        Transport::Tcp => {
            let connected = data_port::connect(data_address, secret, migration, indexes).await;
            connected.map_err(Failure::host(format!(
                "failed to connect to the data port {data_address} of host {host} (--transport grpc needs none)"
            )))
        }
        Transport::Grpc => transport::connect(peer, context, secret, migration, indexes).await,
    }
}

impl Script {
    /// Makes those with these indexes.
    ///
    /// # Errors
    /// [`connect`]'s.
    pub(super) async fn connect(
        &self,
        data_address: &str,
        secret: &[u8],
        indexes: Range<u16>,
    ) -> Result<Vec<OwnedFd>, Failure> {
        let wanted = Wanted {
            data_address,
            secret,
            migration: self.row.id,
            indexes,
        };
        let to = (&*self.row.peer, self.row.transport());
        connect(&self.agent, &self.outgoing.context, to, wanted).await
    }
}
