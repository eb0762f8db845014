//! Keeps what was built outside the tree, under a name made from everything that went into it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::PACKAGES;

/// Everything that goes into something that is built.
#[derive(Default)]
pub(crate) struct Ingredients(blake3::Hasher);

impl Ingredients {
    /// A text of ours.
    pub(crate) fn text(&mut self, text: impl AsRef<[u8]>) {
        self.bytes(text.as_ref());
    }

    /// Any bytes; their length counts too, so that what ends one cannot begin the next.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    /// A file of a package, by size and time: reading 140 MB each time would be slower than most tests.
    ///
    /// # Errors
    /// If it is not installed: says how to.
    pub(crate) fn file(&mut self, file: &str) -> Result<()> {
        let Ok(metadata) = fs::metadata(file) else {
            bail!(
                "{file} is missing: install it with apt-get install {}",
                PACKAGES.join(" ")
            );
        };
        let modified = metadata.modified().context("the file system keeps no times")?;
        let since = modified.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        self.text(format!("{file} {} {}", metadata.len(), since.as_secs()));
        Ok(())
    }

    fn name(&self, what: &str) -> String {
        format!("{what}-{}", &self.0.finalize().to_hex()[..16])
    }
}

/// The folder of what is made of these ingredients; `build` fills it if it is not there, and may log to the file.
///
/// # Errors
/// If it fails; nothing is left that looks finished then.
pub(crate) fn cached(
    what: &str,
    ingredients: Ingredients,
    build: impl FnOnce(&Path, &Path) -> Result<()>,
) -> Result<PathBuf> {
    let parent = parent()?;
    let folder = parent.join(ingredients.name(what));
    if folder.exists() {
        return Ok(folder);
    }
    // Built beside and moved there whole.
    fs::create_dir_all(&parent).with_context(|| format!("failed to make {}", parent.display()))?;
    let building = tempfile::Builder::new()
        .prefix("building-")
        .tempdir_in(&parent)
        .with_context(|| format!("failed to make a folder in {}", parent.display()))?;
    build(building.path(), &parent.join(format!("{what}-build.log")))?;
    match fs::rename(building.path(), &folder) {
        // Somebody else was faster, with the same input.
        Err(_) if folder.exists() => {}
        other => other.with_context(|| format!("failed to move what was built to {}", folder.display()))?,
    }
    Ok(folder)
}

/// `$XDG_CACHE_HOME/ferry`, or `~/.cache/ferry`.
fn parent() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => env::home_dir()
            .context("no home directory to keep the image in: set XDG_CACHE_HOME")?
            .join(".cache"),
    };
    Ok(base.join("ferry"))
}
