//! How a guest moves.

use ferry_proto::InvalidField;
use ferry_proto::agent::v1::MigrationOptions;

/// Whether the guest runs while it is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// It does, in rounds, until little enough is left.
    Precopy,
    /// It is handed over at once, and all of its memory comes when it is touched, or is pushed behind.
    Postcopy,
    /// It runs meanwhile; what rounds do not bring within its budget comes late.
    Hybrid,
    /// It runs meanwhile, until its time is up; what is left then comes late.
    Overtime,
    /// It stands still from before the first page on; or it was off, and stays off.
    Cold,
}

/// What a user wants of a migration whose time is up, beside giving it up.
pub(crate) const PAUSE: &str = "pause";
pub(crate) const POSTCOPY: &str = "postcopy";

impl Mode {
    /// What these options come to: with pages that may come late once the time is up, pre-copy is another mode than without.
    ///
    /// # Errors
    /// The mode of the options is none.
    pub(crate) fn of(options: &MigrationOptions) -> Result<Self, InvalidField> {
        let mode = Self::parse(&options.mode)?;
        Ok(match (mode, options.on_timeout.as_str()) {
            (Self::Precopy, POSTCOPY) => Self::Overtime,
            (mode, _) => mode,
        })
    }

    /// The word of a message; an empty one is that of agents who know no other mode than the first.
    ///
    /// # Errors
    /// It is none.
    pub(crate) fn parse(word: &str) -> Result<Self, InvalidField> {
        match word {
            "" | "precopy" => Ok(Self::Precopy),
            "postcopy" => Ok(Self::Postcopy),
            "hybrid" => Ok(Self::Hybrid),
            "precopy-then-postcopy" => Ok(Self::Overtime),
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
            Self::Overtime => "precopy-then-postcopy",
            Self::Cold => "cold",
        }
    }

    /// When pages come after the guest was handed over, in the VMM's word; empty: never.
    pub(crate) fn lateness(self) -> &'static str {
        match self {
            Self::Precopy | Self::Cold => "",
            Self::Postcopy => "at-once",
            Self::Hybrid => "when-it-pays",
            Self::Overtime => "when-it-must-end",
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
        for mode in [Mode::Precopy, Mode::Postcopy, Mode::Hybrid, Mode::Overtime, Mode::Cold] {
            assert_eq!(Mode::parse(mode.as_str()), Ok(mode));
        }
        assert_eq!(Mode::parse(""), Ok(Mode::Precopy));
        assert!(Mode::parse("lukewarm").unwrap_err().problem.contains("lukewarm"));
    }

    #[test]
    fn only_pre_copy_is_another_mode_for_what_comes_when_its_time_is_up() {
        let of = |mode: &str, on_timeout: &str| {
            Mode::of(&MigrationOptions {
                mode: mode.to_owned(),
                on_timeout: on_timeout.to_owned(),
                ..MigrationOptions::default()
            })
        };
        assert_eq!(of("precopy", POSTCOPY), Ok(Mode::Overtime));
        assert_eq!(of("", POSTCOPY), Ok(Mode::Overtime));
        assert_eq!(of("precopy", PAUSE), Ok(Mode::Precopy));
        assert_eq!(of("hybrid", POSTCOPY), Ok(Mode::Hybrid));
        assert_eq!(of("postcopy", POSTCOPY), Ok(Mode::Postcopy));
    }
}
