//! Tap interfaces: the host's end of a network card.
//!
//! Whoever makes a machine opens its taps here and hands their descriptors over. An interface that was made here is gone
//! when the last descriptor of it is closed; one that somebody made persistent stays.

#![expect(unsafe_code, reason = "ioctls of /dev/net/tun and of network interfaces")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use thiserror::Error;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

/// Bytes of the header before each frame (`struct virtio_net_hdr_v1`).
pub const VNET_HEADER_SIZE: usize = 12;

/// A tap interface, open for frames: non-blocking, each frame after a header of [`VNET_HEADER_SIZE`] bytes.
#[derive(Debug)]
pub struct Tap {
    descriptor: OwnedFd,
    name: String,
}

/// Why a tap could not be had.
#[derive(Debug, Error)]
pub enum TapError {
    /// The host has no tap interfaces, or keeps them from this process.
    #[error("open /dev/net/tun (it comes with the kernel module tun)")]
    Device(#[source] io::Error),
    /// Something could not be done with an interface.
    #[error("{step} {interface}")]
    Interface {
        /// What was tried.
        step: &'static str,
        /// With which interface.
        interface: String,
        /// What is in the way.
        #[source]
        problem: TapProblem,
    },
}

/// What is in the way of something that was tried with an interface.
#[derive(Debug, Error)]
pub enum TapProblem {
    /// The process may not.
    #[error("this process may not: it needs CAP_NET_ADMIN, which root has")]
    NoRight,
    /// There is no such interface.
    #[error("there is no interface of that name")]
    Missing,
    /// A tap has one user, a port one bridge.
    #[error("it is in use by something else")]
    Busy,
    /// It is not what it should be.
    #[error("it is another kind of interface")]
    OtherKind,
    /// The kernel refused for another reason.
    #[error(transparent)]
    Other(io::Error),
}

impl Tap {
    /// Opens the tap interface `name`, or makes it if there is none. With `%d` in the name, a new one with the first number
    /// that is free.
    ///
    /// # Errors
    ///
    /// Names the interface, and who or what is in the way.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let descriptor =
            rustix::fs::open("/dev/net/tun", flags, Mode::empty()).map_err(|error| TapError::Device(error.into()))?;
        let take = || {
            let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
            let mut request = Request::new(name, &(wanted as u16).to_ne_bytes());
            // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, which has the size of a `Request`.
            check(unsafe { ioctl_with_mut_ref(&descriptor, libc::TUNSETIFF, &mut request) })?;
            let size = VNET_HEADER_SIZE as libc::c_int;
            // SAFETY: TUNSETVNETHDRSZ reads an int.
            check(unsafe { ioctl_with_ref(&descriptor, libc::TUNSETVNETHDRSZ, &size) })?;
            Ok(request.name())
        };
        let name = take().map_err(|error| refused(error, "open the tap", name))?;
        Ok(Self { descriptor, name })
    }

    /// What the interface is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Lets frames through.
    ///
    /// # Errors
    ///
    /// Names the interface.
    pub fn bring_up(&self) -> Result<(), TapError> {
        let bring_up = || {
            let control = Control::open()?;
            let flags = control.ask(libc::SIOCGIFFLAGS, &self.name, &[])?;
            let flags = u16::from_ne_bytes([flags[0], flags[1]]);
            let up = libc::IFF_UP as u16;
            // One that is up needs no privilege: its owner may have prepared it for us.
            if flags & up == 0 {
                control.ask(libc::SIOCSIFFLAGS, &self.name, &(flags | up).to_ne_bytes())?;
            }
            Ok(())
        };
        bring_up().map_err(|error| refused(error, "bring up the tap", &self.name))
    }

    /// Makes the interface a port of `bridge`, with the bridge's MTU.
    ///
    /// # Errors
    ///
    /// Names the bridge if it is missing or none.
    pub fn attach(&self, bridge: &str) -> Result<(), TapError> {
        let attach = || {
            let control = Control::open()?;
            // Before it is a port: the bridge takes over the smallest MTU of its ports.
            let mtu = control.ask(libc::SIOCGIFMTU, bridge, &[])?;
            control.ask(libc::SIOCSIFMTU, &self.name, &mtu[..4])?;
            self.look_unimportant(&control)?;
            let index = control.ask(libc::SIOCGIFINDEX, &self.name, &[])?;
            control.ask(SIOCBRADDIF, bridge, &index[..4]).map(drop)
        };
        attach().map_err(|error| refused(error, "attach a tap to the bridge", bridge))
    }

    /// Says which offloads (`TUN_F_*`) the reader of this tap can take; the others are done by the kernel before.
    ///
    /// # Errors
    ///
    /// The kernel does not know one of them.
    pub fn set_offload(tap: impl AsFd, flags: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes a number.
        Ok(check(unsafe {
            ioctl_with_val(&tap.as_fd(), libc::TUNSETOFFLOAD, flags.into())
        })?)
    }

    /// A bridge without an address of its own has the lowest of its ports', and changes it with them. The tap's random one
    /// is made as high as an address can be, so that the bridge keeps its own and nobody loses the way to it.
    fn look_unimportant(&self, control: &Control) -> Result<(), Errno> {
        // A `struct sockaddr`: the family, then the address.
        let mut address = control.ask(libc::SIOCGIFHWADDR, &self.name, &[])?;
        address[2] = 0xfe;
        control.ask(libc::SIOCSIFHWADDR, &self.name, &address).map(drop)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl From<Tap> for OwnedFd {
    fn from(tap: Tap) -> Self {
        tap.descriptor
    }
}

/// A socket by which interfaces are asked and changed.
struct Control(OwnedFd);

impl Control {
    fn open() -> Result<Self, Errno> {
        socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None).map(Self)
    }

    /// Asks something of an interface, or changes it, and gives back what the kernel left in the request.
    fn ask(&self, request: libc::c_ulong, interface: &str, value: &[u8]) -> Result<[u8; VALUE_SIZE], Errno> {
        let mut asked = Request::new(interface, value);
        // SAFETY: the SIOC* of this file read and write a `struct ifreq`, which has the size of a `Request`, and no pointer in it.
        check(unsafe { ioctl_with_mut_ref(&self.0, request, &mut asked) })?;
        Ok(asked.value)
    }
}

/// A `struct ifreq`: an interface's name, and a union of what may be asked of it, beginning at its first byte.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    value: [u8; VALUE_SIZE],
}

/// Makes an interface a port of a bridge (`linux/sockios.h`).
const SIOCBRADDIF: libc::c_ulong = 0x89a2;

/// The size of the union in a `struct ifreq`.
const VALUE_SIZE: usize = size_of::<libc::ifreq>() - libc::IFNAMSIZ;

const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());

impl Request {
    /// A request about `interface`; what is too long for a name of an interface is cut off, and then names none.
    fn new(interface: &str, value: &[u8]) -> Self {
        let mut request = Self {
            name: [0; libc::IFNAMSIZ],
            value: [0; VALUE_SIZE],
        };
        let end = request.name.len() - 1;
        request.name[..end]
            .iter_mut()
            .zip(interface.bytes())
            .for_each(|(to, from)| *to = from);
        request.value[..value.len()].copy_from_slice(value);
        request
    }

    fn name(&self) -> String {
        let name = self.name.split(|&byte| byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }
}

/// The error that an ioctl just returned, if it did.
fn check(answer: libc::c_int) -> Result<(), Errno> {
    if answer >= 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

fn refused(error: Errno, step: &'static str, interface: &str) -> TapError {
    let problem = match error {
        Errno::PERM | Errno::ACCESS => TapProblem::NoRight,
        Errno::NODEV => TapProblem::Missing,
        Errno::BUSY => TapProblem::Busy,
        // TUNSETIFF says it of an interface that is no tap, SIOCBRADDIF of one that is no bridge; SIOCSIFMTU of an MTU that no
        // tap can have and so no bridge for taps.
        Errno::INVAL | Errno::OPNOTSUPP => TapProblem::OtherKind,
        error => TapProblem::Other(error.into()),
    };
    TapError::Interface {
        step,
        interface: interface.to_owned(),
        problem,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rustix::thread::{UnshareFlags, unshare_unsafe};

    use super::*;

    /// Runs `body` in a network namespace of its own, which ends with it.
    fn in_a_namespace(body: impl FnOnce() + Send + 'static) {
        let run = || {
            // SAFETY: only the network is taken apart from other threads, not the table of descriptors.
            match unsafe { unshare_unsafe(UnshareFlags::NEWNET) } {
                Ok(()) if Path::new("/dev/net/tun").exists() => body(),
                Ok(()) => eprintln!("skipped: this host has no /dev/net/tun"),
                // Root in a container may lack the capability.
                Err(Errno::PERM) => eprintln!("skipped: this process may not make a network namespace"),
                Err(error) => panic!("failed to make a network namespace: {error}"),
            }
        };
        std::thread::spawn(run).join().unwrap();
    }

    fn make_bridge(name: &str) {
        const SIOCBRADDBR: libc::c_ulong = 0x89a0;
        // It reads a name, which is what a request begins with.
        asked(SIOCBRADDBR, name, &[]).unwrap();
    }

    fn asked(request: libc::c_ulong, interface: &str, value: &[u8]) -> Result<[u8; VALUE_SIZE], Errno> {
        Control::open()?.ask(request, interface, value)
    }

    /// What was tried, and what was in the way.
    fn told(failed: Result<(), TapError>) -> (String, TapProblem) {
        let error = failed.unwrap_err();
        let step = error.to_string();
        match error {
            TapError::Interface { problem, .. } => (step, problem),
            TapError::Device(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_tap_lasts_as_long_as_its_descriptor() {
        in_a_namespace(|| {
            let (one, other) = (Tap::open("fry%d").unwrap(), Tap::open("fry%d").unwrap());
            assert_eq!((one.name(), other.name()), ("fry0", "fry1"));
            assert!(asked(libc::SIOCGIFINDEX, "fry1", &[]).is_ok());
            drop(other);
            assert_eq!(asked(libc::SIOCGIFINDEX, "fry1", &[]), Err(Errno::NODEV));
        });
    }

    #[test]
    fn a_tap_has_one_user() {
        in_a_namespace(|| {
            let _used = Tap::open("web0").unwrap();
            let (step, problem) = told(Tap::open("web0").map(drop));
            assert_eq!(step, "open the tap web0");
            assert!(matches!(problem, TapProblem::Busy), "{problem}");
        });
    }

    #[test]
    fn a_tap_that_is_brought_up_stays_up() {
        in_a_namespace(|| {
            let tap = Tap::open("web0").unwrap();
            tap.bring_up().unwrap();
            tap.bring_up().unwrap();
            let flags = asked(libc::SIOCGIFFLAGS, "web0", &[]).unwrap();
            assert_ne!(flags[0] & libc::IFF_UP as u8, 0);
        });
    }

    #[test]
    fn a_port_takes_the_bridges_mtu_and_leaves_it_its_address() {
        in_a_namespace(|| {
            make_bridge("br0");
            asked(libc::SIOCSIFMTU, "br0", &1400_i32.to_ne_bytes()).unwrap();
            let tap = Tap::open("fry%d").unwrap();
            tap.attach("br0").unwrap();
            tap.bring_up().unwrap();
            let mtu = asked(libc::SIOCGIFMTU, tap.name(), &[]).unwrap();
            assert_eq!(mtu[..4], 1400_i32.to_ne_bytes());
            let address = asked(libc::SIOCGIFHWADDR, tap.name(), &[]).unwrap();
            assert_eq!(address[2], 0xfe);
            // It is a port by now.
            assert!(matches!(told(tap.attach("br0")).1, TapProblem::Busy));
        });
    }

    #[test]
    fn what_is_no_bridge_is_named() {
        in_a_namespace(|| {
            let tap = Tap::open("fry%d").unwrap();
            let (step, missing) = told(tap.attach("br0"));
            assert_eq!(step, "attach a tap to the bridge br0");
            assert!(matches!(missing, TapProblem::Missing), "{missing}");
            let another = Tap::open("web0").unwrap();
            for other in ["lo", another.name()] {
                assert!(matches!(told(tap.attach(other)).1, TapProblem::OtherKind), "{other}");
            }
            assert!(matches!(told(Tap::open("lo").map(drop)).1, TapProblem::OtherKind));
        });
    }

    #[test]
    fn offloads_are_set_by_whoever_has_the_descriptor() {
        in_a_namespace(|| {
            let tap = Tap::open("fry%d").unwrap();
            Tap::set_offload(&tap, libc::TUN_F_CSUM | libc::TUN_F_TSO4).unwrap();
            let descriptor = OwnedFd::from(tap);
            Tap::set_offload(&descriptor, 0).unwrap();
            assert!(Tap::set_offload(&descriptor, 1 << 31).is_err());
        });
    }
}
