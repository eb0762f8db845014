//! What happens to a journal: its process is killed, its file is torn, its disk is full or read-only.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};
use rustix::io::Errno;
use rustix::thread::UnshareFlags;
use tempfile::TempDir;

use super::{Journal, RowWrite, schema};
use crate::error_chain;

/// The journal that a process of this test writes to until it is killed.
const CHILD: &str = "FERRY_TEST_JOURNAL";
const CHILDS_TEST: &str = "agent::journal::fault_tests::what_is_acknowledged_is_written";
const GOLDEN: &str = include_str!("golden/schema-1.sql");

/// One transaction of two rows; what is written is acknowledged on standard output.
async fn write_pair(journal: &Journal, number: u32) {
    let write = journal.write(RowWrite::Test, move |t| {
        for half in ["a", "b"] {
            t.execute(
                "INSERT INTO meta VALUES(?1, ?2)",
                (format!("{half}-{number:04}"), "x".repeat(500)),
            )?;
        }
        Ok(())
    });
    write.await.unwrap();
    println!("\nwritten {number}");
    std::io::stdout().flush().unwrap();
}

/// How many pairs there are: whole ones, without a hole.
fn pairs(connection: &Connection) -> u32 {
    let mut query = connection
        .prepare("SELECT key FROM meta WHERE key LIKE 'a-%' OR key LIKE 'b-%' ORDER BY key")
        .unwrap();
    let keys: Vec<String> = query
        .query_map((), |row| row.get(0))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let count = u32::try_from(keys.len() / 2).unwrap();
    let whole: Vec<String> = ["a", "b"]
        .iter()
        .flat_map(|half| (1..=count).map(move |number| format!("{half}-{number:04}")))
        .collect();
    assert_eq!(keys, whole);
    count
}

fn reader(path: &Path) -> Connection {
    Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE).unwrap()
}

#[tokio::test]
async fn what_is_acknowledged_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let is_child = std::env::var_os(CHILD);
    let path = is_child
        .as_ref()
        .map_or_else(|| folder.path().join("journal.db"), PathBuf::from);
    let journal = Journal::open(&path).unwrap();
    let first = journal.read(|c| Ok(pairs(c))).await.unwrap() + 1;
    let last = if is_child.is_some() { u32::MAX } else { 3 };
    for number in first..=last {
        write_pair(&journal, number).await;
    }
    assert_eq!(pairs(&reader(&path)), 3);
}

fn start_child(path: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", CHILDS_TEST, "--nocapture"])
        .env(CHILD, path)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_process_killed_at_any_write_loses_nothing_that_it_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.db");
    let mut known = 0;
    for more in 0..10 {
        let mut child = start_child(&path);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let wanted = known + more;
        let acknowledged = |line: &String| line.strip_prefix("written ").and_then(|number| number.parse().ok());
        // Not one is waited for the first time: it dies while it starts or opens.
        let last: u32 = match more {
            0 => 0,
            _ => lines
                .find_map(|line| acknowledged(&line).filter(|&number| number >= wanted))
                .unwrap(),
        };
        kill(child);
        known = if path.exists() && more > 0 {
            pairs(&reader(&path))
        } else {
            0
        };
        assert!(known >= last, "{last} were acknowledged, {known} are there");
    }
    assert!(known >= 9);
}

#[test]
fn a_process_killed_while_it_upgrades_leaves_the_older_journal_or_the_newer() {
    let mut versions = Vec::new();
    for delay_ms in [0, 5, 10, 15, 20, 30, 40, 60] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.db");
        reader_of_new(&path).execute_batch(GOLDEN).unwrap();
        let child = start_child(&path);
        std::thread::sleep(Duration::from_millis(delay_ms));
        kill(child);

        let connection = reader(&path);
        let version: i64 = connection
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .unwrap();
        let has_audit = connection.prepare("SELECT * FROM audit").is_ok();
        let has_restarts = connection.prepare("SELECT restarts FROM instances").is_ok();
        assert_eq!((has_audit, has_restarts), (version > 1, version > 1));
        let rows: i64 = connection
            .query_row("SELECT count(*) FROM instances", (), |row| row.get(0))
            .unwrap();
        assert_eq!(rows, 2);
        versions.push(version);
        drop(connection);
        drop(Journal::open(&path).unwrap());
    }
    assert!(
        versions
            .iter()
            .all(|version| [1, schema::SCHEMA_VERSION].contains(version)),
        "{versions:?}"
    );
}

fn reader_of_new(path: &Path) -> Connection {
    Connection::open(path).unwrap()
}

/// A journal of ten pairs whose WAL is not moved into the database.
fn ten_pairs() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.db");
    let connection = Connection::open(&path).unwrap();
    schema::open(&connection).unwrap();
    for number in 1..=10 {
        connection
            .execute_batch(&format!(
                "BEGIN; INSERT INTO meta VALUES('a-{number:04}','{0}'); INSERT INTO meta VALUES('b-{number:04}','{0}'); COMMIT;",
                "x".repeat(500)
            ))
            .unwrap();
    }
    let copy = folder.path().join("copy.db");
    fs::copy(&path, &copy).unwrap();
    fs::copy(wal(&path), wal(&copy)).unwrap();
    (folder, copy)
}

fn wal(path: &Path) -> PathBuf {
    PathBuf::from(format!("{}-wal", path.display()))
}

/// A WAL begins with 32 bytes; each frame is a page of 4096 bytes behind 24 of its own (sqlite.org/fileformat2.html, 4.1).
const FRAME: u64 = 24 + 4096;

#[test]
fn a_torn_end_of_the_wal_loses_what_it_tore_and_nothing_before() {
    let (folder, whole) = ten_pairs();
    let mut found = Vec::new();
    for frame in 0..30 {
        for torn in [0, 1, 2000, FRAME - 1] {
            let path = folder.path().join("torn.db");
            fs::copy(&whole, &path).unwrap();
            fs::copy(wal(&whole), wal(&path)).unwrap();
            let file = File::options().write(true).open(wal(&path)).unwrap();
            file.set_len(32 + frame * FRAME + torn).unwrap();
            found.push(pairs(&reader(&path)));
        }
    }
    // The longer what is left of it, the more is there; and in the end everything.
    assert!(found.is_sorted(), "{found:?}");
    assert_eq!((found.first(), found.last()), (Some(&0), Some(&10)), "{found:?}");
}

#[test]
fn a_damaged_frame_of_the_wal_ends_it_there_and_the_journal_opens() {
    let (folder, whole) = ten_pairs();
    for frame in [0, 7, 15] {
        let path = folder.path().join(format!("damaged-{frame}.db"));
        fs::copy(&whole, &path).unwrap();
        fs::copy(wal(&whole), wal(&path)).unwrap();
        let file = File::options().write(true).open(wal(&path)).unwrap();
        file.write_all_at(b"damage", 32 + frame * FRAME + 1000).unwrap();
        drop(Journal::open(&path).unwrap());
        assert!(pairs(&reader(&path)) < 10);
    }
}

#[test]
fn a_damaged_database_is_refused_and_said_to_be() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.db");
    let connection = Connection::open(&path).unwrap();
    connection.execute_batch(GOLDEN).unwrap();
    connection.close().unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[0xA5; 3 * 4096], 4096).unwrap();
    let told = error_chain(&Journal::open(&path).err().unwrap());
    assert!(
        told.contains("damaged") && told.contains("docs/operations.md"),
        "{told}"
    );

    fs::write(
        &path,
        "not a journal at all, and longer than a header has to be to be looked at: ".repeat(20),
    )
    .unwrap();
    let told = error_chain(&Journal::open(&path).err().unwrap());
    assert!(told.contains("damaged"), "{told}");
}

/// Runs `body` with a folder that is a file system of its own, of 3 MiB. Nobody else sees it, and it goes with this. Skipped where
/// this process may not mount.
fn on_a_small_file_system(body: impl FnOnce(&Path) + Send + 'static) {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().to_owned();
    let inside = move || {
        if unshare_mounts() == Err(Errno::PERM) {
            eprintln!("skipped: this process may not mount a file system");
            return;
        }
        mount(&["--make-rprivate", "/"]);
        mount(&[
            "-t",
            "tmpfs",
            "-o",
            "size=3m",
            "ferry-test",
            &place.display().to_string(),
        ]);
        body(&place);
    };
    // What is started from a thread sees what it sees.
    let ended = std::thread::spawn(inside).join();
    ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

#[expect(
    deprecated,
    reason = "its successor is unsafe for the sake of other flags than this one"
)]
fn unshare_mounts() -> rustix::io::Result<()> {
    rustix::thread::unshare(UnshareFlags::NEWNS)
}

fn mount(arguments: &[&str]) {
    let output = Command::new("mount").args(arguments).output().unwrap();
    assert!(output.status.success(), "mount {arguments:?}: {output:?}");
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// Takes all the room that is left.
fn fill(path: &Path) {
    let mut filler = File::create(path).unwrap();
    while filler.write_all(&[0; 4096]).is_ok() {}
}

#[test]
fn a_full_disk_is_told_and_nothing_is_lost() {
    on_a_small_file_system(|folder| {
        let (path, filler) = (folder.join("journal.db"), folder.join("filler"));
        let journal = Journal::open(&path).unwrap();
        block_on(write_pair(&journal, 1));
        let mut writable = journal.writable();
        assert!(*writable.borrow_and_update());
        fill(&filler);
        let mut big = 0;
        let failed = loop {
            let key = format!("big-{big}");
            let wrote = block_on(journal.write(RowWrite::Test, move |t| {
                t.execute("INSERT INTO meta VALUES(?1, ?2)", (key, "x".repeat(100_000)))
            }));
            match wrote {
                Ok(_) if big < 100 => big += 1,
                Ok(_) => panic!("10 MB went into 3 MiB"),
                Err(error) => break error_chain(&error),
            }
        };
        assert!(
            failed.contains("no room is left") && failed.contains("journal.db"),
            "{failed}"
        );

        assert!(
            writable.has_changed().unwrap(),
            "nobody was told that it cannot be written"
        );

        fs::remove_file(&filler).unwrap();
        block_on(write_pair(&journal, 2));
        assert!(*writable.borrow_and_update());
        drop(journal);
        let connection = reader(&path);
        assert_eq!(pairs(&connection), 2);
        let kept: i64 = connection
            .query_row("SELECT count(*) FROM meta WHERE key LIKE 'big-%'", (), |row| row.get(0))
            .unwrap();
        assert_eq!(kept, big);
    });
}

#[tokio::test]
async fn a_journal_that_nobody_writes_to_is_told_to_take_no_writes_and_to_take_them_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.db");
    let journal = Journal::open(&path).unwrap();
    let mut writable = journal.writable();
    let patience = Duration::from_secs(60);
    let other = Connection::open(&path).unwrap();

    other.execute_batch("ALTER TABLE meta RENAME TO mislaid").unwrap();
    let noticed = tokio::time::timeout(patience, writable.wait_for(|writable| !writable));
    assert!(noticed.await.is_ok(), "nobody noticed");

    other.execute_batch("ALTER TABLE mislaid RENAME TO meta").unwrap();
    let tried = tokio::time::timeout(patience, writable.wait_for(|writable| *writable));
    assert!(tried.await.is_ok(), "nobody tried again");
}

#[test]
fn an_agent_does_not_start_without_room_or_on_a_disk_that_is_read_only() {
    on_a_small_file_system(|folder| {
        let filler = folder.join("filler");
        fill(&filler);
        let full = error_chain(&Journal::open(&folder.join("journal.db")).err().unwrap());
        assert!(full.contains("no room is left"), "{full}");
        fs::remove_file(&filler).unwrap();

        let place = folder.display().to_string();
        let deadline = Instant::now() + Duration::from_secs(10);
        // The writer of the journal that did not open is ending.
        while !Command::new("mount")
            .args(["-o", "remount,ro", &place])
            .output()
            .unwrap()
            .status
            .success()
        {
            assert!(Instant::now() < deadline, "it stays busy");
            std::thread::sleep(Duration::from_millis(10));
        }
        let readonly = error_chain(&Journal::open(&folder.join("journal.db")).err().unwrap());
        assert!(
            readonly.contains("cannot be written") && readonly.contains("read-only"),
            "{readonly}"
        );
    });
}
