//! Versions of the protocol between an agent and its VMMs: an agent that was upgraded has VMMs of the build before it.
//!
//! A VMM says in its answer to Hello which version both speak. An order that is newer is not sent to it, but refused by name:
//! the guest runs on, and whoever asked is told what to do. Reports only gain fields, and an unknown field is no mistake.

use ferry_proto::vmm::v1::order::Order as Command;

/// The version that brought an order, and what users know it by. A new order does not compile before it is here.
pub(crate) fn brought_by(order: &Command) -> (u32, &'static str) {
    match order {
        Command::Hello(_) => (1, "the greeting"),
        Command::Build(_) => (1, "building a machine"),
        Command::Permit(_) => (1, "the permit to run"),
        Command::Pause(_) => (1, "pausing"),
        Command::Resume(_) => (1, "resuming"),
        Command::Reboot(_) => (1, "rebooting"),
        Command::ConsoleInput(_) => (1, "typing into the console"),
        Command::Ping(_) => (1, "asking how it is"),
        // One of version 1 would let its guest run.
        Command::Send(send) if send.cold => (2, "moving its guest cold"),
        // One of version 1 would give up.
        Command::Send(send) if send.pause_on_timeout => (2, "pausing its guest when the time is up"),
        Command::Send(send) if send.max_throttle_percent > 0 => (2, "throttling its guest"),
        // One of version 1 would send all pages before it hands the guest over.
        Command::Send(send) if !send.lateness.is_empty() => (2, "moving its guest by post-copy"),
        Command::Send(send) if send.resume_window_ms > 0 => (2, "waiting for a link that is lost"),
        // One of version 1 would set them up as if they were TCP's, and fail.
        Command::Send(send) if send.carried => (2, "moving its guest by --transport grpc"),
        // One of version 1 would hand it over as it is.
        Command::Send(send) if send.verify => (2, "comparing what it sends"),
        // One of version 1 would send everything plainly, which is what it is to do where that is left to it.
        Command::Send(send) if !matches!(&*send.compress, "" | "auto" | "off") => (2, "compressing what it sends"),
        Command::Send(_) => (1, "sending its guest"),
        Command::Grant(_) => (1, "the switch grant"),
        Command::CallOff(_) => (1, "calling a switchover off"),
        Command::Receive(receive) if receive.late_streams > 0 => (2, "receiving a guest by post-copy"),
        Command::Receive(receive) if receive.resume_window_ms > 0 => (2, "waiting for a link that is lost"),
        Command::Receive(_) => (1, "receiving a guest"),
        Command::ServePages(_) => (2, "serving late pages"),
        Command::LateLink(_) => (2, "other connections for late pages"),
        Command::Reconnect(_) => (2, "another link for a copy"),
        Command::Snapshot(_) => (2, "snapshots"),
        Command::Restore(_) => (2, "restoring a snapshot"),
        Command::PressPowerButton(_) => (2, "the power button"),
        Command::SetBalloon(_) => (2, "the balloon"),
        Command::ForceComplete(_) => (2, "completing by force"),
        Command::Retune(_) => (2, "retuning a migration"),
        Command::Sample(_) | Command::EndSample(_) => (2, "a sample of what its guest writes"),
        Command::Profile(_) => (2, "telling what it needs of a host"),
    }
}

#[cfg(test)]
mod tests {
    use ferry_proto::vmm::v1::{Ping, Profile};
    use ferry_proto::{OLDEST_VMM_PROTOCOL, VMM_PROTOCOL};

    use super::*;

    #[test]
    fn this_build_and_the_one_before_it_are_spoken() {
        assert_eq!(OLDEST_VMM_PROTOCOL + 1, VMM_PROTOCOL);
        assert_eq!(brought_by(&Command::Ping(Ping {})).0, OLDEST_VMM_PROTOCOL);
        assert_eq!(brought_by(&Command::Profile(Profile {})).0, VMM_PROTOCOL);
    }
}
