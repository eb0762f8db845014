//! The decision register D(M,n) and the only moves that exist.
//!
//! ```text
//!   (no row) ──► OPEN ──► CLAIMED ──► RUNNING
//!       │          │         │ hand-back: agent B only, with proof
//!       └──────────┴─────────┴──────► SRC
//! ```

use std::fmt;

/// The value of D(M,n). `Running` and `Source` are final.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// Agent B expects the guest; nothing is decided.
    Open,
    /// Agent B took the guest: VMM B holds all of it.
    Claimed,
    /// The guest entered KVM_RUN at the destination, or may have.
    Running,
    /// The guest stays with the source.
    Source,
}

impl Decision {
    /// The word that journals and messages use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "OPEN",
            Self::Claimed => "CLAIMED",
            Self::Running => "RUNNING",
            Self::Source => "SRC",
        }
    }

    /// Reads the word that [`Self::as_str`] writes.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Open, Self::Claimed, Self::Running, Self::Source]
            .into_iter()
            .find(|decision| decision.as_str() == word)
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// The proof with which agent B may hand a claimed guest back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandBack {
    /// The incarnation that wrote CLAIMED is alive and has not sent the permit.
    PermitNotSent,
    /// VMM B is dead, left no started mark, and the host has not rebooted since CLAIMED.
    DeadBeforeStart,
}

/// One move of the register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Move {
    /// Agent B begins to expect the guest.
    Expect,
    /// Agent B takes the guest, VMM B having checked the manifest.
    Claim,
    /// The guest runs at B, or crashed there after it may have run.
    Run,
    /// Anyone: the guest stays at the source, while nothing is claimed.
    Refuse,
    /// Agent B alone: back to the source after a claim.
    GiveBack(HandBack),
}

/// A move that the register does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the decision cannot go from {} by {by:?}", from.map_or("no row", Decision::as_str))]
pub struct IllegalMove {
    /// What the register held; none if there was no row.
    pub from: Option<Decision>,
    /// The move that was tried.
    pub by: Move,
}

impl Move {
    /// What the register holds after this move from `row` (none: no row). A move to where it is already is none.
    ///
    /// # Errors
    /// The move does not exist from there.
    pub fn apply(self, row: Option<Decision>) -> Result<Decision, IllegalMove> {
        use Decision::{Claimed, Open, Running, Source};
        match (row, self) {
            (None | Some(Open), Self::Expect) => Ok(Open),
            (Some(Open | Claimed), Self::Claim) => Ok(Claimed),
            (Some(Claimed | Running), Self::Run) => Ok(Running),
            (None | Some(Open | Source), Self::Refuse) => Ok(Source),
            (Some(Claimed | Source), Self::GiveBack(_)) => Ok(Source),
            _ => Err(IllegalMove { from: row, by: self }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_row_counts_as_open_for_src_but_never_for_a_claim() {
        assert_eq!(Move::Refuse.apply(None), Ok(Decision::Source));
        assert!(Move::Claim.apply(None).is_err());
    }

    #[test]
    fn running_and_src_are_final() {
        let moves = [
            Move::Expect,
            Move::Claim,
            Move::Run,
            Move::Refuse,
            Move::GiveBack(HandBack::PermitNotSent),
        ];
        for by in moves {
            let after_running = by.apply(Some(Decision::Running));
            assert!(
                after_running.is_err() || after_running == Ok(Decision::Running),
                "{by:?}"
            );
            let after_source = by.apply(Some(Decision::Source));
            assert!(after_source.is_err() || after_source == Ok(Decision::Source), "{by:?}");
        }
    }

    #[test]
    fn a_claim_is_refused_by_nobody_but_agent_b() {
        assert!(Move::Refuse.apply(Some(Decision::Claimed)).is_err());
        assert_eq!(
            Move::GiveBack(HandBack::DeadBeforeStart).apply(Some(Decision::Claimed)),
            Ok(Decision::Source)
        );
    }

    #[test]
    fn words_are_read_back() {
        for decision in [Decision::Open, Decision::Claimed, Decision::Running, Decision::Source] {
            assert_eq!(Decision::parse(decision.as_str()), Some(decision));
        }
        assert_eq!(Decision::parse("open"), None);
    }
}
