//! What is said of an instance's disks and network cards, before anything of it is opened.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use ferry_proto::InvalidField;
use ferry_proto::agent::v1::{DiskSpec, InstanceSpec, NicSpec};

use super::is_interface_name;
use crate::agent::failure::Failure;
use crate::mac::MacAddress;

/// The most disks, and the most network cards, of one instance. A machine has 16 places for virtio devices, and one each
/// is kept for what needs no backend.
const MOST_DISKS: usize = 8;
const MOST_NICS: usize = 6;
/// The rates that a network card can be limited to, bytes a second: 64 Kbit/s, at which the longest frame takes 8 seconds, to 1 Tbit/s.
pub(crate) const NIC_RATES: RangeInclusive<u64> = 8_000..=125_000_000_000;
/// The longest serial number that a guest can be told (virtio 1.2, 5.2.6.1).
const LONGEST_SERIAL: usize = 20;

/// Makes of a request what is kept: paths without symbolic links, unless they are names of block devices, and an address for each card, the
/// same wherever the instance goes.
///
/// # Errors
/// Names the disk that is not there.
pub(crate) fn complete(spec: &mut InstanceSpec) -> Result<(), Failure> {
    for disk in &mut spec.disks {
        let refused = |problem: String| Failure::Refused(format!("disk {}: {problem}", disk.path));
        let real = real_path(Path::new(&disk.path));
        let real = real.map_err(|error| refused(format!("it cannot be opened: {error}")))?;
        disk.path = real
            .into_os_string()
            .into_string()
            .map_err(|real| refused(format!("its real path {} is not UTF-8", real.display())))?;
    }
    for nic in &mut spec.nics {
        if nic.mac.is_empty() {
            let mac = MacAddress::random().map_err(Failure::host("failed to make a MAC address"))?;
            nic.mac = mac.to_string();
        }
        nic.mac.make_ascii_lowercase();
    }
    Ok(())
}

/// The kernel numbers devices as they come: what is /dev/dm-3 or /dev/sdb here is another disk on the next host, and it is the link in
/// /dev/mapper or /dev/disk that names the same one there.
fn real_path(path: &Path) -> io::Result<PathBuf> {
    let real = fs::canonicalize(path)?;
    match (path.parent(), path.file_name()) {
        (Some(folder), Some(name)) if fs::metadata(&real)?.file_type().is_block_device() => {
            Ok(fs::canonicalize(folder)?.join(name))
        }
        _ => Ok(real),
    }
}

/// Checks what was asked for, and gives back nothing that could be asked of the host.
///
/// # Errors
/// Names the field.
pub(crate) fn check(spec: &InstanceSpec) -> Result<(), InvalidField> {
    check_disks(&spec.disks).map_err(|problem| InvalidField {
        field: "disks",
        problem,
    })?;
    check_nics(&spec.nics).map_err(|problem| InvalidField { field: "nics", problem })
}

fn check_disks(disks: &[DiskSpec]) -> Result<(), String> {
    if disks.len() > MOST_DISKS {
        return Err(format!("{} are more than {MOST_DISKS}", disks.len()));
    }
    let mut paths = HashSet::new();
    for DiskSpec { path, serial, .. } in disks {
        if !Path::new(path).is_absolute() || path.contains('\0') {
            return Err(format!("{path:?} is not an absolute path"));
        }
        if !paths.insert(path) {
            return Err(format!("{path:?} is there twice"));
        }
        let is_told =
            |serial: &String| serial.len() <= LONGEST_SERIAL && serial.bytes().all(|byte| byte.is_ascii_graphic());
        if let Some(serial) = serial.as_ref().filter(|serial| !is_told(serial)) {
            return Err(format!(
                "{serial:?} is not a serial number: {LONGEST_SERIAL} visible ASCII characters at most"
            ));
        }
    }
    Ok(())
}

fn check_nics(nics: &[NicSpec]) -> Result<(), String> {
    if nics.len() > MOST_NICS {
        return Err(format!("{} are more than {MOST_NICS}", nics.len()));
    }
    let (mut macs, mut taps) = (HashSet::new(), HashSet::new());
    for nic in nics {
        let NicSpec {
            tap,
            bridge,
            mac,
            rate_bytes_per_s,
        } = nic;
        let ((Some(name), None) | (None, Some(name))) = (tap, bridge) else {
            return Err("a card is on a tap or on a bridge".to_owned());
        };
        if !is_interface_name(name) {
            return Err(format!("{name:?} cannot name a network interface"));
        }
        if tap.as_ref().is_some_and(|tap| !taps.insert(tap)) {
            return Err(format!("tap {name} is there twice"));
        }
        if !macs.insert(mac.parse::<MacAddress>()?) {
            return Err(format!("MAC address {mac} is there twice"));
        }
        if let Some(rate) = rate_bytes_per_s.filter(|rate| !NIC_RATES.contains(rate)) {
            return Err(format!(
                "a card's rate of {rate} bytes a second is not between {} and {}",
                NIC_RATES.start(),
                NIC_RATES.end()
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(path: &str) -> DiskSpec {
        DiskSpec {
            path: path.to_owned(),
            ..DiskSpec::default()
        }
    }

    fn nic(tap: &str, mac: &str) -> NicSpec {
        NicSpec {
            tap: Some(tap.to_owned()),
            bridge: None,
            mac: mac.to_owned(),
            rate_bytes_per_s: None,
        }
    }

    #[test]
    fn a_few_disks_and_cards_are_taken() {
        let spec = InstanceSpec {
            disks: vec![disk("/srv/a"), disk("/srv/b")],
            nics: vec![nic("tap0", "02:00:00:00:00:01"), nic("tap1", "02:00:00:00:00:02")],
            ..InstanceSpec::default()
        };
        assert_eq!(check(&spec), Ok(()));
    }

    #[test]
    fn each_bad_disk_is_named() {
        assert!(
            check_disks(&vec![disk("/srv/a"); 9])
                .unwrap_err()
                .contains("more than 8")
        );
        assert!(check_disks(&[disk("srv/a")]).unwrap_err().contains("absolute"));
        assert!(check_disks(&[disk("/a"), disk("/a")]).unwrap_err().contains("twice"));
        let serial = DiskSpec {
            serial: Some("a serial with blanks".to_owned()),
            ..disk("/a")
        };
        assert!(check_disks(&[serial]).unwrap_err().contains("serial number"));
    }

    #[test]
    fn each_bad_card_is_named() {
        let mac = "02:00:00:00:00:01";
        assert!(
            check_nics(&vec![nic("tap0", mac); 7])
                .unwrap_err()
                .contains("more than 6")
        );
        assert!(check_nics(&[nic("fry%d", mac)]).unwrap_err().contains("fry%d"));
        assert!(check_nics(&[nic("tap0", "")]).unwrap_err().contains("MAC address"));
        let both = NicSpec {
            bridge: Some("br0".to_owned()),
            ..nic("tap0", mac)
        };
        assert!(check_nics(&[both]).unwrap_err().contains("tap or on a bridge"));
        assert!(check_nics(&[NicSpec::default()]).is_err());
        for rate in [0, 7_999, 125_000_000_001, u64::MAX] {
            let odd = NicSpec {
                rate_bytes_per_s: Some(rate),
                ..nic("tap0", mac)
            };
            assert!(check_nics(&[odd]).unwrap_err().contains(&format!("rate of {rate} ")));
        }
        let same_tap = [nic("tap0", mac), nic("tap0", "02:00:00:00:00:02")];
        assert!(check_nics(&same_tap).unwrap_err().contains("tap tap0 is there twice"));
        assert!(
            check_nics(&[nic("tap0", mac), nic("tap1", mac)])
                .unwrap_err()
                .contains("twice")
        );
    }

    #[test]
    fn what_is_kept_has_no_symbolic_links_and_an_address_for_each_card() {
        let folder = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(folder.path()).unwrap().join("web.img");
        let link = folder.path().join("link");
        fs::write(&real, b"").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let mut spec = InstanceSpec {
            disks: vec![disk(link.to_str().unwrap())],
            nics: vec![nic("tap0", ""), nic("tap1", "02:00:00:00:00:AA")],
            ..InstanceSpec::default()
        };

        complete(&mut spec).unwrap();

        assert_eq!(Path::new(&spec.disks[0].path), real);
        assert!(spec.nics[0].mac.starts_with("02:"), "{}", spec.nics[0].mac);
        assert_eq!(spec.nics[1].mac, "02:00:00:00:00:aa");
        assert_eq!(check(&spec), Ok(()));
    }
}
