//! Whether whoever answers at a peer's URL has the journal that took part in a migration.
//!
//! ```text
//!   PREPARE   A ─ my journal ─► B      A ◄─ mine ─ B      each keeps the other's with its record, durably before ARMED
//!   later     A ─ of that journal: is D decided? ─► whoever answers at B's URL: another journal refuses, JOURNAL_IS_OTHER
//!   reply     A ◄─ D, from this journal ─ B               another one, or none told: no answer
//! ```
//!
//! D and what follows from it is in one journal at each host. An agent that was started there with another data directory knows
//! nothing of the migration, and a missing row counts as OPEN: asked for D it would write SRC, and the guest would run twice. So its
//! answer is none. Two agents of before 4.3 tell none of this; where one was told, an answer without is another's: who cannot tell its
//! journal cannot have opened that one.

use ferry_proto::{InvalidField, wire_uuid};
use uuid::Uuid;

use super::failure::Failure;
use super::peers::Peer;
use super::reason::Reason;

/// The journal that a message names; none if its sender told none.
///
/// # Errors
/// It is no UUID.
pub(crate) fn journal_of(told: &str) -> Result<Option<Uuid>, InvalidField> {
    match told {
        "" => Ok(None),
        told => wire_uuid("journal", told).map(Some),
    }
}

/// How a message names a journal.
pub(crate) fn on_the_wire(journal: Option<Uuid>) -> String {
    journal.map(|journal| journal.to_string()).unwrap_or_default()
}

/// Asked: only the journal that the question is for answers it. A question that names none is answered by any.
///
/// # Errors
/// [`Reason::JournalIsOther`], or what is named is no UUID.
pub(crate) fn check_question(host: &str, own: Uuid, told: &str) -> Result<(), Failure> {
    match journal_of(told)? {
        Some(wanted) if wanted != own => Err(Failure::denied(
            Reason::JournalIsOther,
            format!("the question is for journal {wanted}, the agent of host {host} has journal {own}"),
        )),
        _ => Ok(()),
    }
}

/// Answered: what another journal says than the one that is `wanted` is no answer.
///
/// # Errors
/// [`Reason::JournalIsOther`].
pub(crate) fn check_answer(peer: &Peer, wanted: Option<Uuid>, told: &str) -> Result<(), Failure> {
    let Some(wanted) = wanted else { return Ok(()) };
    match journal_of(told) {
        Ok(Some(journal)) if journal == wanted => Ok(()),
        _ => Err(another_answers(peer)),
    }
}

/// Whoever has the journal that took part is not the one who answers.
pub(crate) fn another_answers(peer: &Peer) -> Failure {
    Failure::denied(
        Reason::JournalIsOther,
        format!(
            "at {} another journal answers than the one of host {} that took part in the migration",
            peer.url, peer.host
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::super::peers::Peers;
    use super::*;

    const OWN: Uuid = Uuid::from_u128(1);
    const OTHER: Uuid = Uuid::from_u128(2);

    fn peer() -> Peer {
        let peers = Peers::new("a", &[("b".to_owned(), "http://127.0.0.1:7601".to_owned())]).unwrap();
        peers.named("b").unwrap().clone()
    }

    #[tokio::test]
    async fn a_question_for_another_journal_is_refused_by_name_and_one_of_before_is_not() {
        assert!(check_question("b", OWN, "").is_ok());
        assert!(check_question("b", OWN, &OWN.to_string()).is_ok());
        let refused = check_question("b", OWN, &OTHER.to_string()).unwrap_err();
        assert_eq!(refused.reason(), Some(Reason::JournalIsOther));
        assert!(matches!(check_question("b", OWN, "?"), Err(Failure::Invalid(_))));
    }

    #[tokio::test]
    async fn an_answer_of_another_journal_or_of_none_is_no_answer_once_one_is_known() {
        let peer = peer();
        assert!(check_answer(&peer, Some(OWN), &OWN.to_string()).is_ok());
        for told in [OTHER.to_string(), String::new(), "?".to_owned()] {
            let refused = check_answer(&peer, Some(OWN), &told).unwrap_err();
            assert_eq!(refused.reason(), Some(Reason::JournalIsOther), "{told:?}");
            assert!(
                refused
                    .chain()
                    .contains("at http://127.0.0.1:7601 another journal answers")
            );
        }
        // The peer told none when it prepared: as before 4.3.
        assert!(check_answer(&peer, None, "").is_ok());
        assert!(check_answer(&peer, None, &OTHER.to_string()).is_ok());
    }
}
