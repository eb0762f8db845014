//! The steps of a migration as data: what each does, when the journal has it, and how it is undone.
//!
//! The script of `outgoing` and the driver of `incoming` enter each step by its row here. What went wrong before GO is undone by the rows
//! of the steps that were reached, the last first; a restarted agent reads from the journal which those are. From GO on nothing is
//! undone: the decision register says whose the guest is. `docs/control-plane.md` has these tables, and a test compares them.

use std::fmt;

/// The status of a migration that waits: for its turn, or for a destination that has its hands full.
pub(crate) const QUEUED: &str = "queued";

/// The status of a migration whose guest runs at the destination without all of its memory.
pub(crate) const POST_COPY: &str = "running (post-copy)";

/// The status of a migration that copies and has no link, while another one may be made.
pub(crate) const LINK_LOST: &str = "running (link lost)";

/// When the journal has that a step was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Journalled {
    /// Durable before the step begins, in a row that is written then.
    Before,
    /// With the next row that is written anyway. Until then a restarted agent finds an earlier step, and the VMM's own word.
    Along,
}

/// How a step is undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Undo<How> {
    /// By this, in words.
    By(How, &'static str),
    /// Not at all, and why.
    Nothing(&'static str),
}

/// One row of a table of steps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepRow<How> {
    /// Its name in records.
    pub(crate) word: &'static str,
    /// What it does.
    pub(crate) does: &'static str,
    pub(crate) journalled: Journalled,
    pub(crate) undo: Undo<How>,
}

/// The steps of agent A, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum SourceStep {
    Accept,
    Queue,
    Build,
    Prepare,
    Connect,
    Copy,
    Arm,
    Grant,
    Go,
    Confirm,
    Serve,
}

/// How a step of agent A is undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SourceUndo {
    GiveUpTurn,
    EndMachine,
    RollBackDestination,
    TakeMachineBack,
}

impl SourceStep {
    /// All of them, in order.
    pub(crate) const ALL: [Self; 11] = [
        Self::Accept,
        Self::Queue,
        Self::Build,
        Self::Prepare,
        Self::Connect,
        Self::Copy,
        Self::Arm,
        Self::Grant,
        Self::Go,
        Self::Confirm,
        Self::Serve,
    ];

    /// Its row of the table.
    pub(crate) const fn row(self) -> StepRow<SourceUndo> {
        use Journalled::{Along, Before};
        use Undo::{By, Nothing};
        let (word, does, journalled, undo) = match self {
            Self::Accept => (
                "accept",
                "at RPC 4.0 only: writes the order down, and waits for its cast",
                Before,
                Nothing("the record stays, and says how it ended"),
            ),
            Self::Queue => (
                "queue",
                "writes the order down with its number, and waits for its turn among the migrations out of the host",
                Before,
                By(SourceUndo::GiveUpTurn, "the turn is the next one's"),
            ),
            Self::Build => (
                "build",
                "of a stopped instance only: builds its machine, paused, under an epoch of its own",
                Before,
                By(SourceUndo::EndMachine, "its VMM is ended, and it is stopped as it was"),
            ),
            Self::Prepare => (
                "prepare",
                "has the destination prepare, and sends it the images that it lacks",
                Before,
                By(
                    SourceUndo::RollBackDestination,
                    "the destination is told that it is over",
                ),
            ),
            Self::Connect => (
                "connect",
                "makes the connections to the destination's data port, or through both agents",
                Along,
                Nothing("a connection that no VMM has goes with the script"),
            ),
            Self::Copy => (
                "copy",
                "the VMM sends memory and disks; of a cold move it stops the guest first",
                Along,
                By(
                    SourceUndo::TakeMachineBack,
                    "the VMM trades its grant for CANCELLED and takes the machine back: the guest is what it was",
                ),
            ),
            Self::Arm => (
                "arm",
                "writes ARMED down, and asks the destination to expect the attempt",
                Before,
                Nothing("epoch e + 1 counts as known for good; the attempt ends with the copy"),
            ),
            Self::Grant => (
                "grant",
                "gives the VMM the switch grant",
                Along,
                Nothing("only the VMM trades it, for CANCELLED when the copy ends or for GO-sent"),
            ),
            Self::Go => (
                "go",
                "the VMM sent GO: asks for D until it is final",
                Along,
                Nothing(
                    "D alone decides; on SRC the guest runs on under a new epoch, and the destination has cleaned up",
                ),
            ),
            Self::Confirm => (
                "confirm",
                "writes RUNNING down, and destroys the copy",
                Before,
                Nothing("the guest is the destination's"),
            ),
            Self::Serve => (
                "serve",
                "where pages come late: writes POSTCOPY down, and keeps the memory until the destination has the last one",
                Before,
                Nothing("the guest is the destination's"),
            ),
        };
        StepRow {
            word,
            does,
            journalled,
            undo,
        }
    }

    /// The step of a record; none in one that was written before there were any.
    pub(crate) fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|step| step.row().word == word)
    }

    /// The status of a migration in this step; none where it stays what it is.
    pub(crate) const fn status(self) -> Option<&'static str> {
        match self {
            Self::Accept => Some("accepted"),
            Self::Queue => Some(QUEUED),
            Self::Build | Self::Prepare | Self::Connect => Some("preparing"),
            Self::Copy => Some("running"),
            Self::Arm | Self::Grant => Some("switching"),
            // Indeterminate it may be meanwhile, and not be any more.
            Self::Go | Self::Confirm => None,
            Self::Serve => Some(POST_COPY),
        }
    }

    /// What is to be undone once this step was reached: the last first, with the words for it.
    pub(crate) fn undoing(self) -> impl Iterator<Item = (Self, SourceUndo, &'static str)> {
        let reached = Self::ALL.into_iter().rev().skip_while(move |&step| step > self);
        reached.filter_map(|step| match step.row().undo {
            Undo::By(how, words) => Some((step, how, words)),
            Undo::Nothing(_) => None,
        })
    }
}

impl fmt::Display for SourceStep {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.row().word)
    }
}

/// The steps of agent B, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum DestinationStep {
    Reserve,
    MakeRoom,
    Build,
    Load,
    Expect,
    Claim,
    Run,
}

/// How a step of agent B is undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DestinationUndo {
    Forget,
    RemoveDisks,
    EndMachine,
}

impl DestinationStep {
    /// All of them, in order.
    pub(crate) const ALL: [Self; 7] = [
        Self::Reserve,
        Self::MakeRoom,
        Self::Build,
        Self::Load,
        Self::Expect,
        Self::Claim,
        Self::Run,
    ];

    /// Its row of the table.
    pub(crate) const fn row(self) -> StepRow<DestinationUndo> {
        use Journalled::{Along, Before};
        use Undo::{By, Nothing};
        let (word, does, journalled, undo) = match self {
            Self::Reserve => (
                "reserve",
                "writes the instance down as incoming, and with it its claim; takes its images",
                Before,
                By(DestinationUndo::Forget, "its row and its folder are removed"),
            ),
            Self::MakeRoom => (
                "make-room",
                "makes files for the disks that are copied; their paths were written down before",
                Along,
                By(DestinationUndo::RemoveDisks, "those that are this guest's are removed"),
            ),
            Self::Build => (
                "build",
                "starts a VMM, and builds an empty machine in it",
                Along,
                By(
                    DestinationUndo::EndMachine,
                    "the VMM is killed, and its locks go with it",
                ),
            ),
            Self::Load => (
                "load",
                "hands the connections over: the VMM loads",
                Along,
                Nothing("what was loaded goes with the VMM"),
            ),
            Self::Expect => (
                "expect",
                "D becomes OPEN",
                Before,
                Nothing("D moves to SRC and stays, so that nothing late is believed"),
            ),
            Self::Claim => (
                "claim",
                "D becomes CLAIMED, and the VMM is sent its permit",
                Before,
                Nothing("only where no permit was sent or taken does D move to SRC"),
            ),
            Self::Run => (
                "run",
                "D becomes RUNNING, and the instance is this host's",
                Before,
                Nothing("the guest may have run here"),
            ),
        };
        StepRow {
            word,
            does,
            journalled,
            undo,
        }
    }

    /// What is to be undone once this step was reached: the last first, with the words for it.
    pub(crate) fn undoing(self) -> impl Iterator<Item = (Self, DestinationUndo, &'static str)> {
        let reached = Self::ALL.into_iter().rev().skip_while(move |&step| step > self);
        reached.filter_map(|step| match step.row().undo {
            Undo::By(how, words) => Some((step, how, words)),
            Undo::Nothing(_) => None,
        })
    }
}

impl fmt::Display for DestinationStep {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.row().word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table as the documentation has it.
    fn table<How>(rows: impl Iterator<Item = StepRow<How>>) -> String {
        let mut text = "| step | does | journalled | undone by |\n| --- | --- | --- | --- |\n".to_owned();
        for row in rows {
            let journalled = match row.journalled {
                Journalled::Before => "before it",
                Journalled::Along => "with the next row",
            };
            let undo = match row.undo {
                Undo::By(_, words) => words.to_owned(),
                Undo::Nothing(why) => format!("nothing: {why}"),
            };
            text += &format!("| `{}` | {} | {journalled} | {undo} |\n", row.word, row.does);
        }
        text
    }

    #[test]
    fn the_documentation_has_the_tables() {
        let page = include_str!("../../../docs/control-plane.md");
        let source = table(SourceStep::ALL.into_iter().map(SourceStep::row));
        let destination = table(DestinationStep::ALL.into_iter().map(DestinationStep::row));
        assert!(page.contains(&source), "docs/control-plane.md lacks:\n{source}");
        assert!(
            page.contains(&destination),
            "docs/control-plane.md lacks:\n{destination}"
        );
    }

    #[test]
    fn all_steps_are_listed_once_and_in_order() {
        assert!(SourceStep::ALL.is_sorted_by(|one, next| one < next));
        assert!(DestinationStep::ALL.is_sorted_by(|one, next| one < next));
        assert_eq!(SourceStep::ALL.last(), Some(&SourceStep::Serve));
        assert_eq!(DestinationStep::ALL.last(), Some(&DestinationStep::Run));
        assert_eq!(SourceStep::Serve as usize + 1, SourceStep::ALL.len());
        assert_eq!(DestinationStep::Run as usize + 1, DestinationStep::ALL.len());
    }

    #[test]
    fn each_step_says_how_it_is_undone_or_why_it_is_not() {
        for step in SourceStep::ALL {
            let (Undo::By(_, words) | Undo::Nothing(words)) = step.row().undo;
            assert!(!words.is_empty() && !step.row().does.is_empty(), "{step}");
            assert_eq!(SourceStep::parse(step.row().word), Some(step));
        }
        for step in DestinationStep::ALL {
            let (Undo::By(_, words) | Undo::Nothing(words)) = step.row().undo;
            assert!(!words.is_empty() && !step.row().does.is_empty(), "{step}");
        }
        assert_eq!(SourceStep::parse(""), None);
    }

    #[test]
    fn from_go_on_and_from_the_claim_on_no_step_has_an_undo() {
        let source = SourceStep::ALL.into_iter().filter(|&step| step >= SourceStep::Go);
        assert!(
            source
                .map(SourceStep::row)
                .all(|row| matches!(row.undo, Undo::Nothing(_)))
        );
        let destination = DestinationStep::ALL
            .into_iter()
            .filter(|&step| step >= DestinationStep::Claim);
        assert!(
            destination
                .map(DestinationStep::row)
                .all(|row| matches!(row.undo, Undo::Nothing(_)))
        );
    }

    #[test]
    fn what_was_reached_is_undone_the_last_first_and_nothing_else() {
        let undone = |reached: SourceStep| reached.undoing().map(|(step, ..)| step).collect::<Vec<_>>();
        assert_eq!(undone(SourceStep::Accept), []);
        assert_eq!(
            undone(SourceStep::Prepare),
            [SourceStep::Prepare, SourceStep::Build, SourceStep::Queue]
        );
        assert_eq!(
            undone(SourceStep::Grant),
            [
                SourceStep::Copy,
                SourceStep::Prepare,
                SourceStep::Build,
                SourceStep::Queue
            ]
        );
        let undone: Vec<_> = DestinationStep::Load.undoing().map(|(step, ..)| step).collect();
        assert_eq!(
            undone,
            [
                DestinationStep::Build,
                DestinationStep::MakeRoom,
                DestinationStep::Reserve
            ]
        );
    }
}
