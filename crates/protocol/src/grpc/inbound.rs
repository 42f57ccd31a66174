//! Bodies of calls. Half a message takes memory for as long as the rest is awaited, so that it is not awaited for ever; between messages a client may
//! be silent for as long as it likes.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;

/// Length of what stands before each message: a flag, and the message's length in four bytes.
const PREFIX: usize = 5;

/// The body of a call, whose messages must come to their end in time.
pub(super) struct InboundBody<B = Incoming> {
    body: B,
    place: MessagePosition,
    /// There is to be one message and then the end, which is awaited from the beginning on.
    is_one: bool,
    /// How long the rest is awaited.
    limit: Duration,
    /// When what is being awaited is given up.
    deadline: Option<Instant>,
    /// Made when a message is awaited for the first time: most come whole.
    timer: Option<Pin<Box<Sleep>>>,
}

impl<B> InboundBody<B> {
    /// The body of a stream of messages.
    pub(super) fn of_many(body: B, limit: Duration) -> Self {
        Self { body, place: MessagePosition::default(), is_one: false, limit, deadline: None, timer: None }
    }

    /// The body of a call that has one message, and must come to its end.
    pub(super) fn of_one(body: B, limit: Duration) -> Self {
        Self { is_one: true, ..Self::of_many(body, limit) }
    }

    fn arrived(&mut self, data: &[u8]) {
        if self.place.advance(data) && !self.is_one {
            self.deadline = None;
        }
    }

    /// Ready when the rest was awaited for too long.
    fn poll_stalled(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if !self.is_one && self.place.is_between() {
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

/// How far a body has come within its messages.
#[derive(Debug, Default)]
struct MessagePosition {
    /// The prefix that is being read, and how much of it there is.
    prefix: [u8; PREFIX],
    read: usize,
    /// Bytes of the message that are to come.
    left: usize,
}

impl MessagePosition {
    /// Goes on by `data`. True if a message has ended within it.
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
        fn the_place_is_known_however_the_bytes_are_cut(lens in prop::collection::vec(0_usize..300, 1..8), cuts in prop::collection::vec(1_usize..40, 1..20)) {
            let bytes: Vec<u8> = lens.iter().flat_map(|&len| framed(len)).collect();
            let mut ends: VecDeque<usize> = lens.iter().scan(0, |end, len| { *end += PREFIX + len; Some(*end) }).collect();
            let mut place = MessagePosition::default();
            let (mut at, mut cuts) = (0, cuts.iter().cycle());
            while at < bytes.len() {
                let next = (at + cuts.next().unwrap()).min(bytes.len());
                let ended = place.advance(&bytes[at..next]);
                at = next;
                let before = ends.len();
                let mut last = None;
                while ends.front().is_some_and(|end| *end <= at) {
                    last = ends.pop_front();
                }
                prop_assert_eq!(ended, ends.len() < before);
                let between = last == Some(at);
                prop_assert_eq!(place.is_between(), between);
            }
        }
    }

    /// A body that has what it was given, and never ends.
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

    /// Takes all that has come, and tells whether the rest was awaited for too long.
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
    async fn half_a_message_is_not_awaited_for_ever() {
        let message = framed_message();
        for half in 1..message.len() {
            let mut inbound = InboundBody::of_many(Given::default(), Duration::ZERO);
            // Nothing has begun: no time is set.
            assert!(!stalls(&mut inbound).await);
            inbound.body.0.push_back(message.slice(..half));
            poll_fn(|context| poll_stalls(&mut inbound, context)).await;
        }
    }

    #[tokio::test]
    async fn what_comes_bit_by_bit_gets_no_more_time() {
        let mut inbound = InboundBody::of_many(Given::default(), Duration::from_secs(30));
        let mut deadline = None;
        for _ in 0..3 {
            for byte in framed_message().chunks(1) {
                inbound.body.0.push_back(Bytes::copy_from_slice(byte));
                assert!(!stalls(&mut inbound).await);
                if inbound.place.is_between() {
                    assert_eq!(inbound.deadline, None);
                    deadline = None;
                } else {
                    assert_eq!(*deadline.get_or_insert(inbound.deadline.unwrap()), inbound.deadline.unwrap());
                    assert_eq!(inbound.timer.as_ref().unwrap().deadline(), inbound.deadline.unwrap());
                }
            }
        }
        // The rest of a message may come with the beginning of the next, which has a time of its own.
        inbound.body.0.push_back(framed_message().slice(..3));
        assert!(!stalls(&mut inbound).await);
        let first = inbound.deadline.unwrap();
        inbound.body.0.extend([framed_message().slice(3..), framed_message().slice(..3)]);
        assert!(!stalls(&mut inbound).await);
        assert!(inbound.deadline.unwrap() > first);
    }

    #[tokio::test]
    async fn a_call_of_one_message_does_not_await_it_for_ever() {
        let mut inbound = InboundBody::of_one(Given::default(), Duration::ZERO);
        poll_fn(|context| poll_stalls(&mut inbound, context)).await;
        // Nor its end.
        let mut inbound = InboundBody::of_one(Given([framed_message()].into()), Duration::ZERO);
        poll_fn(|context| poll_stalls(&mut inbound, context)).await;
    }
}
