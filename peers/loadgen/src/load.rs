//! The requests in flight on one connection, and their results. This module does no I/O: it appends
//! events to a buffer and takes answers as bytes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::answers::{Answers, Frame};
use crate::events::Mix;
use crate::wire::Wire;

/// The slot and the connection take three digits of an id each, and the sequence number takes six.
pub(crate) const MAX_SLOTS: usize = 1 << 12;
const SLOT_SHIFT: u32 = 24;
const CONNECTION_SHIFT: u32 = 36;
const SEQUENCE_MASK: u64 = (1 << SLOT_SHIFT) - 1;

/// Longer latencies are recorded as this one.
const MAX_LATENCY_NS: u64 = 60_000_000_000;

/// When measuring begins and ends, and how the load is paced.
#[derive(Clone)]
pub(crate) struct Plan {
    pub(crate) measure_from: Instant,
    pub(crate) measure_until: Instant,
    pub(crate) pace: Pace,
}

#[derive(Clone, Copy)]
pub(crate) enum Pace {
    /// Keeps `in_flight` requests in flight on each connection.
    Closed { in_flight: usize },
    /// Starts a request on each connection every `interval`, even if earlier ones are unanswered.
    Open { interval: Duration },
}

/// Whether events that are due at the same time share one write (over gRPC: one frame).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Writes {
    Together,
    Each,
}

/// How long to wait for answers after the last event was sent.
pub(crate) const DRAIN: Duration = Duration::from_secs(5);
/// Requests in flight on one connection of an open loop; any further one is counted and not sent.
/// The answers to all of them fit into a socket's buffer, so neither side blocks the other.
const OPEN_SLOTS: usize = 256;

impl Pace {
    fn slots(self) -> usize {
        match self {
            Self::Closed { in_flight } => in_flight,
            Self::Open { .. } => OPEN_SLOTS,
        }
    }
}

/// The results of a measuring window.
pub(crate) struct Tally {
    pub(crate) latency: Histogram<u64>,
    pub(crate) looping: Histogram<u64>,
    pub(crate) answers: u64,
    pub(crate) wrong_decisions: u64,
    pub(crate) unknown_ids: u64,
    pub(crate) lost: u64,
    pub(crate) not_sent: u64,
    pub(crate) first_wrong: Option<String>,
}

impl Tally {
    pub(crate) fn new() -> Self {
        let histogram = || Histogram::new_with_max(MAX_LATENCY_NS, 3).expect("three digits up to 60 s is a valid range");
        Self {
            latency: histogram(),
            looping: histogram(),
            answers: 0,
            wrong_decisions: 0,
            unknown_ids: 0,
            lost: 0,
            not_sent: 0,
            first_wrong: None,
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        let same = "all histograms have the same range";
        self.latency.add(&other.latency).expect(same);
        self.looping.add(&other.looping).expect(same);
        self.answers += other.answers;
        self.wrong_decisions += other.wrong_decisions;
        self.unknown_ids += other.unknown_ids;
        self.lost += other.lost;
        self.not_sent += other.not_sent;
        self.first_wrong = self.first_wrong.take().or_else(|| other.first_wrong.clone());
    }
}

#[derive(Clone)]
struct Slot {
    sequence: u64,
    request: u64,
    event: usize,
    sent: Instant,
    busy: bool,
}

/// The requests of one connection.
pub(crate) struct Requests {
    mix: Arc<Mix>,
    answers: Answers,
    plan: Plan,
    connection: u64,
    slots: Vec<Slot>,
    free: Vec<usize>,
    started: u64,
    due: Instant,
    pub(crate) tally: Tally,
}

impl Requests {
    pub(crate) fn new(wire: Wire, mix: Arc<Mix>, plan: Plan, connection: usize) -> Self {
        let now = Instant::now();
        let slots = plan.pace.slots();
        // Spreads the connections of an open loop over the interval.
        let offset = match plan.pace {
            Pace::Open { interval } => interval.mul_f64((connection as f64 * 0.618).fract()),
            Pace::Closed { .. } => Duration::ZERO,
        };
        Self {
            mix,
            answers: Answers::new(wire),
            plan,
            connection: connection as u64,
            slots: vec![Slot { sequence: 0, request: 0, event: 0, sent: now, busy: false }; slots],
            free: (0..slots).rev().collect(),
            started: connection as u64 * 5,
            due: now + offset,
            tally: Tally::new(),
        }
    }

    pub(crate) fn idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Starts every request that is due, and returns when the next one is due, if there is one.
    pub(crate) fn start_due(&mut self, now: Instant, output: &mut Vec<u8>) -> Option<Instant> {
        if now >= self.plan.measure_until {
            return None;
        }
        match self.plan.pace {
            Pace::Closed { .. } => {
                while let Some(slot) = self.free.pop() {
                    self.start(slot, now, output);
                }
                None
            }
            Pace::Open { interval } => {
                while self.due <= now {
                    let due = self.due;
                    match self.free.pop() {
                        // Timed from when it was due, because a late generator must not hide delay.
                        Some(slot) => self.start(slot, due, output),
                        None => self.tally.not_sent += 1,
                    }
                    self.due += interval;
                }
                Some(self.due)
            }
        }
    }

    /// Takes complete answers from the front of `input` and appends the events that follow them to
    /// `output`. Returns how many bytes of `input` were consumed.
    pub(crate) fn take_answers(&mut self, input: &[u8], now: Instant, output: &mut Vec<u8>) -> Result<usize, String> {
        let mut taken = 0;
        while let Some(Frame { length, payload }) = self.answers.next_frame(&input[taken..])? {
            if let Some(payload) = payload {
                self.take_answer(payload, now, output)?;
            }
            taken += length;
        }
        Ok(taken)
    }

    /// Counts unanswered requests as lost.
    pub(crate) fn give_up(&mut self) {
        self.tally.lost += (self.slots.len() - self.free.len()) as u64;
    }

    fn start(&mut self, slot: usize, at: Instant, output: &mut Vec<u8>) {
        let request = self.started;
        self.started += 1;
        self.slots[slot].request = request;
        self.send(slot, 0, at, output);
    }

    fn send(&mut self, index: usize, event: usize, at: Instant, output: &mut Vec<u8>) {
        let slot = &mut self.slots[index];
        // All events of a request share its id, as in the proxy.
        if event == 0 {
            slot.sequence = (slot.sequence + 1) & SEQUENCE_MASK;
        }
        slot.event = event;
        slot.sent = at;
        slot.busy = true;
        let number = self.connection << CONNECTION_SHIFT | (index as u64) << SLOT_SHIFT | slot.sequence;
        let (request, _) = self.mix.request(slot.request);
        request.events[event].write(number, output);
    }

    fn take_answer(&mut self, payload: &[u8], now: Instant, output: &mut Vec<u8>) -> Result<(), String> {
        let Some((id, decided)) = self.answers.read(payload)? else {
            return Ok(());
        };
        let Some(index) = self.slot_of(id) else {
            self.tally.unknown_ids += 1;
            self.tally.first_wrong.get_or_insert_with(|| format!("an answer with the unknown id `{}`", String::from_utf8_lossy(id)));
            return Ok(());
        };
        let slot = &self.slots[index];
        let (request, looping) = self.mix.request(slot.request);
        let expected = request.events[slot.event].expected;
        if !expected.met_by(decided) {
            self.tally.wrong_decisions += 1;
            self.tally.first_wrong.get_or_insert_with(|| {
                format!("expected {expected:?}, got {decided:?}: {}", String::from_utf8_lossy(&payload[..payload.len().min(400)]))
            });
        }
        if (self.plan.measure_from..self.plan.measure_until).contains(&now) {
            let histogram = if looping { &mut self.tally.looping } else { &mut self.tally.latency };
            histogram.saturating_record(now.duration_since(slot.sent).as_nanos() as u64);
            self.tally.answers += 1;
        }
        let event = slot.event + 1;
        if event < request.events.len() {
            self.send(index, event, now, output);
            return Ok(());
        }
        self.slots[index].busy = false;
        match self.plan.pace {
            Pace::Closed { .. } if now < self.plan.measure_until => {
                self.start(index, now, output);
            }
            _ => self.free.push(index),
        }
        Ok(())
    }

    fn slot_of(&self, id: &[u8]) -> Option<usize> {
        let number = crate::events::number_of(id)?;
        let index = (number >> SLOT_SHIFT) as usize & (MAX_SLOTS - 1);
        let slot = self.slots.get(index)?;
        let mine = number >> CONNECTION_SHIFT == self.connection;
        (mine && slot.busy && slot.sequence == number & SEQUENCE_MASK).then_some(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::MixOptions;
    use crate::wire::PREFIX;

    fn requests(pace: Pace) -> Requests {
        let mix = Mix::new(&MixOptions {
            wire: Wire::Json,
            headers: vec![4],
            body_bytes: None,
            headers_before_body: false,
            admin_blocked: false,
            loop_every: None,
        });
        let now = Instant::now();
        let plan = Plan { measure_from: now, measure_until: now + Duration::from_secs(60), pace };
        Requests::new(Wire::Json, Arc::new(mix), plan, 3)
    }

    fn answer_to(event: &[u8]) -> Vec<u8> {
        let event: serde_json::Value = serde_json::from_slice(&event[PREFIX..]).unwrap();
        let payload = format!(
            r#"{{"version":2,"decision":"allow","audit":{{"confidence":null,"custom":{{"correlation_id":{}}}}}}}"#,
            event["correlation_id"]
        );
        crate::wire::socket_frame(0x20, payload.as_bytes())
    }

    #[test]
    fn an_answer_starts_the_next_request() {
        let mut requests = requests(Pace::Closed { in_flight: 1 });
        let mut first = Vec::new();
        requests.start_due(Instant::now(), &mut first);
        let answer = answer_to(&first);

        let mut second = Vec::new();
        let taken = requests.take_answers(&answer, Instant::now(), &mut second).unwrap();

        assert_eq!(taken, answer.len());
        assert_eq!(requests.tally.answers, 1);
        assert!(!second.is_empty() && second != first);
    }

    #[test]
    fn counts_a_duplicate_answer_as_unknown() {
        let mut requests = requests(Pace::Closed { in_flight: 1 });
        let mut output = Vec::new();
        requests.start_due(Instant::now(), &mut output);
        let answer = answer_to(&output).repeat(2);

        requests.take_answers(&answer, Instant::now(), &mut output).unwrap();

        assert_eq!(requests.tally.unknown_ids, 1);
        assert!(requests.tally.first_wrong.is_some());
    }

    #[test]
    fn an_open_loop_starts_only_due_requests() {
        let interval = Duration::from_millis(10);
        let mut requests = requests(Pace::Open { interval });
        let mut output = Vec::new();
        let start = requests.due;

        let next = requests.start_due(start + interval * 3, &mut output);

        assert_eq!(requests.started, 3 * 5 + 4);
        assert_eq!(next, Some(start + interval * 4));
    }
}
