//! Which effects follow from which events.

use super::*;

fn granted() -> SourceAgent {
    let mut agent = SourceAgent::copying(Epoch(4));
    agent.step(SourceEvent::Converged);
    agent.step(SourceEvent::Expecting(1));
    agent
}

fn asking() -> SourceAgent {
    let mut agent = granted();
    agent.step(SourceEvent::GoSent(1));
    agent
}

#[test]
fn the_grant_follows_the_answer_and_the_copy_goes_on_running() {
    let mut agent = SourceAgent::copying(Epoch(4));
    assert_eq!(
        agent.step(SourceEvent::Converged),
        [SourceEffect::JournalArmed(1), SourceEffect::AskExpect(1)]
    );
    assert_eq!(agent.step(SourceEvent::Expecting(1)), [SourceEffect::GiveGrant(1)]);
    assert_eq!(
        agent.step(SourceEvent::GoSent(1)),
        [SourceEffect::AskAfter(WAIT_FOR_RUNNING)]
    );
    assert_eq!(
        agent.step(SourceEvent::Decided(1, Decision::Running)),
        [
            SourceEffect::JournalDecision(1, Decision::Running),
            SourceEffect::DestroyCopy,
            SourceEffect::Finish(Ending::Arrived)
        ]
    );
}

#[test]
fn after_go_a_timeout_asks_and_an_abort_is_too_late() {
    let mut agent = asking();
    assert_eq!(agent.step(SourceEvent::Abort), []);
    assert_eq!(agent.step(SourceEvent::TimeToAsk), [SourceEffect::AskDecision(1)]);
    assert_eq!(agent.step(SourceEvent::NoAnswer)[0], SourceEffect::SayIndeterminate);
}

#[test]
fn src_resumes_under_an_epoch_that_nobody_had() {
    let mut agent = asking();
    assert_eq!(
        agent.step(SourceEvent::Decided(1, Decision::Source)),
        [
            SourceEffect::JournalDecision(1, Decision::Source),
            SourceEffect::JournalResumed(Epoch(6)),
            SourceEffect::SendPermit(Epoch(6))
        ]
    );
    assert_eq!(agent.step(SourceEvent::Resumed), [SourceEffect::Finish(Ending::Stayed)]);
}

#[test]
fn a_person_ends_the_doubt_and_nothing_else() {
    let mut agent = asking();
    agent.step(SourceEvent::NoAnswer);
    assert_eq!(
        agent.step(SourceEvent::Resolved(Wish::RunHere)),
        [
            SourceEffect::JournalResolved(Wish::RunHere, Epoch(6)),
            SourceEffect::Finish(Ending::Resolved(Wish::RunHere))
        ]
    );
    let mut early = granted();
    assert_eq!(early.step(SourceEvent::Resolved(Wish::RunHere)), []);
    let mut decided = asking();
    decided.step(SourceEvent::Decided(1, Decision::Source));
    assert_eq!(decided.step(SourceEvent::Resolved(Wish::DiscardHere)), []);
}

#[test]
fn a_resolve_that_cannot_be_journalled_leaves_the_doubt() {
    let mut agent = asking();
    agent.step(SourceEvent::Resolved(Wish::RunHere));
    assert_eq!(
        agent.step(SourceEvent::JournalFailed)[0],
        SourceEffect::SayIndeterminate
    );
    assert!(matches!(agent.state(), SourceState::Asking { .. }));
}

#[test]
fn claimed_is_asked_again() {
    let mut agent = asking();
    assert_eq!(
        agent.step(SourceEvent::Decided(1, Decision::Claimed)),
        [SourceEffect::AskAgain]
    );
}

#[test]
fn the_pause_between_two_questions_grows_to_half_a_minute() {
    let pauses = [0, 1, 4, 7, 8, 9, u32::MAX].map(|questions| pause_before_asking_again(questions).as_millis());
    assert_eq!(pauses, [250, 500, 4000, 30_000, 30_000, 30_000, 30_000]);
}

#[test]
fn an_abort_is_over_only_when_the_vmm_answered() {
    let mut agent = granted();
    assert_eq!(agent.step(SourceEvent::Abort), [SourceEffect::AskTrade(1)]);
    assert!(matches!(
        agent.step(SourceEvent::Answered(Traded::GoSent))[..],
        [SourceEffect::AskAfter(_)]
    ));
    let mut agent = granted();
    agent.step(SourceEvent::Abort);
    assert!(
        agent
            .step(SourceEvent::Answered(Traded::Cancelled))
            .contains(&SourceEffect::Finish(Ending::Stayed))
    );
}

#[test]
fn an_armed_guest_whose_vmm_died_asks_before_it_is_called_crashed() {
    let mut agent = granted();
    assert_eq!(
        agent.step(SourceEvent::VmmGone),
        [SourceEffect::AskAfter(Duration::ZERO)]
    );
    assert!(
        agent
            .step(SourceEvent::Decided(1, Decision::Source))
            .contains(&SourceEffect::Finish(Ending::Crashed))
    );
}

#[test]
fn a_disarmed_attempt_is_followed_by_the_next() {
    let mut agent = granted();
    assert_eq!(agent.step(SourceEvent::Disarmed(1)), []);
    assert_eq!(agent.step(SourceEvent::Converged)[0], SourceEffect::JournalArmed(2));
}

#[test]
fn a_restarted_agent_recalls_the_armed_attempt_and_goes_on() {
    let (mut agent, effects) = SourceAgent::recover(Epoch(4), 1, Copy::Held);
    assert_eq!(effects, [SourceEffect::AskRecall(1)]);
    assert_eq!(agent.step(SourceEvent::Answered(Traded::Cancelled)), []);
    assert_eq!(agent.step(SourceEvent::Converged)[0], SourceEffect::JournalArmed(2));
}

#[test]
fn a_refused_grant_may_have_been_traded_for_go_before() {
    let mut agent = granted();
    assert_eq!(agent.step(SourceEvent::GrantRefused(1)), [SourceEffect::AskRecall(1)]);
    assert_eq!(
        agent.step(SourceEvent::Answered(Traded::GoSent)),
        [SourceEffect::AskAfter(WAIT_FOR_RUNNING)]
    );
    let mut agent = granted();
    agent.step(SourceEvent::GrantRefused(1));
    assert_eq!(agent.step(SourceEvent::Answered(Traded::Cancelled)), []);
    assert_eq!(agent.state(), SourceState::Copying);
}

#[test]
fn running_that_is_heard_before_go_is_believed() {
    let mut agent = granted();
    assert!(
        agent
            .step(SourceEvent::Decided(1, Decision::Running))
            .contains(&SourceEffect::DestroyCopy)
    );
    let mut aborting = granted();
    aborting.step(SourceEvent::Abort);
    assert!(
        aborting
            .step(SourceEvent::Decided(1, Decision::Running))
            .contains(&SourceEffect::DestroyCopy)
    );
}

#[test]
fn converged_is_not_lost_while_an_attempt_is_recalled() {
    let (mut agent, _) = SourceAgent::recover(Epoch(4), 1, Copy::Held);
    assert_eq!(agent.step(SourceEvent::Converged), []);
    assert_eq!(
        agent.step(SourceEvent::Answered(Traded::Cancelled))[0],
        SourceEffect::JournalArmed(2)
    );
}

#[test]
fn a_decision_that_cannot_be_journalled_destroys_nothing() {
    let mut agent = asking();
    agent.step(SourceEvent::Decided(1, Decision::Running));
    assert_eq!(
        agent.step(SourceEvent::JournalFailed)[0],
        SourceEffect::SayIndeterminate
    );
    assert!(matches!(agent.state(), SourceState::Asking { .. }));
}

#[test]
fn what_d_said_is_tried_again_and_not_asked_again() {
    let mut agent = asking();
    let resuming = agent.step(SourceEvent::Decided(1, Decision::Source));
    agent.step(SourceEvent::JournalFailed);
    assert_eq!(agent.step(SourceEvent::TimeToAsk), resuming, "B may be gone by now");
    assert!(matches!(agent.state(), SourceState::Resuming { .. }));

    let mut agent = asking();
    let arrived = agent.step(SourceEvent::Decided(1, Decision::Running));
    agent.step(SourceEvent::JournalFailed);
    assert_eq!(agent.step(SourceEvent::TimeToAsk), arrived);

    let mut agent = asking();
    agent.step(SourceEvent::Decided(1, Decision::Source));
    agent.step(SourceEvent::JournalFailed);
    agent.step(SourceEvent::VmmGone);
    assert!(
        agent
            .step(SourceEvent::TimeToAsk)
            .contains(&SourceEffect::Finish(Ending::Crashed)),
        "its copy is gone meanwhile"
    );
}

#[test]
fn a_restarted_agent_that_knows_what_d_said_asks_nobody() {
    let (mut agent, effects) = SourceAgent::recover_decided(Epoch(4), 1, Copy::Held, Decision::Source);
    assert_eq!(
        effects,
        [
            SourceEffect::JournalDecision(1, Decision::Source),
            SourceEffect::JournalResumed(Epoch(6)),
            SourceEffect::SendPermit(Epoch(6))
        ]
    );
    assert_eq!(agent.step(SourceEvent::Resumed), [SourceEffect::Finish(Ending::Stayed)]);

    let (_, effects) = SourceAgent::recover_decided(Epoch(4), 1, Copy::Gone, Decision::Source);
    assert_eq!(
        effects,
        [
            SourceEffect::JournalDecision(1, Decision::Source),
            SourceEffect::Finish(Ending::Crashed)
        ]
    );
    let (_, effects) = SourceAgent::recover_decided(Epoch(4), 1, Copy::Held, Decision::Running);
    assert!(effects.contains(&SourceEffect::DestroyCopy));
}
