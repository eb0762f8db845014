//! `snapshot.json`: what a snapshot is of, and what its other files must be.
//!
//! It says of itself which version it is and what it sums up to, so that a file that was damaged or edited is refused. What a
//! snapshot says is hostile input all the same: whoever made it can make it sum up.

use ferry_proto::agent::v1::InstanceSpec;
use ferry_vmm::{MemoryRegion, MemoryShape};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::agent::images;

/// What the file is called.
pub(super) const FILE: &str = "snapshot.json";
/// More than a manifest has: eight disks with long paths.
pub(super) const LARGEST: u64 = 1 << 20;

const FORMAT: &str = "ferry-snapshot";
/// Raised whenever an older build would make something else of a snapshot than what it is.
const VERSION: u32 = 1;

/// Why a file is not a manifest that can be used. Reads well after "snapshot.json".
#[derive(Debug, thiserror::Error)]
pub(super) enum ManifestError {
    /// It is something else.
    #[error("is not a snapshot's: {0}")]
    NoManifest(String),
    /// It is of another version.
    #[error(
        "is of version {found}, this build knows version {VERSION}: restore it with the build that wrote it, or a newer one"
    )]
    Version {
        /// Its version.
        found: u32,
    },
    /// It was damaged or edited.
    #[error("is damaged or was edited: its content does not have the BLAKE3 digest that it says")]
    Digest,
    /// What it says cannot be.
    #[error("cannot be: {0}")]
    Impossible(String),
}

/// What a snapshot is of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub(super) instance: Uuid,
    pub(super) host: String,
    /// The epoch that it had.
    pub(super) epoch: u64,
    /// RFC 3339.
    pub(super) created: String,
    /// Its user had paused it.
    pub(super) paused: bool,
    /// As the instance's host keeps it: kernel and initrd are content hashes.
    pub(super) spec: InstanceSpec,
    pub(super) memory: Memory,
    /// In the order of the specification.
    pub(super) disks: Vec<Disk>,
    pub(super) digests: Digests,
}

/// Guest memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Memory {
    /// Ascending, in bytes.
    pub(super) regions: Vec<Region>,
    /// How much of it the file holds; the rest is zeroes.
    pub(super) stored_bytes: u64,
}

/// A stretch of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Region {
    pub(super) start: u64,
    pub(super) bytes: u64,
}

/// A disk, which is not in the snapshot, as it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Disk {
    pub(super) path: String,
    /// 0: a block device.
    pub(super) bytes: u64,
    /// Nanoseconds since 1970.
    pub(super) modified_ns: i64,
    /// What its lock file said; 0: there was none.
    pub(super) epoch: u64,
}

/// BLAKE3 of the other files, in hexadecimal. Kernel and initrd have theirs in the specification.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Digests {
    #[serde(rename = "memory.pieces")]
    pub(super) pieces: String,
    pub(super) state: String,
    pub(super) profile: String,
}

/// What every version has.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    format: String,
    version: u32,
    /// BLAKE3 of `content`, byte by byte as it stands in the file.
    digest: String,
    content: Box<RawValue>,
}

/// How memory of so many bytes lies.
pub(super) fn regions_of(bytes: u64) -> Vec<Region> {
    let region = |&MemoryRegion { start, len }: &MemoryRegion| Region { start, bytes: len };
    MemoryShape::from_size(bytes).regions.iter().map(region).collect()
}

impl Manifest {
    /// Encodes it, readable for people.
    ///
    /// # Errors
    /// Nothing of it can fail to be JSON.
    pub(super) fn to_bytes(&self) -> serde_json::Result<Vec<u8>> {
        let content = RawValue::from_string(serde_json::to_string_pretty(self)?)?;
        let envelope = Envelope {
            format: FORMAT.to_owned(),
            version: VERSION,
            digest: digest(&content),
            content,
        };
        let mut bytes = serde_json::to_vec_pretty(&envelope)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Decodes it and checks that all parts of it go together. Whether this host can have the instance is not looked at.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, ManifestError> {
        let no_manifest = |error: serde_json::Error| ManifestError::NoManifest(error.to_string());
        let head: Head = serde_json::from_slice(bytes).map_err(no_manifest)?;
        if head.format != FORMAT {
            return Err(ManifestError::NoManifest(format!("its format is {:?}", head.format)));
        }
        if head.version != VERSION {
            return Err(ManifestError::Version { found: head.version });
        }
        let envelope: Envelope = serde_json::from_slice(bytes).map_err(no_manifest)?;
        if digest(&envelope.content) != envelope.digest {
            return Err(ManifestError::Digest);
        }
        let manifest: Self = serde_json::from_str(envelope.content.get()).map_err(no_manifest)?;
        manifest.check().map_err(ManifestError::Impossible)?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        let Self {
            spec, memory, disks, ..
        } = self;
        if self.epoch == 0 {
            return Err("an instance that ran has an epoch above 0".to_owned());
        }
        if memory.regions != regions_of(spec.memory_bytes) {
            return Err(format!(
                "memory of {} bytes does not lie as it says, on this build at least",
                spec.memory_bytes
            ));
        }
        if !disks
            .iter()
            .map(|disk| &disk.path)
            .eq(spec.disks.iter().map(|disk| &disk.path))
        {
            return Err("it says of other disks than the instance's what they were like".to_owned());
        }
        let Digests { pieces, state, profile } = &self.digests;
        let initrd = Some(&spec.initrd).filter(|hash| !hash.is_empty());
        let hashes = [pieces, state, profile, &spec.kernel].into_iter().chain(initrd);
        match hashes.into_iter().find(|hash| !images::is_hash(hash)) {
            Some(bad) => Err(format!("{bad:?} is not a BLAKE3 digest")),
            None => Ok(()),
        }
    }
}

fn digest(content: &RawValue) -> String {
    blake3::hash(content.get().as_bytes()).to_hex().to_string()
}

/// What fuzzing does: the bytes are a file, and its content, of which whoever made it says what it sums up to.
#[cfg(any(fuzzing, test))]
pub(crate) fn read_hostile(bytes: &[u8]) {
    let _ = Manifest::from_bytes(bytes);
    let Ok(content) = serde_json::from_slice::<Box<RawValue>>(bytes) else {
        return;
    };
    let envelope = Envelope {
        format: FORMAT.to_owned(),
        version: VERSION,
        digest: digest(&content),
        content,
    };
    let file = serde_json::to_vec(&envelope).expect("nothing of it can fail to be JSON");
    if let Ok(manifest) = Manifest::from_bytes(&file) {
        let again = manifest.to_bytes().expect("nothing of it can fail to be JSON");
        assert_eq!(
            Manifest::from_bytes(&again).expect("what was written is read"),
            manifest
        );
    }
}

#[cfg(test)]
mod tests {
    use ferry_proto::agent::v1::DiskSpec;
    use proptest::prelude::*;

    use super::*;

    fn manifest() -> Manifest {
        let hash = "0123456789abcdef".repeat(4);
        Manifest {
            instance: Uuid::from_u128(7),
            host: "a".to_owned(),
            epoch: 3,
            created: "2026-01-01T00:00:00.000Z".to_owned(),
            paused: false,
            spec: InstanceSpec {
                name: "web".to_owned(),
                memory_bytes: 4 << 30,
                kernel: hash.clone(),
                disks: vec![DiskSpec {
                    path: "/srv/web.img".to_owned(),
                    ..DiskSpec::default()
                }],
                ..InstanceSpec::default()
            },
            memory: Memory {
                regions: regions_of(4 << 30),
                stored_bytes: 4096,
            },
            disks: vec![Disk {
                path: "/srv/web.img".to_owned(),
                bytes: 512,
                modified_ns: -1,
                epoch: 3,
            }],
            digests: Digests {
                pieces: hash.clone(),
                state: hash.clone(),
                profile: hash,
            },
        }
    }

    /// The bytes of a manifest that sums up, whatever it says.
    fn summed_up(change: impl FnOnce(&mut Manifest)) -> Vec<u8> {
        let mut manifest = manifest();
        change(&mut manifest);
        manifest.to_bytes().unwrap()
    }

    fn refusal(bytes: &[u8]) -> String {
        Manifest::from_bytes(bytes).unwrap_err().to_string()
    }

    fn edited(from: &str, to: &str) -> Vec<u8> {
        let text = String::from_utf8(manifest().to_bytes().unwrap()).unwrap();
        assert!(text.contains(from), "{text}");
        text.replacen(from, to, 1).into_bytes()
    }

    #[test]
    fn bytes_survive_decoding() {
        let bytes = manifest().to_bytes().unwrap();
        assert_eq!(Manifest::from_bytes(&bytes).unwrap(), manifest());
    }

    /// A file of version 1, which is read for ever; what later builds know more of an instance it does not say.
    const VERSION_1: &[u8] = include_bytes!("golden/snapshot-1.json");

    #[test]
    fn a_file_of_version_1_is_read() {
        let Manifest {
            epoch,
            spec,
            memory,
            disks,
            ..
        } = Manifest::from_bytes(VERSION_1).unwrap();
        assert_eq!((epoch, memory.stored_bytes, spec.vcpus), (1, 8_544_256, 2));
        assert_eq!((spec.name.as_str(), spec.restart.as_str()), ("web", "on-crash"));
        assert_eq!((disks[0].bytes, disks[0].epoch), (1 << 20, 1));
        assert_eq!(spec.disks[0].path, "/srv/web.img");
        assert_eq!(spec.disks[0].serial.as_deref(), Some("web"));
        assert_eq!(spec.nics[0].bridge.as_deref(), Some("br0"));
        assert_eq!(spec.nics[0].rate_bytes_per_s, Some(12_500_000));
    }

    #[test]
    fn what_was_edited_is_refused() {
        assert!(refusal(&edited("web.img", "db.img")).contains("edited"));
        assert!(refusal(&edited("\"epoch\": 3", "\"epoch\": 4")).contains("edited"));
    }

    #[test]
    fn another_version_is_told_before_anything_else() {
        let newer = edited("\"version\": 1", "\"version\": 2, \"more\": {}");
        assert!(refusal(&newer).contains("version 2, this build knows version 1"));
        assert!(refusal(&edited("ferry-snapshot", "tar")).contains("\"tar\""));
        assert!(refusal(b"{").contains("not a snapshot's"));
    }

    #[test]
    fn unknown_fields_are_refused() {
        let content = edited("\"paused\"", "\"unknown\": 1, \"paused\"");
        let envelope: serde_json::Value = serde_json::from_slice(&content).unwrap();
        let raw = serde_json::to_string(&envelope["content"]).unwrap();
        let sum = blake3::hash(raw.as_bytes()).to_hex();
        let bytes = format!(r#"{{"format":"{FORMAT}","version":1,"digest":"{sum}","content":{raw}}}"#);
        assert!(refusal(bytes.as_bytes()).contains("unknown field"));
    }

    #[test]
    fn parts_that_do_not_go_together_are_refused() {
        assert!(refusal(&summed_up(|it| it.epoch = 0)).contains("epoch"));
        assert!(refusal(&summed_up(|it| it.memory.regions[1].start = 0)).contains("does not lie"));
        assert!(refusal(&summed_up(|it| it.disks.clear())).contains("other disks"));
        assert!(refusal(&summed_up(|it| it.digests.state.push('0'))).contains("not a BLAKE3"));
        assert!(refusal(&summed_up(|it| it.spec.kernel = "../../etc/passwd".to_owned())).contains("passwd"));
    }

    #[test]
    fn hostile_files_are_read_or_refused() {
        let content = serde_json::to_vec(&manifest()).unwrap();
        let samples = [manifest().to_bytes().unwrap(), content];
        ferry_fuzz_inputs::feed("snapshot_manifest", &samples, crate::fuzz::snapshot_manifest);
    }

    proptest! {
        #[test]
        fn random_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(Manifest::from_bytes(&bytes).is_err());
        }

        /// A file with a byte that is another is refused, or says what it said: only blanks around the content do not count.
        #[test]
        fn damage_is_noticed_or_changes_nothing(at in any::<proptest::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = manifest().to_bytes().unwrap();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(read) = Manifest::from_bytes(&bytes) {
                prop_assert_eq!(read, manifest());
            }
        }
    }
}
