//! How a guest moves.

use ferry_proto::InvalidField;

/// Whether the guest runs while it is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// It does, in rounds, until little enough is left.
    Precopy,
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
            "cold" => Ok(Self::Cold),
            other => Err(InvalidField {
                field: "mode",
                problem: format!("{other:?} is not one of precopy, cold"),
            }),
        }
    }

    /// As messages and records have it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Cold => "cold",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_word_is_read_as_it_is_written_and_none_means_the_old_behaviour() {
        for mode in [Mode::Precopy, Mode::Cold] {
            assert_eq!(Mode::parse(mode.as_str()), Ok(mode));
        }
        assert_eq!(Mode::parse(""), Ok(Mode::Precopy));
        assert!(Mode::parse("lukewarm").unwrap_err().problem.contains("lukewarm"));
    }
}
