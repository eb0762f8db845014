//! The room that is left where a host keeps its journal and its instances' folders.

use std::path::Path;

use super::failure::Failure;

/// What a migration's notes, the instance's folder and the journal's own log may take at once.
const LEAST: u64 = 1 << 20;

/// Whether there is room for one more instance, and how much there is. The file system may fill up in the next moment: what cannot be noted then is not done.
///
/// # Errors
/// There is none.
pub(super) fn check(data_dir: &Path) -> Result<String, Failure> {
    let unseen = Failure::host(format!("failed to look at {}", data_dir.display()));
    let stat = rustix::fs::statvfs(data_dir).map_err(|error| unseen(error.into()))?;
    judge(data_dir, stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn judge(data_dir: &Path, free: u64) -> Result<String, Failure> {
    let found = format!("{} MiB are free in {}", free >> 20, data_dir.display());
    match free >= LEAST {
        true => Ok(found),
        false => Err(Failure::Refused(format!(
            "no room is left for the journal: {} KiB are free in {}",
            free >> 10,
            data_dir.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_file_system_is_named_with_what_is_left() {
        let folder = Path::new("/var/lib/ferry");
        assert_eq!(judge(folder, 5 << 20).unwrap(), "5 MiB are free in /var/lib/ferry");
        let refused = judge(folder, LEAST - 1).unwrap_err().chain();
        assert!(refused.contains("1023 KiB are free in /var/lib/ferry"), "{refused}");
        assert!(check(Path::new("/")).is_ok() && check(Path::new("/nonexistent")).is_err());
    }
}
