//! Network cards as their hosts see them: taps that come and go with the guest, and a network that learns where it is.

use anyhow::{Result, ensure};
use ferry_tests::{Guest, Pair, Witness, until, waiting::CALL};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::scenario::{command, in_a_network, ip, stays_and_moves_later};

pub(crate) fn trials() -> Vec<Trial> {
    in_a_network![
        a_card_on_a_bridge_has_a_tap_that_goes_with_the_guest,
        the_network_learns_where_a_guest_went,
        a_bridge_that_is_missing_at_the_destination_is_named_before_anything_moves,
        a_named_tap_is_used_by_one_guest,
        a_mac_address_is_one_guests,
    ]
}

const MAC: &str = "02:00:5e:10:00:01";

fn on_bridge() -> Guest {
    Guest::new("g").nic(&format!("bridge=br0,mac={MAC}"))
}

fn make_bridge() -> Result<()> {
    ip(&["link", "add", "br0", "type", "bridge"])?;
    ip(&["link", "set", "br0", "up", "mtu", "1400"])?;
    Ok(())
}

/// The ports of the bridge.
fn ports() -> Result<Vec<Value>> {
    let shown: Value = serde_json::from_str(&ip(&["-json", "link", "show", "master", "br0"])?)?;
    // One that has just gone is an empty object to some versions.
    let is_there = |port: &Value| port["ifname"].is_string();
    Ok(shown
        .as_array()
        .into_iter()
        .flatten()
        .filter(|port| is_there(port))
        .cloned()
        .collect())
}

fn a_card_on_a_bridge_has_a_tap_that_goes_with_the_guest(pair: &mut Pair) -> Result<()> {
    make_bridge()?;

    pair.run(&Guest::new("g").nic("bridge=br0"))?;

    let shown = pair.a.show("g")?;
    let nic = &shown["nics"][0];
    ensure!(nic["bridge"] == "br0" && nic["tap"].is_null(), "{shown}");
    ensure!(nic["mac"].as_str().is_some_and(|mac| mac.starts_with("02:")), "{shown}");
    let taps = ports()?;
    ensure!(taps.len() == 1 && taps[0]["mtu"] == 1400, "{taps:?}");
    ensure!(
        taps[0]["flags"]
            .as_array()
            .is_some_and(|flags| flags.contains(&"UP".into())),
        "{taps:?}"
    );

    pair.a.ferry(&["stop", "g", "--force"])?.exit(0)?;
    until("the tap is gone", CALL, || Ok(ports()?.is_empty().then_some(())))?;
    pair.a.ferry(&["start", "g"])?.exit(0)?;
    ensure!(ports()?.len() == 1 && pair.a.show("g")?["nics"] == shown["nics"]);
    Ok(())
}

fn the_network_learns_where_a_guest_went(pair: &mut Pair) -> Result<()> {
    make_bridge()?;
    let witness = pair.run(&on_bridge())?;

    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;

    pair.runs_only_at(&pair.b, "g", &witness)?;
    let taps = until("one tap is left", CALL, || {
        let taps = ports()?;
        Ok((taps.len() == 1).then_some(taps))
    })?;
    let tap = taps[0]["ifname"].as_str().unwrap_or_default();
    until("the bridge has heard of the guest there", CALL, || {
        let known = command("bridge", &["fdb", "show", "br", "br0", "dev", tap])?;
        Ok(known.contains(MAC).then_some(()))
    })?;
    ensure!(pair.b.show("g")?["nics"][0]["mac"] == MAC);
    Ok(())
}

fn a_bridge_that_is_missing_at_the_destination_is_named_before_anything_moves(pair: &mut Pair) -> Result<()> {
    make_bridge()?;
    let witness = pair.run(&on_bridge())?;
    // The guest keeps its tap: to B it is as if A alone had the bridge.
    ip(&["link", "set", "br0", "name", "br1"])?;

    pair.migrate("g", &[])?
        .exit(4)?
        .says("host b")?
        .says("bridge br0")?
        .says("NETWORK")?;

    ip(&["link", "set", "br1", "name", "br0"])?;
    stays_and_moves_later(pair, &witness)
}

fn a_named_tap_is_used_by_one_guest(pair: &mut Pair) -> Result<()> {
    ip(&["tuntap", "add", "web0", "mode", "tap", "vnet_hdr"])?;
    let guest = |name: &str, tap: &str| Guest::new(name).nic(&format!("tap={tap}"));
    pair.run(&guest("g", "web0"))?;

    pair.a
        .ferry(&guest("second", "web0").arguments(&pair.kernel()))?
        .exit(4)?
        .says("web0")?
        .says("in use")?;
    pair.a
        .ferry(&guest("second", "lo").arguments(&pair.kernel()))?
        .exit(4)?
        .says("tap lo")?;

    // These two agents are in one network.
    pair.migrate("g", &[])?
        .exit(4)?
        .says("NETWORK")?
        .says("web0")?
        .says("one network namespace")?
        .says("bridge")?;
    pair.a.ferry(&["delete", "g", "--force"])?.exit(0)?;
    // Somebody made it persistent: it is not ours to remove.
    ip(&["link", "show", "web0"])?;
    Ok(())
}

fn a_mac_address_is_one_guests(pair: &mut Pair) -> Result<()> {
    make_bridge()?;
    pair.run(&on_bridge())?;
    let id = pair.a.show("g")?["id"].as_str().unwrap_or_default().to_owned();
    let witness = Witness::of_instance(&[&pair.a, &pair.b], &id);
    let second = Guest {
        name: "second".to_owned(),
        ..on_bridge()
    };

    pair.a
        .ferry(&second.arguments(&pair.kernel()))?
        .exit(4)?
        .says(MAC)?
        .says("instance g")?;
    pair.b.ferry(&second.arguments(&pair.kernel()))?.exit(0)?;
    pair.migrate("g", &[])?
        .exit(4)?
        .says(MAC)?
        .says("instance second on host b")?;

    pair.b.ferry(&["delete", "second", "--force"])?.exit(0)?;
    stays_and_moves_later(pair, &witness)
}
