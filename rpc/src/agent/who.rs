//! Who is at the other end of a connection, as far as the kernel knows.
//!
//! Agents do not authenticate anybody yet, and what a request says of its sender proves nothing. What the kernel knows does: on
//! this host, which user a connection's other end belongs to.

use std::fs;
use std::net::{IpAddr, SocketAddr};

use super::sock_diag;

/// Who is at the other end: a user of this host, or another host's address.
pub(super) fn actor(remote: Option<SocketAddr>, local: Option<SocketAddr>) -> String {
    let (Some(remote), Some(local)) = (remote, local) else {
        return "unknown".to_owned();
    };
    let is_here = remote.ip().is_loopback() || remote.ip() == local.ip();
    if !is_here {
        return remote.ip().to_string();
    }
    // A connection from a container's network is in another table.
    let owner = sock_diag::owner(remote, local).unwrap_or_else(|error| {
        tracing::debug!(%error, "the kernel is asked for a connection's user by its table");
        owner_by_table(remote, local)
    });
    match owner {
        Some(user) => match user_name(&fs::read_to_string("/etc/passwd").unwrap_or_default(), user) {
            Some(name) => format!("{name} (uid {user})"),
            None => format!("uid {user}"),
        },
        None => format!("unknown at {}", remote.ip()),
    }
}

/// The same where the kernel was built without `INET_DIAG`.
fn owner_by_table(bound: SocketAddr, connected: SocketAddr) -> Option<u32> {
    let table = match bound {
        SocketAddr::V4(_) => "/proc/net/tcp",
        SocketAddr::V6(_) => "/proc/net/tcp6",
    };
    owner(&fs::read_to_string(table).unwrap_or_default(), bound, connected)
}

/// The user whose socket is bound to `bound` and connected to `connected` (proc_net_tcp.rst of the kernel).
fn owner(table: &str, bound: SocketAddr, connected: SocketAddr) -> Option<u32> {
    let (bound, connected) = (in_table(bound), in_table(connected));
    table.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        let (_, its_bound, its_connected) = (fields.next()?, fields.next()?, fields.next()?);
        let is_it = its_bound == bound && its_connected == connected;
        // st, tx_queue:rx_queue, tr:tm->when, retrnsmt, uid
        is_it.then(|| fields.nth(4)?.parse().ok()).flatten()
    })
}

/// An address as the table has it: words in the machine's byte order, in hexadecimal.
fn in_table(address: SocketAddr) -> String {
    let octets = match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let words = octets.chunks_exact(4).map(|word| {
        let word = word.try_into().map_or(0, u32::from_ne_bytes);
        format!("{word:08X}")
    });
    format!("{}:{:04X}", words.collect::<String>(), address.port())
}

fn user_name(passwd: &str, user: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(user)).then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_user_at_the_other_end_of_a_local_connection_is_known() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (remote, local) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let found = actor(Some(remote), Some(local));
        let user = rustix::process::geteuid().as_raw();
        assert!(found.contains(&format!("uid {user}")), "{found}");
        assert_eq!(owner_by_table(remote, local), Some(user));
    }

    #[test]
    fn addresses_are_written_as_the_kernel_does() {
        assert_eq!(in_table("127.0.0.1:7400".parse().unwrap()), "0100007F:1CE8");
        assert_eq!(
            in_table("[::1]:80".parse().unwrap()),
            "00000000000000000000000001000000:0050"
        );
    }

    #[test]
    fn whoever_asks_from_elsewhere_is_an_address() {
        let here = "192.0.2.1:7400".parse().ok();
        assert_eq!(actor("192.0.2.7:4000".parse().ok(), here), "192.0.2.7");
        assert_eq!(actor(None, None), "unknown");
    }

    #[test]
    fn users_have_names_in_passwd() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n";
        assert_eq!(user_name(passwd, 1000), Some("web"));
        assert_eq!(user_name(passwd, 1), None);
    }
}
