//! Whether this user's agent can give guests network cards.

use ferry_vmm::{Tap, TapError};

use super::Need;

pub(super) fn needs() -> Vec<Need> {
    vec![told(Tap::open("fry%d").map(drop))]
}

/// What making a tap, which is gone at once, says of the need.
fn told(made: Result<(), TapError>) -> Need {
    let (need, wanted) = ("network cards", "taps can be made");
    match made {
        Ok(()) => Need::fact(need, "taps can be made", wanted),
        Err(error) => Need::poor(
            need,
            format!("failed to {}", crate::error_chain(&error)),
            wanted,
            "guests get no network cards: load the kernel module tun, and run the agent as root or give it CAP_NET_ADMIN",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_taps_is_warned_of_and_works() {
        let denied = told(Err(TapError::Device(std::io::ErrorKind::PermissionDenied.into())));
        assert!(!denied.ok && !denied.required);
        assert!(denied.found.contains("/dev/net/tun"), "{}", denied.found);
        assert!(told(Ok(())).ok);
    }
}
