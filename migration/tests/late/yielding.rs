//! Late pages that nobody waits for yield to the guest and to those that somebody waits for; who waits for one does not wait for that.

use super::fake::processors::{Deed, Done, nice, nice_of_who_stands_back};
use super::*;

/// A page that somebody touches while nearly all are missing, and those that come along.
const TOUCHED: u64 = 5900;
const NEIGHBOURHOOD: std::ops::Range<u64> = 5888..5904;

/// Every page came, and one of them was waited for.
#[track_caller]
fn with_one_page_touched() -> (Arc<FakeMemory>, Arc<FakeMemory>) {
    let late = Late::of(migrate(hardly_any_bandwidth()));
    // One frame goes before the cap is felt.
    soon("a first frame is here", || late.pages.missing() < 6300);
    late.touch([TOUCHED].into_iter());
    let is_here = |frame: u64| !late.destination.is_absent(frame);
    soon("its neighbours are here", || NEIGHBOURHOOD.clone().all(is_here));
    let ends = (Arc::clone(&late.source), Arc::clone(&late.destination));
    late.orders.send(ServeOrder::Bandwidth(None)).unwrap();
    late.comes();
    ends
}

/// Frames that were asked for, and the others, of those that are told to have pages.
fn parted(frames: Vec<Done>) -> (Vec<Done>, Vec<Done>) {
    let is_awaited = |frame: &Done| {
        let mut pages = frame.runs.iter().flat_map(|run| run.first..run.end());
        pages.all(|page| NEIGHBOURHOOD.contains(&page))
    };
    let frames = frames.into_iter().filter(|frame| frame.pages() > 0);
    frames.partition(is_awaited)
}

#[track_caller]
fn who_is_waited_for_goes_first(frames: Vec<Done>) {
    let (awaited, pushed) = parted(frames);
    assert!(awaited.iter().any(|frame| frame.has(TOUCHED)), "{awaited:?}");
    let pages: u64 = pushed.iter().map(Done::pages).sum();
    assert_eq!(pages, 6300 - 16, "{pushed:?}");
    let stands_back = nice_of_who_stands_back();
    assert!(awaited.iter().all(|frame| frame.nice == nice()), "{awaited:?}");
    assert!(pushed.iter().all(|frame| frame.nice == stands_back), "{pushed:?}");
}

#[test]
fn who_sends_what_nobody_waits_for_stands_back_and_who_answers_does_not() {
    let (source, _) = with_one_page_touched();
    who_is_waited_for_goes_first(source.processors().done(Deed::Sent));
}

#[test]
fn who_takes_in_what_nobody_waits_for_stands_back_and_who_takes_in_an_answer_does_not() {
    let (_, destination) = with_one_page_touched();
    who_is_waited_for_goes_first(destination.processors().done(Deed::Supplied));
}

#[test]
fn who_puts_huge_pages_below_what_came_late_stands_back() {
    let (_, destination) = with_one_page_touched();
    let gathered = || destination.processors().done(Deed::MadeHuge);
    soon("huge pages are put below it", || !gathered().is_empty());
    let stands_back = nice_of_who_stands_back();
    assert!(gathered().iter().all(|block| block.nice == stands_back));
}
