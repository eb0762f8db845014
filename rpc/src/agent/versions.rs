//! Versions of the RPCs between agents, in Nova's manner: another major number is another language, a higher minor one
//! adds to it.

use std::fmt;
use std::str::FromStr;

/// A version, `major.minor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RpcVersion {
    major: u32,
    minor: u32,
}

impl RpcVersion {
    /// A migration is found by its instance.
    pub const V4_0: Self = Self { major: 4, minor: 0 };
    /// The cast carries the migration's record.
    pub const V4_2: Self = Self { major: 4, minor: 2 };
    /// A migration may be cold.
    pub const V4_3: Self = Self { major: 4, minor: 3 };
    /// The newest that this build speaks.
    pub const NEWEST: Self = Self::V4_3;
    /// The oldest that this build speaks.
    pub const OLDEST: Self = Self::V4_0;

    /// Nova's can_send_version: whether a server that speaks `self` understands what `wanted` brought.
    #[must_use]
    pub fn understands(self, wanted: Self) -> bool {
        self.major == wanted.major && self.minor >= wanted.minor
    }

    /// The newest version that both sides speak; none if their languages differ.
    #[must_use]
    pub fn common(self, other: Self) -> Option<Self> {
        (self.major == other.major).then(|| self.min(other))
    }
}

impl fmt::Display for RpcVersion {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.major, self.minor)
    }
}

/// A text that is no version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a version, such as 4.2")]
pub struct NoVersion(String);

impl FromStr for RpcVersion {
    type Err = NoVersion;

    fn from_str(text: &str) -> Result<Self, NoVersion> {
        let parsed = text
            .split_once('.')
            .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        parsed
            .map(|(major, minor)| Self { major, minor })
            .ok_or_else(|| NoVersion(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_build_speaks_what_it_says() {
        assert_eq!(ferry_proto::RPC_VERSION.parse(), Ok(RpcVersion::NEWEST));
        assert!(RpcVersion::NEWEST.understands(RpcVersion::OLDEST));
    }

    #[test]
    fn a_newer_minor_understands_an_older_one_and_not_the_reverse() {
        assert!(RpcVersion::V4_2.understands(RpcVersion::V4_0));
        assert!(!RpcVersion::V4_0.understands(RpcVersion::V4_2));
    }

    #[test]
    fn the_common_version_is_the_lower_one_of_the_same_language() {
        assert_eq!(RpcVersion::V4_2.common(RpcVersion::V4_0), Some(RpcVersion::V4_0));
        let other = "5.0".parse().unwrap();
        assert_eq!(RpcVersion::V4_2.common(other), None);
        assert!(!RpcVersion::V4_2.understands(other));
    }

    #[test]
    fn what_is_no_version_is_said() {
        for text in ["", "4", "4.", "4.2.1", "x.y", "-1.0"] {
            assert_eq!(text.parse::<RpcVersion>(), Err(NoVersion(text.to_owned())));
        }
    }
}
