use tokio::net::TcpListener;

use super::*;

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (one, other) = tokio::join!(TcpStream::connect(address), listener.accept());
    (one.unwrap(), other.unwrap().0)
}

fn probe() -> Probe {
    Probe {
        id: Uuid::from_u128(1),
        secret: [0; 32],
        until: Instant::now() + VALID,
        streams: AtomicU16::new(0),
        taken: Mutex::default(),
    }
}

#[tokio::test]
async fn what_is_sent_is_counted_by_who_takes_it() {
    let (near, mut far) = pair().await;
    let bounded = probe();
    let (rate, taken) = tokio::join!(send(vec![near], SENDING), bounded.take_in(&mut far));
    taken.unwrap();
    assert!(rate.unwrap() > 0.0);
    assert!(bounded.taken().bytes > 0);
}

#[tokio::test]
async fn no_more_is_taken_than_a_probe_may_send() {
    let (mut near, mut far) = pair().await;
    let bounded = probe();
    bounded.taken().bytes = MOST_BYTES - 1000;
    let write = async {
        // It may be cut off in the middle of it.
        let _ = near.write_all(&[0; 4000]).await;
        let _ = near.shutdown().await;
    };
    let (taken, ()) = tokio::join!(bounded.take_in(&mut far), write);
    assert_eq!(taken.unwrap_err().kind(), io::ErrorKind::FileTooLarge);
}

#[tokio::test]
async fn a_probe_has_no_more_streams_than_are_told() {
    let (near, far) = pair().await;
    let bounded = probe();
    bounded.streams.store(MOST_STREAMS, Ordering::Relaxed);
    let (rate, ()) = tokio::join!(send(vec![near], SENDING), bounded.serve(far));
    assert!(rate.is_err());
    assert_eq!(bounded.taken().bytes, 0);
}

#[test]
fn the_last_half_is_told_with_its_time() {
    let began = Instant::now();
    let after = |ms| began + Duration::from_millis(ms);
    let mut taken = Taken::default();
    assert_eq!(taken.told(0, began), Told::default());
    // A slow beginning, and a link that carries four pieces in a hundred milliseconds.
    for ms in [100, 200, 300, 400, 425, 450, 475, 500] {
        taken.add(PIECE as u64, after(ms)).unwrap();
    }
    let told = Told {
        arrived: 7,
        all: 8 * PIECE as u64,
        half: 4 * PIECE as u64,
        half_us: 100_000,
    };
    assert_eq!(taken.told(7, after(500)), told);
    // Nobody has it keep more steps than there are pieces.
    (0..1000).for_each(|_| taken.add(1, after(600)).unwrap());
    assert_eq!(taken.steps.len(), 8);
}

#[test]
fn a_link_is_known_by_its_last_half_where_that_is_told() {
    let told = |all, half, half_us| Told {
        arrived: 100,
        all,
        half,
        half_us,
    };
    let rate = |told: &[Told]| rate(told, Duration::from_secs(1));
    // Of one that ended before the other, its half is of less.
    assert_eq!(rate(&[told(200, 90, 250_000), told(160, 100, 200_000)]), Some(360.0));
    assert_eq!(rate(&[told(0, 0, 0), told(0, 0, 0)]), Some(200.0));
    assert_eq!(rate(&[told(100, 50, 4_000_000)]), Some(100.0));
    assert_eq!(rate(&[told(100, 50, 1)]), Some(800.0));
    // More than came at all.
    assert_eq!(rate(&[told(100, u64::MAX, 1)]), Some(100.0));
    assert_eq!(rate(&[Told::default()]), None);
    assert_eq!(rate(&[]), None);
}

#[tokio::test]
async fn an_older_host_tells_what_arrived_alone() {
    let all = Told {
        arrived: 9,
        all: 8,
        half: 4,
        half_us: 3,
    };
    let alone = Told {
        arrived: 9,
        ..Told::default()
    };
    for (answered, told) in [(8, alone), (16, alone), (31, alone), (32, all)] {
        let (mut near, mut far) = pair().await;
        far.write_all(&all.bytes()[..answered]).await.unwrap();
        drop(far);
        assert_eq!(Told::read(&mut near, 10).await.unwrap(), told, "{answered}");
    }
    let (mut near, mut far) = pair().await;
    far.write_all(&all.bytes()).await.unwrap();
    assert_eq!(Told::read(&mut near, 5).await.unwrap().arrived, 5);
}

#[test]
fn a_probe_has_the_streams_of_its_migration_as_far_as_they_are_taken() {
    let table = [
        ((11, 0), 4),
        ((2, 0), 2),
        ((11, 16), 11),
        ((64, 16), 16),
        ((64, u32::MAX), 16),
        ((11, 3), 3),
        ((0, 16), 1),
    ];
    for ((wanted, taken), streams) in table {
        assert_eq!(streams_of_probe(wanted, taken), streams, "{wanted} of {taken}");
    }
}

#[test]
fn one_probe_is_made_at_a_time_and_by_its_id() {
    let probes = Probes::default();
    let first = probes.begin().unwrap().unwrap();
    assert!(probes.begin().unwrap().is_none());
    assert!(probes.find(first.id).is_some());
    assert!(probes.find(Uuid::from_u128(7)).is_none());
    let of_streams = Arc::new(Probe {
        until: Instant::now() - VALID,
        ..probe()
    });
    *probes.0.lock().unwrap() = Some(Arc::clone(&of_streams));
    assert!(probes.begin().unwrap().is_none());
    drop(of_streams);
    assert!(probes.begin().unwrap().is_some());
}
