//! `--disk` and `--net` as people write them: `key=value,key=value`.
//!
//! Clap value parsers like those of `quantities`: clap puts the flag's name before the message.

use std::path::PathBuf;

use super::quantities;
use crate::agent::{NIC_RATES, is_interface_name};
use crate::mac::MacAddress;

/// What `--disk` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DiskArgument {
    /// The image or block device, as it was written.
    pub(super) path: PathBuf,
    /// The guest may not write it.
    pub(super) readonly: bool,
    /// What the guest is told as its serial number.
    pub(super) serial: Option<String>,
}

/// What `--net` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NicArgument {
    /// The card's other end.
    pub(super) end: NicEnd,
    /// Its address; the agent makes one where there is none.
    pub(super) mac: Option<MacAddress>,
    /// What the guest may send, and as much receive, at most: bytes a second.
    pub(super) rate: Option<u64>,
}

/// A network card's other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NicEnd {
    /// The tap of this name.
    Tap(String),
    /// A new tap on this bridge.
    Bridge(String),
}

/// A disk: `path=F[,readonly=on][,serial=S]`.
pub(super) fn disk(text: &str) -> Result<DiskArgument, String> {
    let [path, readonly, serial] = values(text, ["path", "readonly", "serial"])?;
    let path = path.ok_or("names no image: write path=FILE")?;
    let readonly = match readonly {
        None | Some("off") => false,
        Some("on") => true,
        Some(other) => return Err(format!("readonly={other} is neither readonly=on nor readonly=off")),
    };
    Ok(DiskArgument {
        path: PathBuf::from(path),
        readonly,
        serial: serial.map(str::to_owned),
    })
}

/// A network card: `tap=T` or `bridge=B`, and then `[,mac=M][,rate=R]`.
pub(super) fn nic(text: &str) -> Result<NicArgument, String> {
    let [tap, bridge, mac, rate] = values(text, ["tap", "bridge", "mac", "rate"])?;
    let end = match (tap, bridge) {
        (Some(tap), None) => NicEnd::Tap(interface(tap)?),
        (None, Some(bridge)) => NicEnd::Bridge(interface(bridge)?),
        (None, None) => return Err("names no other end: write tap=NAME or bridge=NAME".to_owned()),
        (Some(_), Some(_)) => return Err("names both a tap and a bridge: a card has one other end".to_owned()),
    };
    Ok(NicArgument {
        end,
        mac: mac.map(str::parse).transpose()?,
        rate: rate.map(nic_rate).transpose()?,
    })
}

fn nic_rate(text: &str) -> Result<u64, String> {
    let rate = quantities::bandwidth(text).map_err(|problem| format!("rate={text}: {problem}"))?;
    if NIC_RATES.contains(&rate) {
        Ok(rate)
    } else {
        Err(format!("rate={text}: must be between 64Kbit and 1Tbit"))
    }
}

fn interface(name: &str) -> Result<String, String> {
    if is_interface_name(name) {
        Ok(name.to_owned())
    } else {
        Err(format!(
            "{name:?} cannot name a network interface: 1 to 15 bytes, without blanks, '/', ':' and '%'"
        ))
    }
}

/// The values of `key=value,key=value` in the order of `keys`.
fn values<'t, const N: usize>(text: &'t str, keys: [&str; N]) -> Result<[Option<&'t str>; N], String> {
    let mut found = [None; N];
    for part in text.split(',') {
        let (key, value) = part
            .split_once('=')
            .ok_or_else(|| format!("{part:?} is not KEY=VALUE"))?;
        let known = || format!("{key:?} is unknown: {} are known", keys.join(", "));
        let index = keys.iter().position(|known| *known == key).ok_or_else(known)?;
        if value.is_empty() {
            return Err(format!("{key} has no value"));
        }
        if found[index].replace(value).is_some() {
            return Err(format!("{key} is given twice"));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_path_and_what_is_said_of_it() {
        let plain = DiskArgument {
            path: "/srv/web.img".into(),
            readonly: false,
            serial: None,
        };
        assert_eq!(disk("path=/srv/web.img"), Ok(plain.clone()));
        assert_eq!(disk("readonly=off,path=/srv/web.img"), Ok(plain.clone()));
        let all = DiskArgument {
            readonly: true,
            serial: Some("root".to_owned()),
            ..plain
        };
        assert_eq!(disk("path=/srv/web.img,readonly=on,serial=root"), Ok(all));
    }

    #[test]
    fn a_disk_that_cannot_be_meant_is_refused() {
        assert!(disk("/srv/web.img").unwrap_err().contains("KEY=VALUE"));
        assert!(disk("readonly=on").unwrap_err().contains("path=FILE"));
        assert!(disk("path=").unwrap_err().contains("no value"));
        assert!(disk("path=a,readonly=yes").unwrap_err().contains("readonly=on"));
        assert!(disk("path=a,path=b").unwrap_err().contains("twice"));
        assert!(disk("path=a,cache=none").unwrap_err().contains("\"cache\""));
    }

    #[test]
    fn a_card_has_one_other_end() {
        let end = |text| nic(text).map(|nic| nic.end);
        assert_eq!(end("tap=tap0"), Ok(NicEnd::Tap("tap0".to_owned())));
        assert_eq!(end("bridge=br0"), Ok(NicEnd::Bridge("br0".to_owned())));
        assert!(end("mac=02:00:00:00:00:01").unwrap_err().contains("tap=NAME"));
        assert!(end("tap=a,bridge=b").unwrap_err().contains("both"));
        assert!(end("bridge=a-name-too-long-by-far").unwrap_err().contains("15 bytes"));
        assert!(end("tap=fry%d").unwrap_err().contains("'%'"));
    }

    #[test]
    fn a_card_may_be_limited() {
        let rate = |text: &str| nic(text).map(|nic| nic.rate);
        assert_eq!(rate("tap=tap0"), Ok(None));
        assert_eq!(rate("tap=tap0,rate=100Mbit"), Ok(Some(12_500_000)));
        assert_eq!(rate("bridge=br0,rate=64Kbit/s"), Ok(Some(8_000)));
        assert_eq!(rate("bridge=br0,rate=1Tbit"), Ok(Some(125_000_000_000)));
        for odd in [
            "63Kbit", "2Tbit", "0Mbit", "100", "100MB", "-1Mbit", "NaNMbit", "Mbit", "1e3Mbit",
        ] {
            let told = rate(&format!("tap=tap0,rate={odd}")).unwrap_err();
            assert!(told.contains(&format!("rate={odd}")), "{told}");
        }
        assert!(rate("tap=tap0,rate=").unwrap_err().contains("rate has no value"));
    }

    #[test]
    fn a_card_may_be_given_its_address() {
        let mac = |text| nic(text).map(|nic| nic.mac);
        assert_eq!(mac("tap=tap0"), Ok(None));
        assert_eq!(
            mac("tap=tap0,mac=02:00:00:00:00:01"),
            Ok(Some("02:00:00:00:00:01".parse().unwrap()))
        );
        assert!(mac("tap=tap0,mac=02:00").unwrap_err().contains("MAC address"));
    }
}
