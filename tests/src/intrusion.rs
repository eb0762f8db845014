//! A process that somebody else has taken over, as the kernel sees it.

use std::fs;

use anyhow::{Context, Result, bail};
use nix::libc::c_long;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::waiting::{CALL, until};

/// Makes one thread of a process make a system call that it would never make, with whatever arguments it has at hand. The process may
/// die of it: that is not waited for.
///
/// # Errors
/// There is no such thread, it may not be traced, or it never waits in the kernel.
pub fn force_call(process: u32, thread: &str, call: c_long) -> Result<()> {
    let thread = find(process, thread)?;
    until("a thread waits in the kernel", CALL, || {
        ptrace::seize(thread, ptrace::Options::empty()).context("failed to trace the thread")?;
        ptrace::interrupt(thread)?;
        waitpid(thread, Some(WaitPidFlag::__WALL))?;
        let forced = enter_the_kernel(thread, call);
        ptrace::detach(thread, None)?;
        Ok(forced?.then_some(()))
    })
}

/// A thread that waits in a call has the instruction that made it right behind it: it is made to execute that once more.
fn enter_the_kernel(thread: Pid, call: c_long) -> Result<bool> {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    let mut registers = ptrace::getregs(thread)?;
    let instruction = registers.rip - SYSCALL.len() as u64;
    let word = ptrace::read(thread, instruction as ptrace::AddressType)?;
    if word.to_le_bytes()[..2] != SYSCALL {
        return Ok(false);
    }
    registers.rip = instruction;
    registers.rax = call.cast_unsigned();
    // Else the kernel would go back to the call that it was waiting in.
    registers.orig_rax = u64::MAX;
    ptrace::setregs(thread, registers)?;
    Ok(true)
}

/// The thread with this name; the first one is `main`, whatever it calls itself.
fn find(process: u32, name: &str) -> Result<Pid> {
    let id = |number: u32| i32::try_from(number).map(Pid::from_raw).context("no process id");
    if name == "main" {
        return id(process);
    }
    let tasks = fs::read_dir(format!("/proc/{process}/task")).context("no such process")?;
    for task in tasks.flatten() {
        let comm = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if comm.trim_end() == name {
            return id(task.file_name().to_string_lossy().parse()?);
        }
    }
    bail!(
        "process {process} has no thread {name}: {:?}",
        crate::process::threads(process)
    )
}
