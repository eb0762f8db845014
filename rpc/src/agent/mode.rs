//! How a guest moves.

use ferry_proto::InvalidField;

/// Whether the guest runs while it is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// It does, in rounds, until little enough is left.
    Precopy,
    /// It is handed over at once, and all of its memory comes when it is touched, or is pushed behind.
    Postcopy,
    /// It runs meanwhile; what rounds do not bring within its budget comes late.
    Hybrid,
    /// It stands still from before the first page on; or it was off, and stays off.
    Cold,
}

impl Mode {
    /// The word of a message; an empty one is that of agents who know no other mode than the first.
    ///
    /// # Errors
    /// It is none.
    pub(crate) fn parse(word: &str) -> Result<Self, InvalidField> {
        match word {
            "" | "precopy" => Ok(Self::Precopy),
            "postcopy" => Ok(Self::Postcopy),
            "hybrid" => Ok(Self::Hybrid),
            "cold" => Ok(Self::Cold),
            other => Err(InvalidField {
                field: "mode",
                problem: format!("{other:?} is not one of precopy, postcopy, hybrid, cold"),
            }),
        }
    }

    /// As messages and records have it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Postcopy => "postcopy",
            Self::Hybrid => "hybrid",
            Self::Cold => "cold",
        }
    }

    /// When pages come after the guest was handed over, in the VMM's word; empty: never.
    pub(crate) fn lateness(self) -> &'static str {
        match self {
            Self::Precopy | Self::Cold => "",
            Self::Postcopy => "at-once",
            Self::Hybrid => "when-it-pays",
        }
    }

    /// Whether pages may come after the guest was handed over.
    pub(crate) fn may_be_late(self) -> bool {
        !self.lateness().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_word_is_read_as_it_is_written_and_none_means_the_old_behaviour() {
        for mode in [Mode::Precopy, Mode::Postcopy, Mode::Hybrid, Mode::Cold] {
            assert_eq!(Mode::parse(mode.as_str()), Ok(mode));
        }
        assert_eq!(Mode::parse(""), Ok(Mode::Precopy));
        assert!(Mode::parse("lukewarm").unwrap_err().problem.contains("lukewarm"));
    }
}
