//! Reports to the agent. One that does not fit is told with its texts cut: the guest must not become one that nobody can manage.

use std::os::unix::net::UnixStream;

use ferry_migration::shorten;
use ferry_proto::vmm::v1::report::Report as Body;
use ferry_proto::vmm::v1::{Report, Standing};

use crate::vmm_channel::{self, ChannelError};

/// Tells the agent.
///
/// # Errors
/// The socket's, or the report is too large and it is not for the texts that were heard from others.
pub(super) fn send(socket: &UnixStream, mut report: Report) -> Result<(), ChannelError> {
    match vmm_channel::send(socket, &report, &[]) {
        // Nothing of it was sent.
        Err(ChannelError::TooLarge(bytes)) => {
            tracing::warn!(bytes, "a report was too large and is told with its texts cut");
            report.report.iter_mut().for_each(shorten_texts);
            vmm_channel::send(socket, &report, &[])
        }
        sent => sent,
    }
}

/// Cuts what others may have said: a peer, another agent, the guest.
fn shorten_texts(body: &mut Body) {
    match body {
        Body::Refused(refused) => shorten(&mut refused.reason),
        Body::GuestEnded(ended) => shorten(&mut ended.reason),
        Body::Disarmed(disarmed) => shorten(&mut disarmed.reason),
        Body::SendEnded(ended) => shorten(&mut ended.reason),
        Body::LoadFailed(failed) => shorten(&mut failed.reason),
        Body::SnapshotEnded(ended) => shorten(&mut ended.error),
        Body::Late(late) => shorten(&mut late.reason),
        Body::LinkLost(lost) => shorten(&mut lost.reason),
        Body::Standing(standing) => shorten_standing(standing),
        Body::Done(_)
        | Body::Traded(_)
        | Body::Pressed(_)
        | Body::Profiled(_)
        | Body::Progress(_)
        | Body::Converged(_)
        | Body::GoSent(_)
        | Body::Ready(_)
        | Body::Started(_)
        | Body::Restored(_)
        | Body::LinkBack(_)
        | Body::Sampled(_) => {}
    }
}

fn shorten_standing(standing: &mut Standing) {
    let Standing {
        migration,
        ended,
        send_ended,
        snapshot_ended,
        late,
        link_lost,
        ..
    } = standing;
    let guest_ended = send_ended.as_mut().and_then(|ended| ended.guest.as_mut());
    let ends = ended.iter_mut().chain(guest_ended).map(|ended| &mut ended.reason);
    ends.for_each(shorten);
    send_ended.iter_mut().for_each(|ended| shorten(&mut ended.reason));
    snapshot_ended.iter_mut().for_each(|ended| shorten(&mut ended.error));
    late.iter_mut().for_each(|late| shorten(&mut late.reason));
    link_lost.iter_mut().for_each(|lost| shorten(&mut lost.reason));
    shorten(migration);
}

#[cfg(test)]
mod tests {
    use ferry_proto::vmm::v1::{Late, LinkLost, SendEnded};

    use super::*;

    #[test]
    fn a_standing_with_long_texts_is_told_with_short_ones() {
        let (near, far) = UnixStream::pair().unwrap();
        let long = "é".repeat(1 << 20);
        let standing = Standing {
            pid: 7,
            late: Some(Late {
                reason: long.clone(),
                ..Late::default()
            }),
            link_lost: Some(LinkLost {
                reason: long.clone(),
                until_ns: 5,
            }),
            send_ended: Some(SendEnded {
                reason: long,
                ..SendEnded::default()
            }),
            ..Standing::default()
        };
        let report = Report {
            reply_to: 3,
            report: Some(Body::Standing(standing)),
        };
        send(&near, report).unwrap();

        let (report, _) = vmm_channel::receive::<Report>(&far).unwrap().unwrap();
        let Some(Body::Standing(told)) = report.report else {
            panic!("something else was told")
        };
        assert_eq!((report.reply_to, told.pid), (3, 7));
        assert_eq!(told.late.unwrap().reason, "é".repeat(1000) + "…");
    }

    #[test]
    fn a_report_that_fits_is_told_in_full() {
        let (near, far) = UnixStream::pair().unwrap();
        let late = Late {
            reason: "x".repeat(5000),
            ..Late::default()
        };
        let report = Report {
            reply_to: 0,
            report: Some(Body::Late(late)),
        };
        send(&near, report.clone()).unwrap();
        assert_eq!(vmm_channel::receive::<Report>(&far).unwrap().unwrap().0, report);
    }
}
