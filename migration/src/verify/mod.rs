//! Digests that are kept as pages go, and compared before the guest is handed over (`--verify`).
//!
//! ```text
//!   source: re-arm ─► digest ─► send           destination: receive ─► digest           … each round …
//!   guest stands still, last pages sent ─► Compare{sums of ranges} ─► which ranges differ? ─┬─ none ─► GO
//!                                                     ▲        these ranges, sent again ◄───┤ for the first time
//!                                                     └────────────────────┘                └ again: the guest stays
//! ```
//!
//! **What a digest means.** The source digests a page after its range was re-armed and before it sends it, out of the guest's memory and not
//! out of a copy. A guest that writes the page from then on may make that digest, and what was sent, anything; but the write is in the
//! dirty log, the page is sent again, and its new digest takes the old one's place. The last round is sent while the guest stands still. So once that round
//! was sent each page's digest is that of what is in the source's memory and of what was sent last, and nothing had to stop for it.
//! The destination digests what it finds in its memory right after it has put it there, by the thread that received it.
//!
//! A page of zeroes has the digest 0, told or sent; so has one that nobody ever wrote, and one that was discarded or given up (that is a write, and it is
//! told to be zero). What no round sent is therefore equal by definition.
//!
//! **What is compared.** Sums of ranges: 4096 of each region of memory at most, a few dozen KiB in all, whatever the guest's size. A sum follows
//! each digest of its range as it changes, so that the blackout has to digest the last pages and to read the sums, and that is all. The digests behind
//! the sums are 8 bytes a page, on both sides, of pages that were sent: 2 MiB for each GiB.
//!
//! **What it does not tell.** A write that the dirty log does not have is missed by both sides alike: for that tests digest all memory ([`digest`](crate::digest)).
//! XXH3 finds accidents, at memory speed; a peer that lies is not found out.
//!
//! XXH3 is what the repository's other digests of memory are made with, and what keeps up with the copy: SHA or BLAKE3 would be most of its processor
//! time. CRC-32 would be faster on some processors, and is too short for a sum over millions of pages.
//!
//! **Pages that come late** are left out of the comparison on both sides. After GO the source's copy does not change any more: each frame of late pages says what they
//! add up to, and the destination checks that before anybody sees them. What is wrong is asked for again ([`postcopy`](crate::postcopy)).

mod digests;
mod frame_sum;
mod ranges;

pub(crate) use digests::PageDigests;
pub(crate) use frame_sum::FrameSum;
pub(crate) use ranges::Ranges;
