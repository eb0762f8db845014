//! What a cell may end with: the table "What happens when" of the handover, as a function of who fails, what D is at that moment, and how
//! far GO and the permit are.

use ferry_rpc::faults::{Kind, Moment, Site};

use crate::cell::{Actor, Cell, Ending, Fault, Power};
use crate::course::Course;

/// Whether something has been said, as seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    No,
    Maybe,
    Yes,
}

/// How it stands at the moment of the fault.
#[derive(Clone, Debug)]
pub(crate) struct Scene {
    /// D of the newest attempt.
    pub(crate) decision: Option<String>,
    /// Whether GO went to B.
    pub(crate) go: Said,
    /// Whether VMM B was given its permit.
    pub(crate) permit: Said,
    /// Whether VMM B left its started mark.
    pub(crate) marked: bool,
}

/// The endings that the table allows. Of an instance that is off no guest can crash: it is stopped where it would have.
pub(crate) fn allowed(cell: &Cell, scene: &Scene) -> Vec<Ending> {
    let of_a_guest = allowed_of_a_guest(cell, scene).iter().copied();
    match cell.power {
        Power::On => of_a_guest.collect(),
        Power::Off => of_a_guest.map(stopped).collect(),
    }
}

fn stopped(ending: Ending) -> Ending {
    match ending {
        Ending::AtA | Ending::CrashedAtA => Ending::AtA,
        Ending::AtB | Ending::CrashedAtB => Ending::AtB,
    }
}

fn allowed_of_a_guest(cell: &Cell, scene: &Scene) -> &'static [Ending] {
    use Ending::{AtA, AtB, CrashedAtA, CrashedAtB};
    let decision = scene.decision.as_deref();
    let refused = decision == Some("SRC") || cell.course == Course::Refused;
    match (cell.fault, decision) {
        // "The page source's VMM or host lost: the guest is lost", unless its last page was faster; before it is handed over, as ever.
        (Fault::Kill(Actor::VmmA), Some("CLAIMED" | "RUNNING")) if cell.course == Course::Late => &[CrashedAtB, AtB],
        (Fault::Kill(Actor::VmmA), _) if cell.course == Course::Late && scene.go != Said::No => {
            &[CrashedAtA, CrashedAtB, AtB]
        }
        // "VMM B dies, started mark set: RUNNING, guest crashed on B".
        (Fault::Kill(Actor::VmmB), Some("RUNNING")) => &[CrashedAtB],
        (Fault::Kill(Actor::VmmB), _) if scene.marked => &[CrashedAtB],
        // "D = CLAIMED, permit not sent, or no started mark and same boot: A resumes". With the permit on its way the mark may come yet.
        (Fault::Kill(Actor::VmmB), Some("CLAIMED")) if scene.permit == Said::No => &[AtA],
        (Fault::Kill(Actor::VmmB), Some("CLAIMED")) => &[AtA, CrashedAtB],
        // "VMM B dies with D = OPEN: OPEN -> SRC, A resumes".
        (Fault::Kill(Actor::VmmB), _) => &[AtA],

        // Final, and claimed is as good while VMM B lives: "agent B killed between CLAIM and RUNNING: sends the permit again";
        // "VMM A dies after GO: D decides"; "the RUNNING notice is lost: A asks again, destroys". Timeouts never decide.
        (_, Some("CLAIMED" | "RUNNING")) => &[AtB],

        // "VMM A dies before GO: guest crashed at A"; "after GO: D decides", and it is not decided yet.
        (Fault::Kill(Actor::VmmA), _) if refused => &[CrashedAtA],
        (Fault::Kill(Actor::VmmA), _) => match scene.go {
            Said::No => &[CrashedAtA],
            Said::Maybe | Said::Yes => &[CrashedAtA, AtB],
        },
        // The guest's way back is decided: nothing but its own VMM's death changes that.
        _ if refused || cell.course == Course::Aborted && scene.go == Said::No => &[AtA],

        // "Agent A killed, any time: VMM A finishes the grant it holds": A or B. "Agent B killed before CLAIM: VMM B gone -> SRC;
        // there -> waits or SRC": what it waits for may be a claim.
        (Fault::Kill(Actor::AgentA | Actor::AgentB), _) => &[AtA, AtB],

        // Nothing is left to be said to the source: it may have sent GO while its last answer was held, passed on by then.
        (Fault::Lose, _) if cell.site == Site::WireCompared && cell.moment == Moment::After => &[AtA, AtB],
        // "Link cut before GO", "GO lost, manifest refused".
        (Fault::Lose, _) if cell.site.kind() == Kind::Wire && scene.go != Said::Yes => &[AtA],
        // No expectation, no switchover.
        (Fault::Lose, _) if cell.site == Site::CallExpect => &[AtA],
        (Fault::Lose, _) => &[AtA, AtB],
        // Between VMMs a message that comes twice is misbehaviour, and refused. Elsewhere it changes nothing.
        (Fault::Double, _) if cell.site.kind() == Kind::Wire => &[AtA, AtB],
        (Fault::Double, _) => base(cell.course),
        // Timeouts make someone ask, or call it off before GO.
        (Fault::Delay | Fault::Stop(_), _) => &[AtA, AtB],
    }
}

/// How a course ends when nothing else happens.
fn base(course: Course) -> &'static [Ending] {
    match course {
        Course::Straight | Course::Asked | Course::Unanswered | Course::Late => &[Ending::AtB],
        Course::Aborted | Course::Refused => &[Ending::AtA],
        Course::Recalled => &[Ending::AtA, Ending::AtB],
    }
}
