//! Which effects follow from which events.

use super::*;
use DestinationEffect::{Adopt, AdoptCrashed, Answer, Journal, JournalLater, KillVmm, Refuse, SendPermit, TellSource};

fn claimed() -> DestinationAgent {
    let mut agent = DestinationAgent::prepared();
    agent.step(DestinationEvent::Expect(1));
    agent.step(DestinationEvent::Ready(1));
    agent
}

#[test]
fn the_permit_follows_the_claim_that_is_durable() {
    let mut agent = DestinationAgent::prepared();
    assert_eq!(
        agent.step(DestinationEvent::Expect(1)),
        [
            Journal {
                attempt: 1,
                decision: Decision::Open
            },
            Answer(Decision::Open)
        ]
    );
    assert_eq!(
        agent.step(DestinationEvent::Ready(1)),
        [
            Journal {
                attempt: 1,
                decision: Decision::Claimed
            },
            SendPermit
        ]
    );
    assert_eq!(
        agent.step(DestinationEvent::Started),
        [
            Journal {
                attempt: 1,
                decision: Decision::Running
            },
            Adopt,
            TellSource(Decision::Running)
        ]
    );
}

#[test]
fn deciding_before_the_claim_keeps_the_guest_at_the_source_for_ever() {
    let mut agent = DestinationAgent::prepared();
    agent.step(DestinationEvent::Expect(1));
    let effects = agent.step(DestinationEvent::Decide(1));
    assert_eq!(
        effects[..2],
        [
            Journal {
                attempt: 1,
                decision: Decision::Source
            },
            Answer(Decision::Source)
        ]
    );
    assert!(effects.contains(&KillVmm));
    assert_eq!(agent.step(DestinationEvent::Ready(1)), []);
    assert_eq!(agent.step(DestinationEvent::Expect(2)), [Refuse]);
}

#[test]
fn deciding_after_the_permit_does_not_take_the_claim_back() {
    let mut agent = claimed();
    assert_eq!(agent.step(DestinationEvent::Decide(1)), [Answer(Decision::Claimed)]);
}

#[test]
fn a_vmm_that_died_unstarted_in_the_same_boot_is_handed_back() {
    let mut agent = claimed();
    let effects = agent.step(DestinationEvent::VmmGone {
        started: false,
        same_boot: true,
    });
    assert_eq!(
        effects[0],
        Journal {
            attempt: 1,
            decision: Decision::Source
        }
    );
    assert_eq!(agent.decision(), Some(Decision::Source));
}

#[test]
fn a_vmm_that_may_have_started_crashed_here() {
    for (started, same_boot) in [(true, true), (true, false), (false, false)] {
        let mut agent = claimed();
        let effects = agent.step(DestinationEvent::VmmGone { started, same_boot });
        assert_eq!(
            effects,
            [
                Journal {
                    attempt: 1,
                    decision: Decision::Running
                },
                AdoptCrashed,
                TellSource(Decision::Running)
            ]
        );
    }
}

#[test]
fn a_restarted_agent_sends_the_permit_again_and_does_not_hand_back() {
    let mut agent = DestinationAgent::recover(Some((1, Decision::Claimed)));
    assert_eq!(agent.step(DestinationEvent::Decide(1)), [Answer(Decision::Claimed)]);
    assert_eq!(agent.step(DestinationEvent::VmmFound), [SendPermit]);
}

#[test]
fn a_claim_that_could_not_be_written_is_given_back_durably() {
    let mut agent = claimed();
    let source = Journal {
        attempt: 1,
        decision: Decision::Source,
    };
    assert_eq!(
        agent.step(DestinationEvent::JournalFailed),
        [KillVmm, source, TellSource(Decision::Source)]
    );
    // SRC cannot be written either: asked again, it is answered only after it is.
    agent.step(DestinationEvent::JournalFailed);
    assert!(!agent.is_refused());
    assert_eq!(
        agent.step(DestinationEvent::Decide(1))[..2],
        [source, Answer(Decision::Source)]
    );
}

#[test]
fn a_guest_that_crashed_before_running_was_written_is_adopted_once_it_is() {
    let mut agent = claimed();
    agent.step(DestinationEvent::Started);
    let later = [JournalLater {
        attempt: 1,
        decision: Decision::Running,
    }];
    assert_eq!(agent.step(DestinationEvent::JournalFailed), later);
    let gone = DestinationEvent::VmmGone {
        started: true,
        same_boot: true,
    };
    let adopted = [
        Journal {
            attempt: 1,
            decision: Decision::Running,
        },
        AdoptCrashed,
        TellSource(Decision::Running),
    ];
    assert_eq!(agent.step(gone), adopted);
    assert_eq!(agent.step(DestinationEvent::JournalFailed), later);
    // Its process may be there all the same, and be found over a new connection: what crashed stays crashed.
    assert_eq!(agent.step(DestinationEvent::VmmFound), adopted);
    assert_eq!(agent.step(DestinationEvent::JournalFailed), later);
    assert_eq!(agent.step(DestinationEvent::Started), adopted);
    assert_eq!(agent.step(gone), [AdoptCrashed]);
}

#[test]
fn a_new_attempt_closes_the_one_before_it() {
    let mut agent = DestinationAgent::prepared();
    agent.step(DestinationEvent::Expect(1));
    assert_eq!(
        agent.step(DestinationEvent::Expect(2)),
        [
            Journal {
                attempt: 1,
                decision: Decision::Source
            },
            Journal {
                attempt: 2,
                decision: Decision::Open
            },
            Answer(Decision::Open)
        ]
    );
    assert_eq!(agent.step(DestinationEvent::Decide(1)), [Answer(Decision::Source)]);
}

#[test]
fn a_go_that_was_not_expected_is_not_claimed() {
    let mut agent = DestinationAgent::prepared();
    assert!(agent.step(DestinationEvent::Ready(1)).contains(&KillVmm));
}
