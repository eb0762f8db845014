use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use vm_memory::{Bytes, GuestAddress};

use super::super::MemoryOptions;
use super::spare::restricted;
use super::*;

const PAGE: u64 = 4096;

fn memory() -> GuestMemory {
    GuestMemory::new(MemoryOptions {
        bytes: 16 << 20,
        hugetlb: false,
        expect_incoming: false,
    })
    .expect("memory")
}

/// Without io_uring there is nothing to be tested here, and that is not to be passed over.
fn ring(file: impl Into<OwnedFd>) -> Ring<u64> {
    Ring::new(Arc::new(File::from(file.into()))).expect("a host with io_uring (kernel.io_uring_disabled=0)")
}

fn land(ring: &mut Ring<u64>) -> (u64, io::Result<()>) {
    loop {
        ring.submit();
        match ring.land() {
            Some(landed) => return landed,
            None => ring.wait(None),
        }
    }
}

fn span(address: u64, len: u32) -> Span {
    Span { address, len }
}

#[test]
fn as_many_as_there_is_room_for_are_under_way_and_each_lands_once() {
    let (memory, file) = (memory(), tempfile::tempfile().expect("file"));
    for number in 0..DEPTH as u64 {
        file.write_all_at(&[number as u8; 4096], number * PAGE).expect("file");
    }
    let mut ring = ring(file);
    for number in 0..DEPTH as u64 {
        assert!(ring.has_room_for(1));
        let spans = [span(number * 2 * PAGE, 4096)];
        ring.read(number, &memory, number * PAGE, &spans).expect("begun");
    }
    assert!(!ring.has_room_for(1));
    let mut landed: Vec<u64> = (0..DEPTH)
        .map(|_| land(&mut ring))
        .map(|(number, done)| {
            done.expect("read");
            number
        })
        .collect();
    landed.sort_unstable();
    assert_eq!(landed, (0..DEPTH as u64).collect::<Vec<_>>());
    assert!(ring.in_flight() == 0 && ring.land().is_none());
    for number in 0..DEPTH as u64 {
        let mut found = [0xff; 4096];
        memory
            .tracked()
            .read_slice(&mut found, GuestAddress(number * 2 * PAGE))
            .expect("memory");
        assert_eq!(found, [number as u8; 4096]);
    }
    let dirty: u64 = memory.device_dirty().runs().iter().map(|run| run.count).sum();
    assert_eq!(dirty, DEPTH as u64);
}

#[test]
fn what_falls_short_is_continued() {
    let (memory, (mine, mut theirs)) = (memory(), io::pipe().expect("pipe"));
    let mut ring = ring(mine);
    ring.read(7, &memory, 0, &[span(10, 4), span(100, 4)]).expect("begun");
    ring.submit();
    theirs.write_all(b"abcde").expect("some");
    ring.wait(None);
    assert!(ring.land().is_none());
    theirs.write_all(b"fgh").expect("the rest");
    let (number, done) = land(&mut ring);
    done.expect("read");
    let mut found = [0; 8];
    memory
        .tracked()
        .read_slice(&mut found[..4], GuestAddress(10))
        .expect("memory");
    memory
        .tracked()
        .read_slice(&mut found[4..], GuestAddress(100))
        .expect("memory");
    assert_eq!((number, &found), (7, b"abcdefgh"));
}

#[test]
fn more_buffers_than_one_call_takes_are_written_and_durable() {
    let (memory, mut file) = (memory(), tempfile::tempfile().expect("file"));
    let spans: Vec<Span> = (0..MAX_BUFFERS as u64 + 500)
        .map(|number| span(number * 8, 4))
        .collect();
    for span in &spans {
        memory
            .tracked()
            .write_obj(span.address as u32, GuestAddress(span.address))
            .expect("memory");
    }
    let mut ring = ring(file.try_clone().expect("descriptor"));
    ring.write(0, &memory, 0, &spans).expect("begun");
    land(&mut ring).1.expect("written");
    ring.sync(1, &memory).expect("begun");
    assert_eq!(land(&mut ring).0, 1);
    let mut found = Vec::new();
    file.read_to_end(&mut found).expect("file");
    let expected: Vec<u8> = spans
        .iter()
        .flat_map(|span| (span.address as u32).to_le_bytes())
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn file_that_ends_early_is_an_error() {
    let (memory, file) = (memory(), tempfile::tempfile().expect("file"));
    file.write_all_at(b"short", 0).expect("file");
    let mut ring = ring(file);
    ring.read(0, &memory, 0, &[span(0, 9)]).expect("begun");
    assert_eq!(
        land(&mut ring).1.expect_err("too short").kind(),
        io::ErrorKind::UnexpectedEof
    );
}

#[test]
fn spans_outside_memory_are_refused_before_anything_moves() {
    let mut ring = ring(tempfile::tempfile().expect("file"));
    let (work, error) = ring.read(3, &memory(), 0, &[span(16 << 20, 1)]).expect_err("outside");
    assert_eq!(
        (work, error.kind(), ring.in_flight()),
        (3, io::ErrorKind::InvalidInput, 0)
    );
}

#[test]
fn memory_of_a_ring_that_is_left_in_flight_stays() {
    let (memory, (mine, _theirs)) = (memory(), UnixStream::pair().expect("pair"));
    let start = memory.host_ranges().next().expect("memory").0.addr();
    let mut ring = ring(mine);
    ring.read(0, &memory, 0, &[span(0, 4)]).expect("begun");
    ring.submit();
    drop((ring, memory));
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let holds = |line: &str| {
        let (from, to) = line.split_once(' ')?.0.split_once('-')?;
        let (from, to) = (
            usize::from_str_radix(from, 16).ok()?,
            usize::from_str_radix(to, 16).ok()?,
        );
        Some((from..to).contains(&start))
    };
    assert!(maps.lines().filter_map(holds).any(|holds| holds));
}

/// What a process that was taken over could ask of a ring: nothing that its filters do not allow anyway.
#[test]
fn restricted_ring_does_nothing_but_what_disks_need() {
    let mut ring = restricted().expect("a host with io_uring");
    let path = c"/etc/hostname";
    let file = types::Fd(tempfile::tempfile().map(OwnedFd::from).expect("file").as_raw_fd());
    let forbidden = [
        opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).build(),
        opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
        opcode::Close::new(file).build(),
        opcode::Nop::new().build(),
        opcode::Fsync::new(file).build().flags(Flags::ASYNC),
    ];
    for entry in forbidden {
        // SAFETY: the path lives as long as the process; nothing else is pointed to.
        unsafe { ring.submission().push(&entry) }.expect("room");
        ring.submit_and_wait(1).expect("an answer");
        let result = ring.completion().next().map(|told| told.result());
        assert_eq!(result, Some(-libc::EACCES), "{entry:?}");
    }
    let registered = ring.submitter().register_files(&[0]).expect_err("restricted");
    assert_eq!(registered.raw_os_error(), Some(libc::EACCES));
    let lifted = ring
        .submitter()
        .register_restrictions(&mut [Restriction::sqe_op(opcode::OpenAt::CODE)]);
    assert!(lifted.is_err());
}
