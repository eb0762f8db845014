//! The handshake: what both sides must agree on before a page is sent. Refusals name everything at once.

use ferry_proto::stream::v1;
use uuid::Uuid;

use super::frame::StreamIdentity;
use crate::compress::Codecs;
use crate::guest::{FRAME_SIZE, MemoryShape, Region};

/// The newest version of the protocol between two VMMs that this build speaks.
pub const PROTOCOL: u32 = 2;
/// The oldest version of it that this build speaks.
pub const OLDEST_PROTOCOL: u32 = 1;

/// The version that brought pages that come after GO.
pub(crate) const LATE_PAGES_SINCE: u32 = 2;

/// The version that brought digests that are compared before the guest is handed over.
pub(crate) const VERIFY_SINCE: u32 = 2;

/// What the source asks for beside the guest's move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wishes {
    /// Page streams for pages that come late.
    pub(crate) late_streams: u32,
    /// Both sides keep digests of pages, and compare.
    pub(crate) verify: bool,
    /// Formats in which pages may be compressed.
    pub(crate) codecs: Codecs,
}

/// The version that brought further links of one migration.
pub(crate) const RESUMES_SINCE: u32 = 2;

/// Protocol versions that one side speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Versions {
    pub(crate) newest: u32,
    pub(crate) oldest: u32,
}

impl Versions {
    pub(crate) const OURS: Self = Self {
        newest: PROTOCOL,
        oldest: OLDEST_PROTOCOL,
    };

    /// The newest version that both speak.
    pub(crate) fn common(self, other: Self) -> Option<u32> {
        let newest = self.newest.min(other.newest);
        (newest >= self.oldest && newest >= other.oldest).then_some(newest)
    }
}

/// The source's first message.
pub(crate) fn hello(identity: &StreamIdentity, shape: &MemoryShape, profile: Vec<u8>, wishes: Wishes) -> v1::Hello {
    let region = |region: &Region| v1::Region {
        start_frame: region.start_frame,
        frames: region.frames,
    };
    v1::Hello {
        protocol_newest: PROTOCOL,
        protocol_oldest: OLDEST_PROTOCOL,
        instance: identity.instance.as_bytes().to_vec(),
        migration: identity.migration.as_bytes().to_vec(),
        epoch: identity.epoch.0,
        page_size: FRAME_SIZE as u32,
        regions: shape.regions().iter().map(region).collect(),
        streams: identity.streams,
        profile,
        late_streams: wishes.late_streams,
        verify: wishes.verify,
        session: identity.session,
        codecs: wishes.codecs.to_wire(),
    }
}

/// Checks the source's first message against what this side expects.
///
/// # Errors
/// Every reason against the migration; a foreign protocol version is the only one told if there is one, because nothing
/// else in the message can be relied on then.
pub(crate) fn check_hello(
    hello: &v1::Hello,
    expected: &StreamIdentity,
    shape: &MemoryShape,
    ours: Versions,
    check_profile: impl FnOnce(&[u8]) -> Vec<String>,
) -> Result<u32, Vec<String>> {
    let theirs = Versions {
        newest: hello.protocol_newest,
        oldest: hello.protocol_oldest,
    };
    let Some(protocol) = ours.common(theirs) else {
        return Err(vec![format!(
            "protocol version: the source speaks {} to {}, this host {} to {}",
            theirs.oldest, theirs.newest, ours.oldest, ours.newest
        )]);
    };
    let mut refusals = Vec::new();
    let mut refuse_unless = |holds: bool, reason: String| {
        if !holds {
            refusals.push(reason);
        }
    };
    let instance = Uuid::from_slice(&hello.instance).ok();
    let migration = Uuid::from_slice(&hello.migration).ok();
    refuse_unless(
        instance == Some(expected.instance),
        format!("instance: {} is expected here", expected.instance),
    );
    refuse_unless(
        migration == Some(expected.migration),
        format!("migration: {} is expected here", expected.migration),
    );
    refuse_unless(
        hello.epoch == expected.epoch.0,
        format!(
            "epoch: the guest runs under {} at the source, {} is expected here",
            hello.epoch, expected.epoch
        ),
    );
    refuse_unless(
        u64::from(hello.page_size) == FRAME_SIZE,
        format!("page size: {} at the source, {FRAME_SIZE} here", hello.page_size),
    );
    refuse_unless(
        hello.streams == expected.streams,
        format!(
            "page streams: {} at the source, {} here",
            hello.streams, expected.streams
        ),
    );
    let regions = hello.regions.iter().map(|region| Region {
        start_frame: region.start_frame,
        frames: region.frames,
    });
    let theirs: Vec<Region> = regions.collect();
    refuse_unless(
        theirs == shape.regions(),
        format!(
            "memory shape: {} at the source, {} here",
            describe(&theirs),
            describe(shape.regions())
        ),
    );
    refusals.extend(check_profile(&hello.profile));
    if refusals.is_empty() {
        Ok(protocol)
    } else {
        Err(refusals)
    }
}

fn describe(regions: &[Region]) -> String {
    let shown = regions
        .iter()
        .take(8)
        .map(|region| format!("{:#x}+{:#x}", region.start_frame, region.frames));
    let dots = if regions.len() > 8 { ", …" } else { "" };
    format!("pages [{}{dots}]", shown.collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::Epoch;

    fn identity() -> StreamIdentity {
        StreamIdentity {
            instance: Uuid::from_u128(1),
            migration: Uuid::from_u128(2),
            epoch: Epoch(3),
            streams: 2,
            session: 0,
        }
    }

    fn shape(frames: u64) -> MemoryShape {
        MemoryShape::new(vec![Region { start_frame: 0, frames }]).unwrap()
    }

    fn check(hello: &v1::Hello) -> Result<u32, Vec<String>> {
        check_hello(hello, &identity(), &shape(64), Versions::OURS, |_| Vec::new())
    }

    fn ours() -> v1::Hello {
        hello(&identity(), &shape(64), Vec::new(), Wishes::default())
    }

    #[test]
    fn the_same_guest_is_accepted() {
        assert_eq!(check(&ours()), Ok(PROTOCOL));
    }

    #[test]
    fn the_newest_common_version_is_spoken() {
        let versions = |oldest, newest| Versions { oldest, newest };
        assert_eq!(versions(1, 2).common(versions(2, 3)), Some(2));
        assert_eq!(versions(2, 3).common(versions(1, 2)), Some(2));
        assert_eq!(versions(3, 4).common(versions(1, 2)), None);
        assert_eq!(versions(1, 2).common(versions(3, 4)), None);
    }

    #[test]
    fn a_foreign_version_is_refused_by_its_numbers() {
        let reasons = check(&v1::Hello {
            protocol_newest: 9,
            protocol_oldest: 8,
            ..ours()
        })
        .unwrap_err();
        assert_eq!(
            reasons,
            ["protocol version: the source speaks 8 to 9, this host 1 to 2"]
        );
    }

    #[test]
    fn all_reasons_are_told_at_once() {
        let hello = v1::Hello {
            epoch: 9,
            page_size: 16384,
            ..hello(&identity(), &shape(65), Vec::new(), Wishes::default())
        };
        let check = |_: &[u8]| vec!["cpu feature avx512f is missing".to_owned()];
        let reasons = check_hello(&hello, &identity(), &shape(64), Versions::OURS, check).unwrap_err();
        assert_eq!(
            reasons,
            [
                "epoch: the guest runs under 9 at the source, 3 is expected here",
                "page size: 16384 at the source, 4096 here",
                "memory shape: pages [0x0+0x41] at the source, pages [0x0+0x40] here",
                "cpu feature avx512f is missing",
            ]
        );
    }
}
