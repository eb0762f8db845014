//! The state of a whole machine, its bytes, and its digest.

use ferry_proto::state::v1 as saved;
use kvm_bindings::{kvm_irqchip, kvm_pit_state2};
use prost::Message;
use xxhash_rust::xxh3::xxh3_128;

use super::envelope::{StateError, Units, VERSION, decode, structure, unit, unit_of_version};
use super::profile::UnitKind;
use super::vcpu;
use crate::arch::x86_64::msr::IA32_TSC_DEADLINE;
use crate::arch::x86_64::time::ClockState;
use crate::arch::x86_64::vcpu_state::VcpuState;
use crate::devices::{DevicesState, schema_of, set_macs, version_of_saved};
use crate::kvm::{from_bytes, to_bytes};

/// Everything that a machine is besides its memory, as exported. Restoring checks what KVM and the devices make of it.
#[derive(Debug, Clone)]
pub struct MachineState {
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) clock: ClockState,
    pub(crate) irqchip: IrqchipState,
    pub(crate) pit: kvm_pit_state2,
    pub(crate) devices: DevicesState,
}

/// The three interrupt controllers.
#[derive(Debug, Clone)]
pub(crate) struct IrqchipState {
    pub(crate) pic_primary: kvm_irqchip,
    pub(crate) pic_secondary: kvm_irqchip,
    pub(crate) ioapic: kvm_irqchip,
}

const CLOCK: (&str, &str) = ("clock", "ferry.clock");
const IRQCHIP: (&str, &str) = ("irqchip", "ferry.irqchip");
const PIT: (&str, &str) = ("pit", "ferry.pit");
const SERIAL: (&str, &str) = ("serial0", "ferry.serial16550");
const POWER: (&str, &str) = ("power", "ferry.power");

/// The units of a machine with so many vCPUs and virtio devices of these names and versions.
pub(crate) fn unit_kinds(vcpus: usize, virtio: &[(&str, u32)]) -> Vec<UnitKind> {
    let kind = |name: &str, schema: &str, version| UnitKind {
        name: name.to_owned(),
        schema: schema.to_owned(),
        version,
    };
    [CLOCK, IRQCHIP, PIT, SERIAL, POWER]
        .into_iter()
        .map(|(name, schema)| kind(name, schema, VERSION))
        .chain(
            virtio
                .iter()
                .filter_map(|&(name, version)| Some(kind(name, schema_of(name)?, version))),
        )
        .chain((0..vcpus).map(|index| kind(&vcpu_name(index), vcpu::SCHEMA, VERSION)))
        .collect()
}

fn vcpu_name(index: usize) -> String {
    format!("vcpu{index}")
}

impl MachineState {
    /// Encodes it: a `ferry.state.v1.MachineState`, about 9 KiB and 9 KiB more per vCPU.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let Self {
            vcpus,
            clock,
            irqchip,
            pit,
            devices,
        } = self;
        let mut units = vec![
            unit(CLOCK.0, CLOCK.1, &clock_to_saved(clock)),
            unit(
                IRQCHIP.0,
                IRQCHIP.1,
                &saved::InterruptControllers {
                    pic_primary: to_bytes(&irqchip.pic_primary),
                    pic_secondary: to_bytes(&irqchip.pic_secondary),
                    ioapic: to_bytes(&irqchip.ioapic),
                },
            ),
            unit(PIT.0, PIT.1, &saved::IntervalTimer { state: to_bytes(pit) }),
            unit(SERIAL.0, SERIAL.1, &devices.serial),
            unit(POWER.0, POWER.1, &devices.power),
        ];
        for (name, device) in &devices.virtio {
            let schema = schema_of(name).unwrap_or_default();
            units.push(unit_of_version(name, schema, version_of_saved(device), device));
        }
        for (index, state) in vcpus.iter().enumerate() {
            units.push(unit(&vcpu_name(index), vcpu::SCHEMA, &vcpu::to_saved(state)));
        }
        saved::MachineState { units }.encode_to_vec()
    }

    /// Decodes what [`to_bytes`](Self::to_bytes) gave, anywhere.
    ///
    /// # Errors
    ///
    /// If anything is unknown, missing, double, of another version or size, or left over.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let envelope: saved::MachineState = decode("the state", bytes)?;
        let mut units = Units::new(envelope.units)?;
        let clock = clock_from_saved(units.take(CLOCK.0, CLOCK.1)?);
        let saved::InterruptControllers {
            pic_primary,
            pic_secondary,
            ioapic,
        } = units.take(IRQCHIP.0, IRQCHIP.1)?;
        let saved::IntervalTimer { state: pit } = units.take(PIT.0, PIT.1)?;
        let (serial, power) = (units.take(SERIAL.0, SERIAL.1)?, units.take(POWER.0, POWER.1)?);
        let mut virtio = Vec::new();
        for name in units.names() {
            if let Some(schema) = schema_of(&name) {
                let device = units.take(&name, schema)?;
                virtio.push((name, device));
            }
        }
        let devices = DevicesState { serial, power, virtio };
        let mut vcpus = Vec::new();
        while units.has(&vcpu_name(vcpus.len())) {
            let name = vcpu_name(vcpus.len());
            vcpus.push(vcpu::from_saved(&name, units.take(&name, vcpu::SCHEMA)?)?);
        }
        if vcpus.is_empty() {
            return Err(StateError::MissingUnit(vcpu_name(0)));
        }
        units.finish()?;
        let controller = |field, bytes: &[u8]| structure(IRQCHIP.0, field, bytes);
        Ok(Self {
            vcpus,
            clock,
            irqchip: IrqchipState {
                pic_primary: controller("pic_primary", &pic_primary)?,
                pic_secondary: controller("pic_secondary", &pic_secondary)?,
                ioapic: controller("ioapic", &ioapic)?,
            },
            pit: structure(PIT.0, "state", &pit)?,
            devices,
        })
    }

    /// The state of a machine that is another one from here on: its network cards have these addresses, in their order. The guest's driver
    /// learns of it when it looks for its cards the next time, at the latest when it boots.
    ///
    /// # Errors
    ///
    /// If it does not have as many cards.
    pub fn with_macs(mut self, macs: &[[u8; 6]]) -> Result<Self, StateError> {
        set_macs(&mut self.devices.virtio, macs).map_err(|error| StateError::Value {
            what: "the network cards".to_owned(),
            field: error.to_string(),
        })?;
        Ok(self)
    }

    /// Sums up everything but what time alone changes while the vCPUs stand still: clocks, counters, deadlines, running timers and
    /// the interrupts that those raise. Equal before and after a migration.
    #[must_use]
    pub fn digest(&self) -> u128 {
        xxh3_128(&self.without_time().to_bytes())
    }

    fn without_time(&self) -> Self {
        let mut state = self.clone();
        state.clock = ClockState {
            kvm_clock_ns: 0,
            host_realtime_ns: 0,
            host_tsc: 0,
            boot_id: String::new(),
            tsc_khz: self.clock.tsc_khz,
        };
        for channel in &mut state.pit.channels {
            channel.count_load_time = 0;
        }
        let timer_vectors = state.irqchip.silence_timer();
        for vcpu in &mut state.vcpus {
            vcpu.tsc = 0;
            vcpu.tsc_offset = None;
            vcpu.msrs.retain(|(index, _)| *index != IA32_TSC_DEADLINE);
            let registers = &mut vcpu.lapic.regs;
            registers[LAPIC_CURRENT_COUNT..LAPIC_CURRENT_COUNT + 4].fill(0);
            let own_timer = registers[LAPIC_TIMER_VECTOR] as u8;
            for vector in timer_vectors.into_iter().chain([own_timer]).map(usize::from) {
                let byte = LAPIC_REQUESTS + vector / 32 * 16 + vector % 32 / 8;
                registers[byte] &= !(1 << (vector % 8));
            }
        }
        state
    }
}

/// Offsets in the local APIC's page: interrupt requests, the timer's vector, and what is left of its count.
const LAPIC_REQUESTS: usize = 0x200;
const LAPIC_TIMER_VECTOR: usize = 0x320;
const LAPIC_CURRENT_COUNT: usize = 0x390;

impl IrqchipState {
    /// Forgets whether the interval timer has an interrupt pending; returns the vectors that the I/O APIC gives it.
    fn silence_timer(&mut self) -> [u8; 2] {
        /// `struct kvm_irqchip`: number and padding, then the chip.
        const CHIP: usize = 8;
        /// `struct kvm_ioapic_state`: requests, and the table of 8 bytes per pin.
        const REQUESTS: usize = CHIP + 16;
        const TABLE: usize = CHIP + 24;
        /// The timer's line is pin 0 on the older and pin 2 on the newer controller, 0 where routing is one to one.
        const PINS: [usize; 2] = [0, 2];

        let mut pic = to_bytes(&self.pic_primary);
        // `struct kvm_pic_state`: last level of the lines, then requests.
        pic[CHIP] &= !1;
        pic[CHIP + 1] &= !1;
        let mut ioapic = to_bytes(&self.ioapic);
        let vectors = PINS.map(|pin| {
            ioapic[REQUESTS] &= !(1 << pin);
            // Delivery status and remote request.
            ioapic[TABLE + pin * 8 + 1] &= !(1 << 4 | 1 << 6);
            ioapic[TABLE + pin * 8]
        });
        self.pic_primary = from_bytes(&pic).expect("as long as it was");
        self.ioapic = from_bytes(&ioapic).expect("as long as it was");
        vectors
    }
}

fn clock_to_saved(clock: &ClockState) -> saved::Clock {
    let ClockState {
        kvm_clock_ns,
        host_realtime_ns,
        host_tsc,
        boot_id,
        tsc_khz,
    } = clock;
    saved::Clock {
        kvm_clock_ns: *kvm_clock_ns,
        host_realtime_ns: *host_realtime_ns,
        host_tsc: *host_tsc,
        boot_id: boot_id.clone(),
        tsc_khz: *tsc_khz,
    }
}

fn clock_from_saved(clock: saved::Clock) -> ClockState {
    let saved::Clock {
        kvm_clock_ns,
        host_realtime_ns,
        host_tsc,
        boot_id,
        tsc_khz,
    } = clock;
    ClockState {
        kvm_clock_ns,
        host_realtime_ns,
        host_tsc,
        boot_id,
        tsc_khz,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn state() -> MachineState {
        let vcpu = |rip| VcpuState {
            regs: kvm_bindings::kvm_regs {
                rip,
                ..Default::default()
            },
            sregs: Default::default(),
            debug_registers: Default::default(),
            events: Default::default(),
            xcrs: Default::default(),
            lapic: Default::default(),
            xsave: vec![3; 4096],
            mp_state: 0,
            msrs: vec![(0x174, 1), (IA32_TSC_DEADLINE, 99)],
            tsc: 5,
            tsc_offset: Some(0),
            cpuid: Vec::new(),
        };
        MachineState {
            vcpus: vec![vcpu(1), vcpu(2)],
            clock: ClockState {
                kvm_clock_ns: 1,
                host_realtime_ns: 2,
                host_tsc: 3,
                boot_id: "boot".to_owned(),
                tsc_khz: 4,
            },
            irqchip: IrqchipState {
                pic_primary: Default::default(),
                pic_secondary: Default::default(),
                ioapic: Default::default(),
            },
            pit: Default::default(),
            devices: DevicesState {
                serial: Default::default(),
                power: Default::default(),
                virtio: ["disk0", "rng0"]
                    .map(|name| (name.to_owned(), Default::default()))
                    .into(),
            },
        }
    }

    fn envelope() -> saved::MachineState {
        saved::MachineState::decode(state().to_bytes().as_slice()).expect("own bytes")
    }

    fn error_of(envelope: &saved::MachineState) -> StateError {
        MachineState::from_bytes(&envelope.encode_to_vec()).expect_err("changed")
    }

    #[test]
    fn bytes_survive_decoding() {
        let bytes = state().to_bytes();
        let decoded = MachineState::from_bytes(&bytes).expect("own bytes");
        assert_eq!(decoded.to_bytes(), bytes);
    }

    #[test]
    fn cards_get_other_addresses_and_announce_nothing() {
        let card = |mac: [u8; 6], announce| saved::VirtioDevice {
            device: saved::VirtioNet {
                mac: mac.to_vec(),
                announce,
            }
            .encode_to_vec(),
            ..Default::default()
        };
        let mut state = state();
        state.devices.virtio.push(("nic0".to_owned(), card([2; 6], true)));
        let other = state.clone().with_macs(&[[4; 6]]).expect("one card");
        assert_eq!(other.devices.virtio[2].1, card([4; 6], false));
        assert_eq!(other.devices.virtio[..2], state.devices.virtio[..2]);
        let error = state.with_macs(&[]).expect_err("a card without an address");
        assert!(error.to_string().contains("number of network cards is 1"), "{error}");
    }

    #[test]
    fn units_are_those_of_the_profile() {
        let names: Vec<String> = envelope().units.into_iter().map(|unit| unit.name).collect();
        let kinds: Vec<String> = unit_kinds(2, &[("disk0", 1), ("rng0", 1)])
            .into_iter()
            .map(|kind| kind.name)
            .collect();
        assert_eq!(names, kinds);
    }

    #[test]
    fn unknown_unit_is_refused() {
        let mut envelope = envelope();
        envelope.units[3].name = "floppy0".to_owned();
        assert_eq!(error_of(&envelope), StateError::MissingUnit("serial0".to_owned()));
        let mut envelope = self::envelope();
        envelope.units.push(saved::Unit {
            name: "floppy0".to_owned(),
            ..Default::default()
        });
        assert_eq!(error_of(&envelope), StateError::UnknownUnit("floppy0".to_owned()));
    }

    #[test]
    fn gap_in_the_vcpus_is_refused() {
        let mut envelope = envelope();
        let last = envelope.units.len() - 1;
        envelope.units[last].name = "vcpu2".to_owned();
        assert_eq!(error_of(&envelope), StateError::UnknownUnit("vcpu2".to_owned()));
    }

    #[test]
    fn double_unit_is_refused() {
        let mut envelope = envelope();
        let again = envelope.units[0].clone();
        envelope.units.push(again);
        assert_eq!(error_of(&envelope), StateError::DoubleUnit("clock".to_owned()));
    }

    #[test]
    fn other_version_is_refused() {
        let mut envelope = envelope();
        envelope.units[4].version = 2;
        assert!(matches!(error_of(&envelope), StateError::Schema { version: 2, .. }));
    }

    #[test]
    fn bytes_of_no_field_are_refused() {
        let mut envelope = envelope();
        // Field 15, a varint.
        envelope.units[2].body.extend([0x78, 1]);
        assert!(matches!(error_of(&envelope), StateError::Leftover { bytes: 2, .. }));
    }

    #[test]
    fn structure_of_another_size_is_refused() {
        let mut short = state();
        short.vcpus[1].xsave.truncate(4095);
        let error = MachineState::from_bytes(&short.to_bytes()).expect_err("short");
        assert!(matches!(
            error,
            StateError::Size {
                field: "xsave",
                found: 4095,
                ..
            }
        ));
    }

    #[test]
    fn digest_leaves_out_time_and_nothing_else() {
        let before = state();
        let mut later = before.clone();
        later.clock.kvm_clock_ns += 5;
        later.vcpus[0].tsc += 5;
        later.pit.channels[0].count_load_time = 7;
        later.vcpus[1].lapic.regs[LAPIC_CURRENT_COUNT] = 1;
        assert_eq!(later.digest(), before.digest());
        let mut other = before.clone();
        other.vcpus[1].regs.rax = 1;
        assert_ne!(other.digest(), before.digest());
    }

    #[test]
    fn hostile_states_are_read_or_refused() {
        let profile = super::super::profile::tests::profile().to_bytes();
        ferry_fuzz_inputs::feed("saved_state", &[state().to_bytes(), profile], crate::fuzz::saved_state);
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = MachineState::from_bytes(&bytes);
        }

        #[test]
        fn damaged_state_never_panics(at in any::<prop::sample::Index>(), value: u8, cut in any::<prop::sample::Index>()) {
            let mut bytes = state().to_bytes();
            let at = at.index(bytes.len());
            bytes[at] = value;
            let _ = MachineState::from_bytes(&bytes).map(|state| state.digest());
            bytes.truncate(cut.index(bytes.len()));
            let _ = MachineState::from_bytes(&bytes).map(|state| state.digest());
        }
    }
}
