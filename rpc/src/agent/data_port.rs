//! The data port: page streams are opened, accepted and authenticated here, and then handed to the VMMs.
//!
//! ```text
//!   destination: "FERRYDP1" nonce(32)
//!   source:      migration(16) index(u16, little-endian) hmac-sha256(secret, nonce ‖ migration ‖ index)(32)
//!   destination: 1 (taken) or 0 (refused)
//! ```
//!
//! The secret is made anew for each preparation and travels on the agents' gRPC connection; the nonce is made anew for each
//! connection, so nothing that was on the wire can be used again. A probe of the link (`prediction::probe`) has an id and a secret of its own in their place.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use hmac::{Hmac, Mac};
use sha2::Sha256;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::instances::Agent;
use super::prediction::Probe;

const GREETING: &[u8; 8] = b"FERRYDP1";
pub(super) const NONCE: usize = 32;
const PROOF: usize = 32;
/// How long a connection may take to prove itself, or to be taken.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// Connections that are proving themselves at the same time; more wait in the listen queue.
pub(super) const MOST_UNPROVEN: usize = 256;
/// Bytes in the send and in the receive buffer of a connection within one machine; the kernel doubles them for its own bookkeeping.
///
/// Measured on two processors of which the guest keeps one busy, moves of 1 GiB, medians of 12 in turn: 405 ms with these, 425 with
/// twice the receive buffer, 409 with half of each, 438 with 64 KiB both.
const LOCAL_SEND_BUFFER: usize = 128 << 10;
const LOCAL_RECEIVE_BUFFER: usize = 512 << 10;

/// The secret of one preparation.
pub(crate) type Secret = [u8; 32];

/// Random bytes of the operating system.
///
/// # Errors
/// It has none.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

/// What one who knows the secret can say over a nonce.
pub(super) fn proof(secret: &[u8], nonce: &[u8], migration: Uuid, index: u16) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("an HMAC key may have any length");
    mac.update(nonce);
    mac.update(migration.as_bytes());
    mac.update(&index.to_le_bytes());
    mac
}

/// Accepts connections until the listener fails for good.
pub(crate) async fn serve(agent: Arc<Agent>, listener: TcpListener) {
    let unproven = Arc::new(Semaphore::new(MOST_UNPROVEN));
    loop {
        let Ok(place) = Arc::clone(&unproven).acquire_owned().await else {
            return;
        };
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::info!(%error, "failed to accept a connection at the data port");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let agent = Arc::clone(&agent);
        tokio::spawn(async move {
            let taken = tokio::time::timeout(PATIENCE, take(&agent, stream)).await;
            drop(place);
            match taken {
                Ok(Ok(None)) => {}
                // A slow link is none that proves nothing.
                Ok(Ok(Some((probe, stream)))) => probe.serve(stream).await,
                Ok(Err(_)) | Err(_) => {
                    tracing::info!(%from, "a connection to the data port was refused: it did not prove a migration's secret");
                }
            }
        });
    }
}

/// Has a connection prove itself, and hands it to whom it is for; one of a probe is handed back with its probe.
async fn take(agent: &Arc<Agent>, mut stream: TcpStream) -> io::Result<Option<(Arc<Probe>, TcpStream)>> {
    stream.set_nodelay(true)?;
    let nonce: [u8; NONCE] = random()?;
    stream.write_all(GREETING).await?;
    stream.write_all(&nonce).await?;

    let mut claim = [0; 16 + 2 + PROOF];
    if stream.read(&mut claim[..1]).await? == 0 {
        // Somebody found out whether it can be reached.
        return Ok(None);
    }
    stream.read_exact(&mut claim[1..]).await?;
    let (name, shown) = claim.split_at(18);
    let migration = Uuid::from_slice(&name[..16]).map_err(io::Error::other)?;
    let index = u16::from_le_bytes([name[16], name[17]]);

    let incoming = agent.incoming.find(migration).filter(|incoming| {
        // Compared in constant time.
        proof(&incoming.secret, &nonce, migration, index)
            .verify_slice(shown)
            .is_ok()
    });
    // One that is not of a migration may be of a probe, with the same proof.
    let probe = agent.probes.find(migration).filter(|probe| {
        proof(&probe.secret, &nonce, migration, index)
            .verify_slice(shown)
            .is_ok()
    });
    if let Some(probe) = probe {
        stream.write_all(&[1]).await?;
        fit_buffers(&stream)?;
        return Ok(Some((probe, stream)));
    }
    let Some(incoming) = incoming else {
        stream.write_all(&[0]).await?;
        return Err(io::Error::from(io::ErrorKind::PermissionDenied));
    };
    stream.write_all(&[1]).await?;
    fit_buffers(&stream)?;
    incoming.connected(index, OwnedFd::from(stream.into_std()?));
    Ok(None)
}

/// Opens the connections of a migration with these indexes, all at once, proven and in order: a control stream and page streams.
///
/// # Errors
/// The data port cannot be reached, is something else, or refuses.
pub(crate) async fn connect(
    address: &str,
    secret: &[u8],
    migration: Uuid,
    indexes: Range<u16>,
) -> io::Result<Vec<OwnedFd>> {
    let (address, secret): (Arc<str>, Arc<[u8]>) = (address.into(), secret.into());
    all_at_once(indexes, |index| {
        let (address, secret) = (Arc::clone(&address), Arc::clone(&secret));
        async move {
            let connect = connect_one(&address, &secret, migration, index);
            let timed_out = |_| io::Error::new(io::ErrorKind::TimedOut, format!("{address} does not answer"));
            tokio::time::timeout(PATIENCE, connect).await.map_err(timed_out)?
        }
    })
    .await
}

/// Makes something of each index, all at once: each takes three round trips, and some ways are long. In the order of their indexes.
///
/// # Errors
/// The first one's that fails; what the others made is gone then.
pub(super) async fn all_at_once<T, E, F>(indexes: Range<u16>, make: impl Fn(u16) -> F) -> Result<Vec<T>, E>
where
    F: Future<Output = Result<T, E>> + Send + 'static,
    T: Send + 'static,
    E: Send + 'static,
{
    let mut making = JoinSet::new();
    for index in indexes {
        let one = make(index);
        making.spawn(async move { one.await.map(|made| (index, made)) });
    }
    let mut all = Vec::with_capacity(making.len());
    while let Some(one) = making.join_next().await {
        match one {
            Ok(made) => all.push(made?),
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime ends, and this with it.
                Err(_) => std::future::pending().await,
            },
        }
    }
    all.sort_by_key(|&(index, _)| index);
    Ok(all.into_iter().map(|(_, made)| made).collect())
}

/// How long a data port that is only looked for may take: less than the call takes whose answer tells of it.
const REACHED_WITHIN: Duration = Duration::from_secs(2);

/// Finds out whether a data port can be reached, and hangs up.
///
/// # Errors
/// It cannot, or is something else.
pub(crate) async fn reach(address: &str) -> io::Result<()> {
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("{address} does not answer"));
    let greeted = tokio::time::timeout(REACHED_WITHIN, greeted_by(address));
    greeted.await.map_err(late)?.map(drop)
}

/// A connection to a data port, and its nonce.
async fn greeted_by(address: &str) -> io::Result<(TcpStream, [u8; NONCE])> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (mut word, mut nonce) = ([0; GREETING.len()], [0; NONCE]);
    stream.read_exact(&mut word).await?;
    if word != *GREETING {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{address} is not a ferry data port"),
        ));
    }
    stream.read_exact(&mut nonce).await?;
    Ok((stream, nonce))
}

async fn connect_one(address: &str, secret: &[u8], migration: Uuid, index: u16) -> io::Result<OwnedFd> {
    let (mut stream, nonce) = greeted_by(address).await?;
    let mut claim = Vec::with_capacity(16 + 2 + PROOF);
    claim.extend_from_slice(migration.as_bytes());
    claim.extend_from_slice(&index.to_le_bytes());
    claim.extend_from_slice(&proof(secret, &nonce, migration, index).finalize().into_bytes());
    stream.write_all(&claim).await?;
    if stream.read_u8().await? != 1 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("{address} refused the connection"),
        ));
    }
    fit_buffers(&stream)?;
    Ok(OwnedFd::from(stream.into_std()?))
}

/// Keeps what is under way between two ends on one machine within a processor's cache.
///
/// Across a network the kernel sizes the buffers by bandwidth and delay. Between two processes of one machine that ends
/// in tens of MiB, which cost the copy a trip to memory and hide nothing.
pub(super) fn fit_buffers(stream: &TcpStream) -> io::Result<()> {
    if stream.local_addr()?.ip() == stream.peer_addr()?.ip() {
        rustix::net::sockopt::set_socket_send_buffer_size(stream, LOCAL_SEND_BUFFER)?;
        rustix::net::sockopt::set_socket_recv_buffer_size(stream, LOCAL_RECEIVE_BUFFER)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_made_at_once_comes_in_order() {
        // The last one is the first to be there.
        let late_first = |index: u16| async move {
            tokio::task::yield_now().await;
            for _ in index..4 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            Ok::<_, ()>(index)
        };
        assert_eq!(all_at_once(1..4, late_first).await, Ok(vec![1, 2, 3]));
    }

    #[tokio::test]
    async fn the_first_error_ends_all_and_frees_what_was_made() {
        let made = Arc::new(());
        let second_fails = |index: u16| {
            let made = Arc::clone(&made);
            async move {
                match index {
                    1 => Err("refused"),
                    2 => std::future::pending().await,
                    _ => Ok(made),
                }
            }
        };
        assert_eq!(all_at_once(0..3, second_fails).await, Err("refused"));
        // Those that were begun end when they are run next.
        while Arc::strong_count(&made) > 1 {
            tokio::task::yield_now().await;
        }
    }
}
