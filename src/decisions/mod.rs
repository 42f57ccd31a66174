//! The decision log: a line of JSON for each request, with what the module decided and why.
//!
//! The outcomes of events go into a bounded queue. A thread of its own joins those of a request,
//! writes a line when the request has no more events, and loses and counts what it cannot write:
//! the log delays no request, and fails none.

mod file;
mod record;

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::io::Write;
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use prometheus::IntCounter;
use tokio::signal::unix::{SignalKind, signal};
use zentinel_wasm_contract::Hook;
use zentinel_wasm_contract::json::{field, plain_field};
use zentinel_wasm_engine::{DecisionKind, Observer, Outcome};

use crate::logging::{LineWriter, Log};
use crate::process::NO_THREADS;

pub use file::DecisionFile;
use file::RotatingFile;
use record::Record;
pub use record::{ClientPrivacy, Privacy};

/// Most outcomes in the queue: those of a second, at a rate that one agent hardly reaches.
const MAX_QUEUED: usize = 1 << 14;

/// Most bytes of outcomes in the queue, because a module may give each of them many tags.
const MAX_QUEUED_BYTES: usize = 8 << 20;

/// Most requests whose next event is awaited.
const MAX_PENDING: usize = 1 << 14;

/// Most bytes of their records.
const MAX_PENDING_BYTES: usize = 16 << 20;

/// How long the next event of a request is awaited; sometimes up to twice as long. A proxy that
/// sends no further events, or an upstream that does not respond, must not keep a line back for
/// long.
const MAX_IDLE: Duration = Duration::from_secs(60);

/// How often to check for requests that have been idle for [`MAX_IDLE`].
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Bytes of lines that are collected before they are written, if outcomes keep arriving.
const MAX_BATCH: usize = 64 << 10;

/// Outcomes that are taken before lines are written.
const MAX_TAKEN: usize = 1024;

/// Time to write the last lines when the process ends. As for the log, a disk that does not write
/// must not delay a service manager.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause before another attempt to reach a thread whose queue is full, when the process ends.
const FLUSH_RETRY: Duration = Duration::from_millis(5);

/// What is missing from the decision log.
static DROPPED: LazyLock<IntCounter> = LazyLock::new(|| {
    IntCounter::new(
        "wasm_agent_decision_log_dropped_total",
        "Events and lines that are missing from the decision log because it was not written fast enough or could not be written.",
    )
    .expect("the name is valid")
});

/// The counter of what is missing from the decision log, of all agents of the process.
pub fn dropped() -> &'static IntCounter {
    &DROPPED
}

/// Which requests are recorded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Recorded {
    /// Those that were refused or had a module error.
    Refused,
    /// These, and this share of the others, from 0 to 1.
    All(f64),
}

/// What is recorded, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct DecisionLogConfig {
    /// Which requests.
    pub recorded: Recorded,
    /// What of them.
    pub privacy: Privacy,
    /// The file. None: the agent's own log.
    pub file: Option<DecisionFile>,
}

/// The decision log. Dropping it writes what is known of all requests, for a bounded time.
pub struct DecisionLog {
    intake: Arc<Intake>,
    /// The file is to be opened again.
    reopen: Arc<AtomicBool>,
}

enum Message {
    Outcome(Arc<Outcome>),
    /// Check whether the file is to be opened again.
    Wake,
    /// Write everything, and drop the sender then.
    Flush(SyncSender<()>),
}

impl DecisionLog {
    /// Opens the file and starts the thread that writes.
    ///
    /// # Errors
    ///
    /// The file cannot be opened, or the system cannot start the thread.
    pub fn start(config: DecisionLogConfig, log: &Log) -> anyhow::Result<Self> {
        let (sender, receiver) = sync_channel(MAX_QUEUED);
        let reopen = Arc::<AtomicBool>::default();
        let shared = Arc::new(Shared {
            selection: Selection { recorded: config.recorded, hasher: RandomState::new(), counted: AtomicU64::new(0) },
            bytes: AtomicUsize::new(0),
            lost: AtomicU64::new(0),
        });
        let (out, prefix): (Box<dyn Write + Send>, _) = match config.file {
            Some(file) => (Box::new(RotatingFile::open(file, Arc::clone(&reopen))?), ""),
            None => (Box::new(log.raw()), r#""level":"INFO","target":"decision""#),
        };
        let notice = move |lost| {
            let mut line = format!("{{{prefix}").into_bytes();
            field(&mut line, "timestamp", &record::timestamp(SystemTime::now()));
            plain_field(&mut line, "lost", lost);
            line.extend_from_slice(b"}\n");
            line
        };
        let mut joiner = Joiner {
            shared: Arc::clone(&shared),
            privacy: config.privacy,
            prefix,
            pending: HashMap::new(),
            order: VecDeque::new(),
            bytes: 0,
            lines: Vec::new(),
        };
        let mut writer = LineWriter::new(out, notice, DROPPED.clone());
        thread::Builder::new().name("decisions".into()).spawn(move || joiner.run(&receiver, &mut writer)).context(NO_THREADS)?;
        Ok(Self { intake: Arc::new(Intake { shared, sender }), reopen })
    }

    /// What the agent gives its outcomes to.
    pub fn observer(&self) -> Arc<dyn Observer> {
        Arc::clone(&self.intake) as _
    }

    /// Opens the file again on each SIGHUP, because `logrotate` may have moved it away. The future
    /// never ends.
    ///
    /// # Errors
    ///
    /// The system does not deliver signals.
    pub fn reopen_on_hangup(&self) -> anyhow::Result<impl Future<Output = ()> + Send + use<>> {
        let mut hangup = signal(SignalKind::hangup()).context("cannot catch signals")?;
        let (intake, reopen) = (Arc::clone(&self.intake), Arc::clone(&self.reopen));
        Ok(async move {
            while hangup.recv().await.is_some() {
                reopen.store(true, Relaxed);
                // If the queue is full, the thread is about to write.
                let _ = intake.sender.try_send(Message::Wake);
            }
        })
    }
}

impl Drop for DecisionLog {
    fn drop(&mut self) {
        let deadline = Instant::now() + FLUSH_TIMEOUT;
        let (done, flushed) = sync_channel(0);
        let mut message = Message::Flush(done);
        while let Err(TrySendError::Full(refused)) = self.intake.sender.try_send(message) {
            if Instant::now() >= deadline {
                return;
            }
            message = refused;
            thread::sleep(FLUSH_RETRY);
        }
        let _ = flushed.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
}

/// Takes outcomes on the tasks of connections.
struct Intake {
    shared: Arc<Shared>,
    sender: SyncSender<Message>,
}

/// What the tasks of connections and the thread share.
struct Shared {
    selection: Selection,
    /// Bytes of outcomes in the queue.
    bytes: AtomicUsize,
    /// Outcomes lost since the thread has last asked.
    lost: AtomicU64,
}

impl Observer for Intake {
    fn observe(&self, outcome: &Arc<Outcome>) {
        let Shared { selection, bytes, lost } = &*self.shared;
        if !selection.takes(outcome) {
            return;
        }
        let size = outcome.size();
        let is_over = bytes.fetch_add(size, Relaxed) + size > MAX_QUEUED_BYTES;
        if is_over || self.sender.try_send(Message::Outcome(Arc::clone(outcome))).is_err() {
            bytes.fetch_sub(size, Relaxed);
            lost.fetch_add(1, Relaxed);
            DROPPED.inc();
        }
    }
}

/// Selects the requests that are recorded.
struct Selection {
    recorded: Recorded,
    /// Keyed, so nobody can predict which request is in a sample.
    hasher: RandomState,
    /// Requests that a sample was drawn for.
    counted: AtomicU64,
}

impl Selection {
    /// Whether the line of a request may need this outcome.
    fn takes(&self, outcome: &Outcome) -> bool {
        if outcome.answer.decision != DecisionKind::Allow || outcome.error.is_some() || outcome.fail_open {
            return true;
        }
        if is_alone(outcome) {
            return outcome.is_exported && self.takes_allowed();
        }
        // The first says what the request is, and the last that its line is complete.
        outcome.is_exported || outcome.is_last || outcome.hook == Hook::RequestHeaders
    }

    /// Whether a request that was allowed is recorded.
    fn takes_allowed(&self) -> bool {
        match self.recorded {
            Recorded::Refused => false,
            Recorded::All(share) => {
                let drawn = self.hasher.hash_one(self.counted.fetch_add(1, Relaxed));
                // From 0 to less than 1, in as many steps as an `f64` has.
                ((drawn >> 11) as f64) / ((1_u64 << 53) as f64) < share
            }
        }
    }
}

/// Whether no other outcome goes into the same line.
fn is_alone(outcome: &Outcome) -> bool {
    outcome.request.is_none() || outcome.hook == Hook::RequestHeaders && outcome.is_last
}

/// Joins the outcomes of each request.
struct Joiner {
    shared: Arc<Shared>,
    privacy: Privacy,
    /// The fields with which each line begins.
    prefix: &'static str,
    /// Requests whose next event is awaited, by their numbers.
    pending: HashMap<u64, Pending>,
    /// Their numbers, each with the time from which it is checked after [`MAX_IDLE`]. The line of a
    /// request may be written already.
    order: VecDeque<(u64, Instant)>,
    /// Bytes of the pending records.
    bytes: usize,
    /// Lines to write.
    lines: Vec<u8>,
}

struct Pending {
    record: Record,
    size: usize,
    last_event: Instant,
}

impl Joiner {
    /// Takes outcomes and writes lines, until nobody can send outcomes any more.
    fn run(&mut self, receiver: &Receiver<Message>, writer: &mut LineWriter<impl Write, impl Fn(u64) -> Vec<u8>>) {
        loop {
            let mut message = if self.pending.is_empty() {
                receiver.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                receiver.recv_timeout(SWEEP_INTERVAL)
            };
            let now = Instant::now();
            let mut taken = 0;
            loop {
                match message {
                    Ok(Message::Outcome(outcome)) => {
                        self.shared.bytes.fetch_sub(outcome.size(), Relaxed);
                        self.take(Arc::unwrap_or_clone(outcome), now);
                    }
                    Ok(Message::Wake) | Err(RecvTimeoutError::Timeout) => {}
                    Ok(Message::Flush(_done)) => self.flush(writer),
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                taken += 1;
                if taken == MAX_TAKEN || self.lines.len() >= MAX_BATCH {
                    break;
                }
                message = match receiver.try_recv() {
                    Ok(next) => Ok(next),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => Err(RecvTimeoutError::Disconnected),
                };
            }
            self.sweep(now, writer);
            self.write(writer);
        }
    }

    fn write(&mut self, writer: &mut LineWriter<impl Write, impl Fn(u64) -> Vec<u8>>) {
        writer.write(&self.lines);
        self.lines.clear();
        self.lines.shrink_to(MAX_BATCH);
        writer.lost(self.shared.lost.swap(0, Relaxed));
        // Opens the file again if that was requested.
        let _ = writer.flush();
    }

    /// Writes what is known of all requests, in batches, because the time for it is limited.
    fn flush(&mut self, writer: &mut LineWriter<impl Write, impl Fn(u64) -> Vec<u8>>) {
        while let Some((request, _)) = self.order.pop_front() {
            self.give_up(request);
            if self.lines.len() >= MAX_BATCH {
                self.write(writer);
            }
        }
        self.write(writer);
    }

    fn take(&mut self, mut outcome: Outcome, now: Instant) {
        let Some(request) = outcome.request.filter(|_| !is_alone(&outcome)) else {
            let mut record = Record::new(&mut outcome);
            record.add(outcome);
            self.append(&record, true);
            return;
        };
        let mut pending = match self.pending.remove(&request) {
            Some(pending) => {
                self.bytes -= pending.size;
                pending
            }
            None => {
                if !outcome.is_last {
                    self.order.push_back((request, now));
                }
                Pending { record: Record::new(&mut outcome), size: 0, last_event: now }
            }
        };
        let is_last = outcome.is_last || outcome.hook == Hook::ResponseHeaders && pending.record.is_head();
        pending.record.add(outcome);
        if is_last {
            self.finish(&pending.record, true);
            return;
        }
        pending.size = pending.record.size();
        pending.last_event = now;
        self.bytes += pending.size;
        self.pending.insert(request, pending);
        while self.pending.len() > MAX_PENDING || self.bytes > MAX_PENDING_BYTES {
            let Some((oldest, _)) = self.order.pop_front() else { break };
            self.give_up(oldest);
        }
        self.forget_finished();
    }

    /// Drops the numbers of finished requests, once they are most of all.
    fn forget_finished(&mut self) {
        if self.order.len() > 2 * self.pending.len() + MAX_TAKEN {
            self.order.retain(|(request, _)| self.pending.contains_key(request));
        }
    }

    /// Writes the lines of requests that have been idle for too long, in batches, because there may
    /// be as many as are awaited.
    fn sweep(&mut self, now: Instant, writer: &mut LineWriter<impl Write, impl Fn(u64) -> Vec<u8>>) {
        let is_idle = |since: Instant| now.saturating_duration_since(since) >= MAX_IDLE;
        while let Some((request, since)) = self.order.front().copied()
            && is_idle(since)
        {
            self.order.pop_front();
            match self.pending.get(&request) {
                Some(pending) if !is_idle(pending.last_event) => self.order.push_back((request, now)),
                Some(_) => self.give_up(request),
                None => {}
            }
            if self.lines.len() >= MAX_BATCH {
                self.write(writer);
            }
        }
    }

    /// Writes the line of a request although more events may follow.
    fn give_up(&mut self, request: u64) {
        if let Some(pending) = self.pending.remove(&request) {
            self.bytes -= pending.size;
            self.finish(&pending.record, false);
        }
    }

    fn finish(&mut self, record: &Record, is_complete: bool) {
        if !record.is_empty() && (record.is_notable() || self.shared.selection.takes_allowed()) {
            self.append(record, is_complete);
        }
    }

    fn append(&mut self, record: &Record, is_complete: bool) {
        self.lines.push(b'{');
        self.lines.extend_from_slice(self.prefix.as_bytes());
        record.write(&mut self.lines, self.privacy, is_complete);
        self.lines.extend_from_slice(b"}\n");
    }
}
