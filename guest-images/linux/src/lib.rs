//! A small Linux guest that is nobody's fake: Debian's kernel source, a minimal configuration, busybox, one shell script.
//!
//! It boots on ordinary KVM hosts and, with three small patches, where ring 0 is emulated (kvm-pvm). What is built lies in
//! a cache outside the tree under a name made from everything that goes into it, so that a second run builds nothing.
#![forbid(unsafe_code)]

mod initramfs;
mod kernel;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// What the kernel is told in every guest. On kvm-pvm hosts the words hide what the emulator of ring 0 does not know
/// although the guest sees it in CPUID; elsewhere they cost nothing that a test would notice.
pub const CMDLINE: &str = "console=ttyS0 panic=-1 nokaslr tsc=reliable no_timer_check noxsave \
    clearcpuid=smap,smep,umip,fsgsbase,popcnt,cx16,xsave,erms,fsrm,pcid,invpcid";

/// The guest's two files.
#[derive(Clone, Debug)]
pub struct Image {
    /// An ELF with a PVH note.
    pub kernel: PathBuf,
    /// An uncompressed cpio archive: inflating one is slow where ring 0 is emulated.
    pub initramfs: PathBuf,
}

/// What must be installed to build the image, as Debian names it.
pub const PACKAGES: [&str; 9] = [
    "linux-source-6.1",
    "busybox-static",
    "bc",
    "bison",
    "flex",
    "libelf-dev",
    "libssl-dev",
    "make",
    "xz-utils",
];

/// The image, built if it is not in the cache: minutes then, with what the build prints going to `log` beside it.
///
/// # Errors
/// Something that the build needs is not installed, or a step of it failed; names which, and where its log is.
pub fn image() -> Result<Image> {
    let folder = cache()?.join(format!("linux-{}", key()?));
    let image = Image {
        kernel: folder.join("vmlinux"),
        initramfs: folder.join("initramfs.cpio"),
    };
    if image.kernel.exists() && image.initramfs.exists() {
        return Ok(image);
    }
    // Built beside and moved there whole: a build that is interrupted leaves nothing that looks finished.
    let parent = folder.parent().context("the cache is a folder of folders")?;
    fs::create_dir_all(parent).with_context(|| format!("failed to make {}", parent.display()))?;
    let building = tempfile::Builder::new()
        .prefix("building-")
        .tempdir_in(parent)
        .with_context(|| format!("failed to make a folder in {}", parent.display()))?;
    initramfs::write(&building.path().join("initramfs.cpio"))?;
    kernel::build(building.path(), &parent.join("kernel-build.log"))?;
    match fs::rename(building.path(), &folder) {
        // Somebody else was faster, with the same input.
        Err(_) if image.kernel.exists() => {}
        other => other.with_context(|| format!("failed to move the image to {}", folder.display()))?,
    }
    Ok(image)
}

/// Names everything that goes into the image.
fn key() -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(kernel::CONFIG.as_bytes());
    for (_, patch) in kernel::PATCHES {
        hasher.update(patch.as_bytes());
    }
    hasher.update(initramfs::INIT);
    for file in [kernel::SOURCE, initramfs::BUSYBOX] {
        hasher.update(&describe(Path::new(file))?);
    }
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}

/// A file of a package, by size and time: reading 140 MB each time would be slower than most tests.
fn describe(file: &Path) -> Result<Vec<u8>> {
    let Ok(metadata) = fs::metadata(file) else {
        bail!(
            "{} is missing: install it with apt-get install {}",
            file.display(),
            PACKAGES.join(" ")
        );
    };
    let modified = metadata.modified().context("the file system keeps no times")?;
    let since = modified.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Ok(format!("{} {} {}", file.display(), metadata.len(), since.as_secs()).into_bytes())
}

/// `$XDG_CACHE_HOME/ferry`, or `~/.cache/ferry`.
fn cache() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => env::home_dir()
            .context("no home directory to keep the image in: set XDG_CACHE_HOME")?
            .join(".cache"),
    };
    Ok(base.join("ferry"))
}
