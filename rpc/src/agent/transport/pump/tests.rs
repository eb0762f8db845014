//! Pumps back to back, as two agents have them, with a VMM's socket at either end; and one pump with a peer that misbehaves.

use std::future::Future;
use std::time::Duration;

use ferry_proto::agent::v1::StreamTaken;
use rustix::net::Shutdown;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::super::call::{WAITING, request, response};
use super::*;

/// What is waited for in these tests comes at once, or never.
const DEADLINE: Duration = Duration::from_secs(30);
/// What is not to happen has this long to happen.
const A_WHILE: Duration = Duration::from_millis(200);

type Pumping = JoinHandle<Result<(), Cut>>;

/// A pump between a call and what a VMM would have.
fn pumping(mut hearing: Hearing, outgoing: Outgoing) -> (UnixStream, Pumping) {
    let (socket, handed) = pair().unwrap();
    let vmm = StdUnixStream::from(handed);
    vmm.set_nonblocking(true).unwrap();
    let task = tokio::spawn(async move { pump(socket, &mut hearing, &outgoing).await });
    (UnixStream::from_std(vmm).unwrap(), task)
}

/// What is said in a call, and heard at its other end; with the status of an answer at its end, or without as a request.
fn said() -> (Outgoing, Hearing) {
    let (outgoing, request) = request();
    (outgoing, Hearing::new(request.into_body()))
}

fn answered() -> (Outgoing, Hearing) {
    let (outgoing, response) = response();
    (outgoing, Hearing::new(response.into_body()))
}

/// Both ends of a stream, and the pumps between them.
fn stream() -> ([UnixStream; 2], [Pumping; 2]) {
    let (to_b, from_a) = said();
    let (to_a, from_b) = answered();
    let (vmm_a, pump_a) = pumping(from_b, to_b);
    let (vmm_b, pump_b) = pumping(from_a, to_a);
    ([vmm_a, vmm_b], [pump_a, pump_b])
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(DEADLINE, what).await.expect("it happens")
}

async fn ended(pumping: Pumping) -> Result<(), Cut> {
    soon(pumping).await.unwrap()
}

async fn read_to_end(vmm: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    soon(vmm.read_to_end(&mut all)).await.unwrap();
    all
}

/// Bytes in which none that is lost or comes twice goes unnoticed.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32 / 4).flat_map(u32::to_le_bytes).collect()
}

#[tokio::test]
async fn what_is_said_arrives_whole_and_each_side_says_its_own_end() {
    let ([mut vmm_a, mut vmm_b], pumps) = stream();
    let said = pattern(1 << 20);
    let (sent, answer) = (said.clone(), pattern(1000));
    let speaking = tokio::spawn(async move {
        vmm_a.write_all(&sent).await.unwrap();
        vmm_a.shutdown().await.unwrap();
        vmm_a
    });
    assert!(read_to_end(&mut vmm_b).await == said);
    let mut vmm_a = soon(speaking).await.unwrap();

    // Only one direction has ended.
    vmm_b.write_all(&answer).await.unwrap();
    vmm_b.shutdown().await.unwrap();
    assert!(read_to_end(&mut vmm_a).await == answer);

    for pump in pumps {
        assert!(ended(pump).await.is_ok());
    }
}

#[tokio::test]
async fn a_vmm_that_does_not_read_has_the_other_one_wait_and_nothing_is_collected() {
    let ([mut vmm_a, mut vmm_b], _pumps) = stream();
    let said = pattern(8 << 20);
    let mut taken = 0;
    while let Ok(written) = timeout(A_WHILE, vmm_a.write(&said[taken..])).await {
        taken += written.unwrap();
        assert!(taken < said.len(), "nobody reads, and all of it was taken");
    }
    // Two sockets, and in each pump a piece that was read, beside those that wait for the call.
    let most = 2 * 2 * SOCKET_BUFFER + (2 + WAITING) * PIECE;
    assert!(taken <= most, "{taken} bytes are under way");

    let sent = said.clone();
    let speaking = tokio::spawn(async move {
        vmm_a.write_all(&sent[taken..]).await.unwrap();
    });
    let mut all = vec![0; said.len()];
    soon(vmm_b.read_exact(&mut all)).await.unwrap();
    soon(speaking).await.unwrap();
    assert!(all == said);
}

#[tokio::test]
async fn one_that_listens_no_more_may_still_speak() {
    let ([mut vmm_a, mut vmm_b], pumps) = stream();
    rustix::net::shutdown(&vmm_a, Shutdown::Read).unwrap();
    for _ in 0..20 {
        vmm_b.write_all(b"ping").await.unwrap();
        tokio::task::yield_now().await;
    }
    vmm_a.write_all(b"GO").await.unwrap();
    let mut heard = [0; 2];
    soon(vmm_b.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"GO");
    assert!(pumps.iter().all(|pump| !pump.is_finished()));
}

#[tokio::test]
async fn what_comes_for_one_that_hung_up_cuts_the_stream() {
    let ([mut vmm_a, mut vmm_b], [pump_a, pump_b]) = stream();
    vmm_a.write_all(b"last words").await.unwrap();
    drop(vmm_a);
    assert_eq!(read_to_end(&mut vmm_b).await, b"last words");
    assert!(!pump_b.is_finished());

    let error = loop {
        match soon(vmm_b.write(b"ping")).await {
            Ok(_) => tokio::task::yield_now().await,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    assert!(matches!(ended(pump_a).await, Err(Cut::NobodyListens)));
    assert!(matches!(ended(pump_b).await, Err(Cut::CallEnded)));
}

/// A pump whose call is the test's: the VMM's end, what the peer says, what it is told.
fn with_a_peer() -> (UnixStream, Outgoing, Hearing, Pumping) {
    let (says, incoming) = answered();
    let (outgoing, told) = said();
    let (vmm, task) = pumping(incoming, outgoing);
    (vmm, says, told, task)
}

#[tokio::test]
async fn a_call_that_ends_without_an_end_cuts_the_stream() {
    let (mut vmm, says, _told, task) = with_a_peer();
    says.send(Ok(bytes(b"half a"))).await.unwrap();
    drop(says);
    assert_eq!(read_to_end(&mut vmm).await, b"half a");
    assert!(matches!(ended(task).await, Err(Cut::CallEnded)));
    assert!(soon(vmm.write(b"x")).await.is_err());
}

#[tokio::test]
async fn the_end_of_a_call_is_noticed_while_the_vmm_is_silent_or_does_not_read() {
    let (_silent, _says, told, task) = with_a_peer();
    drop(told);
    assert!(matches!(ended(task).await, Err(Cut::CallEnded)));

    let (_deaf, says, told, task) = with_a_peer();
    while let Ok(taken) = timeout(A_WHILE, says.send(Ok(bytes(&[0; PIECE])))).await {
        taken.unwrap();
    }
    drop(told);
    assert!(matches!(ended(task).await, Err(Cut::CallEnded)));
}

#[tokio::test]
async fn a_call_that_fails_cuts_the_stream_and_says_why() {
    let (mut vmm, says, _told, task) = with_a_peer();
    says.send(Err(Status::unavailable("the wire is gone"))).await.unwrap();
    let cut = ended(task).await.unwrap_err();
    assert!(cut.to_string().contains("the wire is gone"), "{cut}");
    assert!(read_to_end(&mut vmm).await.is_empty());
}

/// A message with these bytes.
fn bytes(said: &[u8]) -> Bytes {
    message(Piece::Bytes(Bytes::copy_from_slice(said)))
}

/// What a pump makes of one message of the peer's; nothing of it reaches the VMM.
async fn refused(said: Bytes) -> String {
    let (mut vmm, says, _told, task) = with_a_peer();
    says.send(Ok(said)).await.unwrap();
    assert!(read_to_end(&mut vmm).await.is_empty());
    ended(task).await.unwrap_err().to_string()
}

#[tokio::test]
async fn what_does_not_belong_there_cuts_the_stream() {
    assert!(refused(bytes(&vec![0; PIECE + 1])).await.contains("too large"));
    let words = [Piece::Taken(StreamTaken {}), Piece::Nonce(vec![0; 32])];
    for word in words {
        assert!(refused(message(word)).await.contains("the beginning"));
    }
    assert!(refused(Bytes::from_static(&[0; 5])).await.contains("empty"));
}

#[tokio::test]
async fn a_piece_of_no_bytes_changes_nothing() {
    let (mut vmm, says, _told, task) = with_a_peer();
    for said in [&b""[..], b"x", b""] {
        says.send(Ok(bytes(said))).await.unwrap();
    }
    let mut heard = [0];
    soon(vmm.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"x");
    assert!(!task.is_finished());
}
