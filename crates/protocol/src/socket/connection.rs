//! One connection on the Unix socket.
//!
//! Each round reads and decodes what has arrived, writes the answers of the previous round, and
//! runs the new events. Answers are written *after* the next read for two reasons: every event that
//! has arrived can supersede an older one of its id before that one is answered, and one write
//! takes many answers. A call that does not finish in its first slice becomes pending, and the
//! round continues.
//!
//! A connection that pauses decodes no more events, but still looks at the ids of those that
//! arrive while it writes its last answers, because they can supersede them too.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::debug;
use zentinel_wasm_bounds::{log_limited, run_blocking_if_large};
use zentinel_wasm_contract::report::Reports;
use zentinel_wasm_contract::{Handler, Text};

use super::decode;
use super::dispatch::{Dispatcher, SocketCall, SocketSession};
use super::encoding::Encoding;
use super::error::SocketError;
use super::frame::{self, Frame, kind};
use super::handshake::{Shaken, shake_hands};
use super::inbox::{Inbox, READ_ROOM, ReadOutcome};
use super::outbox::Outbox;
use super::paused::{ConnectionState, Ended, Paused, Registration};
use super::report::{health_json, metrics_json};
use crate::limits::{BATCH, FRAME_WORK, MAX_FRAME, MAX_ID, MAX_IN_FLIGHT, MAX_WORK, SLOW_BATCH, Timeouts};
use crate::session::{Session, Ticket};
use crate::stage::Stage;

/// Rounds in a row after which the other tasks on this thread get their turn. A client that never
/// pauses would otherwise keep the thread.
const MAX_BUSY_ROUNDS: u32 = 8;

/// Duration of a batch after which the socket is read again before the answers are written: events
/// that supersede them are likely by then, and the system call is cheap compared to the batch.
const LONG_BATCH: Duration = Duration::from_micros(50);

/// Serves one connection on a Unix socket until the client closes it, or the agent shuts down or
/// pauses.
///
/// # Errors
///
/// The client violates the protocol or exceeds a timeout, or the socket fails.
pub fn serve<H: Handler>(
    stream: UnixStream,
    handler: Arc<H>,
    stage: watch::Receiver<Stage>,
    timeouts: &Timeouts,
) -> impl Future<Output = Result<Ended<H>, SocketError>> + Send + use<H> {
    resume(Paused::new(stream, ConnectionState::default(), handler), stage, timeouts)
}

/// Serves a paused connection as [`serve`] does.
///
/// # Errors
///
/// As for [`serve`].
pub fn resume<H: Handler>(
    paused: Paused<H>,
    mut stage: watch::Receiver<Stage>,
    timeouts: &Timeouts,
) -> impl Future<Output = Result<Ended<H>, SocketError>> + Send + use<H> {
    let timeouts = *timeouts;
    async move {
        let Paused { stream, state, registration } = paused;
        let Registration { handler, number } = &registration;
        let ConnectionState { agreed, received, superseding } = state;
        let mut inbox = Inbox::of(received);
        let reports = handler.reports();
        let (encoding, proxy) = match agreed {
            Some(agreed) => agreed,
            None => match shake_hands(&stream, &mut inbox, handler, &mut stage, timeouts.handshake).await? {
                Shaken::Agreed(encoding, proxy) => (encoding, proxy),
                Shaken::Closed => return Ok(Ended::Closed),
                Shaken::Paused => {
                    let state = ConnectionState { received: inbox.into_bytes(), ..ConnectionState::default() };
                    return Ok(Ended::Paused(Paused { stream, state, registration }));
                }
            },
        };
        let dispatcher = Dispatcher::new(Arc::clone(handler), *number, encoding, proxy);
        let mut connection = Connection::new(stream, dispatcher, inbox, timeouts);
        for id in &superseding {
            connection.session.arrived(id);
        }
        if agreed.is_none() {
            connection.report(&reports);
        }
        Ok(match connection.run(stage, reports).await? {
            Rest::Closed => Ended::Closed,
            Rest::Paused => {
                let superseding = connection.superseding();
                let Connection { stream, inbox, .. } = connection;
                let state = ConnectionState { agreed: Some((encoding, proxy)), received: inbox.into_bytes(), superseding };
                Ended::Paused(Paused { stream, state, registration })
            }
        })
    }
}

/// Why a connection takes no more events.
enum Rest {
    Closed,
    Paused,
}

struct Connection<H> {
    stream: UnixStream,
    dispatcher: Dispatcher<H>,
    timeouts: Timeouts,
    inbox: Inbox,
    session: SocketSession,
    /// Decoded events whose calls were not polled yet.
    batch: VecDeque<SocketCall>,
    outbox: Outbox,
    /// Work since the other tasks on this thread had their turn: see [`MAX_WORK`].
    work: usize,
    /// Bytes of the inbox that were looked at while pausing.
    looked_at: usize,
    /// The client has closed its side.
    closed: bool,
    /// A frame of an unknown type was logged: a client must not fill the log.
    warned: bool,
}

impl<H: Handler> Connection<H> {
    fn new(stream: UnixStream, dispatcher: Dispatcher<H>, inbox: Inbox, timeouts: Timeouts) -> Self {
        Self {
            stream,
            dispatcher,
            timeouts,
            inbox,
            session: Session::new(),
            batch: VecDeque::new(),
            outbox: Outbox::default(),
            work: 0,
            looked_at: 0,
            closed: false,
            warned: false,
        }
    }

    async fn run(&mut self, mut stage: watch::Receiver<Stage>, mut reports: watch::Receiver<Arc<Reports>>) -> Result<Rest, SocketError> {
        let timer = tokio::time::sleep(Duration::ZERO);
        tokio::pin!(timer);
        let mut quiet_since = Instant::now();
        let mut watches_stage = true;
        let mut busy_rounds = 0;
        loop {
            let now_stage = *stage.borrow();
            match now_stage {
                Stage::Serving | Stage::Draining => {
                    self.looked_at = 0;
                    self.read()?;
                    self.decode()?;
                }
                Stage::Pausing => self.look_ahead()?,
                Stage::Closing => {}
            }
            let was_full = self.outbox.is_full();
            self.outbox.write(&self.stream, &mut self.session)?;
            let has_worked = self.work >= MAX_WORK;
            if has_worked {
                self.work = 0;
                tokio::task::yield_now().await;
            }
            let has_room = !self.outbox.is_full();
            if self.batch.is_empty() && (has_worked || was_full && has_room) {
                // The inbox may hold more frames.
                continue;
            }
            if !self.batch.is_empty() && has_room {
                let began = Instant::now();
                self.run_batch(began).await;
                quiet_since = Instant::now();
                let took = quiet_since - began;
                if took > LONG_BATCH && now_stage != Stage::Pausing && self.takes_events() {
                    self.inbox.read_again(&self.stream);
                }
                busy_rounds += 1;
                if busy_rounds == MAX_BUSY_ROUNDS || took > SLOW_BATCH {
                    busy_rounds = 0;
                    self.work = 0;
                    tokio::task::yield_now().await;
                }
                continue;
            }
            busy_rounds = 0;
            let idle = self.session.pending() == 0 && self.outbox.is_empty();
            if idle && now_stage == Stage::Pausing {
                return Ok(Rest::Paused);
            }
            if idle && (self.closed || now_stage == Stage::Closing) {
                return Ok(Rest::Closed);
            }
            let may_drain = idle && now_stage == Stage::Draining && !self.dispatcher.handler.awaits_more(self.dispatcher.number);
            if may_drain && quiet_since.elapsed() >= self.timeouts.quiet {
                return Ok(Rest::Closed);
            }

            let wants_read = match now_stage {
                Stage::Serving | Stage::Draining => self.takes_events(),
                Stage::Pausing => self.takes_events() && self.inbox.len() < MAX_FRAME,
                Stage::Closing => false,
            };
            let wants_write = !self.outbox.is_empty();
            let quiet_end = may_drain.then(|| quiet_since + self.timeouts.quiet);
            let stall = self.timeouts.stall;
            let deadline = [self.inbox.stalled_at(wants_read, stall), self.outbox.stalled_at(stall), quiet_end].into_iter().flatten().min();
            if let Some(deadline) = deadline
                && timer.deadline() != deadline
            {
                timer.as_mut().reset(deadline);
            }
            tokio::select! {
                biased;
                finished = self.wait(wants_read, wants_write) => {
                    if let Some((ticket, answer)) = finished? {
                        self.outbox.answer(ticket, answer);
                    }
                }
                changed = stage.changed(), if watches_stage => watches_stage = changed.is_ok(),
                changed = reports.changed() => {
                    if changed.is_err() {
                        // The agent has shut down; the stage ends this connection.
                        std::future::pending::<()>().await;
                    }
                    if now_stage != Stage::Pausing {
                        self.report(&reports);
                    }
                }
                () = &mut timer, if deadline.is_some() => {
                    let now = Instant::now();
                    if self.inbox.stalled_at(wants_read, stall).is_some_and(|at| at <= now) {
                        return Err(SocketError::Timeout("frame not completed", stall));
                    }
                    if self.outbox.stalled_at(stall).is_some_and(|at| at <= now) {
                        return Err(SocketError::Timeout("answers not read", stall));
                    }
                }
            }
        }
    }

    /// Whether more events may be read.
    fn takes_events(&self) -> bool {
        !self.closed && self.session.pending() + self.batch.len() < MAX_IN_FLIGHT && !self.outbox.is_full()
    }

    /// Waits for a call to finish, in which case it returns the answer, or for the socket to be
    /// ready.
    async fn wait(&mut self, wants_read: bool, wants_write: bool) -> io::Result<Option<(Ticket, Vec<u8>)>> {
        std::future::poll_fn(|context| {
            if let Poll::Ready(finished) = self.session.poll_finished(context) {
                return Poll::Ready(Ok(finished));
            }
            if wants_read && let Poll::Ready(ready) = self.stream.poll_read_ready(context) {
                return Poll::Ready(ready.map(|()| None));
            }
            if wants_write && let Poll::Ready(ready) = self.stream.poll_write_ready(context) {
                return Poll::Ready(ready.map(|()| None));
            }
            Poll::Pending
        })
        .await
    }

    /// Reads what has arrived, up to [`READ_ROOM`] or one whole frame.
    fn read(&mut self) -> Result<(), SocketError> {
        while self.takes_events() && self.inbox.len() < READ_ROOM {
            match self.inbox.read(&self.stream)? {
                ReadOutcome::Data => {}
                ReadOutcome::Empty => return Ok(()),
                ReadOutcome::Closed => self.closed = true,
            }
        }
        // A frame larger than that.
        while self.takes_events() && frame::next(self.inbox.bytes())?.is_none() {
            match self.inbox.read(&self.stream)? {
                ReadOutcome::Data => {}
                ReadOutcome::Empty => return Ok(()),
                ReadOutcome::Closed => self.closed = true,
            }
        }
        Ok(())
    }

    /// While answers are to be written, finds the events that have arrived and supersede one of
    /// them. All events stay in the inbox for the next process.
    fn look_ahead(&mut self) -> Result<(), SocketError> {
        let idle = self.session.pending() == 0 && self.batch.is_empty() && self.outbox.is_empty();
        if idle {
            return Ok(());
        }
        let enough = (self.inbox.len() + MAX_WORK).min(MAX_FRAME);
        while self.takes_events() && self.inbox.len() < enough {
            match self.inbox.read(&self.stream)? {
                ReadOutcome::Data => {}
                ReadOutcome::Empty => break,
                ReadOutcome::Closed => self.closed = true,
            }
        }
        while let Some((frame, len)) = frame::next(&self.inbox.bytes()[self.looked_at..])? {
            self.looked_at += len;
            self.work += frame.payload.len() + FRAME_WORK;
            if let Some(id) = id_of(self.dispatcher.encoding, frame)
                && self.session.awaits(&id)
            {
                self.session.arrived(&id);
            }
        }
        Ok(())
    }

    /// The ids for [`ConnectionState::superseding`]: nothing is in flight, so the session knows
    /// only ids of superseded events.
    fn superseding(&self) -> Vec<String> {
        let mut ids: Vec<String> = Vec::new();
        let mut rest = self.inbox.bytes();
        while self.session.awaits_any()
            && let Ok(Some((frame, len))) = frame::next(rest)
        {
            rest = &rest[len..];
            if let Some(id) = id_of(self.dispatcher.encoding, frame)
                && self.session.awaits(&id)
                && !ids.iter().any(|other| **other == *id)
            {
                ids.push(id.to_string());
            }
        }
        ids
    }

    /// Decodes the received frames into the calls of the next batch, without polling them.
    fn decode(&mut self) -> Result<(), SocketError> {
        let mut inbox = std::mem::take(&mut self.inbox);
        let result = self.decode_from(&mut inbox);
        self.inbox = inbox;
        result
    }

    fn decode_from(&mut self, inbox: &mut Inbox) -> Result<(), SocketError> {
        while self.session.pending() + self.batch.len() < MAX_IN_FLIGHT && self.batch.len() < BATCH && self.work < MAX_WORK {
            let Some((frame, len)) = frame::next(inbox.bytes())? else { break };
            // While the client reads no answers, no more are produced. Events are decoded
            // nevertheless, and wait to be run, because they may supersede an unsent answer.
            if self.outbox.is_full() && !kind::is_event(frame.kind) {
                break;
            }
            self.work += frame.payload.len() + FRAME_WORK;
            self.receive(frame)?;
            inbox.consume(len);
        }
        Ok(())
    }

    /// Handles one frame. The call for an event joins the batch.
    fn receive(&mut self, frame: Frame<'_>) -> Result<(), SocketError> {
        let Frame { kind, payload } = frame;
        let (dispatcher, session) = (&mut self.dispatcher, &mut self.session);
        let call = match kind {
            kind::CONFIGURE => run_blocking_if_large(payload.len(), || dispatcher.configuration(session, payload)),
            _ if kind::is_event(kind) => run_blocking_if_large(payload.len(), || dispatcher.event(session, kind, payload)),
            _ => return self.receive_control(kind, payload),
        };
        if let Some(call) = call {
            self.batch.push_back(call);
        }
        Ok(())
    }

    /// Handles a frame that is not an event.
    fn receive_control(&mut self, kind: u8, payload: &[u8]) -> Result<(), SocketError> {
        match kind {
            kind::CANCEL => {
                let encoding = self.dispatcher.encoding;
                if let Some(id) = run_blocking_if_large(payload.len(), || decode::correlation_id(encoding, kind, payload)) {
                    self.cancel(&id);
                }
            }
            kind::PING => self.outbox.control(kind::PONG, payload),
            kind::PONG => {}
            kind::HANDSHAKE_REQUEST => return Err(SocketError::Handshake("second request on one connection".into())),
            _ => {
                if !std::mem::replace(&mut self.warned, true) {
                    log_limited!(warn, "ignored a frame of unknown type {kind:#04x}; further ones on this connection are not logged");
                }
            }
        }
        Ok(())
    }

    fn cancel(&mut self, correlation_id: &str) {
        self.session.cancel(correlation_id);
        self.dispatcher.handler.cancelled(self.dispatcher.number, correlation_id);
        let session = &self.session;
        self.batch.retain(|(ticket, _)| session.is_newest(*ticket));
        debug!(correlation_id, "cancelled");
    }

    /// Polls each call of the batch once, or as many as the time allows. Answers those that finish;
    /// the others become pending.
    async fn run_batch(&mut self, began: Instant) {
        std::future::poll_fn(|context| {
            while let Some((ticket, mut call)) = self.batch.pop_front() {
                // Superseded by an event of the same read, or cancelled.
                if !self.session.is_newest(ticket) {
                    continue;
                }
                match call.as_mut().poll(context) {
                    Poll::Ready(answer) => self.outbox.answer(ticket, answer),
                    Poll::Pending => self.session.push(ticket, call),
                }
                if began.elapsed() > SLOW_BATCH || self.outbox.is_full() {
                    break;
                }
            }
            // Nothing else polls the pending calls while events keep coming.
            while let Poll::Ready(finished) = self.session.poll_finished(context) {
                if let Some((ticket, answer)) = finished {
                    self.outbox.answer(ticket, answer);
                }
            }
            Poll::Ready(())
        })
        .await;
    }

    /// Appends the health and the metrics.
    fn report(&mut self, reports: &watch::Receiver<Arc<Reports>>) {
        // Reports must not pile up: a client that reads slowly gets the next one.
        if self.outbox.is_full() {
            return;
        }
        let reports = Arc::clone(&reports.borrow());
        for (kind, report) in [(kind::HEALTH_STATUS, health_json(&reports)), (kind::METRICS_REPORT, metrics_json(&reports))] {
            let payload = match self.dispatcher.encoding {
                Encoding::Json => serde_json::to_vec(&report).ok(),
                Encoding::MessagePack => rmp_serde::to_vec_named(&report).ok(),
            };
            if let Some(payload) = payload {
                self.outbox.control(kind, &payload);
            }
        }
    }
}

/// The id of a frame's event, if it is one that can be answered.
fn id_of(encoding: Encoding, frame: Frame<'_>) -> Option<Text<'_>> {
    let Frame { kind, payload } = frame;
    if !kind::is_event(kind) {
        return None;
    }
    let id = run_blocking_if_large(payload.len(), || decode::correlation_id(encoding, kind, payload));
    id.filter(|id| id.len() <= MAX_ID)
}

#[cfg(test)]
mod tests {
    use zentinel_wasm_bounds::LARGE;

    use super::*;
    use crate::allow_all::AllowAll;
    use crate::limits::MAX_UNSENT;
    use crate::proxy::Proxy;
    use crate::socket::frame::framed;

    /// A connection on which `frames` have arrived.
    fn connection(frames: impl Iterator<Item = Vec<u8>>) -> (Connection<AllowAll>, UnixStream) {
        let (client, server) = UnixStream::pair().unwrap();
        let inbox = Inbox::of(frames.flatten().collect());
        let handler = AllowAll::new(Duration::ZERO);
        let dispatcher = Dispatcher::new(handler, 0, Encoding::Json, Proxy::default());
        (Connection::new(server, dispatcher, inbox, Timeouts::default()), client)
    }

    #[tokio::test]
    async fn a_round_is_bounded_by_the_bytes_of_its_frames() {
        const FRAMES: usize = 100;
        let padding = "x".repeat(LARGE / 10);
        let body = format!(r#"{{"correlation_id":"a","data":"{}","is_last":true,"chunk_index":0}}"#, "AAAA".repeat(LARGE / 40));
        for (kind, payload) in [
            (kind::CANCEL, format!(r#"{{"correlation_id":"a","x":"{padding}"}}"#)),
            (kind::PONG, padding.clone()),
            (0x70, padding.clone()),
            (kind::PING, padding.clone()),
            (kind::REQUEST_BODY, body),
        ] {
            let (mut connection, _client) = connection((0..FRAMES).map(|_| framed(kind, payload.as_bytes())));
            let before = connection.inbox.len();
            connection.decode().unwrap();
            let taken = before - connection.inbox.len();
            assert!((LARGE..2 * LARGE).contains(&taken), "{taken} bytes of {before} for {kind:#04x}");
        }
        // Short frames count as work too.
        let (mut connection, _client) = connection((0..2000).map(|_| framed(kind::PONG, b"")));
        let before = connection.inbox.len();
        connection.decode().unwrap();
        let taken = (before - connection.inbox.len()) / 5;
        assert_eq!(taken, MAX_WORK / FRAME_WORK);
    }

    #[tokio::test]
    async fn unread_answers_pause_answering_but_not_superseding() {
        let event = |id: &str| format!(r#"{{"correlation_id":"{id}","status":200,"headers":{{}}}}"#).into_bytes();
        let frames = [framed(kind::RESPONSE_HEADERS, &event("a")), framed(kind::PING, b""), framed(kind::RESPONSE_HEADERS, &event("b"))];
        let (mut connection, _client) = connection(frames.into_iter());
        let superseded = connection.session.arrived("a");
        connection.outbox.answer(superseded, vec![0; MAX_UNSENT]);
        connection.decode().unwrap();
        assert_eq!((connection.batch.len(), connection.outbox.len()), (1, 1));
        assert!(!connection.session.is_newest(superseded));
        connection.run_batch(Instant::now()).await;
        assert_eq!(connection.outbox.len(), 1 + 1, "room is checked after each call");
    }

    mod timeouts {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

        use super::*;

        const SHORT: Duration = Duration::from_millis(50);

        /// Serves with these timeouts, until `client` ends or the agent closes the connection.
        async fn serve_client(timeouts: Timeouts, client: impl AsyncFnOnce(UnixStream)) -> Result<Ended<AllowAll>, SocketError> {
            let (stream, server) = UnixStream::pair().unwrap();
            let stage = watch::Sender::new(Stage::Serving);
            let served = serve(server, AllowAll::new(Duration::ZERO), stage.subscribe(), &timeouts);
            tokio::select! {
                ended = served => ended,
                () = client(stream) => panic!("the connection is open"),
            }
        }

        async fn shake_hands(client: &mut UnixStream) {
            let request = br#"{"supported_versions":[2],"proxy_id":"p","proxy_version":"0.6.54"}"#;
            client.write_all(&framed(kind::HANDSHAKE_REQUEST, request)).await.unwrap();
        }

        async fn read_all(mut client: UnixStream) {
            let mut buffer = [0; 4096];
            while client.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
            std::future::pending::<()>().await;
        }

        #[tokio::test]
        async fn end_a_connection_without_a_handshake() {
            let timeouts = Timeouts { handshake: SHORT, ..Timeouts::default() };
            let ended = serve_client(timeouts, read_all).await;
            assert!(matches!(ended, Err(SocketError::Timeout("no handshake", SHORT))), "{ended:?}");
        }

        #[tokio::test]
        async fn end_a_connection_with_an_incomplete_frame() {
            let timeouts = Timeouts { stall: SHORT, ..Timeouts::default() };
            let ended = serve_client(timeouts, async |mut client| {
                shake_hands(&mut client).await;
                client.write_all(&framed(kind::PING, b"ping")[..6]).await.unwrap();
                read_all(client).await;
            })
            .await;
            assert!(matches!(ended, Err(SocketError::Timeout("frame not completed", SHORT))), "{ended:?}");
        }

        #[tokio::test]
        async fn end_a_connection_with_unread_answers() {
            let timeouts = Timeouts { stall: SHORT, ..Timeouts::default() };
            let ended = serve_client(timeouts, async |mut client| {
                shake_hands(&mut client).await;
                let ping = framed(kind::PING, &[0; 64 << 10]);
                while client.write_all(&ping).await.is_ok() {}
                std::future::pending::<()>().await;
            })
            .await;
            assert!(matches!(ended, Err(SocketError::Timeout("answers not read", SHORT))), "{ended:?}");
        }

        #[tokio::test]
        async fn leave_an_idle_connection_open() {
            let timeouts = Timeouts { handshake: SHORT, stall: SHORT, quiet: SHORT, ..Timeouts::default() };
            let served = serve_client(timeouts, async |mut client| {
                shake_hands(&mut client).await;
                read_all(client).await;
            });
            assert!(tokio::time::timeout(4 * SHORT, served).await.is_err());
        }
    }

    mod pausing {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        use tokio::task::JoinHandle;

        use super::*;

        /// Time that the handler takes for a configuration.
        const CONFIGURING: Duration = Duration::from_millis(300);

        type Served = JoinHandle<Result<Ended<AllowAll>, SocketError>>;

        struct Pair {
            client: UnixStream,
            stage: watch::Sender<Stage>,
            served: Served,
        }

        impl Pair {
            /// A connection that has sent a request for a handshake with `encodings`.
            async fn open(encodings: &str) -> Self {
                let (mut client, server) = UnixStream::pair().unwrap();
                let stage = watch::Sender::new(Stage::Serving);
                let served = tokio::spawn(serve(server, AllowAll::new(CONFIGURING), stage.subscribe(), &Timeouts::default()));
                let request = format!(r#"{{"supported_versions":[2],"proxy_version":"0.6.54","supported_encodings":[{encodings}]}}"#);
                client.write_all(&framed(kind::HANDSHAKE_REQUEST, request.as_bytes())).await.unwrap();
                Self { client, stage, served }
            }

            /// The next frame that is no report.
            async fn receive(&mut self) -> (u8, Vec<u8>) {
                loop {
                    let mut head = [0; frame::HEADER];
                    self.client.read_exact(&mut head).await.unwrap();
                    let len = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize - 1;
                    let mut payload = vec![0; len];
                    self.client.read_exact(&mut payload).await.unwrap();
                    if ![kind::HEALTH_STATUS, kind::METRICS_REPORT].contains(&head[4]) {
                        return (head[4], payload);
                    }
                }
            }

            /// Waits until the agent has read all that was sent.
            async fn wait_until_read(&self) {
                tokio::time::sleep(CONFIGURING / 3).await;
            }

            async fn pause(self) -> (UnixStream, Paused<AllowAll>) {
                self.stage.send_replace(Stage::Pausing);
                match self.served.await.unwrap().unwrap() {
                    Ended::Paused(paused) => (self.client, paused),
                    Ended::Closed => panic!("the connection was closed"),
                }
            }

            /// Continues as another process would: with the stream and a copy of the state.
            fn resume((client, paused): (UnixStream, Paused<AllowAll>)) -> Self {
                let state = serde_json::from_str(&serde_json::to_string(paused.state()).unwrap()).unwrap();
                let stage = watch::Sender::new(Stage::Serving);
                let next = Paused::new(paused.stream, state, AllowAll::new(CONFIGURING));
                let served = tokio::spawn(resume(next, stage.subscribe(), &Timeouts::default()));
                Self { client, stage, served }
            }
        }

        fn configure(id: &str) -> Vec<u8> {
            framed(kind::CONFIGURE, format!(r#"{{"correlation_id":"{id}","config":{{}},"config_version":"1"}}"#).as_bytes())
        }

        #[tokio::test]
        async fn keeps_half_a_frame_and_the_encoding() {
            let event = rmp_serde::to_vec_named(&serde_json::json!({"correlation_id": "a", "status": 200, "headers": {}})).unwrap();
            let event = framed(kind::RESPONSE_HEADERS, &event);
            // Every cut, with a pause at each byte.
            let mut pair = Pair::open(r#""msgpack""#).await;
            assert_eq!(pair.receive().await.0, kind::HANDSHAKE_RESPONSE);
            for byte in &event {
                pair = Pair::resume(pair.pause().await);
                pair.client.write_all(std::slice::from_ref(byte)).await.unwrap();
            }
            let (kind, answer) = pair.receive().await;
            assert_eq!(kind, kind::AGENT_RESPONSE);
            let answer: serde_json::Value = rmp_serde::from_slice(&answer).unwrap();
            assert_eq!(answer["audit"]["custom"]["correlation_id"], "a");
        }

        #[tokio::test]
        async fn keeps_half_a_handshake() {
            let (mut client, server) = UnixStream::pair().unwrap();
            let stage = watch::Sender::new(Stage::Serving);
            let served = tokio::spawn(serve(server, AllowAll::new(CONFIGURING), stage.subscribe(), &Timeouts::default()));
            let request = framed(kind::HANDSHAKE_REQUEST, br#"{"supported_versions":[2],"proxy_version":"0.6.54"}"#);
            client.write_all(&request[..20]).await.unwrap();
            let mut pair = Pair::resume(Pair { client, stage, served }.pause().await);
            pair.client.write_all(&request[20..]).await.unwrap();
            assert_eq!(pair.receive().await.0, kind::HANDSHAKE_RESPONSE);
        }

        #[tokio::test]
        async fn answers_what_is_in_flight_and_leaves_the_rest() {
            let mut pair = Pair::open("").await;
            assert_eq!(pair.receive().await.0, kind::HANDSHAKE_RESPONSE);
            pair.client.write_all(&configure("first")).await.unwrap();
            pair.wait_until_read().await;
            pair.stage.send_replace(Stage::Pausing);
            pair.client.write_all(&configure("second")).await.unwrap();
            assert!(String::from_utf8_lossy(&pair.receive().await.1).contains("first"));
            let mut pair = Pair::resume(pair.pause().await);
            assert!(String::from_utf8_lossy(&pair.receive().await.1).contains("second"));
        }

        #[tokio::test]
        async fn does_not_answer_what_is_superseded_meanwhile() {
            let mut pair = Pair::open("").await;
            assert_eq!(pair.receive().await.0, kind::HANDSHAKE_RESPONSE);
            pair.client.write_all(&configure("twin")).await.unwrap();
            pair.wait_until_read().await;
            pair.stage.send_replace(Stage::Pausing);
            pair.client.write_all(&configure("twin")).await.unwrap();
            let (client, paused) = pair.pause().await;
            assert_eq!(paused.state().superseding, ["twin"]);
            assert_eq!(paused.state().received, configure("twin"));
            let mut pair = Pair::resume((client, paused));
            pair.client.write_all(&framed(kind::PING, b"")).await.unwrap();
            let mut received = [pair.receive().await.0, pair.receive().await.0];
            received.sort_unstable();
            assert_eq!(received, [kind::AGENT_RESPONSE, kind::PONG], "the second twin alone is answered");
        }

        #[tokio::test]
        async fn can_be_called_off() {
            let mut pair = Pair::open("").await;
            assert_eq!(pair.receive().await.0, kind::HANDSHAKE_RESPONSE);
            pair.client.write_all(&configure("first")).await.unwrap();
            pair.wait_until_read().await;
            pair.stage.send_replace(Stage::Pausing);
            pair.client.write_all(&configure("second")).await.unwrap();
            pair.wait_until_read().await;
            pair.stage.send_replace(Stage::Serving);
            for id in ["first", "second"] {
                assert!(String::from_utf8_lossy(&pair.receive().await.1).contains(id), "{id}");
            }
        }
    }
}
