//! Network cards as their hosts see them: taps that come and go with the guest, and a network that learns where it is.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ferry_tests::{Guest, Pair, Witness, until, waiting::CALL};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::scenario::{command, in_a_network, ip, stays_and_moves_later};

pub(crate) fn trials() -> Vec<Trial> {
    in_a_network![
        a_card_on_a_bridge_has_a_tap_that_goes_with_the_guest,
        the_network_learns_where_a_guest_went,
        the_gap_in_what_a_guest_was_sent_is_in_its_record,
        a_bridge_that_is_missing_at_the_destination_is_named_before_anything_moves,
        a_named_tap_is_used_by_one_guest,
        a_guest_whose_tap_vanishes_runs_on_and_has_another_where_it_goes,
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

    let moved = pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;

    // Nobody talked to it.
    ensure!(
        moved.record["network_gap_ms"].is_null() && moved.record["network_gaps"] == serde_json::json!([]),
        "{}",
        moved.record
    );
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

/// The card sees frames, whatever the guest makes of them.
fn the_gap_in_what_a_guest_was_sent_is_in_its_record(pair: &mut Pair) -> Result<()> {
    make_bridge()?;
    // One without an address of its own takes that of its first port, and forgets its neighbours when it does.
    ip(&["link", "set", "br0", "address", "02:00:00:00:00:01"])?;
    ip(&["address", "add", "198.51.100.1/24", "dev", "br0"])?;
    let guest = "198.51.100.2";
    ip(&[
        "neighbour",
        "add",
        guest,
        "lladdr",
        MAC,
        "dev",
        "br0",
        "nud",
        "permanent",
    ])?;
    let work = "heartbeat_ms=20 work=net direction=receive packet=100 depth=64 seconds=600";
    let witness = pair.run(&on_bridge().work(work))?;
    let over = AtomicBool::new(false);

    let (moved, took) = thread::scope(|scope| {
        scope.spawn(|| {
            let socket = UdpSocket::bind("198.51.100.1:0").and_then(|socket| {
                socket.connect((guest, 9))?;
                Ok(socket)
            });
            while !over.load(Ordering::Relaxed) {
                // Without a way to the guest there is none to send.
                let _ = socket.as_ref().map(|socket| socket.send(&[0; 58]));
                thread::sleep(Duration::from_millis(1));
            }
        });
        let began = Instant::now();
        let moved = pair.migrate("g", &[]).and_then(|moved| moved.exit(0)?.migration());
        over.store(true, Ordering::Relaxed);
        (moved, began.elapsed().as_secs_f64() * 1e3)
    });

    let moved = moved?.is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)?;
    let told = &moved.record["network_gaps"][0];
    ensure!(told["mac"] == MAC && told["sent_ms"].is_null(), "{}", moved.record);
    let gap = told["received_ms"].as_f64().context("no gap")?;
    ensure!(moved.record["network_gap_ms"] == gap, "{}", moved.record);
    // Frames pass until the vCPUs stand still, and perhaps while the devices come to rest.
    let downtime = &moved.record["downtime_ms"];
    let blackout = |part: &str| downtime[part].as_f64().context("no blackout");
    let least = blackout("total")? - blackout("pause")? - blackout("drain")? - blackout("start")?;
    ensure!(gap > least && gap < took, "{gap} ms of {took} ms: {}", moved.record);
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

fn a_guest_whose_tap_vanishes_runs_on_and_has_another_where_it_goes(pair: &mut Pair) -> Result<()> {
    make_bridge()?;
    let work = "heartbeat_ms=20 work=net direction=send packet=1000 depth=4 seconds=600";
    let witness = pair.run(&on_bridge().work(work))?;
    let own = ports()?[0]["ifname"].as_str().unwrap_or_default().to_owned();

    ip(&["link", "del", &own])?;

    witness.wait_for_beats_at("a", 20)?;
    pair.runs_only_at(&pair.a, "g", &witness)?;
    pair.migrate("g", &[])?.exit(0)?.migration()?.is("completed", "b")?;
    pair.runs_only_at(&pair.b, "g", &witness)?;
    ensure!(ports()?.len() == 1, "{:?}", ports()?);
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
