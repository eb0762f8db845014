//! The search: every world that can be reached, breadth first, and from each a way to a settled one.
//!
//! A world is remembered by a fingerprint of 128 bits and by the number of the one it was first reached from; a trace is
//! found by walking back and taking the same steps again.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hash, Hasher};

use xxhash_rust::xxh3::xxh3_128;

use crate::config::Config;
use crate::invariants::{self, Fault};
use crate::moves::{Kind, Moves, Step};
use crate::world::World;

/// What came of a search.
pub(crate) struct Outcome {
    pub(crate) states: usize,
    pub(crate) steps: usize,
    /// Of the states, those in which nothing is left to do.
    pub(crate) settled: usize,
    /// The most steps that the shortest way to a state has.
    pub(crate) depth: usize,
    pub(crate) violation: Option<Violation>,
}

/// The shortest way to something that must not be.
pub(crate) struct Violation {
    pub(crate) fault: Fault,
    pub(crate) trace: Vec<(Step, World)>,
}

/// Searches everything within the bounds of `config`, or up to the first violation.
pub(crate) fn search(config: &Config) -> Outcome {
    let first = World::new(config);
    let mut search = Search {
        config,
        known: HashMap::default(),
        parents: Vec::new(),
        settled: Vec::new(),
        sure: Vec::new(),
        steps: 0,
        depth: 0,
        bytes: Vec::new(),
    };
    let violation = search.run(first).map(|(fault, at)| Violation {
        fault,
        trace: search.trace(at),
    });
    Outcome {
        states: search.parents.len(),
        steps: search.steps,
        settled: search.settled.len(),
        depth: search.depth,
        violation,
    }
}

struct Search<'a> {
    config: &'a Config,
    known: HashMap<u128, u32, BuildHasherDefault<Fingerprinted>>,
    /// By number: the one that it was first reached from.
    parents: Vec<u32>,
    settled: Vec<u32>,
    /// Steps that happen when nothing fails any more: to, from.
    sure: Vec<(u32, u32)>,
    steps: usize,
    depth: usize,
    bytes: Vec<u8>,
}

impl Search<'_> {
    fn run(&mut self, first: World) -> Option<(Fault, u32)> {
        let mut layer = Vec::new();
        let (number, _) = self.enter(&first, 0);
        if let Some(fault) = self.look(&first, number) {
            return Some((fault, number));
        }
        layer.push((number, first));
        while !layer.is_empty() {
            let mut next = Vec::new();
            for (number, world) in layer {
                for (_, kind, reached) in Moves::all(&world, self.config) {
                    self.steps += 1;
                    let (to, is_new) = self.enter(&reached, number);
                    if kind == Kind::Sure && to != number {
                        self.sure.push((to, number));
                    }
                    if is_new {
                        if let Some(fault) = self.look(&reached, to) {
                            return Some((fault, to));
                        }
                        next.push((to, reached));
                    }
                }
            }
            self.depth += usize::from(!next.is_empty());
            layer = next;
        }
        self.never_settles().map(|number| (Fault::NeverSettles, number))
    }

    /// The world's number, and whether it is new.
    fn enter(&mut self, world: &World, from: u32) -> (u32, bool) {
        let fingerprint = fingerprint(world, &mut self.bytes);
        let number = u32::try_from(self.parents.len()).expect("there are less than four billion states");
        match self.known.entry(fingerprint) {
            std::collections::hash_map::Entry::Occupied(known) => (*known.get(), false),
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(number);
                self.parents.push(from);
                (number, true)
            }
        }
    }

    fn look(&mut self, world: &World, number: u32) -> Option<Fault> {
        if let Some(fault) = invariants::check(world) {
            return Some(fault);
        }
        if !invariants::is_settled(world, self.config) {
            return None;
        }
        self.settled.push(number);
        invariants::check_settled(world)
    }

    /// The first state from which no settled one is reached by steps that are sure to happen.
    fn never_settles(&mut self) -> Option<u32> {
        self.sure.sort_unstable();
        let states = self.parents.len();
        let mut settles = vec![false; states];
        let mut waiting = self.settled.clone();
        for &number in &waiting {
            settles[number as usize] = true;
        }
        while let Some(to) = waiting.pop() {
            let begin = self.sure.partition_point(|&(reached, _)| reached < to);
            for &(reached, from) in &self.sure[begin..] {
                if reached != to {
                    break;
                }
                if !std::mem::replace(&mut settles[from as usize], true) {
                    waiting.push(from);
                }
            }
        }
        let stuck = settles.iter().position(|&settles| !settles)?;
        u32::try_from(stuck).ok()
    }

    /// The steps from the first world to this one.
    fn trace(&mut self, to: u32) -> Vec<(Step, World)> {
        let mut way = vec![to];
        while let Some(&number) = way.last()
            && number != 0
        {
            way.push(self.parents[number as usize]);
        }
        way.reverse();
        let mut world = World::new(self.config);
        let mut trace = Vec::new();
        for number in way.into_iter().skip(1) {
            let step = Moves::all(&world, self.config).into_iter().find(|(_, _, reached)| {
                let fingerprint = fingerprint(reached, &mut self.bytes);
                self.known.get(&fingerprint) == Some(&number)
            });
            let Some((step, _, reached)) = step else { break };
            trace.push((step, reached.clone()));
            world = reached;
        }
        trace
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (step, world)) in self.trace.iter().enumerate() {
            let step = step.to_string();
            writeln!(formatter, "{:>4}  {step:<72} {world}", number + 1)?;
        }
        write!(formatter, "      => {}", self.fault)
    }
}

fn fingerprint(world: &World, bytes: &mut Vec<u8>) -> u128 {
    let mut hasher = Collected(std::mem::take(bytes));
    hasher.0.clear();
    world.hash(&mut hasher);
    let fingerprint = xxh3_128(&hasher.0);
    *bytes = hasher.0;
    fingerprint
}

/// Collects what is hashed, to be hashed in one go.
struct Collected(Vec<u8>);

impl Hasher for Collected {
    fn write(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn finish(&self) -> u64 {
        xxh3_128(&self.0) as u64
    }
}

/// The hash of a fingerprint is a part of it.
#[derive(Default)]
struct Fingerprinted(u64);

impl Hasher for Fingerprinted {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u128(&mut self, fingerprint: u128) {
        self.0 = fingerprint as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
