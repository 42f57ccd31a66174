//! Request bodies with a timeout.
//!
//! An incomplete message occupies memory, so the rest of it must arrive in time. Between messages a
//! client may be silent for any time.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;

/// Length of the prefix of each message, in bytes: a flag, and the length of the message in 4
/// bytes.
const PREFIX: usize = 5;

/// The body of a request, whose messages must be completed in time.
pub(super) struct InboundBody<B = Incoming> {
    body: B,
    position: MessagePosition,
    /// The body has one message and then ends. The timeout applies from the start.
    is_one: bool,
    /// Time for the rest of a message.
    limit: Duration,
    /// When the current message times out.
    deadline: Option<Instant>,
    /// Created for the first incomplete message, because most arrive complete.
    timer: Option<Pin<Box<Sleep>>>,
}

impl<B> InboundBody<B> {
    /// The body of a stream of messages.
    pub(super) fn of_many(body: B, limit: Duration) -> Self {
        Self { body, position: MessagePosition::default(), is_one: false, limit, deadline: None, timer: None }
    }

    /// The body of a call with one message.
    pub(super) fn of_one(body: B, limit: Duration) -> Self {
        Self { is_one: true, ..Self::of_many(body, limit) }
    }

    fn arrived(&mut self, data: &[u8]) {
        if self.position.advance(data) && !self.is_one {
            self.deadline = None;
        }
    }

    /// Ready when the current message has timed out.
    fn poll_stalled(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if !self.is_one && self.position.is_between() {
            return Poll::Pending;
        }
        let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + self.limit);
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if timer.deadline() != deadline {
            timer.as_mut().reset(deadline);
        }
        timer.as_mut().poll(context)
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for InboundBody<B>
where
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        if let Poll::Ready(arrived) = Pin::new(&mut this.body).poll_frame(context) {
            if let Some(Ok(frame)) = &arrived
                && let Some(data) = frame.data_ref()
            {
                this.arrived(data);
            }
            return Poll::Ready(arrived.map(|frame| frame.map_err(|error| Status::from_error(error.into()))));
        }
        ready!(this.poll_stalled(context));
        Poll::Ready(Some(Err(Status::deadline_exceeded(format!(
            "{} not completed within {:?}",
            if this.is_one { "call" } else { "message" },
            this.limit
        )))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Position of a body within its messages.
#[derive(Debug, Default)]
struct MessagePosition {
    /// The prefix that is being read, and how many bytes of it were read.
    prefix: [u8; PREFIX],
    read: usize,
    /// Missing bytes of the message.
    left: usize,
}

impl MessagePosition {
    /// Advances by `data`. Returns whether a message has ended within it.
    fn advance(&mut self, mut data: &[u8]) -> bool {
        let mut ended = false;
        while !data.is_empty() {
            if self.left == 0 {
                let len = data.len().min(PREFIX - self.read);
                self.prefix[self.read..self.read + len].copy_from_slice(&data[..len]);
                data = &data[len..];
                self.read += len;
                if self.read < PREFIX {
                    break;
                }
                self.read = 0;
                let [_, length @ ..] = self.prefix;
                self.left = u32::from_be_bytes(length) as usize;
            }
            let len = data.len().min(self.left);
            data = &data[len..];
            self.left -= len;
            ended |= self.left == 0;
        }
        ended
    }

    const fn is_between(&self) -> bool {
        self.read == 0 && self.left == 0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::future::poll_fn;

    use proptest::prelude::*;

    use super::*;

    fn framed(len: usize) -> Vec<u8> {
        let mut framed = vec![0];
        framed.extend((len as u32).to_be_bytes());
        framed.resize(PREFIX + len, 1);
        framed
    }

    proptest! {
        #[test]
        fn finds_the_ends_of_messages_in_any_chunks(lens in prop::collection::vec(0_usize..300, 1..8), cuts in prop::collection::vec(1_usize..40, 1..20)) {
            let bytes: Vec<u8> = lens.iter().flat_map(|&len| framed(len)).collect();
            let mut ends: VecDeque<usize> = lens.iter().scan(0, |end, len| { *end += PREFIX + len; Some(*end) }).collect();
            let mut position = MessagePosition::default();
            let (mut at, mut cuts) = (0, cuts.iter().cycle());
            while at < bytes.len() {
                let next = (at + cuts.next().unwrap()).min(bytes.len());
                let ended = position.advance(&bytes[at..next]);
                at = next;
                let before = ends.len();
                let mut last = None;
                while ends.front().is_some_and(|end| *end <= at) {
                    last = ends.pop_front();
                }
                prop_assert_eq!(ended, ends.len() < before);
                let between = last == Some(at);
                prop_assert_eq!(position.is_between(), between);
            }
        }
    }

    /// A body that has these chunks and never ends.
    #[derive(Default)]
    struct Given(VecDeque<Bytes>);

    impl Body for Given {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            self.0.pop_front().map_or(Poll::Pending, |data| Poll::Ready(Some(Ok(Frame::data(data)))))
        }
    }

    fn framed_message() -> Bytes {
        Bytes::from(framed(10))
    }

    /// Reads all that has arrived. Ready when the rest has timed out.
    fn poll_stalls(inbound: &mut InboundBody<Given>, context: &mut Context<'_>) -> Poll<()> {
        loop {
            match ready!(Pin::new(&mut *inbound).poll_frame(context)) {
                Some(Ok(_)) => {}
                Some(Err(status)) => {
                    assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
                    return Poll::Ready(());
                }
                None => unreachable!("it never ends"),
            }
        }
    }

    async fn stalls(inbound: &mut InboundBody<Given>) -> bool {
        poll_fn(|context| Poll::Ready(poll_stalls(inbound, context).is_ready())).await
    }

    #[tokio::test]
    async fn an_incomplete_message_times_out() {
        let message = framed_message();
        for half in 1..message.len() {
            let mut inbound = InboundBody::of_many(Given::default(), Duration::ZERO);
            // No message has begun, so there is no timeout.
            assert!(!stalls(&mut inbound).await);
            inbound.body.0.push_back(message.slice(..half));
            poll_fn(|context| poll_stalls(&mut inbound, context)).await;
        }
    }

    #[tokio::test]
    async fn a_slow_message_gets_no_more_time() {
        let mut inbound = InboundBody::of_many(Given::default(), Duration::from_secs(30));
        let mut deadline = None;
        for _ in 0..3 {
            for byte in framed_message().chunks(1) {
                inbound.body.0.push_back(Bytes::copy_from_slice(byte));
                assert!(!stalls(&mut inbound).await);
                if inbound.position.is_between() {
                    assert_eq!(inbound.deadline, None);
                    deadline = None;
                } else {
                    assert_eq!(*deadline.get_or_insert(inbound.deadline.unwrap()), inbound.deadline.unwrap());
                    assert_eq!(inbound.timer.as_ref().unwrap().deadline(), inbound.deadline.unwrap());
                }
            }
        }
        // The rest of a message may arrive with the start of the next, which has a timeout of its
        // own.
        inbound.body.0.push_back(framed_message().slice(..3));
        assert!(!stalls(&mut inbound).await);
        let first = inbound.deadline.unwrap();
        inbound.body.0.extend([framed_message().slice(3..), framed_message().slice(..3)]);
        assert!(!stalls(&mut inbound).await);
        assert!(inbound.deadline.unwrap() > first);
    }

    #[tokio::test]
    async fn a_call_of_one_message_times_out() {
        let mut inbound = InboundBody::of_one(Given::default(), Duration::ZERO);
        poll_fn(|context| poll_stalls(&mut inbound, context)).await;
        // The end of the call times out too.
        let mut inbound = InboundBody::of_one(Given([framed_message()].into()), Duration::ZERO);
        poll_fn(|context| poll_stalls(&mut inbound, context)).await;
    }
}
