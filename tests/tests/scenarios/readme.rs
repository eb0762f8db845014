//! README's examples do what it says they do: its commands, read from it and carried out by a shell as they stand there.
//!
//! The shell has a network, processes, `/tmp` and `/run` of its own, which go with it, and a folder that looks like a checkout that was built. What of
//! the commands is not carried out as it stands there is in [`SUBSTITUTIONS`].

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use ferry_tests::linux::BOOT;
use ferry_tests::waiting::MOVE;
use ferry_tests::{Call, Pair, binary};
use libtest_mimic::Trial;

use crate::scenario::in_a_network;

pub(crate) fn trials() -> Vec<Trial> {
    in_a_network![the_examples_of_the_readme_work_as_written]
}

const README: &str = include_str!("../../../README.md");
const BY_HAND: &str = "A first migration by hand";
const LINUX: &str = "Linux with a disk and a network, moved while a client talks to it";

/// What is carried out otherwise than it stands there, and why. Each is there exactly once.
const SUBSTITUTIONS: [(&str, &str); 8] = [
    // A test installs nothing; what the image is built from is there, or the image is.
    ("cargo xtask linux --install", "cargo xtask linux"),
    // How long agents take to start depends on what else the host has to do.
    (
        "& sleep 1\n",
        "& until ferry list && ferry --agent http://127.0.0.1:7401 list; do sleep 0.1; done\n",
    ),
    // What the guest prints at b may begin in the middle of its line.
    (
        "7401 console web",
        "7401 list; until ferry --agent http://127.0.0.1:7401 console web >web && grep -q 'HB ' web; do sleep 0.1; done; cat web",
    ),
    // A boot takes as long as it takes, and longer than the client waits where the host has too much else to do.
    (
        "cargo xtask echo",
        "until ferry console linux | grep -q 'ECHO port'; do sleep 0.5; done; cargo xtask echo",
    ),
    // Who knows when the client talks need not have it talk so long.
    (
        "--seconds 90 & sleep 60;",
        "--seconds 30 >answers & until grep -qs answers answers || ! kill -0 $!; do sleep 0.1; done;",
    ),
    // It is still talking when the move is over.
    ("wait $!", "kill -0 $!; wait $!; cat answers"),
    // Giving memory back and unmounting take longer where ring 0 is emulated and the host is busy.
    ("--size 128M", "--size 128M --timeout 5m"),
    ("stop linux", "stop linux --timeout 5m"),
];

/// Where the shell finds the checkout.
const CHECKOUT: &str = "/mnt";

fn the_examples_of_the_readme_work_as_written(pair: &mut Pair) -> Result<()> {
    let folder = pair.folder().to_owned();
    make_checkout(&folder)?;
    fs::write(folder.join("checkout/script"), script()?)?;

    let said = in_its_own_world(&folder)?
        .wait_for(4 * BOOT + 4 * MOVE)?
        .exit(0)?
        .stdout;

    let of = |command: &str| output_of(&said, command);
    ensure!(of("ferry migrate web --to b")?.contains("web is on b"), "{said}");
    let console = of("ferry --agent http://127.0.0.1:7401 list; until")?;
    ensure!(console.contains("HB ") && !console.contains("FAULT"), "{console}");
    let moved = of("until ferry console linux")?;
    for words in [
        "linux is on b",
        "answers over one connection, each in its turn; longest wait",
    ] {
        ensure!(moved.contains(words), "{words:?} is not in {moved}");
    }
    let console = of("ferry --agent http://127.0.0.1:7401 console linux")?;
    ensure!(
        console.contains("RECORDS n=") && !console.contains("broken"),
        "{console}"
    );
    ensure!(
        of("ferry --agent http://127.0.0.1:7401 stop linux")?.contains("stopped"),
        "{said}"
    );
    let left = output_of(&said, LEFT)?;
    ensure!(left.trim().is_empty(), "left behind: {left}");
    Ok(())
}

/// What follows a heading up to the next one.
fn section(heading: &str) -> Result<&'static str> {
    let (_, section) = README
        .split_once(&format!("\n## {heading}\n"))
        .with_context(|| format!("README has no heading {heading:?}"))?;
    Ok(section.split("\n## ").next().unwrap_or(section))
}

/// The lines of a section's block of code.
fn block(section: &str) -> String {
    let code = section.lines().filter_map(|line| line.strip_prefix("    "));
    code.map(|line| format!("{line}\n")).collect()
}

/// The commands to an agent that a section's text names, in their order: those that clean up come last.
fn named_commands(section: &str) -> String {
    let text: Vec<&str> = section.lines().filter(|line| !line.starts_with("    ")).collect();
    let text = text.join(" ");
    let quoted = text.split('`').skip(1).step_by(2);
    let commands = quoted.filter(|words| words.starts_with("ferry --agent "));
    commands.map(|words| format!("{words}\n")).collect()
}

/// README's commands, each told before it is carried out; ends with the first that fails. At the end it says what is left.
fn script() -> Result<String> {
    let (by_hand, linux) = (section(BY_HAND)?, section(LINUX)?);
    let closing = named_commands(by_hand);
    // The first guest goes before the second comes, for it keeps a processor busy; the agents serve both.
    let (delete, end) = closing.split_once("; ").context("README does not clean up")?;
    let (first, second) = (block(by_hand), block(linux) + &named_commands(linux));
    let mut commands = format!("{first}{delete}\n{second}{end}");
    for (from, to) in SUBSTITUTIONS {
        ensure!(
            commands.matches(from).count() == 1,
            "README does not say {from:?} once:\n{commands}"
        );
        commands = commands.replacen(from, to, 1);
    }
    let mut script = PREAMBLE.to_owned();
    for line in commands.lines() {
        let told = line.replace('\'', r"'\''");
        // An element of a list that is not its last does not end the shell by itself.
        script += &format!("echo '{MARK}{told}'\n{line}\n[ $? = 0 ] || exit\n");
    }
    Ok(script + CLOSING)
}

/// Before each command.
const MARK: &str = "-- ";

/// `cargo` is what it would build, for that is built.
const PREAMBLE: &str = r#"
set -e
cargo() {
    case "$*" in
    "build --release") ;;
    xtask\ *) shift && "$PWD/target/release/xtask" "$@" ;;
    *) echo "this test knows no cargo $*" >&2 && return 1 ;;
    esac
}
"#;

/// What the last part of the script is called.
const LEFT: &str = "what is left";

/// The agents were told to end. Then there is no process but this shell, no link but the loopback, no file of theirs.
const CLOSING: &str = r#"
wait || true
echo '-- what is left'
for process in /proc/[0-9]*; do
    [ $process = /proc/$$ ] || tr '\0' ' ' <$process/cmdline || true
done
ip -brief link show | grep -v '^lo ' || true
ls -A /tmp /run | grep -v -e '^$' -e ':$' || true
"#;

/// What was said from a command, given by how it begins, to the next.
fn output_of<'a>(said: &'a str, command: &str) -> Result<&'a str> {
    let (_, output) = said
        .split_once(&format!("{MARK}{command}"))
        .with_context(|| format!("{command:?} was not carried out:\n{said}"))?;
    let output = output.split(&format!("\n{MARK}")).next().unwrap_or(output);
    Ok(output.split_once('\n').map_or("", |(_, output)| output))
}

/// A folder as a checkout is after `cargo build --release`, beside it the other folders that the shell sees elsewhere.
fn make_checkout(folder: &Path) -> Result<()> {
    let guest = ferry_linux_guest::image()?;
    let cache = guest.kernel.ancestors().nth(2).context("the image lies in no cache")?;
    let release = folder.join("checkout/target/release");
    for made in [&release, &folder.join("checkout/cache/ferry"), &folder.join("tmp")] {
        fs::create_dir_all(made)?;
    }
    fs::copy(binary::ferry()?, release.join("ferry"))?;
    fs::copy(binary::xtask()?, release.join("xtask"))?;
    symlink(cache, folder.join("cache"))?;
    Ok(())
}

/// The script under way where nothing but what is installed is the host's. All of it ends with the call, and with this thread.
fn in_its_own_world(folder: &Path) -> Result<Call> {
    const ENTER: &str = r#"
        mount --bind "$1/checkout" "$2" && mount --bind "$(readlink "$1/cache")" "$2/cache/ferry" &&
        mount --bind "$1/tmp" /tmp && mount -t tmpfs -o mode=755 none /run &&
        cd "$2" && exec bash script"#;
    let mut command = Command::new("setpriv");
    command
        .args([
            "--pdeathsig",
            "KILL",
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ])
        .args(["bash", "-c", ENTER, "bash"])
        .arg(folder)
        .arg(CHECKOUT)
        .env("CARGO_TARGET_DIR", format!("{CHECKOUT}/target"))
        .env("XDG_CACHE_HOME", format!("{CHECKOUT}/cache"))
        .env("NO_COLOR", "1");
    Call::start(command, "README's commands".to_owned())
}
