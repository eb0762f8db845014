//! Taps.

use std::os::fd::OwnedFd;

use ferry_proto::agent::v1::NicSpec;
use ferry_vmm::{Tap, TapError, TapProblem};

/// What a tap on a bridge is called; the kernel puts the first number there that is free. Names are short (15 bytes), and two
/// agents may share a host, so an instance's name or id would not do.
const OWN_TAP: &str = "fry%d";

/// The longest name of an interface (IFNAMSIZ, without its end).
const LONGEST_NAME: usize = 15;

/// Opens the tap of a card: the one that was named, or a new one on the bridge that was.
///
/// # Errors
/// Names the tap or bridge, and what is wrong with it.
pub(super) fn open(nic: &NicSpec) -> Result<OwnedFd, TapError> {
    let tap = match (&nic.tap, &nic.bridge) {
        (Some(name), _) => Tap::open(name)?,
        (None, Some(bridge)) => {
            let tap = Tap::open(OWN_TAP)?;
            tap.attach(bridge)?;
            tap
        }
        (None, None) => Tap::open(OWN_TAP)?,
    };
    tap.bring_up()?;
    Ok(tap.into())
}

/// Whether somebody else has the tap.
pub(super) fn is_in_use(error: &TapError) -> bool {
    matches!(
        error,
        TapError::Interface {
            problem: TapProblem::Busy,
            ..
        }
    )
}

/// Whether an interface can have this name: the kernel's rules (`dev_valid_name`), and no `%`, in whose place it would put
/// a number.
pub(crate) fn is_interface_name(text: &str) -> bool {
    let fits =
        |byte: u8| !byte.is_ascii_whitespace() && !byte.is_ascii_control() && !matches!(byte, b'/' | b':' | b'%');
    (1..=LONGEST_NAME).contains(&text.len()) && text != "." && text != ".." && text.bytes().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_the_kernel_takes() {
        for good in ["br0", "tap-web.1", "fifteen-bytes-x", "bücke"] {
            assert!(is_interface_name(good), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "a:1", "fry%d", "sixteen-bytes-xx", "a\0"] {
            assert!(!is_interface_name(bad), "{bad:?}");
        }
    }
}
