//! Units in an envelope: taking them out one by one, strictly.

use ferry_proto::state::v1::Unit;
use prost::Message;
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
    let message = M::decode(bytes).map_err(|_| StateError::Malformed { what: what.to_owned() })?;
    // What was written by these schemas encodes to exactly what it was decoded from.
    match bytes.len().checked_sub(message.encoded_len()) {
        Some(0) => Ok(message),
        difference => Err(StateError::Leftover {
            what: what.to_owned(),
            bytes: difference.unwrap_or(0),
        }),
    }
}

/// The units that have not been taken out yet.
pub(super) struct Units(Vec<Unit>);

impl Units {
    /// All units of an envelope.
    pub(super) fn new(units: Vec<Unit>) -> Result<Self, StateError> {
        for (index, unit) in units.iter().enumerate() {
            if units[..index].iter().any(|other| other.name == unit.name) {
                return Err(StateError::DoubleUnit(unit.name.clone()));
            }
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
