//! A cold move: the guest stands still from before its first page is sent.
//!
//! It is what PAUSE does, only earlier. The guest stops under the epoch that it has, nobody else has a right to run it before GO, and
//! the way back is that of every migration: the grant is traded for CANCELLED, then it runs on. A switchover that is called off while the
//! migration goes on does not wake it: it stands still until the next attempt.

use std::time::{Duration, Instant};

use crate::guest::{DiskCondition, GuestCondition, GuestEnd, GuestWas, SourceGuest, StopTimes};
use crate::handover::Traded;
use crate::source::Stop;
use crate::source::conversation::{TICK, unexpected};
use crate::source::rounds::Copy;

/// How long one try to stop the guest may take: nothing else is heard meanwhile. A device that has not finished by then is
/// given another try after the guest ran on, until the migration's time is up.
pub(super) const STOP_TRY: Duration = Duration::from_secs(10);

/// A guest that was stopped before anything of it was sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Halt {
    /// When the stop began: so does the blackout.
    pub(super) began: Instant,
    /// How long its parts took.
    pub(super) times: StopTimes,
    /// Since when it stands still.
    pub(super) complete: Instant,
}

impl<G: SourceGuest> Copy<'_, '_, G> {
    /// Stops the guest for good, and takes in what it wrote until then.
    pub(super) fn halt(&mut self) -> Result<(), Stop> {
        // What can be written back while it runs need not be waited for when it does not.
        while self.guest.settle_disks() == DiskCondition::Settling {
            self.pass_time()?;
        }
        let halt = loop {
            self.pass_time()?;
            let began = Instant::now();
            match self.guest.stop(began + STOP_TRY) {
                Ok(times) => {
                    break Halt {
                        began,
                        times,
                        complete: Instant::now(),
                    };
                }
                Err(cause) => {
                    tracing::info!(%cause, "the guest does not stand still yet");
                    run_on(self.guest, self.conversation.asked.parameters.guest_was)?;
                }
            }
        };
        *self.halt = Some(halt);
        if let GuestCondition::Ended(end) = self.guest.poll() {
            return Err(Stop::GuestEnded(end));
        }
        self.fetch_dirty()
    }

    /// Lets a little time pass, in which the guest runs.
    fn pass_time(&mut self) -> Result<(), Stop> {
        self.conversation.look_after(self.guest)?;
        match self.conversation.next(TICK)? {
            None => Ok(()),
            Some(heard) => Err(unexpected(&heard).into()),
        }
    }
}

/// The way back of a halted guest: it runs on, once nobody can have the right to run it elsewhere. Gives why the migration ended.
pub(super) fn undo<G: SourceGuest>(
    guest: &mut G,
    halt: Option<Halt>,
    traded: Traded,
    guest_was: GuestWas,
    stop: Stop,
) -> Stop {
    let is_over = matches!(stop, Stop::GuestEnded(_));
    if halt.is_none() || traded == Traded::GoSent || is_over {
        return stop;
    }
    match run_on(guest, guest_was) {
        Ok(()) => stop,
        Err(crashed) => crashed,
    }
}

fn run_on<G: SourceGuest>(guest: &mut G, was: GuestWas) -> Result<(), Stop> {
    guest
        .resume(was)
        .map_err(|cause| Stop::GuestEnded(GuestEnd::Crashed(format!("it could not run on: {cause}"))))
}
