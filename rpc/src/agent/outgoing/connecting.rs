//! The connections of a migration, and of each later session of late pages.

use std::ops::Range;
use std::os::fd::OwnedFd;

use super::script::Script;
use crate::agent::data_port;
use crate::agent::failure::Failure;
use crate::agent::transport::{self, Transport};

impl Script {
    /// Makes those with these indexes, in order, as the migration has it: to the destination's data port, or through both agents.
    ///
    /// # Errors
    /// There is no way there, or the destination refuses one.
    pub(super) async fn connect(
        &self,
        data_address: &str,
        secret: &[u8],
        indexes: Range<u16>,
    ) -> Result<Vec<OwnedFd>, Failure> {
        let peer = self.agent.peers.named(&self.row.peer)?;
        match self.row.transport() {
            Transport::Tcp => {
                let connected = data_port::connect(data_address, secret, self.row.id, indexes).await;
                connected.map_err(Failure::host(format!(
                    "failed to connect to the data port {data_address} of host {} (--transport grpc needs none)",
                    peer.host
                )))
            }
            Transport::Grpc => {
                let context = &self.outgoing.context;
                transport::connect(peer, context, secret, self.row.id, indexes).await
            }
        }
    }
}
