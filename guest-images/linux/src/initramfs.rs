//! The first files: busybox, one script and our own program, as a cpio archive in the "newc" format
//! (`Documentation/driver-api/early-userspace/buffer-format.rst` in the kernel).

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Where Debian's package puts it. Static: there are no libraries in the guest.
pub(crate) const BUSYBOX: &str = "/bin/busybox";

/// The guest's first process.
pub(crate) const INIT: &[u8] = include_bytes!("../init");

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CONSOLE: u32 = 0o020_600;

/// Writes the archive.
///
/// # Errors
/// busybox or the program cannot be read, or the archive not written.
pub(crate) fn write(file: &Path, program: &Path) -> Result<()> {
    let read = |file: &Path| fs::read(file).with_context(|| format!("failed to read {}", file.display()));
    let (busybox, program) = (read(Path::new(BUSYBOX))?, read(program)?);
    let mut archive = Archive::default();
    for folder in ["bin", "data", "dev", "proc", "tmp"] {
        archive.add(folder, DIRECTORY, (0, 0), &[]);
    }
    // Without it init would have no standard output: it mounts devtmpfs itself.
    archive.add("dev/console", CONSOLE, (5, 1), &[]);
    archive.add("bin/busybox", EXECUTABLE, (0, 0), &busybox);
    archive.add("bin/ferry-guest", EXECUTABLE, (0, 0), &program);
    archive.add("init", EXECUTABLE, (0, 0), INIT);
    fs::write(file, archive.finish()).with_context(|| format!("failed to write {}", file.display()))
}

/// A newc archive in the making.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("a file of an initramfs is small");
        let name_size = u32::try_from(name.len() + 1).expect("a name is short");
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn pad(&mut self) {
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_end_with_the_trailer() {
        let mut archive = Archive::default();
        archive.add("init", EXECUTABLE, (0, 0), b"hello");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        // 110 bytes of header and "init\0" are 115, padded to 116; five bytes of content to 124.
        assert_eq!(&bytes[116..121], b"hello");
        assert_eq!(&bytes[124..130], b"070701");
        assert_eq!(&bytes[124 + 110..124 + 120], b"TRAILER!!!");
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[54..62], b"00000005");
    }
}
