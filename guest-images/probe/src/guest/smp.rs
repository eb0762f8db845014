//! Waking the other vCPUs: INIT and SIPI by the local APIC, one vCPU after the other.

use core::hint::spin_loop;
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

use crate::machine::clock;
use crate::memory::Stacks;
use crate::plan::Plan;
use crate::shared::ACCOUNTS;

/// Where woken vCPUs start: free memory below 1 MiB in all VMMs once the start info is read.
const TRAMPOLINE: u64 = 0x1_0000;

const ICR_LOW: u64 = 0xfee0_0300;
const ICR_HIGH: u64 = 0xfee0_0310;
const INIT: u32 = 0x4500;
const SIPI: u32 = 0x4600 | (TRAMPOLINE >> 12) as u32;

static PLAN: AtomicPtr<Plan> = AtomicPtr::new(ptr::null_mut());

unsafe extern "C" {
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static mut next_stack: u64;
    static mut next_cpu: u64;
}

/// Wakes vCPUs `1..cpus` (their APIC ids); each has arrived in ring 3 when this returns.
///
/// # Errors
/// The first vCPU that did not come up within two seconds.
pub fn wake(cpus: u32, stacks: Stacks, plan: &'static Plan) -> Result<(), u32> {
    if cpus == 1 {
        return Ok(());
    }
    PLAN.store(ptr::from_ref(plan).cast_mut(), Ordering::Release);
    let (start, end) = (&raw const ap_trampoline, &raw const ap_trampoline_end);
    // SAFETY: the trampoline's bytes go to memory below 1 MiB, which is mapped and which nothing else uses any more.
    unsafe { ptr::copy_nonoverlapping(start, TRAMPOLINE as *mut u8, end as usize - start as usize) };
    (1..cpus).try_for_each(|cpu| wake_one(cpu, stacks, plan))
}

fn wake_one(cpu: u32, stacks: Stacks, plan: &Plan) -> Result<(), u32> {
    // SAFETY: the vCPU woken last has taken its values, for it has arrived; this one is not awake yet.
    unsafe {
        ptr::write_volatile(&raw mut next_stack, stacks.top(cpu));
        ptr::write_volatile(&raw mut next_cpu, u64::from(cpu));
    }
    let arrived = || ACCOUNTS[cpu as usize].arrived.load(Ordering::Acquire);
    send(cpu, INIT);
    wait(plan.cycles(1), || false);
    send(cpu, SIPI);
    // A second SIPI if the first is lost, as the processors' manuals advise; a vCPU that runs ignores it.
    if wait(plan.cycles(100), arrived) {
        return Ok(());
    }
    send(cpu, SIPI);
    match wait(plan.cycles(2000), arrived) {
        true => Ok(()),
        false => Err(cpu),
    }
}

/// A woken vCPU is in ring 3: gives its plan.
pub fn arrive(cpu: u32) -> &'static Plan {
    ACCOUNTS[cpu as usize].arrived.store(true, Ordering::Release);
    // SAFETY: stored before this vCPU was woken, from a `&'static Plan`.
    unsafe { &*PLAN.load(Ordering::Acquire) }
}

fn send(apic_id: u32, command: u32) {
    // SAFETY: the local APIC is mapped here, in xAPIC mode as after reset.
    unsafe {
        ptr::write_volatile(ICR_HIGH as *mut u32, apic_id << 24);
        ptr::write_volatile(ICR_LOW as *mut u32, command);
    }
}

/// Waits until `done` or so many cycles are over; says whether it was `done`.
fn wait(cycles: u64, done: impl Fn() -> bool) -> bool {
    let start = clock();
    while clock().wrapping_sub(start) < cycles {
        if done() {
            return true;
        }
        spin_loop();
    }
    done()
}
