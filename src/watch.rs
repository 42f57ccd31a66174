//! `--watch`: decides when to reload by comparing snapshots of the files' metadata.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use tokio::sync::{oneshot, watch};

/// Time between two snapshots. A change counts once two snapshots in a row are equal, so a file
/// that is being written is not reloaded.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Snapshots in a row in which a file has to be missing before that counts as a change: 5 s.
/// Whoever replaces a file by removing the old one and moving the new one to its place needs less.
const MISSING_SNAPSHOTS: u32 = 10;

/// Pause before the first retry of a failed reload. Short, because the cause may be temporary.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// Longest pause between retries, each of which may compile a module. A change of the files is
/// reloaded without waiting for it.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// The metadata of the watched files at one time, in the order of their paths.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Snapshot(Vec<Result<FileStamp, ErrorKind>>);

/// Metadata that changes when a file is written, or when another file takes its place. Links and
/// directories of the path are not compared themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FileStamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    /// Set by the kernel alone, also when permissions change.
    changed: (i64, i64),
}

impl Snapshot {
    fn take(paths: &[PathBuf]) -> Self {
        Self(paths.iter().map(|path| FileStamp::of(path).map_err(|error| error.kind())).collect())
    }

    fn misses_a_file(&self) -> bool {
        self.0.contains(&Err(ErrorKind::NotFound))
    }
}

impl FileStamp {
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

/// Watches files for changes.
pub struct FileWatcher {
    snapshots: watch::Receiver<Snapshot>,
    /// Requests a snapshot at once.
    requests: mpsc::Sender<oneshot::Sender<Snapshot>>,
    schedule: ReloadSchedule,
}

/// Why to reload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReloadCause {
    /// The files have changed.
    Change,
    /// A file has been missing for a while.
    Missing,
    /// The last reload has failed.
    Retry,
}

impl FileWatcher {
    /// Takes the first snapshot and starts the thread that takes the others. Must be called before
    /// the files are read, so no later change is missed.
    ///
    /// # Errors
    ///
    /// The system cannot start the thread.
    pub fn start(paths: Vec<PathBuf>) -> io::Result<Self> {
        let first = Snapshot::take(&paths);
        let (sender, snapshots) = watch::channel(first.clone());
        let (requests, requested) = mpsc::channel::<oneshot::Sender<Snapshot>>();
        // A thread of its own, because reading metadata blocks, on network file systems for long.
        thread::Builder::new().name("watch".into()).spawn(move || {
            loop {
                match requested.recv_timeout(POLL_INTERVAL) {
                    Err(RecvTimeoutError::Timeout) => {
                        sender.send_replace(Snapshot::take(&paths));
                    }
                    Err(RecvTimeoutError::Disconnected) => return,
                    Ok(reply) => {
                        let _ = reply.send(Snapshot::take(&paths));
                    }
                }
            }
        })?;
        Ok(Self { snapshots, requests, schedule: ReloadSchedule::new(first) })
    }

    /// Waits until it is time to reload. Dropping the future loses nothing.
    pub(crate) async fn due(&mut self) -> ReloadCause {
        loop {
            if self.snapshots.changed().await.is_err() {
                // The thread has ended, so there will be no more snapshots.
                std::future::pending::<()>().await;
            }
            let snapshot = self.snapshots.borrow_and_update().clone();
            if let Some(cause) = self.schedule.observe(snapshot, Instant::now()) {
                return cause;
            }
        }
    }

    /// Takes a snapshot because a reload begins, whatever its cause. Later ones are compared with
    /// it.
    pub(crate) async fn reload_begins(&mut self) {
        let (reply, snapshot) = oneshot::channel();
        // Fails only if the thread has ended.
        if self.requests.send(reply).is_ok()
            && let Ok(snapshot) = snapshot.await
        {
            self.schedule.loaded = snapshot;
        }
    }

    /// Records how a reload has ended, whatever its cause.
    pub(crate) fn reload_ended(&mut self, succeeded: bool) {
        self.schedule.reload_ended(succeeded, Instant::now());
    }
}

/// Decides from snapshots when to reload.
#[derive(Debug)]
struct ReloadSchedule {
    /// The snapshot from before the last reload.
    loaded: Snapshot,
    /// The latest snapshot, and how many in a row were equal to it.
    latest: Snapshot,
    repeats: u32,
    retry: Option<Retry>,
}

#[derive(Clone, Copy, Debug)]
struct Retry {
    at: Instant,
    pause: Duration,
}

impl ReloadSchedule {
    fn new(first: Snapshot) -> Self {
        Self { loaded: first.clone(), latest: first, repeats: 1, retry: None }
    }

    fn observe(&mut self, snapshot: Snapshot, now: Instant) -> Option<ReloadCause> {
        if snapshot == self.latest {
            self.repeats = self.repeats.saturating_add(1);
        } else {
            self.latest = snapshot;
            self.repeats = 1;
        }
        let is_missing = self.latest.misses_a_file();
        if self.repeats < if is_missing { MISSING_SNAPSHOTS } else { 2 } {
            return None;
        }
        if self.latest != self.loaded {
            self.retry = None;
            return Some(if is_missing { ReloadCause::Missing } else { ReloadCause::Change });
        }
        // A retry cannot succeed while a file is missing, and its return is a change.
        self.retry.filter(|retry| retry.at <= now && !is_missing).map(|_| ReloadCause::Retry)
    }

    fn reload_ended(&mut self, succeeded: bool, now: Instant) {
        self.retry = (!succeeded).then(|| {
            let pause = self.retry.map_or(FIRST_PAUSE, |retry| (retry.pause * 2).min(LONGEST_PAUSE));
            Retry { at: now + pause, pause }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl ReloadSchedule {
        /// A reload begins while the files are as in the latest snapshot.
        fn reload_begins(&mut self) {
            self.loaded.clone_from(&self.latest);
        }
    }

    fn snapshot(inode: u64) -> Snapshot {
        Snapshot(vec![Ok(FileStamp { device: 1, inode, size: 1, modified: (0, 0), changed: (0, 0) })])
    }

    fn missing() -> Snapshot {
        Snapshot(vec![Err(ErrorKind::NotFound)])
    }

    #[test]
    fn reloads_when_two_snapshots_agree() {
        let now = Instant::now();
        let mut schedule = ReloadSchedule::new(snapshot(1));
        let causes = [snapshot(1), snapshot(1), snapshot(2), snapshot(3), snapshot(3)].map(|snapshot| schedule.observe(snapshot, now));
        assert_eq!(causes, [None, None, None, None, Some(ReloadCause::Change)]);
        schedule.reload_begins();
        schedule.reload_ended(true, now);
        assert_eq!(schedule.observe(snapshot(3), now), None);
    }

    #[test]
    fn ignores_a_change_that_was_undone() {
        let now = Instant::now();
        let mut schedule = ReloadSchedule::new(snapshot(1));
        assert_eq!([snapshot(2), snapshot(1), snapshot(1)].map(|snapshot| schedule.observe(snapshot, now)), [None, None, None]);
    }

    #[test]
    fn ignores_a_file_that_is_missing_briefly() {
        let now = Instant::now();
        let mut schedule = ReloadSchedule::new(snapshot(1));
        for _ in 1..MISSING_SNAPSHOTS {
            assert_eq!(schedule.observe(missing(), now), None);
        }
        assert_eq!([snapshot(2), snapshot(2)].map(|snapshot| schedule.observe(snapshot, now)), [None, Some(ReloadCause::Change)]);
    }

    #[test]
    fn reloads_once_for_a_missing_file_and_once_for_its_return() {
        let now = Instant::now();
        let mut schedule = ReloadSchedule::new(snapshot(1));
        let causes: Vec<_> = (0..MISSING_SNAPSHOTS).filter_map(|_| schedule.observe(missing(), now)).collect();
        assert_eq!(causes, [ReloadCause::Missing]);
        schedule.reload_begins();
        schedule.reload_ended(false, now);
        let much_later = now + 2 * LONGEST_PAUSE;
        assert_eq!(schedule.observe(missing(), much_later), None);
        assert_eq!([snapshot(1), snapshot(1)].map(|snapshot| schedule.observe(snapshot, much_later)), [None, Some(ReloadCause::Change)]);
    }

    #[test]
    fn retries_after_growing_pauses_until_a_reload_succeeds() {
        let mut now = Instant::now();
        let mut schedule = ReloadSchedule::new(snapshot(1));
        schedule.reload_begins();
        schedule.reload_ended(false, now);
        let mut pauses = Vec::new();
        for _ in 0..12 {
            let pause = schedule.retry.unwrap().pause;
            pauses.push(pause.as_secs());
            assert_eq!(schedule.observe(snapshot(1), now + pause - Duration::from_millis(1)), None);
            now += pause;
            assert_eq!(schedule.observe(snapshot(1), now), Some(ReloadCause::Retry));
            schedule.reload_begins();
            schedule.reload_ended(false, now);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
        schedule.reload_begins();
        schedule.reload_ended(true, now);
        assert_eq!(schedule.observe(snapshot(1), now + 2 * LONGEST_PAUSE), None);
    }

    #[test]
    fn a_change_is_reloaded_during_a_pause_and_resets_it() {
        let now = Instant::now();
        let mut schedule = ReloadSchedule::new(snapshot(1));
        for _ in 0..5 {
            schedule.reload_begins();
            schedule.reload_ended(false, now);
        }
        assert_eq!([snapshot(2), snapshot(2)].map(|snapshot| schedule.observe(snapshot, now)), [None, Some(ReloadCause::Change)]);
        schedule.reload_begins();
        schedule.reload_ended(false, now);
        assert_eq!(schedule.retry.unwrap().pause, FIRST_PAUSE);
    }

    #[test]
    fn a_snapshot_detects_a_change_that_keeps_size_and_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        let paths = [path.clone()];
        fs::write(&path, "one").unwrap();
        let first = Snapshot::take(&paths);
        assert_eq!(Snapshot::take(&paths), first);
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        fs::write(&path, "two").unwrap();
        fs::File::open(&path).unwrap().set_modified(modified).unwrap();
        let second = Snapshot::take(&paths);
        assert_ne!(second, first);
        fs::remove_file(&path).unwrap();
        assert!(Snapshot::take(&paths).misses_a_file() && !second.misses_a_file());
    }
}
