//! Memory of this process's own for what passes between a disk and a connection.
//!
//! Direct I/O hands a disk the pages of a buffer, as one piece only where they follow each other in the host's memory: 1 MiB in pages of 4 KiB
//! is up to 256 pieces, more than some disks take in one request. In a huge page it is one. Reading 1 MiB each from a virtio disk of a
//! nested host: 1.2 to 1.5 GiB/s into small pages, 3.1 to 3.3 into huge ones.

use std::io;

use super::mapping::Mapping;

/// A buffer in huge pages, where the kernel has them: aligned as direct I/O wants it on every disk.
#[derive(Debug)]
pub struct DiskBuffer(Mapping);

impl DiskBuffer {
    /// A buffer of so many bytes, all zero. Whole huge pages make the best of it.
    ///
    /// # Errors
    /// The kernel gives no memory.
    pub fn new(len: usize) -> io::Result<Self> {
        let mapping = Mapping::new(len, false)?;
        mapping.advise_whole(false, false);
        Ok(Self(mapping))
    }

    /// Its bytes.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is of this length, may be read and written and holds zeroes at first; it is this value's alone, which is borrowed
        // for as long as the slice lives.
        unsafe { std::slice::from_raw_parts_mut(self.0.start.as_ptr(), self.0.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::HUGE_PAGE_SIZE;
    use super::*;

    #[test]
    fn a_buffer_is_aligned_zero_and_its_owners() {
        let len = 2 * HUGE_PAGE_SIZE as usize;
        let mut buffer = DiskBuffer::new(len).unwrap();
        let bytes = buffer.as_mut_slice();
        assert_eq!((bytes.len(), bytes.as_ptr().addr() % HUGE_PAGE_SIZE as usize), (len, 0));
        assert!(bytes.iter().all(|&byte| byte == 0));
        bytes.fill(7);
        assert!(buffer.as_mut_slice().iter().all(|&byte| byte == 7));
        drop(buffer);
        assert!(DiskBuffer::new(usize::MAX / 4).is_err());
    }
}
