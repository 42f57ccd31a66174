//! The queue of log lines, and the thread that writes them to standard error.

use std::cell::Cell;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use prometheus::IntCounter;

use super::lines::{LineWriter, count};

/// Largest queue, in bytes of lines: the burst of a module, 500 lines of 8 KiB. The writer may hold
/// as many again.
const MAX_QUEUED: usize = 4 << 20;

/// Largest empty buffer that is kept, in bytes, so a burst does not hold its memory forever.
const MAX_KEPT: usize = 64 << 10;

/// Lines that wait to be written. Clones are the same queue.
#[derive(Clone)]
pub(crate) struct LogQueue(Arc<QueueInner>);

struct QueueInner {
    backlog: Mutex<Backlog>,
    /// There is something to write.
    filled: Condvar,
    /// Everything is written.
    emptied: Condvar,
    lost: IntCounter,
}

#[derive(Default)]
struct Backlog {
    /// Whole lines, oldest first.
    lines: Vec<u8>,
    /// Lines lost after those in `lines`. While there are any, further lines are lost too, so the
    /// gap is in one place.
    lost: u64,
    /// The writer was woken and is not waiting again yet.
    is_busy: bool,
}

impl LogQueue {
    /// An empty queue that counts lost lines in `lost`.
    pub(super) fn new(lost: IntCounter) -> Self {
        Self(Arc::new(QueueInner { backlog: Mutex::default(), filled: Condvar::new(), emptied: Condvar::new(), lost }))
    }

    /// Starts the thread that writes to `out`. `notice` makes a line from the number of lost lines.
    ///
    /// # Errors
    ///
    /// The system cannot start the thread.
    pub(super) fn start(&self, out: impl Write + Send + 'static, notice: impl Fn(u64) -> Vec<u8> + Send + 'static) -> io::Result<()> {
        let queue = Arc::clone(&self.0);
        let writer = LineWriter::new(out, notice, queue.lost.clone());
        thread::Builder::new().name("log".into()).spawn(move || queue.write(writer))?;
        Ok(())
    }

    /// Puts whole lines into the queue, or loses and counts them if there is no room. Never blocks.
    fn push(&self, lines: &[u8]) {
        let mut backlog = self.0.backlog();
        if backlog.lost > 0 || backlog.lines.len() + lines.len() > MAX_QUEUED {
            let lost = count(lines);
            backlog.lost += lost;
            self.0.lost.inc_by(lost);
        } else {
            backlog.lines.extend_from_slice(lines);
        }
        if !backlog.is_busy {
            backlog.is_busy = true;
            self.0.filled.notify_one();
        }
    }

    /// Waits until everything is written or lost, for at most `timeout`.
    pub(super) fn flush(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let mut backlog = self.0.backlog();
        while backlog.is_busy {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            backlog = self.0.emptied.wait_timeout(backlog, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl QueueInner {
    fn backlog(&self) -> MutexGuard<'_, Backlog> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the lines of the queue forever.
    fn write(&self, mut writer: LineWriter<impl Write, impl Fn(u64) -> Vec<u8>>) {
        let mut lines = Vec::new();
        let mut backlog = self.backlog();
        loop {
            while backlog.lines.is_empty() && backlog.lost == 0 {
                backlog.is_busy = false;
                self.emptied.notify_all();
                backlog = self.filled.wait(backlog).unwrap_or_else(PoisonError::into_inner);
            }
            std::mem::swap(&mut lines, &mut backlog.lines);
            let lost = std::mem::take(&mut backlog.lost);
            drop(backlog);
            writer.write(&lines);
            lines.clear();
            lines.shrink_to(MAX_KEPT);
            writer.lost(lost);
            backlog = self.backlog();
        }
    }
}

thread_local! {
    /// Takes the lines of this thread instead of the queue while [`captured`] runs.
    static CAPTURED: Cell<Option<Vec<u8>>> = const { Cell::new(None) };
}

/// Returns the lines that `log` logs.
pub(super) fn captured(log: impl FnOnce()) -> Vec<u8> {
    CAPTURED.set(Some(Vec::new()));
    log();
    CAPTURED.take().unwrap_or_default()
}

/// Keeps the line for [`captured`] if that is running on this thread.
fn capture(line: &[u8]) -> bool {
    match CAPTURED.take() {
        None => false,
        Some(mut lines) => {
            lines.extend_from_slice(line);
            CAPTURED.set(Some(lines));
            true
        }
    }
}

impl Write for LogQueue {
    /// Takes whole lines.
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        if !capture(lines) {
            self.push(lines);
        }
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// The result of one write: the number of bytes taken, or an error.
    type Outcome = Result<usize, ErrorKind>;

    /// Takes as many bytes as the test allows, and hands them to it.
    struct Pipe {
        outcomes: mpsc::Receiver<Outcome>,
        written: mpsc::Sender<Vec<u8>>,
    }

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // Blocks until the test reads.
            let taken = self.outcomes.recv().map_or(Err(ErrorKind::BrokenPipe), |outcome| outcome)?.min(bytes.len());
            self.written.send(bytes[..taken].to_vec()).map_err(|_| ErrorKind::BrokenPipe)?;
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Reader {
        outcomes: mpsc::Sender<Outcome>,
        written: mpsc::Receiver<Vec<u8>>,
    }

    impl Reader {
        fn read(&self, outcome: Outcome) -> String {
            self.outcomes.send(outcome).unwrap();
            String::from_utf8(self.written.recv_timeout(PATIENCE).unwrap()).unwrap()
        }

        fn fail(&self, error: ErrorKind) {
            self.outcomes.send(Err(error)).unwrap();
        }
    }

    fn start() -> (LogQueue, Reader) {
        let queue = LogQueue::new(IntCounter::new("lost", "lost").unwrap());
        let ((outcomes, taken), (written, read)) = (mpsc::channel(), mpsc::channel());
        queue.start(Pipe { outcomes: taken, written }, |lost| format!("{lost} lost\n").into_bytes()).unwrap();
        (queue, Reader { outcomes, written: read })
    }

    /// Waits until the writer has taken all lines and is about to write them.
    fn wait_until_taken(queue: &LogQueue) {
        let started = Instant::now();
        while !queue.0.backlog().lines.is_empty() {
            assert!(started.elapsed() < PATIENCE);
            thread::yield_now();
        }
    }

    #[test]
    fn writes_whole_lines_in_order() {
        let (queue, reader) = start();
        queue.push(b"one\n");
        wait_until_taken(&queue);
        let line = |number: usize| format!("{number:0999}\n");
        (0..9).for_each(|number| queue.push(line(number).as_bytes()));
        queue.push(format!("{}\n", "x".repeat(10_000)).as_bytes());
        queue.push(b"last\n");
        assert_eq!(reader.read(Ok(usize::MAX)), "one\n");
        for batch in [0..4, 4..8, 8..9] {
            assert_eq!(reader.read(Ok(usize::MAX)), batch.map(line).collect::<String>());
        }
        assert_eq!(reader.read(Ok(6000)).len(), 6000);
        assert_eq!(reader.read(Ok(usize::MAX)).len(), 4001);
        assert_eq!(reader.read(Ok(usize::MAX)), "last\n");
    }

    #[test]
    fn lines_beyond_the_limit_are_lost_counted_and_reported_in_their_place() {
        let (queue, reader) = start();
        queue.push(b"first\n");
        wait_until_taken(&queue);
        let line = [&[b'x'; (64 << 10) - 1][..], b"\n"].concat();
        for _ in 0..MAX_QUEUED / line.len() + 9 {
            queue.push(&line);
        }
        // Would fit, but come after the gap.
        queue.push(b"also lost\nlost too\n");
        assert_eq!(queue.0.lost.get(), 11);
        assert!(queue.0.backlog().lines.len() <= MAX_QUEUED);
        queue.flush(Duration::from_millis(1));
        assert_eq!(reader.read(Ok(usize::MAX)), "first\n");
        for _ in 0..MAX_QUEUED / line.len() {
            wait_until_taken(&queue);
            assert_eq!(reader.read(Ok(usize::MAX)).len(), line.len());
        }
        queue.push(b"after\n");
        assert_eq!(reader.read(Ok(usize::MAX)), "11 lost\n");
        assert_eq!(reader.read(Ok(usize::MAX)), "after\n");
        queue.flush(PATIENCE);
        let backlog = queue.0.backlog();
        assert!(!backlog.is_busy && backlog.lines.capacity() <= MAX_KEPT);
    }

    #[test]
    fn lines_that_cannot_be_written_are_lost_and_later_ones_written() {
        let (queue, reader) = start();
        for error in [ErrorKind::BrokenPipe, ErrorKind::StorageFull] {
            reader.fail(error);
            queue.push(b"nobody\n");
            queue.flush(PATIENCE);
        }
        assert_eq!(queue.0.lost.get(), 2);
        // The notice comes first and is written partly before the disk is full again.
        reader.outcomes.send(Ok(3)).unwrap();
        reader.fail(ErrorKind::StorageFull);
        queue.push(b"nor this\n");
        assert_eq!(reader.written.recv_timeout(PATIENCE).unwrap(), b"2 l");
        queue.flush(PATIENCE);
        assert_eq!(queue.0.lost.get(), 3);
        // Ends the partly written line first.
        queue.push(b"again\n");
        assert_eq!(reader.read(Ok(usize::MAX)), "\n");
        reader.fail(ErrorKind::Interrupted);
        reader.fail(ErrorKind::WouldBlock);
        assert_eq!(reader.read(Ok(usize::MAX)), "3 lost\n");
        assert_eq!(reader.read(Ok(usize::MAX)), "again\n");
        queue.flush(PATIENCE);
    }

    #[test]
    fn flushing_times_out_without_a_reader() {
        let (queue, _reader) = start();
        queue.push(b"line\n");
        queue.flush(Duration::from_millis(1));
        assert!(queue.0.backlog().is_busy);
    }

    #[test]
    fn captures_the_lines_of_one_thread() {
        assert!(!capture(b"not me\n"));
        let lines = captured(|| {
            assert!(capture(b"me\n"));
            thread::scope(|scope| scope.spawn(|| assert!(!capture(b"nor me\n"))).join().unwrap());
        });
        assert_eq!(lines, b"me\n");
        assert!(!capture(b"any more\n"));
    }
}
