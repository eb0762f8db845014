use std::io::Read;
use std::os::unix::net::UnixStream;
use std::thread;

use vm_memory::{Bytes, GuestAddress};

use super::super::MemoryOptions;
use super::*;

fn memory() -> GuestMemory {
    memory_of(64 << 20, false).expect("memory")
}

fn memory_of(bytes: u64, hugetlb: bool) -> Result<GuestMemory, MemoryError> {
    GuestMemory::new(MemoryOptions {
        bytes,
        hugetlb,
        expect_incoming: true,
    })
}

/// Watched memory; none where this process may not watch, which it says.
fn watched(memory: &GuestMemory, absent: &[FrameRun]) -> Option<AbsentPages> {
    match memory.watch(absent.iter().copied()) {
        Err(MemoryError::WatchDenied) => {
            eprintln!("skipped: {}", MemoryError::WatchDenied);
            None
        }
        watched => Some(watched.expect("watched")),
    }
}

fn run(first: u64, count: u64) -> FrameRun {
    FrameRun { first, count }
}

fn read(memory: &GuestMemory, frame: u64) -> u64 {
    let address = GuestAddress(frame * PAGE_SIZE + 8);
    memory.tracked().read_obj(address).expect("guest memory")
}

fn write(memory: &GuestMemory, frame: u64, value: u64) {
    let address = GuestAddress(frame * PAGE_SIZE + 8);
    memory.tracked().write_obj(value, address).expect("guest memory");
}

fn page_of(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat((PAGE_SIZE / 8) as usize)
}

fn first_touched(pages: &AbsentPages) -> u64 {
    let mut frames = Vec::new();
    while frames.is_empty() {
        pages.touched(Duration::from_secs(10), &mut frames).expect("told");
    }
    frames[0]
}

#[test]
fn who_touches_an_absent_page_waits_until_it_is_supplied() {
    let memory = memory();
    write(&memory, 7, 1);
    write(&memory, 8, 2);
    let Some(pages) = watched(&memory, &[run(7, 1)]) else {
        return;
    };
    let reader = thread::spawn({
        let memory = memory.clone();
        move || read(&memory, 7)
    });
    assert_eq!(first_touched(&pages), 7);
    pages.supply(&[run(7, 1)], &page_of(77)).expect("supplied");
    assert_eq!(reader.join().expect("thread"), 77);
    assert_eq!(read(&memory, 8), 2);
    pages.stop_watching().expect("stopped");
}

#[test]
fn pages_that_are_there_are_passed_over_and_zeroes_are_zero() {
    let memory = memory();
    write(&memory, 101, 5);
    let Some(pages) = watched(&memory, &[run(100, 1), run(102, 600)]) else {
        return;
    };
    pages
        .supply(&[run(100, 3), run(300, 1)], &page_of(9).repeat(4))
        .expect("supplied");
    pages.supply_zeroes(run(100, 602)).expect("zeroes");
    let found = [100, 101, 102, 103, 300, 701].map(|frame| read(&memory, frame));
    assert_eq!(found, [9, 5, 9, 0, 9, 0]);
    pages.stop_watching().expect("stopped");
}

#[test]
fn the_kernel_waits_as_well() {
    let memory = memory();
    let Some(pages) = watched(&memory, &[run(20, 2)]) else {
        return;
    };
    let (mine, mut theirs) = UnixStream::pair().expect("pair");
    let sender = thread::spawn({
        let memory = memory.clone();
        // As a system call of a device's thread does it.
        move || memory.send(mine.as_fd(), b"", &[run(20, 2)])
    });
    assert_eq!(first_touched(&pages), 20);
    pages.supply_zeroes(run(20, 2)).expect("zeroes");
    sender.join().expect("thread").expect("sent");
    let mut sent = vec![1; 2 * PAGE_SIZE as usize];
    theirs.read_exact(&mut sent).expect("two pages");
    assert!(sent.iter().all(|&byte| byte == 0));
    pages.stop_watching().expect("stopped");
}

#[test]
fn what_is_absent_when_nobody_watches_any_more_is_zero() {
    let memory = memory();
    write(&memory, 3, 4);
    let Some(pages) = watched(&memory, &[run(3, 1)]) else {
        return;
    };
    pages.stop_watching().expect("stopped");
    assert_eq!(read(&memory, 3), 0);
}

#[test]
fn pages_on_both_sides_of_where_huge_pages_are_wanted_are_supplied_together() {
    let memory = memory();
    memory.advise_huge(run(512, 512)).expect("advised");
    let Some(pages) = watched(&memory, &[]) else { return };
    let contents: Vec<u8> = (510..1030).flat_map(page_of).collect();
    pages.supply(&[run(510, 520)], &contents).expect("supplied");
    pages.supply_zeroes(run(400, 700)).expect("zeroes");
    assert!((510..1030).all(|frame| read(&memory, frame) == frame));
    assert_eq!((read(&memory, 400), read(&memory, 1099)), (0, 0));
    pages.stop_watching().expect("stopped");
}

#[test]
fn pages_that_came_one_by_one_are_one_huge_page_again() {
    let memory = memory();
    let Some(pages) = watched(&memory, &[]) else { return };
    for frame in 512..1024 {
        pages.supply(&[run(frame, 1)], &page_of(frame)).expect("supplied");
    }
    pages.stop_watching().expect("stopped");
    assert_eq!(memory.populated().expect("scan").huge, []);
    if !pages.make_huge(run(512, 512)).expect("asked") {
        eprintln!("skipped: this host has no huge page left");
        return;
    }
    assert_eq!(memory.populated().expect("scan").huge, [run(512, 512)]);
    assert!((512..1024).all(|frame| read(&memory, frame) == frame));
}

#[test]
fn pages_of_the_pool_come_as_a_whole() {
    let Ok(memory) = memory_of(4 * HUGE_PAGE_SIZE, true) else {
        eprintln!("skipped: this host's pool of huge pages is too small");
        return;
    };
    write(&memory, 7, 1);
    write(&memory, 600, 2);
    let Some(pages) = watched(&memory, &[run(0, 512), run(1024, 512)]) else {
        return;
    };
    let reader = thread::spawn({
        let memory = memory.clone();
        move || read(&memory, 1030)
    });
    assert_eq!(first_touched(&pages), 1024);
    pages
        .supply(&[run(1024, 512)], &page_of(9).repeat(512))
        .expect("supplied");
    assert_eq!(reader.join().expect("thread"), 9);
    // Again, with one that nobody touched; and one that is there stays as it is.
    pages
        .supply(&[run(0, 1024)], &page_of(8).repeat(1024))
        .expect("supplied");
    pages.supply_zeroes(run(0, 2048)).expect("zeroes");
    let found = [7, 600, 1030, 1600].map(|frame| read(&memory, frame));
    assert_eq!(found, [8, 2, 9, 0]);
    pages.stop_watching().expect("stopped");
}

#[test]
fn a_run_outside_memory_is_refused() {
    let memory = memory();
    let Some(pages) = watched(&memory, &[]) else { return };
    assert!(pages.supply_zeroes(run(u64::MAX, 2)).is_err());
    assert!(pages.supply(&[run(0, 2)], &page_of(1)).is_err());
    assert!(matches!(
        super::tests::memory().watch([run(1 << 40, 1)].into_iter()),
        Err(MemoryError::OutOfBounds { .. })
    ));
    pages.stop_watching().expect("stopped");
}
