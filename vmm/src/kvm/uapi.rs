//! Ioctls and layouts of `linux/kvm.h` that kvm-ioctls does not wrap.

use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_debugregs, kvm_device_attr, kvm_dirty_log, kvm_irqchip, kvm_lapic_state,
    kvm_mp_state, kvm_pit_state2, kvm_regs, kvm_sregs2, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

/// A structure of KVM's interface that is saved as bytes.
///
/// # Safety
///
/// Only for `repr(C)` structures made of integers, without padding between them, for which any bytes are a value.
pub(crate) unsafe trait Uapi: Copy + Default {}

macro_rules! uapi {
    ($($name:ident = $size:literal),* $(,)?) => {$(
        // SAFETY: generated from linux/kvm.h, where these have explicit padding fields; the size is checked below.
        unsafe impl Uapi for $name {}
        const _: () = assert!(size_of::<$name>() == $size);
    )*};
}

uapi! {
    kvm_regs = 144,
    kvm_sregs2 = 320,
    kvm_debugregs = 128,
    kvm_vcpu_events = 64,
    kvm_xcrs = 392,
    kvm_lapic_state = 1024,
    kvm_irqchip = 520,
    kvm_pit_state2 = 112,
    kvm_mp_state = 4,
}

/// The bytes of a structure.
pub(crate) fn to_bytes<T: Uapi>(value: &T) -> Vec<u8> {
    let start: *const u8 = (&raw const *value).cast();
    // SAFETY: `Uapi` promises plain integers without padding, so each of its bytes is initialised.
    unsafe { std::slice::from_raw_parts(start, size_of::<T>()) }.to_vec()
}

/// The structure that has these bytes, or `None` if there are more or fewer of them.
pub(crate) fn from_bytes<T: Uapi>(bytes: &[u8]) -> Option<T> {
    if bytes.len() != size_of::<T>() {
        return None;
    }
    // SAFETY: the length was checked, and `Uapi` promises that any bytes are a value; read_unaligned needs no alignment.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// Reads the dirty log of a slot of `pages` pages; `words` is overwritten.
pub(super) fn dirty_log(vm: &impl AsRawFd, slot: u32, pages: u64, words: &mut [u64]) -> Result<(), Errno> {
    assert!(words.len() as u64 * 64 >= pages, "the kernel writes one bit per page");
    let mut arguments = kvm_dirty_log {
        slot,
        ..Default::default()
    };
    arguments.__bindgen_anon_1.dirty_bitmap = words.as_mut_ptr().cast();
    // SAFETY: the bitmap has a bit for each page of the slot, rounded up to words, which is what the kernel writes.
    check(unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &arguments) })
}

/// Write-protects again those pages of `first_page..first_page + pages` whose bits are set, and clears them in the log.
pub(super) fn clear_dirty_log(
    vm: &impl AsRawFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    words: &[u64],
) -> Result<(), Errno> {
    assert!(
        words.len() as u64 * 64 >= u64::from(pages),
        "the kernel reads one bit per page"
    );
    let mut arguments = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        ..Default::default()
    };
    arguments.__bindgen_anon_1.dirty_bitmap = words.as_ptr().cast_mut().cast();
    // SAFETY: the bitmap has a bit for each of the pages; the kernel only reads it.
    check(unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &arguments) })
}

/// Write-protects again the pages of all ring entries that were marked as harvested.
pub(super) fn reset_dirty_rings(vm: &impl AsRawFd) -> Result<(), Errno> {
    loop {
        // SAFETY: takes no argument.
        match check(unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) }) {
            // A signal on the way; the next call goes on where it stopped.
            Err(error) if error.errno() == libc::EINTR => {}
            other => return other,
        }
    }
}

/// Reads the vCPU's XSAVE area; `size` is what KVM_CAP_XSAVE2 said.
pub(super) fn xsave(vcpu: &impl AsRawFd, size: usize) -> Result<Vec<u8>, Errno> {
    let mut area = vec![0u8; size.max(size_of::<kvm_xsave>())];
    // SAFETY: the kernel writes as many bytes as KVM_CAP_XSAVE2 said, which is the size of the area.
    check(unsafe { ioctl_with_mut_ptr(vcpu, KVM_GET_XSAVE2(), area.as_mut_ptr()) })?;
    Ok(area)
}

/// Writes the vCPU's XSAVE area, which must be at least `size` bytes long, what KVM_CAP_XSAVE2 said.
pub(super) fn set_xsave(vcpu: &impl AsRawFd, size: usize, area: &[u8]) -> Result<(), Errno> {
    assert!(
        area.len() >= size.max(size_of::<kvm_xsave>()),
        "the kernel reads the whole area"
    );
    // SAFETY: the kernel reads as many bytes as KVM_CAP_XSAVE2 said, which the area has.
    check(unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), area.as_ptr()) })
}

/// KVM_GET_SREGS2, for hosts with KVM_CAP_SREGS2.
pub(super) fn sregs2(vcpu: &impl AsRawFd) -> Result<kvm_sregs2, Errno> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel fills the structure that the ioctl is defined for.
    check(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

/// KVM_SET_SREGS2, for hosts with KVM_CAP_SREGS2.
pub(super) fn set_sregs2(vcpu: &impl AsRawFd, sregs: &kvm_sregs2) -> Result<(), Errno> {
    // SAFETY: the kernel reads the structure that the ioctl is defined for.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) })
}

/// The vCPU's attribute KVM_VCPU_TSC_OFFSET (`devices/vcpu.rst`).
pub(super) fn tsc_offset(vcpu: &impl AsRawFd) -> Result<u64, Errno> {
    let mut offset = 0u64;
    let attribute = tsc_offset_attribute((&raw mut offset).addr() as u64);
    // SAFETY: the kernel writes a u64 to the address in the attribute, which is that of `offset`.
    check(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) })?;
    // Volatile: the compiler does not see that the kernel wrote it.
    // SAFETY: `offset` is a live local.
    Ok(unsafe { (&raw const offset).read_volatile() })
}

/// Sets KVM_VCPU_TSC_OFFSET. That it succeeds does not say that it took effect: read it back.
pub(super) fn set_tsc_offset(vcpu: &impl AsRawFd, offset: u64) -> Result<(), Errno> {
    let attribute = tsc_offset_attribute((&raw const offset).expose_provenance() as u64);
    // SAFETY: the kernel reads a u64 from the address in the attribute, which is that of `offset`.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) })
}

fn tsc_offset_attribute(address: u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: kvm_bindings::KVM_VCPU_TSC_CTRL,
        attr: u64::from(kvm_bindings::KVM_VCPU_TSC_OFFSET),
        addr: address,
    }
}

fn check(result: i32) -> Result<(), Errno> {
    if result < 0 { Err(Errno::last()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_another_size_are_no_structure() {
        assert!(from_bytes::<kvm_regs>(&[0; 143]).is_none());
        assert!(from_bytes::<kvm_regs>(&[0; 145]).is_none());
    }

    #[test]
    fn structure_survives_the_way_through_bytes() {
        let regs = kvm_regs {
            rip: 0x1234,
            rflags: 2,
            ..Default::default()
        };
        assert_eq!(from_bytes(&to_bytes(&regs)), Some(regs));
    }
}
