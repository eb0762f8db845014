//! The address of a network card.

use std::fmt;
use std::str::FromStr;

/// A MAC address that a card can have: of one station, not of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct MacAddress([u8; 6]);

/// The bit of the first byte that makes it a group's address.
const GROUP: u8 = 1;
/// The bit of the first byte that says that no manufacturer gave it.
const LOCAL: u8 = 2;

impl MacAddress {
    /// A random address as hosts give them to cards that have none: locally administered. It begins with 02, so that it is
    /// told from QEMU's (52:54:00) at a glance.
    ///
    /// # Errors
    /// The kernel gives no random bytes.
    pub(crate) fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 6];
        getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
        bytes[0] = LOCAL;
        Ok(Self(bytes))
    }

    /// Its six bytes, in the order in which they are sent.
    pub(crate) fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a MAC address: write six bytes like 02:00:5e:10:00:01");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(bad)?;
            // A sign would be taken for a digit.
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        if bytes[0] & GROUP != 0 || bytes == [0; 6] {
            return Err(format!(
                "{text} is no address that a card can have: the first byte must be even, and not all may be zero"
            ));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_back_in_lower_case() {
        let address: MacAddress = "02:00:5E:10:00:fF".parse().unwrap();
        assert_eq!(address.octets(), [2, 0, 0x5e, 0x10, 0, 0xff]);
        assert_eq!(address.to_string(), "02:00:5e:10:00:ff");
    }

    #[test]
    fn what_no_card_can_have_is_refused() {
        for bad in [
            "",
            "02:00:5e:10:00",
            "02:00:5e:10:00:01:02",
            "02-00-5e-10-00-01",
            "2:0:5e:10:0:1",
        ] {
            assert!(bad.parse::<MacAddress>().unwrap_err().contains("MAC address"), "{bad}");
        }
        for bad in ["02:00:5e:10:00:+1", "02:00:5e:10:00:ü"] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
        for group in ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"] {
            assert!(group.parse::<MacAddress>().unwrap_err().contains("even"), "{group}");
        }
    }

    #[test]
    fn a_random_address_is_one_stations_own() {
        let (one, other) = (MacAddress::random().unwrap(), MacAddress::random().unwrap());
        assert_eq!(one.octets()[0], 2);
        assert_ne!(one, other);
        assert_eq!(one.to_string().parse(), Ok(one));
    }
}
