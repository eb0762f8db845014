//! What a VMM's process gives up before it serves anybody.
//!
//! A guest that breaks out of its machine into the process around it shall find there what the guest had anyway, its memory, disks
//! and network cards, and no way on: no file, no network, no other process, no privilege, and few of the kernel's calls.
//!
//! ```text
//!   what is needed is open ─► limits ─► view ─► user, capabilities ─► filter of the process ─► threads, each with its own filter
//! ```
//!
//! Each stage takes rights that a later one gives up, and all but the threads' filters come while the process has one thread. What a
//! host does not allow is left out: a VMM never fails for want of a jail. It says so in its log, and `ferry doctor` tells beforehand.

mod calls;
mod limits;
mod privileges;
mod seccomp;
mod view;

use std::fmt;
use std::io;
use std::path::Path;

use rustix::process::{Gid, Uid};
use serde::{Deserialize, Serialize};

pub(super) use seccomp::Kind;

/// What a process is confined to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Confinement<'a> {
    /// Its instance's folder: it may read what is in there.
    pub(super) folder: &'a Path,
    /// Where it may write its started mark, if it will need one.
    pub(super) mark_folder: Option<&'a Path>,
    /// The user and group that it becomes, which nothing else has.
    pub(super) user: Option<u32>,
}

/// A part of the jail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Part {
    /// Limits of descriptors, threads and core dumps.
    Limits,
    /// The right to go back to the usual weight, which a copying thread gives up for a while.
    Weight,
    /// A view of its own of the file system.
    View,
    /// A network of its own, which is empty.
    Network,
    /// A user of its own.
    User,
    /// No capabilities, and no way to get any.
    Capabilities,
    /// A filter on system calls.
    SystemCalls,
}

impl fmt::Display for Part {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Limits => "limits",
            Self::Weight => "the right to its usual weight",
            Self::View => "a view of its own of the file system",
            Self::Network => "a network of its own",
            Self::User => "a user of its own",
            Self::Capabilities => "a life without capabilities",
            Self::SystemCalls => "a filter on system calls",
        })
    }
}

/// A part of the jail that this host does not allow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shortfall {
    /// What is missing.
    pub(crate) part: Part,
    /// Why.
    pub(crate) reason: String,
}

/// Collects what could not be had.
#[derive(Debug, Default)]
struct Shortfalls(Vec<Shortfall>);

impl Shortfalls {
    /// Takes note of a part that could not be had. True if it could.
    fn note<T>(&mut self, part: Part, tried: io::Result<T>) -> bool {
        match tried {
            Ok(_) => true,
            Err(error) => {
                let reason = crate::error_chain(&error);
                self.0.push(Shortfall { part, reason });
                false
            }
        }
    }
}

/// Goes into the jail, as far as this host allows, and tells what it does not. There is no way back.
///
/// Called once, while the process has one thread: much of this is a thread's own, and what is started later has it from here.
pub(super) fn enter(confinement: Confinement<'_>) -> Vec<Shortfall> {
    let mut shortfalls = Shortfalls::default();
    shortfalls.note(Part::Limits, limits::set());
    shortfalls.note(Part::Weight, limits::allow_usual_weight());

    let own = view::leave_the_hosts();
    shortfalls.note(Part::Network, own.network);
    let folders = [
        Some((confinement.folder, view::Access::Read)),
        confinement.mark_folder.map(|folder| (folder, view::Access::Write)),
    ];
    let viewed = own
        .mounts
        .and_then(|()| view::show_only(&folders.into_iter().flatten().collect::<Vec<_>>()));
    let has_own_view = shortfalls.note(Part::View, viewed);

    // Another user may not do this any more.
    let bounded = privileges::clear_bounding_set();
    let became = match confinement.user {
        None => Err(io::Error::other("the agent is not root, or may not give files away")),
        // Another user does not get through to the folder by the host's paths.
        Some(_) if !has_own_view => Err(io::Error::other("that takes a view of its own")),
        Some(user) => {
            limits::set_threads().and_then(|()| privileges::become_user(Uid::from_raw(user), Gid::from_raw(user)))
        }
    };
    shortfalls.note(Part::User, became);
    shortfalls.note(Part::Capabilities, privileges::give_up().and(bounded));
    shortfalls.note(Part::SystemCalls, seccomp::install(Kind::Process));
    shortfalls.0
}

/// Takes from the calling thread, and from those that it will start, what its kind does not need. To be called first thing.
pub(super) fn narrow(kind: Kind) {
    if let Err(error) = seccomp::install(kind) {
        // The start of the process told it louder, if the kernel has no filters at all.
        tracing::debug!(?kind, %error, "a thread has the process's filter only");
    }
}
