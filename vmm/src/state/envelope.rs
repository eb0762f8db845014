//! Units in an envelope: taking them out one by one, strictly.

use std::collections::HashSet;

use ferry_proto::state::v1::Unit;
use prost::{DecodeError, Message, decode_length_delimiter};
use thiserror::Error;

use crate::devices::newest_version;
use crate::kvm::{Uapi, from_bytes};

/// Why bytes are not the saved state, or the profile, of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StateError {
    /// They are not a message of the schema.
    #[error("decode {what}: not its message")]
    Malformed {
        /// Which message.
        what: String,
    },
    /// The message holds more than this version knows.
    #[error("decode {what}: {bytes} bytes of it belong to no field")]
    Leftover {
        /// Which message.
        what: String,
        /// How many.
        bytes: usize,
    },
    /// A unit that no device here is called.
    #[error("decode the state: unit {0:?} is unknown")]
    UnknownUnit(String),
    /// A unit that must be there is not.
    #[error("decode the state: unit {0:?} is missing")]
    MissingUnit(String),
    /// A unit is there more than once.
    #[error("decode the state: unit {0:?} is there twice")]
    DoubleUnit(String),
    /// A unit was written in a way that is not read here.
    #[error(
        "decode the state: unit {unit:?} is of schema {schema:?} version {version}, known is {known:?} up to version {newest}"
    )]
    Schema {
        /// The unit.
        unit: String,
        /// What it says.
        schema: String,
        /// What it says.
        version: u32,
        /// What is known.
        known: &'static str,
        /// Its newest version.
        newest: u32,
    },
    /// A field does not have the size that it must have.
    #[error("decode {what}: {field} has {found} bytes or entries, which cannot be")]
    Size {
        /// Which message.
        what: String,
        /// Which field.
        field: &'static str,
        /// How many there are.
        found: usize,
    },
    /// A field has a value that it cannot have.
    #[error("decode {what}: {field}")]
    Value {
        /// Which message.
        what: String,
        /// What about which field.
        field: String,
    },
}

/// The version of the schemas that have only one so far.
pub(super) const VERSION: u32 = 1;

/// The most units of a machine: 255 vCPUs and some twenty devices.
pub(crate) const MOST_UNITS: usize = 512;

/// The most bytes of a unit's name; those of today have seven at most.
const LONGEST_NAME: usize = 64;

/// The most fields of a message: a profile has the most, of the units, of 256 lines of CPUID (KVM takes no more), and of two regions of memory.
/// An empty field is two bytes here and up to a hundred once it is decoded.
const MOST_FIELDS: usize = 1024;

/// Wraps a message as a unit.
pub(super) fn unit(name: &str, schema: &str, message: &impl Message) -> Unit {
    unit_of_version(name, schema, VERSION, message)
}

/// The same in one of several versions.
pub(super) fn unit_of_version(name: &str, schema: &str, version: u32, message: &impl Message) -> Unit {
    Unit {
        name: name.to_owned(),
        schema: schema.to_owned(),
        version,
        body: message.encode_to_vec(),
    }
}

/// Decodes a message whose every byte must belong to a known field.
pub(super) fn decode<M: Message + Default>(what: &str, bytes: &[u8]) -> Result<M, StateError> {
    let malformed = |_| StateError::Malformed { what: what.to_owned() };
    let found = fields(bytes).map_err(malformed)?;
    if found > MOST_FIELDS {
        return Err(StateError::Size {
            what: what.to_owned(),
            field: "the message",
            found,
        });
    }
    let message = M::decode(bytes).map_err(malformed)?;
    // What was written by these schemas encodes to exactly what it was decoded from.
    match bytes.len().checked_sub(message.encoded_len()) {
        Some(0) => Ok(message),
        difference => Err(StateError::Leftover {
            what: what.to_owned(),
            bytes: difference.unwrap_or(0),
        }),
    }
}

/// How many fields a message has, each entry of a list being one, as far as they are looked at: one more than are allowed.
fn fields(mut bytes: &[u8]) -> Result<usize, DecodeError> {
    let mut found = 0;
    while !bytes.is_empty() && found <= MOST_FIELDS {
        // Protobuf: a key, whose low three bits say how the field's end is found.
        let key = decode_length_delimiter(&mut bytes)?;
        let length = match key & 7 {
            0 => {
                let end = bytes.iter().position(|byte| byte & 0x80 == 0);
                end.map_or(usize::MAX, |end| end + 1)
            }
            1 => 8,
            2 => decode_length_delimiter(&mut bytes)?,
            5 => 4,
            // Groups, which no schema here has, and what is none of Protobuf's: the decoder refuses it.
            _ => bytes.len(),
        };
        // What is cut short is the decoder's to refuse as well.
        bytes = bytes.get(length..).unwrap_or_default();
        found += 1;
    }
    Ok(found)
}

/// The units that have not been taken out yet.
pub(super) struct Units(Vec<Unit>);

impl Units {
    /// All units of an envelope.
    pub(super) fn new(units: Vec<Unit>) -> Result<Self, StateError> {
        let size = |field, found| StateError::Size {
            what: "the state".to_owned(),
            field,
            found,
        };
        if units.len() > MOST_UNITS {
            return Err(size("units", units.len()));
        }
        // Errors say a unit's name and schema.
        let longest = units.iter().map(|unit| unit.name.len().max(unit.schema.len())).max();
        if let Some(longest) = longest.filter(|&longest| longest > LONGEST_NAME) {
            return Err(size("the name or schema of a unit", longest));
        }
        let mut names = HashSet::new();
        if let Some(unit) = units.iter().find(|unit| !names.insert(unit.name.as_str())) {
            return Err(StateError::DoubleUnit(unit.name.clone()));
        }
        Ok(Self(units))
    }

    /// The names of those that are left, in their order.
    pub(super) fn names(&self) -> Vec<String> {
        self.0.iter().map(|unit| unit.name.clone()).collect()
    }

    /// Whether there is a unit of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|unit| unit.name == name)
    }

    /// Takes a unit out and decodes it.
    pub(super) fn take<M: Message + Default>(&mut self, name: &str, schema: &'static str) -> Result<M, StateError> {
        let newest = newest_version(schema);
        let position = self
            .0
            .iter()
            .position(|unit| unit.name == name)
            .ok_or_else(|| StateError::MissingUnit(name.to_owned()))?;
        let unit = self.0.remove(position);
        if unit.schema != schema || !(VERSION..=newest).contains(&unit.version) {
            return Err(StateError::Schema {
                unit: unit.name,
                schema: unit.schema,
                version: unit.version,
                known: schema,
                newest,
            });
        }
        decode(name, &unit.body)
    }

    /// Refuses what nobody took.
    pub(super) fn finish(self) -> Result<(), StateError> {
        match self.0.into_iter().next() {
            Some(unit) => Err(StateError::UnknownUnit(unit.name)),
            None => Ok(()),
        }
    }
}

/// Reads a structure of KVM's interface, of exactly its size.
pub(super) fn structure<T: Uapi>(what: &str, field: &'static str, bytes: &[u8]) -> Result<T, StateError> {
    from_bytes(bytes).ok_or_else(|| StateError::Size {
        what: what.to_owned(),
        field,
        found: bytes.len(),
    })
}

#[cfg(test)]
mod tests {
    use ferry_proto::state::v1::{MachineProfile, MachineState};

    use super::*;

    fn units(count: usize) -> Vec<Unit> {
        let unit = |index| Unit {
            name: format!("unit{index}"),
            ..Unit::default()
        };
        (0..count).map(unit).collect()
    }

    #[test]
    fn more_units_than_a_machine_has_are_refused() {
        assert!(Units::new(units(MOST_UNITS)).is_ok());
        let refused = Units::new(units(MOST_UNITS + 1)).map(|_| ());
        assert!(
            matches!(refused, Err(StateError::Size { found: 513, .. })),
            "{refused:?}"
        );
    }

    #[test]
    fn a_unit_with_a_long_name_is_refused_without_saying_it() {
        let mut units = units(2);
        units[1].name = "x".repeat(1 << 20);
        let error = Units::new(units).map(|_| ()).unwrap_err();
        assert!(error.to_string().len() < 200);
    }

    #[test]
    fn a_message_of_empty_fields_is_refused_before_it_is_decoded() {
        let state = MachineState {
            units: vec![Unit::default(); 1 << 20],
        };
        let refused = decode::<MachineState>("the state", &state.encode_to_vec());
        assert!(matches!(refused, Err(StateError::Size { found: 1025, .. })));
        let profile = MachineProfile {
            cpuid: vec![Default::default(); 1 << 18],
            ..MachineProfile::default()
        };
        let refused = decode::<MachineProfile>("the profile", &profile.encode_to_vec());
        assert!(matches!(refused, Err(StateError::Size { found: 1025, .. })));
    }

    #[test]
    fn every_kind_of_field_is_counted() {
        let profile = MachineProfile {
            version: 1,
            tsc: 7,
            boot_id: "boot".to_owned(),
            units: units(3),
            cpuid: vec![Default::default(); 4],
            disk_sectors: vec![1 << 40; 9],
            ..MachineProfile::default()
        };
        // A list of numbers is one field.
        assert_eq!(fields(&profile.encode_to_vec()), Ok(3 + 3 + 4 + 1));
        // A number of four bytes, as the schemas have none.
        assert_eq!(fields(&[0x0d, 1, 2, 3, 4, 0x08, 1]), Ok(2));
    }
}
