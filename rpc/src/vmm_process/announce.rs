//! Telling the network where a guest is now.
//!
//! Switches send frames for a card's address to where they last saw a frame of it. A guest that moved may be silent for
//! long; so its new host sends a frame in its name: a reverse ARP request, which every switch looks at and no other station
//! answers. QEMU does the same.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ferry_vmm::VNET_HEADER_SIZE;

use super::jail;
use crate::mac::MacAddress;

/// Pauses before the frames after the first: one may be lost, and a switch may not forward yet.
const PAUSES_MS: [u64; 4] = [50, 150, 300, 500];

/// The least bytes of a frame on Ethernet, without its checksum.
const LEAST_FRAME: usize = 60;

/// A network card, as others see it.
#[derive(Debug)]
pub(super) struct Card {
    pub(super) tap: OwnedFd,
    pub(super) mac: MacAddress,
}

/// Announces the cards of one guest.
#[derive(Clone, Debug)]
pub(super) struct Announcer {
    cards: Arc<[Card]>,
}

impl Announcer {
    /// An announcer of these cards.
    pub(super) fn new(cards: Vec<Card>) -> Self {
        Self { cards: cards.into() }
    }

    /// Says at once that the guest is here, and a few times more within the next second from a thread that ends by itself.
    pub(super) fn announce(&self) {
        if self.cards.is_empty() {
            return;
        }
        self.send();
        let again = self.clone();
        let repeat = move || {
            jail::narrow(jail::Kind::Control);
            for pause in PAUSES_MS {
                thread::sleep(Duration::from_millis(pause));
                again.send();
            }
        };
        if let Err(error) = thread::Builder::new().name("announce".to_owned()).spawn(repeat) {
            tracing::warn!(%error, "the guest was announced to its network once only");
        }
    }

    fn send(&self) {
        for Card { tap, mac } in &*self.cards {
            // The tap takes it or not, at once: it does not block.
            if let Err(error) = rustix::io::write(tap, &announcement(*mac)) {
                tracing::info!(%mac, %error, "a network card was not announced");
            }
        }
    }
}

/// A reverse ARP request (RFC 903) of the card to everybody, behind the header that taps want.
fn announcement(mac: MacAddress) -> Vec<u8> {
    let own = mac.octets();
    let mut frame = vec![0; VNET_HEADER_SIZE];
    frame.extend([0xff; 6]);
    frame.extend(own);
    frame.extend(0x8035_u16.to_be_bytes());
    // Ethernet and IPv4, with their addresses' lengths; operation 3, "request reverse".
    frame.extend([0, 1, 8, 0, 6, 4, 0, 3]);
    // Sender and target: the card, whose IP address nobody here knows.
    for _ in 0..2 {
        frame.extend(own);
        frame.extend([0; 4]);
    }
    frame.resize(VNET_HEADER_SIZE + LEAST_FRAME, 0);
    frame
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn an_announcement_is_a_reverse_arp_request_of_the_card() {
        let bytes = announcement("02:00:5e:10:00:01".parse().unwrap());
        let (header, frame) = bytes.split_at(VNET_HEADER_SIZE);
        assert_eq!(header, [0; 12]);
        assert_eq!(frame.len(), 60);
        let own = [2, 0, 0x5e, 0x10, 0, 1];
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[6..12], own);
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(frame[22..28], own);
        assert_eq!(frame[32..38], own);
        assert_eq!(frame[28..32], [0; 4]);
        assert!(frame[38..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn each_card_is_announced_at_once_and_again() {
        let (near, far) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let mac = "02:00:5e:10:00:01".parse().unwrap();
        let announcer = Announcer::new(vec![Card { tap: near.into(), mac }]);
        announcer.announce();
        drop(announcer);
        far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut heard = [0; 100];
        for _ in 0..=PAUSES_MS.len() {
            // A wait with a time limit is not taken up again after a signal.
            let count = loop {
                match far.recv(&mut heard) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    heard => break heard.unwrap(),
                }
            };
            assert_eq!(heard[..count], announcement(mac));
        }
    }
}
