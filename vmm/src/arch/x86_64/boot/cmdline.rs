//! The command line as the guest gets it: what the user wrote, and where the devices are if nothing else tells.

use super::super::layout::{VIRTIO_SLOT_BYTES, virtio_slot};

/// Whether the user leaves the guest its ACPI.
pub(super) fn wants_acpi(cmdline: &str) -> bool {
    kernel_words(cmdline).all(|word| word != "acpi=off")
}

/// The command line with a `virtio_mmio.device=` for each device (`drivers/virtio/virtio_mmio.c`).
///
/// Words after a lone `--` are not the kernel's but its init's: ours go before it.
pub(super) fn with_devices(cmdline: &str, devices: usize) -> String {
    let at = kernel_words_end(cmdline);
    let (before, after) = cmdline.split_at(at);
    let mut text = before.trim_end().to_owned();
    for number in 0..devices {
        let slot = virtio_slot(number);
        if !text.is_empty() {
            text.push(' ');
        }
        let size = VIRTIO_SLOT_BYTES >> 10;
        text.push_str(&format!("virtio_mmio.device={size}K@{:#x}:{}", slot.address, slot.irq));
    }
    if !after.is_empty() {
        text.push(' ');
        text.push_str(after);
    }
    text
}

fn kernel_words(cmdline: &str) -> impl Iterator<Item = &str> {
    cmdline[..kernel_words_end(cmdline)].split_ascii_whitespace()
}

/// Where the words for init begin, with their `--`; the end where there are none.
fn kernel_words_end(cmdline: &str) -> usize {
    let is_space = |byte: Option<&u8>| byte.is_none_or(u8::is_ascii_whitespace);
    let bytes = cmdline.as_bytes();
    cmdline
        .match_indices("--")
        .map(|(at, _)| at)
        .find(|&at| is_space(at.checked_sub(1).and_then(|at| bytes.get(at))) && is_space(bytes.get(at + 2)))
        .unwrap_or(cmdline.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn acpi_is_off_by_that_word_only() {
        assert!(wants_acpi("console=ttyS0 acpi=force xacpi=off"));
        assert!(wants_acpi("quiet -- acpi=off"));
        assert!(!wants_acpi("quiet acpi=off"));
    }

    #[test]
    fn devices_are_told_before_the_words_for_init() {
        assert_eq!(
            with_devices("acpi=off -- single", 2),
            "acpi=off virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 -- single"
        );
        assert_eq!(with_devices("", 1), "virtio_mmio.device=4K@0xd0000000:5");
    }

    proptest! {
        #[test]
        fn words_are_neither_lost_nor_changed(cmdline in "[ -~é]{0,60}", devices in 0usize..4) {
            let with = with_devices(&cmdline, devices);
            let words: Vec<&str> = with.split_ascii_whitespace().filter(|word| !word.starts_with("virtio_mmio.device=")).collect();
            let expected: Vec<&str> = cmdline.split_ascii_whitespace().collect();
            prop_assert_eq!(words, expected);
        }
    }
}
