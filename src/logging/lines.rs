//! Writes whole lines. Writing may block or fail, because the reader may be stalled or gone, or a
//! disk may be full.

use std::io::{self, ErrorKind, Write};
use std::thread;
use std::time::Duration;

use prometheus::IntCounter;

/// Bytes of lines that are written at once. A pipe takes as many without mixing them with another
/// process's (`PIPE_BUF` of Linux).
const MAX_BATCH: usize = 4096;

/// Pause before another write if a pipe is full and does not block, because another process has
/// made it non-blocking or it was opened so.
const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// Writes whole lines, and in their place how many were lost.
pub(crate) struct LineWriter<W, N> {
    out: W,
    /// Makes a line from the number of lost lines.
    notice: N,
    /// Lines lost since the last notice.
    unreported: u64,
    /// The last line was written partly.
    is_torn: bool,
    lost: IntCounter,
}

impl<W: Write, N: Fn(u64) -> Vec<u8>> LineWriter<W, N> {
    /// Writes to `out`. `notice` makes a line from the number of lost lines, which `lost` counts.
    pub(crate) fn new(out: W, notice: N, lost: IntCounter) -> Self {
        Self { out, notice, unreported: 0, is_torn: false, lost }
    }

    /// Writes lines, at once as many as fit into a batch.
    pub(crate) fn write(&mut self, mut lines: &[u8]) {
        while !lines.is_empty() {
            let (batch, rest) = lines.split_at(batch_len(lines));
            lines = rest;
            self.report();
            // If the notice cannot be written, the lines after it are lost too.
            if self.unreported > 0 || self.write_all(batch).is_err() {
                let lost = count(batch);
                self.unreported += lost;
                self.lost.inc_by(lost);
            }
        }
    }

    /// Writes that `count` more lines were lost, which are counted already, once it is possible.
    pub(crate) fn lost(&mut self, count: u64) {
        self.unreported += count;
        if count > 0 {
            self.report();
        }
    }

    /// Flushes what it writes to.
    ///
    /// # Errors
    ///
    /// As for [`Write::flush`].
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    /// Writes how many lines were lost, if any were.
    fn report(&mut self) {
        if self.unreported > 0 && self.write_all(&(self.notice)(self.unreported)).is_ok() {
            self.unreported = 0;
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.is_torn {
            self.write_bytes(b"\n")?;
            self.is_torn = false;
        }
        self.write_bytes(bytes)
    }

    fn write_bytes(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.out.write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => {
                    bytes = &bytes[written..];
                    self.is_torn = !bytes.is_empty();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY_PAUSE),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The number of lines.
pub(super) fn count(lines: &[u8]) -> u64 {
    lines.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// The length of the first lines that fit into a batch, or of the first line if it does not fit.
fn batch_len(lines: &[u8]) -> usize {
    if lines.len() <= MAX_BATCH {
        return lines.len();
    }
    let end = |byte: &u8| *byte == b'\n';
    match lines[..MAX_BATCH].iter().rposition(end) {
        Some(last) => last + 1,
        None => lines.iter().position(end).map_or(lines.len(), |first| first + 1),
    }
}
