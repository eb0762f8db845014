//! Ways in for the fuzz targets, which see only what is public. The tests feed them too.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;

use ferry_proto::vmm::v1::{Order, Report, order, report};

use crate::lock_file::parse;
use crate::vmm_channel::receive;
use crate::vmm_process::attempt_from_wire;

/// What is read from the socket between an agent and a VMM, by either.
pub fn vmm_frames(bytes: &[u8]) {
    each::<Order>(bytes, |order| match order.order {
        Some(order::Order::Grant(grant)) => drop(attempt_from_wire(grant.attempt)),
        Some(order::Order::CallOff(call_off)) => drop(attempt_from_wire(call_off.attempt)),
        _ => {}
    });
    each::<Report>(bytes, |report| match report.report {
        Some(report::Report::Ready(ready)) => drop(attempt_from_wire(ready.attempt)),
        Some(report::Report::GoSent(go)) => drop(attempt_from_wire(go.attempt)),
        _ => {}
    });
}

fn each<M: prost::Message + Default>(bytes: &[u8], take: impl Fn(M)) {
    let (mut near, far) = UnixStream::pair().expect("descriptors");
    near.set_nonblocking(true).expect("a socket");
    // What does not fit into its buffer would be read like the rest.
    match near.write(bytes) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => panic!("{error}"),
        _ => drop(near),
    }
    while let Ok(Some((message, descriptors))) = receive::<M>(&far) {
        assert!(descriptors.is_empty(), "descriptors that nobody sent");
        take(message);
    }
}

/// A snapshot's `snapshot.json`, and the content of one.
pub fn snapshot_manifest(bytes: &[u8]) {
    crate::agent::read_hostile_manifest(bytes);
}

/// What comes in a call of `Streams.Carry`, from either agent.
pub fn carried_messages(bytes: &[u8]) {
    crate::agent::read_hostile_messages(bytes);
}

/// A disk's lock file, which whoever may write beside the image may write.
pub fn lock_file(bytes: &[u8]) {
    if let Some(holder) = parse(bytes) {
        let line = serde_json::to_vec(&holder).expect("nothing of it can fail to be JSON");
        assert_eq!(parse(&line), Some(holder));
    }
}

#[cfg(test)]
mod tests {
    use ferry_fuzz_inputs::feed;
    use ferry_proto::vmm::v1 as wire;
    use prost::Message;

    use super::*;

    fn frame(message: &impl Message) -> Vec<u8> {
        let mut bytes = (message.encoded_len() as u32).to_le_bytes().to_vec();
        message.encode(&mut bytes).expect("a vector takes everything");
        bytes
    }

    fn orders() -> Vec<u8> {
        let attempt = Some(wire::Attempt {
            instance: uuid::Uuid::nil().to_string(),
            migration: uuid::Uuid::nil().to_string(),
            attempt: 1,
            epoch: 2,
        });
        let grant = wire::Grant {
            attempt: attempt.clone(),
        };
        let call_off = wire::CallOff {
            attempt,
            end: true,
            reason: "asked to".to_owned(),
        };
        let hello = wire::Hello {
            oldest_version: 1,
            newest_version: 2,
        };
        let orders = [
            order::Order::Hello(hello),
            order::Order::Grant(grant),
            order::Order::CallOff(call_off),
        ];
        let order = |order| {
            frame(&Order {
                number: 7,
                order: Some(order),
            })
        };
        orders.map(order).concat()
    }

    fn reports() -> Vec<u8> {
        let progress = wire::Progress {
            rounds: vec![wire::Round::default(), wire::Round::default()],
            decision: "goes on".to_owned(),
            ..wire::Progress::default()
        };
        let go_sent = wire::GoSent {
            attempt: Some(wire::Attempt::default()),
            progress: Some(progress.clone()),
            ..wire::GoSent::default()
        };
        let refused = wire::Refused {
            reason: "no".to_owned(),
        };
        let reports = [
            report::Report::Refused(refused),
            report::Report::Progress(progress),
            report::Report::GoSent(go_sent),
        ];
        let report = |report| {
            frame(&Report {
                reply_to: 0,
                report: Some(report),
            })
        };
        reports.map(report).concat()
    }

    #[test]
    fn vmm_frames_are_read_or_refused() {
        feed("vmm_frames", &[orders(), reports()], vmm_frames);
    }

    #[test]
    fn carried_messages_are_read_or_refused_in_whatever_parts_they_come() {
        // Parts of 1 KiB; a nonce, a long piece and a short one.
        let nonce = [&[0, 0, 0, 0, 34, 0x12, 32][..], &[7; 32]].concat();
        let long = [&[0, 0, 0, 8, 3, 0x2a, 0x80, 0x10][..], &[1; 2048]].concat();
        let short = [0, 0, 0, 0, 3, 0x2a, 1, 9];
        let all = [&[3][..], &nonce, &long, &short].concat();
        feed("carried_messages", &[all], carried_messages);
    }

    #[test]
    fn lock_files_name_somebody_or_nobody() {
        let line = format!(
            r#"{{"host":"a","instance":"{}","name":"web","epoch":3,"pid":4711}}"#,
            uuid::Uuid::nil()
        );
        assert!(parse(line.as_bytes()).is_some());
        feed("lock_file", &[line.into_bytes()], lock_file);
    }
}
