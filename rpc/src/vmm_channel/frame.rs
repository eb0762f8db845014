//! One frame, written and read.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use prost::Message;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

/// The most descriptors in one frame: a control stream and 64 page streams.
pub(crate) const MAX_DESCRIPTORS: usize = 65;

/// The largest message. Nothing that the two say comes near it; what exceeds it is garbage.
pub(crate) const MAX_MESSAGE: usize = 1 << 20;

/// Why a frame could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    /// The socket failed.
    #[error("the socket between agent and VMM failed")]
    Socket(#[from] io::Error),
    /// A frame announces more than a message may have.
    #[error("a message of {0} bytes is over the limit of {MAX_MESSAGE}")]
    TooLarge(usize),
    /// The bytes are not the message they should be.
    #[error("a message does not parse")]
    Malformed(#[from] prost::DecodeError),
    /// More descriptors than a frame may carry.
    #[error("{0} descriptors are over the limit of {MAX_DESCRIPTORS}")]
    TooManyDescriptors(usize),
}

/// Sends one message with its descriptors. The socket is blocking; callers give it a send timeout.
pub(crate) fn send<M: Message>(
    socket: &UnixStream,
    message: &M,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), ChannelError> {
    if descriptors.len() > MAX_DESCRIPTORS {
        return Err(ChannelError::TooManyDescriptors(descriptors.len()));
    }
    let length = message.encoded_len();
    if length > MAX_MESSAGE {
        return Err(ChannelError::TooLarge(length));
    }
    let mut bytes = Vec::with_capacity(4 + length);
    bytes.extend_from_slice(&(length as u32).to_le_bytes());
    message.encode_raw(&mut bytes);

    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(ChannelError::TooManyDescriptors(descriptors.len()));
    }
    let sent = retry(|| sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL))?;
    let mut rest = socket;
    rest.write_all(&bytes[sent..])?;
    Ok(())
}

/// Receives one message and its descriptors; `None` when the peer closed the socket between two frames.
pub(crate) fn receive<M: Message + Default>(socket: &UnixStream) -> Result<Option<(M, Vec<OwnedFd>)>, ChannelError> {
    let mut header = [0; 4];
    let mut descriptors = Vec::new();
    let mut filled = 0;
    while filled < header.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = retry(|| {
            let mut rest = [IoSliceMut::new(&mut header[filled..])];
            recvmsg(socket, &mut rest, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        })?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        match received.bytes {
            0 if filled == 0 => return Ok(None),
            0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            count => filled += count,
        }
    }
    let length = u32::from_le_bytes(header) as usize;
    if length > MAX_MESSAGE {
        return Err(ChannelError::TooLarge(length));
    }
    let mut bytes = vec![0; length];
    let mut rest = socket;
    rest.read_exact(&mut bytes)?;
    Ok(Some((M::decode(bytes.as_slice())?, descriptors)))
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use ferry_proto::vmm::v1::{ConsoleInput, Order, order};

    use super::*;

    fn input(number: u64, bytes: &[u8]) -> Order {
        Order {
            number,
            order: Some(order::Order::ConsoleInput(ConsoleInput { bytes: bytes.to_vec() })),
        }
    }

    #[test]
    fn descriptors_arrive_with_their_own_frame() {
        let (near, far) = UnixStream::pair().unwrap();
        let (passed, kept) = UnixStream::pair().unwrap();
        send(&near, &input(1, b"first"), &[]).unwrap();
        send(&near, &input(2, b"second"), &[passed.as_fd()]).unwrap();

        let (first, none) = receive::<Order>(&far).unwrap().unwrap();
        let (second, one) = receive::<Order>(&far).unwrap().unwrap();

        assert_eq!((first.number, none.len()), (1, 0));
        assert_eq!((second.number, one.len()), (2, 1));
        drop(passed);
        let mut through = UnixStream::from(one.into_iter().next().unwrap());
        through.write_all(b"x").unwrap();
        let mut byte = [0];
        (&kept).read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn a_closed_peer_ends_the_frames() {
        let (near, far) = UnixStream::pair().unwrap();
        drop(near);
        assert!(receive::<Order>(&far).unwrap().is_none());
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_anything_is_allocated() {
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(receive::<Order>(&far), Err(ChannelError::TooLarge(_))));
    }

    #[test]
    fn a_frame_cut_short_is_an_error() {
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(&[9, 0]).unwrap();
        drop(near);
        assert!(matches!(receive::<Order>(&far), Err(ChannelError::Socket(_))));
    }
}
