//! What the kernel knows of connections, asked by sock_diag(7): whose socket is at the other end of a local one, and how long the way of one is.
//!
//! `/proc/net/tcp` has the same, but to read it the kernel walks its whole table of connections: 4 ms on an idle host with 24 GiB, fifty on a busy
//! one, and every order of a user waited for that.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

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
/// Where attributes follow it, and the header of each: `struct nlattr`, length and kind.
const ATTRIBUTES_AT: usize = USER_AT + 2 * 4;
const ATTRIBUTE_HEADER: usize = 4;
/// `INET_DIAG_INFO`: the attribute with a `struct tcp_info` of linux/tcp.h, and where that has `tcpi_rtt`, in microseconds.
const INFO: u16 = 2;
const ROUND_TRIP_AT: usize = 68;

/// The user whose TCP socket is bound to `bound` and connected to `connected`; none if there is no such socket in this network.
///
/// # Errors
/// The kernel does not answer such questions.
pub(super) fn owner(bound: SocketAddr, connected: SocketAddr) -> io::Result<Option<u32>> {
    match answered(&question(bound, connected, 0))? {
        Some(answer) => word(&answer, USER_AT).map(Some),
        None => Ok(None),
    }
}

/// How long a word and its acknowledgement take on the TCP connection that is bound to `bound` and connected to `connected`, as its kernel has it: of one
/// that was just made, how long that took. None if there is no such connection in this network.
///
/// # Errors
/// The kernel does not answer such questions.
pub(super) fn round_trip(bound: SocketAddr, connected: SocketAddr) -> io::Result<Option<Duration>> {
    let Some(answer) = answered(&question(bound, connected, 1 << (INFO - 1)))? else {
        return Ok(None);
    };
    let info = attribute(&answer, INFO).ok_or_else(short)?;
    let micros = word(info, ROUND_TRIP_AT)?;
    Ok(Some(Duration::from_micros(micros.into())))
}

/// The first attribute of this kind.
fn attribute(answer: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut rest = answer.get(ATTRIBUTES_AT..)?;
    loop {
        let (header, _) = rest.split_first_chunk::<ATTRIBUTE_HEADER>()?;
        let [length, kind] = [[header[0], header[1]], [header[2], header[3]]].map(u16::from_ne_bytes);
        let content = rest.get(ATTRIBUTE_HEADER..length.into())?;
        if kind == wanted {
            return Some(content);
        }
        rest = rest.get(usize::from(length).next_multiple_of(4)..)?;
    }
}

fn answered(question: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let socket = ask(question)?;
    let mut answer = vec![0; 1024];
    let (_, length) = recv(&socket, &mut answer[..], RecvFlags::DONTWAIT)?;
    answer.truncate(length);
    answer_or_error(answer)
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

/// Asks for these attributes too, a bit for each.
fn question(bound: SocketAddr, connected: SocketAddr, attributes: u8) -> Vec<u8> {
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
    bytes.extend([family.as_raw() as u8, IPPROTO_TCP, attributes, 0]);
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

fn short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "a short answer")
}

fn word(answer: &[u8], at: usize) -> io::Result<u32> {
    let bytes = answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    bytes.map(u32::from_ne_bytes).ok_or_else(short)
}

/// The answer, if it is one; none if there is no such socket.
fn answer_or_error(answer: Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok());
    match kind.map(u16::from_ne_bytes) {
        Some(BY_FAMILY) => Ok(Some(answer)),
        Some(ERROR) => {
            let error = io::Error::from_raw_os_error(word(&answer, HEADER_BYTES)?.cast_signed().wrapping_neg());
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
    use std::time::Instant;

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
        assert!(answer_or_error(Vec::new()).is_err());
        let mut cut = question("127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap(), 0);
        cut.truncate(40);
        assert!(word(&cut, USER_AT).is_err() && attribute(&cut, INFO).is_none());
        // An attribute that says that it is longer than all there is, and one that is shorter than its own header.
        for length in [100_u16, 2] {
            let mut answer = vec![0; ATTRIBUTES_AT];
            answer.extend([length, INFO].map(u16::to_ne_bytes).concat());
            assert!(attribute(&answer, INFO).is_none(), "{length}");
        }
    }

    #[test]
    fn a_round_trip_is_no_longer_than_connecting_took() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let began = Instant::now();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let took = began.elapsed();
        let (local, remote) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let told = round_trip(local, remote).unwrap().unwrap();
        assert!(!told.is_zero() && told <= took, "{told:?} of {took:?}");
        assert_eq!(round_trip(SocketAddr::new(local.ip(), 1), remote).unwrap(), None);
    }
}
