//! `--watch`: when to reload, from what the files look like.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use tokio::sync::{oneshot, watch};

/// How often the watched files are looked at. A change is taken when two looks in a row have found
/// the same, so that a file being written is left alone.
const INTERVAL: Duration = Duration::from_millis(500);

/// Looks in a row that a file has to be missing before that counts as a change: five seconds. Who
/// replaces a file in two steps, by removing the old one and moving the new one to its place, is
/// done by then.
const MISSING_LOOKS: u32 = 10;

/// Pause before the first retry of a reload that has failed: what is wrong for a moment is over
/// soon.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// Longest pause between retries, each of which may compile a module. A change of the files does
/// not wait for it.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// What the files looked like at one moment, each in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Look(Vec<Result<Stamp, ErrorKind>>);

/// What changes when a file does, or when another one takes its place: directories and links on the
/// way to it do not matter.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds, as everywhere.
    modified: (i64, i64),
    /// The kernel's own: nobody can set it, and it changes with permissions too.
    changed: (i64, i64),
}

impl Look {
    fn at(paths: &[PathBuf]) -> Self {
        Self(paths.iter().map(|path| Stamp::of(path).map_err(|error| error.kind())).collect())
    }

    fn misses_a_file(&self) -> bool {
        self.0.contains(&Err(ErrorKind::NotFound))
    }
}

impl Stamp {
    /// Follows links.
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

/// The watched files since they were looked at first.
pub struct Watched {
    looks: watch::Receiver<Look>,
    /// Asks the thread for a look between two of them.
    ask: mpsc::Sender<oneshot::Sender<Look>>,
    schedule: Schedule,
}

/// Why to reload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The files have changed.
    Change,
    /// The last reload has failed.
    Retry,
}

impl Watched {
    /// Looks at the files for the first time and starts the thread that goes on looking. This is
    /// done before they are read, so that no later change is missed.
    ///
    /// # Errors
    ///
    /// The system gives no thread.
    pub fn start(paths: Vec<PathBuf>) -> io::Result<Self> {
        let first = Look::at(&paths);
        let (sender, looks) = watch::channel(first.clone());
        let (ask, asked) = mpsc::channel::<oneshot::Sender<Look>>();
        // A thread of its own: looking at a file blocks, on a network's file system for long.
        thread::Builder::new().name("watch".into()).spawn(move || {
            loop {
                match asked.recv_timeout(INTERVAL) {
                    Err(RecvTimeoutError::Timeout) => {
                        sender.send_replace(Look::at(&paths));
                    }
                    Err(RecvTimeoutError::Disconnected) => return,
                    Ok(answer) => {
                        let _ = answer.send(Look::at(&paths));
                    }
                }
            }
        })?;
        Ok(Self { looks, ask, schedule: Schedule::new(first) })
    }

    /// Waits until it is time to reload. What it has waited for is not lost when it is dropped.
    pub(crate) async fn due(&mut self) -> Cause {
        loop {
            if self.looks.changed().await.is_err() {
                // Without the thread there is nothing to wait for.
                std::future::pending::<()>().await;
            }
            let look = self.looks.borrow_and_update().clone();
            if let Some(cause) = self.schedule.looked(look, Instant::now()) {
                return cause;
            }
        }
    }

    /// Looks at the files because a reload begins, whatever its cause. What they look like later is
    /// compared with that.
    pub(crate) async fn reloading(&mut self) {
        let (answer, look) = oneshot::channel();
        // Without the thread nothing is watched any more.
        if self.ask.send(answer).is_ok()
            && let Ok(look) = look.await
        {
            self.schedule.known = look;
        }
    }

    /// Takes over how a reload has ended, whatever its cause.
    pub(crate) fn reloaded(&mut self, succeeded: bool) {
        self.schedule.reloaded(succeeded, Instant::now());
    }
}

/// Turns looks into reloads.
#[derive(Debug)]
struct Schedule {
    /// What the files looked like before they were read last.
    known: Look,
    /// What they looked like last, and how many times in a row.
    seen: Look,
    times: u32,
    retry: Option<Retry>,
}

#[derive(Clone, Copy, Debug)]
struct Retry {
    at: Instant,
    pause: Duration,
}

impl Schedule {
    fn new(first: Look) -> Self {
        Self { known: first.clone(), seen: first, times: 1, retry: None }
    }

    fn looked(&mut self, look: Look, now: Instant) -> Option<Cause> {
        if look == self.seen {
            self.times = self.times.saturating_add(1);
        } else {
            self.seen = look;
            self.times = 1;
        }
        let is_missing = self.seen.misses_a_file();
        if self.times < if is_missing { MISSING_LOOKS } else { 2 } {
            return None;
        }
        if self.seen != self.known {
            self.retry = None;
            return Some(Cause::Change);
        }
        // A file that is missing is not there before it looks different.
        self.retry.filter(|retry| retry.at <= now && !is_missing).map(|_| Cause::Retry)
    }

    fn reloaded(&mut self, succeeded: bool, now: Instant) {
        self.retry = (!succeeded).then(|| {
            let pause = self.retry.map_or(FIRST_PAUSE, |retry| (retry.pause * 2).min(LONGEST_PAUSE));
            Retry { at: now + pause, pause }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Schedule {
        /// A reload that begins when the files look as they did last.
        fn reloading(&mut self) {
            self.known.clone_from(&self.seen);
        }
    }

    fn look(inode: u64) -> Look {
        Look(vec![Ok(Stamp { device: 1, inode, size: 1, modified: (0, 0), changed: (0, 0) })])
    }

    fn missing() -> Look {
        Look(vec![Err(ErrorKind::NotFound)])
    }

    #[test]
    fn a_change_is_taken_when_two_looks_agree() {
        let now = Instant::now();
        let mut schedule = Schedule::new(look(1));
        let looks = [look(1), look(1), look(2), look(3), look(3)].map(|look| schedule.looked(look, now));
        assert_eq!(looks, [None, None, None, None, Some(Cause::Change)]);
        schedule.reloading();
        schedule.reloaded(true, now);
        assert_eq!(schedule.looked(look(3), now), None);
    }

    #[test]
    fn what_is_as_it_was_is_no_change() {
        let now = Instant::now();
        let mut schedule = Schedule::new(look(1));
        assert_eq!([look(2), look(1), look(1)].map(|look| schedule.looked(look, now)), [None, None, None]);
    }

    #[test]
    fn a_file_may_be_missing_for_a_moment() {
        let now = Instant::now();
        let mut schedule = Schedule::new(look(1));
        for _ in 1..MISSING_LOOKS {
            assert_eq!(schedule.looked(missing(), now), None);
        }
        assert_eq!([look(2), look(2)].map(|look| schedule.looked(look, now)), [None, Some(Cause::Change)]);
    }

    #[test]
    fn a_file_that_stays_missing_is_one_change_and_its_return_another() {
        let now = Instant::now();
        let mut schedule = Schedule::new(look(1));
        let causes: Vec<_> = (0..MISSING_LOOKS).filter_map(|_| schedule.looked(missing(), now)).collect();
        assert_eq!(causes, [Cause::Change]);
        schedule.reloading();
        schedule.reloaded(false, now);
        let much_later = now + 2 * LONGEST_PAUSE;
        assert_eq!(schedule.looked(missing(), much_later), None);
        assert_eq!([look(1), look(1)].map(|look| schedule.looked(look, much_later)), [None, Some(Cause::Change)]);
    }

    #[test]
    fn a_failure_is_retried_after_growing_pauses_until_it_works() {
        let mut now = Instant::now();
        let mut schedule = Schedule::new(look(1));
        schedule.reloading();
        schedule.reloaded(false, now);
        let mut pauses = Vec::new();
        for _ in 0..12 {
            let pause = schedule.retry.unwrap().pause;
            pauses.push(pause.as_secs());
            assert_eq!(schedule.looked(look(1), now + pause - Duration::from_millis(1)), None);
            now += pause;
            assert_eq!(schedule.looked(look(1), now), Some(Cause::Retry));
            schedule.reloading();
            schedule.reloaded(false, now);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
        schedule.reloading();
        schedule.reloaded(true, now);
        assert_eq!(schedule.looked(look(1), now + 2 * LONGEST_PAUSE), None);
    }

    #[test]
    fn a_change_does_not_wait_for_the_pause_and_starts_it_anew() {
        let now = Instant::now();
        let mut schedule = Schedule::new(look(1));
        for _ in 0..5 {
            schedule.reloading();
            schedule.reloaded(false, now);
        }
        assert_eq!([look(2), look(2)].map(|look| schedule.looked(look, now)), [None, Some(Cause::Change)]);
        schedule.reloading();
        schedule.reloaded(false, now);
        assert_eq!(schedule.retry.unwrap().pause, FIRST_PAUSE);
    }

    #[test]
    fn a_look_sees_what_size_and_time_do_not_show() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        let paths = [path.clone()];
        fs::write(&path, "one").unwrap();
        let first = Look::at(&paths);
        assert_eq!(Look::at(&paths), first);
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        fs::write(&path, "two").unwrap();
        fs::File::open(&path).unwrap().set_modified(modified).unwrap();
        let second = Look::at(&paths);
        assert_ne!(second, first);
        fs::remove_file(&path).unwrap();
        assert!(Look::at(&paths).misses_a_file() && !second.misses_a_file());
    }
}
