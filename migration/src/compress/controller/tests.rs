use proptest::prelude::*;

use super::*;

const FRAME: u64 = 2 << 20;

/// A link with so much for a stream, and what each way makes of the pages, in bytes a second and what is left.
#[derive(Clone, Copy, Debug)]
struct World {
    link: f64,
    lz4: (f64, f64),
    zstd1: (f64, f64),
    zstd3: (f64, f64),
}

const TEXT: World = World {
    link: 0.0,
    lz4: (600e6, 0.5),
    zstd1: (300e6, 0.3),
    zstd3: (150e6, 0.22),
};

const RANDOM: World = World {
    link: 0.0,
    lz4: (2e9, 1.0),
    zstd1: (1e9, 1.0),
    zstd3: (900e6, 1.0),
};

impl World {
    fn over(self, link: f64) -> Self {
        Self { link, ..self }
    }

    fn of(&self, method: Method) -> (f64, f64) {
        match method {
            Method::Lz4 => self.lz4,
            Method::Zstd(1) => self.zstd1,
            Method::Zstd(_) => self.zstd3,
        }
    }

    /// What a frame that was planned so tells.
    fn send(&self, plan: Plan) -> Measured {
        let seconds = |bytes: f64, rate: f64| Duration::from_secs_f64(bytes / rate);
        let (speed, left) = plan.method.map_or((f64::INFINITY, 1.0), |method| self.of(method));
        let bytes = FRAME as f64;
        let compressing = seconds(bytes, speed);
        // The link works on while the next frame is compressed.
        let sending = seconds(bytes * left, self.link).saturating_sub(compressing);
        Measured {
            bytes: FRAME,
            sent: (bytes * left) as u64,
            method: plan.method,
            copies: 0,
            deltas: 0,
            compressing,
            worked: compressing,
            sending: sending.max(seconds(bytes * left, 4e9)),
            sampled: plan.sample.map(|method| {
                let (speed, left) = self.of(method);
                Sampled {
                    method,
                    bytes: 256 << 10,
                    packed: (f64::from(256 << 10) * left) as u64,
                    took: seconds(f64::from(256 << 10), speed),
                }
            }),
            streams: 1,
            cap: None,
        }
    }

    /// Sends so many frames; gives how many of them were sent plainly, and how many samples were taken.
    fn run(&self, controller: &mut Controller, frames: u32) -> (u32, u32) {
        let (mut plain, mut samples) = (0, 0);
        for _ in 0..frames {
            let plan = controller.plan(FRAME);
            plain += u32::from(plan.method.is_none());
            samples += u32::from(plan.sample.is_some());
            controller.measured(&self.send(plan));
        }
        (plain, samples)
    }
}

fn controller() -> Controller {
    Controller::new(Codecs::ours())
}

#[test]
fn text_over_a_slow_link_is_compressed_within_some_frames() {
    for (link, method) in [(5e6, Method::Zstd(3)), (59e6, Method::Zstd(1)), (280e6, Method::Lz4)] {
        let mut controller = controller();
        let (plain, _) = TEXT.over(link).run(&mut controller, 400);
        assert_eq!(controller.method(), Some(method), "{link}");
        assert!(plain <= 20, "{plain} frames were sent plainly over {link}");
    }
}

#[test]
fn a_link_that_is_faster_than_compressors_is_left_alone_at_next_to_no_cost() {
    for world in [TEXT.over(2e9), RANDOM.over(2e9)] {
        let mut controller = controller();
        let (plain, samples) = world.run(&mut controller, 512);
        assert_eq!((controller.method(), plain), (None, 512));
        assert!(samples <= 6, "{samples} samples");
    }
}

#[test]
fn random_pages_are_never_compressed() {
    for link in [5e6, 59e6, 280e6, 2e9] {
        let mut controller = controller();
        let (plain, samples) = RANDOM.over(link).run(&mut controller, 1000);
        assert_eq!((controller.method(), plain), (None, 1000));
        assert!(samples <= 12, "{samples} samples over {link}");
    }
}

#[test]
fn a_link_that_becomes_fast_is_noticed_and_one_that_becomes_slow_too() {
    let mut controller = controller();
    TEXT.over(59e6).run(&mut controller, 200);
    assert!(controller.method().is_some());
    TEXT.over(3e9).run(&mut controller, 800);
    assert_eq!(controller.method(), None);
    TEXT.over(59e6).run(&mut controller, 60);
    assert!(controller.method().is_some(), "{controller:?}");
}

#[test]
fn a_link_that_was_slow_for_a_moment_is_found_out_soon() {
    let mut controller = controller();
    // The other end was without a processor.
    TEXT.over(20e6).run(&mut controller, 8);
    assert!(controller.method().is_some());
    let (plain, _) = TEXT.over(2e9).run(&mut controller, 300);
    assert_eq!(controller.method(), None);
    assert!(plain > 100, "{plain} frames were sent plainly");
}

#[test]
fn a_receiver_that_is_slow_to_unpack_gets_plain_frames() {
    // What is compressed is taken at a fraction of the link's rate: over any of these links plain frames are faster.
    for link in [100e6, 400e6, 2e9] {
        let (mut controller, starved) = (controller(), TEXT.over(50e6 * 0.2));
        TEXT.over(50e6).run(&mut controller, 20);
        assert!(controller.method().is_some());
        let fast = TEXT.over(link);
        let mut plain = 0;
        for _ in 0..1000 {
            let plan = controller.plan(FRAME);
            let world = if plan.method.is_some() { starved } else { fast };
            controller.measured(&world.send(plan));
            plain += u32::from(plan.method.is_none());
        }
        assert!(plain > 900, "{plain} frames were sent plainly over {link}");
    }
}

#[test]
fn what_was_saved_up_under_a_cap_is_not_taken_for_a_fast_link() {
    let (mut controller, burst) = (controller(), TEXT.over(4e9));
    for _ in 0..1000 {
        let plan = controller.plan(FRAME);
        // A probe's frames go at once, for what is compressed takes less than is allowed.
        let sent = burst.send(plan);
        controller.measured(&Measured {
            cap: Some(100e6),
            ..sent
        });
    }
    assert!(controller.method().is_some());
}

#[test]
fn probes_cost_a_few_frames_in_a_hundred() {
    // The compressor is the bottleneck: what the link carries is not seen.
    let mut controller = controller();
    let world = TEXT.over(280e6);
    world.run(&mut controller, 100);
    assert!(controller.method().is_some());
    let (plain, _) = world.run(&mut controller, 1000);
    assert!((1..=40).contains(&plain), "{plain} frames were sent plainly");
}

#[test]
fn pages_that_cease_to_shrink_are_sent_plainly_again() {
    let mut controller = controller();
    TEXT.over(59e6).run(&mut controller, 50);
    assert!(controller.method().is_some());
    RANDOM.over(59e6).run(&mut controller, 100);
    assert_eq!(controller.method(), None);
}

#[test]
fn changes_are_told_with_their_grounds() {
    let (mut controller, world) = (controller(), TEXT.over(59e6));
    let mut told = Vec::new();
    for _ in 0..20 {
        let plan = controller.plan(FRAME);
        told.extend(controller.measured(&world.send(plan)));
    }
    assert_eq!(
        told[0].words,
        "pages are compressed with lz4 from now on: a stream carries 59 MB/s, and lz4 takes in 600 MB/s and leaves 50 % of it"
    );
    assert_eq!(told[0].to, Some(Method::Lz4));
}

#[test]
fn one_frame_that_is_unlike_the_others_switches_nothing_on() {
    let (mut controller, world) = (controller(), RANDOM.over(59e6));
    for frame in 0..20 {
        let plan = controller.plan(FRAME);
        let sent = if frame == 1 { TEXT.over(59e6) } else { world }.send(plan);
        assert_eq!(controller.measured(&sent), None);
    }
}

#[test]
fn without_a_format_nothing_is_tried() {
    let mut controller = Controller::new(Codecs::default());
    assert_eq!(TEXT.over(1e6).run(&mut controller, 100), (100, 0));
}

proptest! {
    /// Whatever link and compressors: what is settled on costs hardly more than the best of all, and never clearly more than plain frames.
    #[test]
    fn what_is_settled_on_is_near_the_best(
        link in 1e6f64..5e9,
        speeds in (100e6f64..3e9, 50e6f64..1e9, 20e6f64..500e6),
        left in (0.01f64..1.0, 0.01f64..1.0, 0.01f64..1.0),
    ) {
        let world = World {
            link,
            lz4: (speeds.0, left.0),
            zstd1: (speeds.1.min(speeds.0), left.1.min(left.0)),
            zstd3: (speeds.2.min(speeds.1.min(speeds.0)), left.2.min(left.1.min(left.0))),
        };
        let mut controller = controller();
        world.run(&mut controller, 600);
        let cost = |method: Option<Method>| match method {
            None => 1.0 / link.min(4e9),
            Some(method) => {
                let (speed, left) = world.of(method);
                let known = Some((1.0 / speed, left));
                Way { known, ..Way::new(method) }.cost(link).unwrap_or(f64::INFINITY)
            }
        };
        let settled = cost(controller.method());
        prop_assert!(settled <= 1.1 * cost(None), "{:?} costs {settled}, plain frames {}", controller.method(), cost(None));
    }

    /// Measurements that make no sense are no reason to panic.
    #[test]
    fn any_measurement_is_taken(frames in prop::collection::vec((0u64..4 << 20, 0u64..8 << 20, 0u64..1 << 30, 0u64..1 << 30, 0usize..4), 1..300)) {
        let mut controller = controller();
        for (bytes, sent, compressing, sending, way) in frames {
            let plan = controller.plan(bytes);
            let method = WAYS.get(way).copied();
            let sampled = plan.sample.map(|method| Sampled { method, bytes, packed: sent, took: Duration::from_nanos(compressing) });
            controller.measured(&Measured {
                bytes,
                sent,
                method,
                copies: 0,
                deltas: 0,
                compressing: Duration::from_nanos(compressing),
                worked: Duration::from_nanos(compressing),
                sending: Duration::from_nanos(sending),
                sampled,
                streams: 1,
                cap: None,
            });
        }
    }
}
