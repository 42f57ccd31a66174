//! Messages with descriptors on a Unix socket.
//!
//! A message has a header: four bytes that identify the protocol and its version, the kind, the
//! number of descriptors, and the length of the payload, four bytes big-endian. The descriptors
//! come with the first byte of the header.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg,
    sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Protocol and version.
const MAGIC: [u8; 4] = *b"ZWA1";

const HEADER: usize = 10;

/// Largest payload, in bytes: a configuration of a proxy as JSON, and room for the rest.
const MAX_PAYLOAD: usize = 8 << 20;

/// Descriptors of one message. The system's limit is 253.
pub(super) const MAX_DESCRIPTORS: usize = 250;

#[cfg(target_os = "linux")]
const RECV: RecvFlags = RecvFlags::CMSG_CLOEXEC;
#[cfg(not(target_os = "linux"))]
const RECV: RecvFlags = RecvFlags::empty();

#[cfg(target_os = "linux")]
const SEND: SendFlags = SendFlags::NOSIGNAL;
#[cfg(not(target_os = "linux"))]
const SEND: SendFlags = SendFlags::empty();

/// What a message is. The first three are understood by every version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// The new process introduces itself.
    Hello = 1,
    /// What the old process serves.
    Welcome = 2,
    /// The other side ends the exchange, and why.
    Refused = 3,
    /// The new process asks for everything.
    Take = 4,
    /// Sealed memory with the state; the descriptors follow.
    Handover = 5,
    /// Descriptors of a handover.
    Descriptors = 6,
    /// The new process has everything and can serve.
    Confirmed = 7,
    /// The old process does not touch it any more, so the new one may serve.
    Go = 8,
    /// The old process has nothing left.
    Done = 9,
}

impl Kind {
    const ALL: [Self; 9] =
        [Self::Hello, Self::Welcome, Self::Refused, Self::Take, Self::Handover, Self::Descriptors, Self::Confirmed, Self::Go, Self::Done];
}

/// A received message.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) kind: Kind,
    pub(super) payload: Vec<u8>,
    pub(super) descriptors: Vec<OwnedFd>,
}

/// Sends a message.
///
/// # Errors
///
/// The other side is gone, or there are too many descriptors.
pub(super) async fn send(stream: &UnixStream, kind: Kind, payload: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    if descriptors.len() > MAX_DESCRIPTORS || payload.len() > MAX_PAYLOAD {
        return Err(io::Error::new(ErrorKind::InvalidInput, "a message that is too large"));
    }
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&[kind as u8, descriptors.len() as u8]);
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    bytes.extend_from_slice(payload);
    let mut sent = stream.async_io(Interest::WRITABLE, || send_with(stream.as_fd(), &bytes, descriptors)).await?;
    while sent < bytes.len() {
        sent += stream.async_io(Interest::WRITABLE, || send_with(stream.as_fd(), &bytes[sent..], &[])).await?;
    }
    Ok(())
}

/// Sends bytes and descriptors at once. Returns how many bytes were sent.
pub(super) fn send_with(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    Ok(rustix::io::retry_on_intr(|| sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SEND))?)
}

/// Receives a message.
///
/// # Errors
///
/// The other side is gone, or what it sent is not a message of this protocol.
pub(super) async fn receive(stream: &UnixStream) -> io::Result<Message> {
    let mut descriptors = Vec::new();
    let mut header = [0; HEADER];
    fill(stream, &mut header, &mut descriptors).await?;
    let (kind, len) = parse(&header, descriptors.len())?;
    let mut payload = vec![0; len];
    fill(stream, &mut payload, &mut descriptors).await?;
    Ok(Message { kind, payload, descriptors })
}

/// Returns the kind and the length of the payload.
fn parse(header: &[u8; HEADER], descriptors: usize) -> io::Result<(Kind, usize)> {
    let invalid = |what: &str| Err(io::Error::new(ErrorKind::InvalidData, what.to_owned()));
    let [a, b, c, d, kind, count, len @ ..] = *header;
    if [a, b, c, d] != MAGIC {
        return invalid("the other process speaks another version of the takeover protocol");
    }
    let Some(kind) = Kind::ALL.into_iter().find(|known| *known as u8 == kind) else { return invalid("an unknown message") };
    let len = u32::from_be_bytes(len) as usize;
    if len > MAX_PAYLOAD || usize::from(count) != descriptors {
        return invalid("a message with a wrong length or number of descriptors");
    }
    Ok((kind, len))
}

async fn fill(stream: &UnixStream, buffer: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        let rest = &mut buffer[filled..];
        let received = stream.async_io(Interest::READABLE, || receive_with(stream.as_fd(), rest, descriptors, RECV)).await?;
        if received == 0 {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the other process has closed the connection"));
        }
        filled += received;
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(io::Error::new(ErrorKind::InvalidData, "a message with too many descriptors"));
        }
    }
    Ok(())
}

/// Receives bytes and descriptors at once. Returns how many bytes were received.
fn receive_with(socket: BorrowedFd<'_>, buffer: &mut [u8], descriptors: &mut Vec<OwnedFd>, flags: RecvFlags) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags))?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    // For example because the process has reached its limit on descriptors.
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("not all descriptors arrived: raise the limit on open files"));
    }
    Ok(received.bytes)
}

/// The descriptors of the next message, which stays in the socket.
///
/// # Errors
///
/// There is no message.
pub(super) fn peek_descriptors(socket: BorrowedFd<'_>) -> io::Result<Vec<OwnedFd>> {
    let mut descriptors = Vec::new();
    let mut header = [0; HEADER];
    let received = receive_with(socket, &mut header, &mut descriptors, RECV | RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
    if received < HEADER {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    parse(&header, descriptors.len())?;
    Ok(descriptors)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;

    use super::*;

    #[tokio::test]
    async fn messages_arrive_with_their_descriptors() {
        let (one, other) = UnixStream::pair().unwrap();
        let files: Vec<File> = (0..MAX_DESCRIPTORS).map(|_| tempfile::tempfile().unwrap()).collect();
        (&files[7]).write_all(b"seven").unwrap();
        let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let payload = vec![b'x'; 1 << 20];
        let sent = async {
            send(&one, Kind::Hello, b"first", &[]).await.unwrap();
            send(&one, Kind::Descriptors, &payload, &descriptors).await.unwrap();
            send(&one, Kind::Done, b"", &descriptors[..1]).await.unwrap();
            drop(one);
        };
        let received = async {
            let first = receive(&other).await.unwrap();
            assert_eq!((first.kind, &first.payload[..], first.descriptors.len()), (Kind::Hello, &b"first"[..], 0));
            let second = receive(&other).await.unwrap();
            assert_eq!((second.kind, second.descriptors.len()), (Kind::Descriptors, MAX_DESCRIPTORS));
            assert!(second.payload == vec![b'x'; 1 << 20]);
            let seventh = File::from(rustix::io::dup(&second.descriptors[7]).unwrap());
            assert_eq!(seventh.metadata().unwrap().len(), 5);
            assert_eq!(peek_descriptors(other.as_fd()).unwrap().len(), 1);
            assert_eq!(receive(&other).await.unwrap().descriptors.len(), 1);
            assert_eq!(receive(&other).await.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        };
        tokio::join!(sent, received);
    }

    #[tokio::test]
    async fn other_bytes_are_rejected() {
        for bytes in [&b"ZWA2\x01\0\0\0\0\0"[..], b"ZWA1\x63\0\0\0\0\0", b"ZWA1\x01\x01\0\0\0\0", b"ZWA1\x01\0\xff\0\0\0"] {
            let (one, other) = UnixStream::pair().unwrap();
            one.writable().await.unwrap();
            one.try_write(bytes).unwrap();
            assert_eq!(receive(&other).await.unwrap_err().kind(), ErrorKind::InvalidData, "{bytes:?}");
        }
    }
}
