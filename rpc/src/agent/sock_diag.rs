//! Whose socket is at the other end of a local connection, asked of the kernel by sock_diag(7).
//!
//! `/proc/net/tcp` has the same, but to read it the kernel walks its whole table of connections: 4 ms on an idle host with 24 GiB, fifty on a busy
//! one, and every order of a user waited for that.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};

/// `SOCK_DIAG_BY_FAMILY` of linux/sock_diag.h.
const BY_FAMILY: u16 = 20;
/// `NLMSG_ERROR` and `NLM_F_REQUEST` of linux/netlink.h.
const ERROR: u16 = 2;
const REQUEST: u16 = 1;
/// `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// `struct inet_diag_req_v2` of linux/inet_diag.h.
const QUESTION_BYTES: usize = 56;
/// Where `struct inet_diag_msg` has the user: after four bytes, the socket's id (48 bytes) and three words.
const USER_AT: usize = HEADER_BYTES + 4 + 48 + 3 * 4;

/// The user whose TCP socket is bound to `bound` and connected to `connected`; none if there is no such socket in this network.
///
/// # Errors
/// The kernel does not answer such questions.
pub(super) fn owner(bound: SocketAddr, connected: SocketAddr) -> io::Result<Option<u32>> {
    let socket = ask(&question(bound, connected))?;
    let mut answer = [0; 512];
    let (_, length) = recv(&socket, &mut answer[..], RecvFlags::DONTWAIT)?;
    understand(&answer[..length.min(answer.len())])
}

fn ask(question: &[u8]) -> io::Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(netlink::SOCK_DIAG),
    )?;
    // The kernel answers while it takes the question: nothing is waited for afterwards.
    send(&socket, question, SendFlags::empty())?;
    Ok(socket)
}

fn question(bound: SocketAddr, connected: SocketAddr) -> Vec<u8> {
    const IPPROTO_TCP: u8 = 6;
    let family = match bound {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let length = HEADER_BYTES + QUESTION_BYTES;
    let mut bytes = Vec::with_capacity(length);
    bytes.extend((length as u32).to_ne_bytes());
    bytes.extend(BY_FAMILY.to_ne_bytes());
    bytes.extend(REQUEST.to_ne_bytes());
    // Sequence number and sender: one question on a socket of its own.
    bytes.extend([0; 8]);
    bytes.extend([family.as_raw() as u8, IPPROTO_TCP, 0, 0]);
    // In any state.
    bytes.extend(u32::MAX.to_ne_bytes());
    bytes.extend(bound.port().to_be_bytes());
    bytes.extend(connected.port().to_be_bytes());
    bytes.extend(address(bound.ip()));
    bytes.extend(address(connected.ip()));
    // Any interface, and no cookie.
    bytes.extend(0u32.to_ne_bytes());
    bytes.extend([0xff; 8]);
    bytes
}

fn address(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&ip.octets());
            bytes
        }
        IpAddr::V6(ip) => ip.octets(),
    }
}

fn understand(answer: &[u8]) -> io::Result<Option<u32>> {
    let short = || io::Error::new(io::ErrorKind::UnexpectedEof, "a short answer");
    let word = |at: usize| {
        let bytes = answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u32::from_ne_bytes).ok_or_else(short)
    };
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok());
    match kind.map(u16::from_ne_bytes) {
        Some(BY_FAMILY) => word(USER_AT).map(Some),
        Some(ERROR) => {
            let error = io::Error::from_raw_os_error(word(HEADER_BYTES)?.cast_signed().wrapping_neg());
            match error.kind() {
                io::ErrorKind::NotFound => Ok(None),
                _ => Err(error),
            }
        }
        _ => Err(short()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_user_of_a_connections_other_end_is_told() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                // A host without IPv6 has no such connections either.
                assert!(address.starts_with('['), "{address}");
                continue;
            };
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (remote, local) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
            assert_eq!(
                owner(remote, local).unwrap(),
                Some(rustix::process::geteuid().as_raw()),
                "{address}"
            );
            drop(listener);
            let nobody = SocketAddr::new(remote.ip(), 1);
            assert_eq!(owner(nobody, local).unwrap(), None, "{address}");
        }
    }

    #[test]
    fn an_answer_that_is_too_short_is_none() {
        assert!(understand(&[]).is_err());
        assert!(understand(&question("127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap())[..40]).is_err());
    }
}
