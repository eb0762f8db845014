//! The host's pool of huge pages, as far as a guest that comes with memory from it has to know.
//!
//! A mapping from the pool reserves all of its pages at once, of those that are free and that nobody has reserved, and of those that the kernel may
//! add to the pool (Documentation/admin-guide/mm/hugetlbpage.rst).

use std::fs;
use std::io;
use std::path::Path;

use super::failure::Failure;

/// The pool of pages of 2 MiB.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
const PAGE_BYTES: u64 = 2 << 20;

/// Whether so much memory can be had from the pool now, and of how much.
///
/// # Errors
/// It cannot be.
pub(super) fn check(bytes: u64) -> Result<String, Failure> {
    let available = available(Path::new(POOL)).map_err(Failure::host(format!("failed to read {POOL}")))?;
    let wanted = bytes.div_ceil(PAGE_BYTES);
    let found = format!("{available} huge pages of 2 MiB can be had, {wanted} are needed");
    match available >= wanted {
        true => Ok(found),
        false => Err(Failure::Refused(found)),
    }
}

fn available(pool: &Path) -> io::Result<u64> {
    let number = |name: &str| -> io::Result<u64> {
        // A kernel without them has none.
        let text = match fs::read_to_string(pool.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => "0".to_owned(),
            read => read?,
        };
        text.trim().parse().map_err(io::Error::other)
    };
    let unreserved = number("free_hugepages")?.saturating_sub(number("resv_hugepages")?);
    let may_be_added = number("nr_overcommit_hugepages")?.saturating_sub(number("surplus_hugepages")?);
    Ok(unreserved + may_be_added)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_reserved_is_not_available_and_what_may_be_added_is() {
        let pool = tempfile::tempdir().unwrap();
        let write = |name: &str, number: u64| fs::write(pool.path().join(name), format!("{number}\n")).unwrap();
        write("free_hugepages", 100);
        write("resv_hugepages", 30);
        write("nr_overcommit_hugepages", 8);
        write("surplus_hugepages", 0);
        assert_eq!(available(pool.path()).unwrap(), 78);
        write("surplus_hugepages", 3);
        assert_eq!(available(pool.path()).unwrap(), 75);
        write("resv_hugepages", 130);
        assert_eq!(available(pool.path()).unwrap(), 5);
        fs::write(pool.path().join("free_hugepages"), "many").unwrap();
        assert!(available(pool.path()).is_err());
        assert_eq!(available(&pool.path().join("of another size")).unwrap(), 0);
    }
}
