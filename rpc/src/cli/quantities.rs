//! Sizes, bandwidths, durations and names as people write them.
//!
//! Each function is a clap value parser: clap puts the flag's name before the message, so the messages name only
//! what is wrong and what would be right.

use std::str::FromStr;
use std::time::Duration;

use ferry_migration::{Compression, ParseCompressionError};

use crate::agent::UserRange;
use crate::request::RequestId;

/// What a request is called.
pub(super) fn request_id(text: &str) -> Result<RequestId, String> {
    RequestId::parse(text).map_err(|error| error.to_string())
}

/// Bytes of memory: `512M`, `1G`, `1GiB`. Powers of 1024; the unit may not be left out.
pub(super) fn memory_size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let shift = match unit {
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        "" => return Err(format!("no unit: write {number}M or {number}G")),
        _ => {
            return Err(format!(
                "unknown unit {unit:?}: use K, M, G or T (or KiB, MiB, GiB, TiB)"
            ));
        }
    };
    let count: u64 = whole(number)?;
    if count == 0 {
        return Err("must be more than zero".to_owned());
    }
    count
        .checked_shl(shift)
        .filter(|bytes| bytes >> shift == count)
        .ok_or_else(|| format!("{text} is too large"))
}

/// Bytes a second: `5Gbit`, `2.5Gbit`, `100Mbit/s`. Powers of 1000, and bits, as networks are sold.
pub(super) fn bandwidth(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let bits = match unit.strip_suffix("/s").unwrap_or(unit) {
        "Kbit" | "kbit" => 1e3,
        "Mbit" => 1e6,
        "Gbit" => 1e9,
        "Tbit" => 1e12,
        "" => return Err(format!("no unit: write {number}Mbit or {number}Gbit")),
        _ => return Err(format!("unknown unit {unit:?}: use Kbit, Mbit, Gbit or Tbit")),
    };
    let number = f64::from_str(number).map_err(|_| format!("{number:?} is not a number"))?;
    let bytes = number * bits / 8.0;
    if !(1.0..=1e15).contains(&bytes) {
        return Err("must be between 8 bit/s and 8 Pbit/s".to_owned());
    }
    Ok(bytes.round() as u64)
}

/// A limit on bandwidth, in bytes a second; 0 where there is to be none.
pub(super) fn cap(text: &str) -> Result<u64, String> {
    match text {
        "none" => Ok(0),
        rate => bandwidth(rate),
    }
}

/// A span of time longer than zero: `300ms`, `15m`, `1h 30m`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let span =
        humantime::parse_duration(text).map_err(|error| format!("{error} (write for example 300ms, 15m, 1h)"))?;
    if span.is_zero() {
        return Err("must be longer than zero".to_owned());
    }
    Ok(span)
}

/// How long a guest is looked at, in milliseconds; 0 where it is not to be.
pub(super) fn sample(text: &str) -> Result<u32, String> {
    if text == "none" {
        return Ok(0);
    }
    match duration(text)?.as_millis() {
        ms @ 1..=LONGEST_SAMPLE_MS => Ok(ms as u32),
        _ => Err("must be none, or between 1ms and 30s".to_owned()),
    }
}

/// A number of page streams; 0 stands for `auto`.
pub(super) fn streams(text: &str) -> Result<u32, String> {
    if text == "auto" {
        return Ok(0);
    }
    match whole(text) {
        Ok(count @ 1..=MOST_STREAMS) => Ok(count as u32),
        _ => Err(format!("must be auto or a number from 1 to {MOST_STREAMS}")),
    }
}

/// What is to be done about compression.
pub(super) fn compression(text: &str) -> Result<Compression, ParseCompressionError> {
    text.parse()
}

/// How many times what a host has may be claimed of it.
pub(super) fn ratio(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(ratio) if (0.01..=1000.0).contains(&ratio) => Ok(ratio),
        _ => Err("must be a number from 0.01 to 1000".to_owned()),
    }
}

/// A number of migrations at the same time.
pub(super) fn migrations(text: &str) -> Result<usize, String> {
    match whole(text) {
        Ok(count @ 1..=1000) => Ok(count as usize),
        _ => Err("must be a number from 1 to 1000".to_owned()),
    }
}

/// The name of a new instance: it becomes part of messages and file names, and must not look like an id.
pub(super) fn instance_name(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if text.is_empty() || text.len() > LONGEST_NAME {
        return Err(format!("must be 1 to {LONGEST_NAME} characters long"));
    }
    if let Some(wrong) = text.chars().find(|&c| !allowed(c)) {
        return Err(format!(
            "{wrong:?} may not be in a name: letters, digits, '-', '_' and '.' may"
        ));
    }
    if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err("must begin with a letter or a digit".to_owned());
    }
    if uuid::Uuid::parse_str(text).is_ok() {
        return Err("looks like an instance's id, which names may not".to_owned());
    }
    Ok(text.to_owned())
}

/// The id of a host, by the same rules as an instance's name.
pub(super) fn host_id(text: &str) -> Result<String, String> {
    instance_name(text)
}

/// `FIRST-LAST`: numbers of users that nothing else has.
pub(super) fn user_range(text: &str) -> Result<UserRange, String> {
    let number = |text: &str| text.parse::<u32>().ok();
    text.split_once('-')
        .and_then(|(first, last)| UserRange::new(number(first)?, number(last)?))
        .ok_or_else(|| format!("{text:?} is not FIRST-LAST, numbers of users without root, for example 70000-79999"))
}

/// `H=URL`: another agent's host id and where it listens.
pub(super) fn peer(text: &str) -> Result<(String, String), String> {
    let (host, url) = text
        .split_once('=')
        .ok_or("must be HOST=URL, for example b=http://127.0.0.1:7500")?;
    Ok((host_id(host)?, agent_url(url)?))
}

/// Where an agent listens; `http://` may be left out.
pub(super) fn agent_url(text: &str) -> Result<String, String> {
    let url = if text.contains("://") {
        text.to_owned()
    } else {
        format!("http://{text}")
    };
    let rest = url
        .strip_prefix("http://")
        .ok_or_else(|| format!("{text:?} is not an http:// URL"))?;
    let parsed: tonic::transport::Uri = url.parse().map_err(|error| format!("{text:?} is not a URL: {error}"))?;
    if rest.is_empty() || parsed.port_u16().is_none() {
        return Err(format!(
            "{text:?} names no port: write for example http://127.0.0.1:7400"
        ));
    }
    Ok(url)
}

fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (number, unit.trim())
}

fn whole(number: &str) -> Result<u64, String> {
    number.parse().map_err(|_| format!("{number:?} is not a whole number"))
}

const LONGEST_NAME: usize = 63;
const MOST_STREAMS: u64 = 64;
const LONGEST_SAMPLE_MS: u128 = 30_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_counted_in_powers_of_1024() {
        assert_eq!(memory_size("512M"), Ok(512 << 20));
        assert_eq!(memory_size("1G"), Ok(1 << 30));
        assert_eq!(memory_size("1GiB"), Ok(1 << 30));
        assert_eq!(memory_size("12 GiB"), Ok(12 << 30));
        assert_eq!(memory_size("4T"), Ok(4 << 40));
    }

    #[test]
    fn memory_that_cannot_be_meant_is_refused() {
        assert!(memory_size("512").unwrap_err().contains("512M"));
        assert!(memory_size("1GB").unwrap_err().contains("\"GB\""));
        assert!(memory_size("0M").unwrap_err().contains("zero"));
        assert!(memory_size("1.5G").unwrap_err().contains("whole"));
        assert!(memory_size("99999999999999T").unwrap_err().contains("too large"));
        assert!(memory_size("").is_err());
        assert!(memory_size("-1G").is_err());
    }

    #[test]
    fn bandwidth_is_counted_in_bits_and_powers_of_1000() {
        assert_eq!(bandwidth("5Gbit"), Ok(625_000_000));
        assert_eq!(bandwidth("100Mbit"), Ok(12_500_000));
        assert_eq!(bandwidth("1Gbit/s"), Ok(125_000_000));
        assert_eq!(bandwidth("2.5Gbit"), Ok(312_500_000));
        assert_eq!(bandwidth("64Kbit"), Ok(8_000));
    }

    #[test]
    fn bandwidth_that_cannot_be_meant_is_refused() {
        assert!(bandwidth("5").unwrap_err().contains("5Gbit"));
        assert!(bandwidth("5GB").unwrap_err().contains("\"GB\""));
        assert!(bandwidth("0Gbit").is_err());
        assert!(bandwidth("1.2.3Gbit").unwrap_err().contains("not a number"));
        assert!(bandwidth("Gbit").is_err());
    }

    #[test]
    fn durations_are_read_and_zero_is_refused() {
        assert_eq!(duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(duration("15m"), Ok(Duration::from_secs(900)));
        assert!(duration("0s").unwrap_err().contains("longer than zero"));
        assert!(duration("soon").is_err());
        assert!(duration("300").is_err());
    }

    #[test]
    fn streams_are_auto_or_a_small_number() {
        assert_eq!(streams("auto"), Ok(0));
        assert_eq!(streams("4"), Ok(4));
        assert!(streams("0").is_err());
        assert!(streams("65").is_err());
        assert!(streams("many").is_err());
    }

    #[test]
    fn names_are_plain_and_not_ids() {
        assert_eq!(instance_name("web-1.a_b"), Ok("web-1.a_b".to_owned()));
        for bad in [
            "",
            "a/b",
            "-a",
            ".a",
            "a b",
            "ü",
            "123e4567-e89b-12d3-a456-426614174000",
        ] {
            assert!(instance_name(bad).is_err(), "{bad:?}");
        }
        assert!(instance_name(&"a".repeat(64)).is_err());
    }

    #[test]
    fn users_are_a_range_without_root() {
        assert_eq!(user_range("70000-79999").ok(), UserRange::new(70_000, 79_999));
        for wrong in ["70000", "9-8", "0-9", "a-b", "1-4294967295", ""] {
            assert!(user_range(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn peers_are_a_host_and_a_url() {
        assert_eq!(
            peer("b=127.0.0.1:7500"),
            Ok(("b".to_owned(), "http://127.0.0.1:7500".to_owned()))
        );
        assert!(peer("b").unwrap_err().contains("HOST=URL"));
        assert!(peer("b=https://x:1").unwrap_err().contains("http://"));
        assert!(peer("b=http://x").unwrap_err().contains("no port"));
    }
}
