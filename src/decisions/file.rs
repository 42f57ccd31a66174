//! The file of the decision log. It is rotated at a size, and opened again on request.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use anyhow::anyhow;
use rustix::fs::{CWD, OFlags};
use rustix::io::Errno;
use zentinel_wasm_bounds::log_limited;

use crate::files::{folder, folder_hint};

/// Owner and group may read the file, because it has addresses and paths of clients.
const MODE: u32 = 0o640;

/// Which file to write, and when to rotate it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecisionFile {
    /// The file. Rotated ones have a number behind their name.
    pub path: PathBuf,
    /// The size at which it is rotated, in bytes. 0: never.
    pub max_bytes: u64,
    /// Files that are kept, with the current one.
    pub files: u64,
}

impl DecisionFile {
    /// Why the file certainly cannot be opened, if that is known without opening it.
    pub(crate) fn problem(&self) -> Option<anyhow::Error> {
        let error = || cannot_open(&self.path, &Errno::NOENT.into());
        (!folder(&self.path).exists()).then(error)
    }
}

/// The open file. Takes whole lines, one or several per write.
pub(super) struct RotatingFile {
    config: DecisionFile,
    file: File,
    /// Only a regular file is rotated, and only at its own path: to rename a link such as
    /// `/dev/stdout` would harm others.
    is_regular: bool,
    size: u64,
    /// The last write ended within a line.
    is_within_line: bool,
    /// The file is to be opened again.
    reopen: Arc<AtomicBool>,
}

impl RotatingFile {
    /// Opens the file, and again when `reopen` is set.
    ///
    /// # Errors
    ///
    /// The file cannot be opened. The message says what to do.
    pub(super) fn open(config: DecisionFile, reopen: Arc<AtomicBool>) -> anyhow::Result<Self> {
        let file = open(&config.path).and_then(|file| Ok((fs::symlink_metadata(&config.path)?, file)));
        let (metadata, file) = file.map_err(|error| cannot_open(&config.path, &error))?;
        Ok(Self { is_regular: metadata.is_file(), size: metadata.len(), config, file, is_within_line: false, reopen })
    }

    fn open_again(&mut self) -> io::Result<()> {
        let file = open(&self.config.path)?;
        let metadata = fs::symlink_metadata(&self.config.path)?;
        (self.is_regular, self.size, self.is_within_line) = (metadata.is_file(), metadata.len(), false);
        self.file = file;
        Ok(())
    }

    /// Opens the file again if that was requested. Something else, such as `logrotate`, has moved
    /// it away.
    fn reopen_if_requested(&mut self) {
        if self.reopen.swap(false, Relaxed)
            && let Err(error) = self.open_again()
        {
            let path = self.config.path.display();
            log_limited!(warn, "cannot open the decision log `{path}` again, keeping the open file: {error}");
        }
    }

    /// Rotates the file if it has no room for `len` more bytes.
    fn rotate_if_full(&mut self, len: u64) -> io::Result<()> {
        let max = self.config.max_bytes;
        if !self.is_regular || max == 0 || self.size + len <= max {
            return Ok(());
        }
        // It may have been truncated meanwhile.
        self.size = self.file.metadata()?.len();
        if self.size == 0 || self.size + len <= max {
            return Ok(());
        }
        let rotated = self.rotate();
        if let Err(error) = &rotated {
            let path = self.config.path.display();
            log_limited!(warn, "cannot rotate the decision log `{path}`, dropping its lines: {error}");
        }
        rotated
    }

    fn rotate(&mut self) -> io::Result<()> {
        let path = |number: u64| if number == 0 { self.config.path.clone() } else { numbered(&self.config.path, number) };
        let oldest = self.config.files - 1;
        remove(&path(oldest))?;
        for number in (0..oldest).rev() {
            // The system call of the seccomp profile, unlike that of the standard library.
            match rustix::fs::renameat(CWD, path(number), CWD, path(number + 1)) {
                // There are fewer so far.
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.open_again()
    }
}

impl Write for RotatingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.is_within_line {
            self.reopen_if_requested();
            self.rotate_if_full(bytes.len() as u64)?;
        }
        match self.file.write(bytes) {
            Ok(written) => {
                self.size += written as u64;
                self.is_within_line = bytes[..written].last().is_some_and(|byte| *byte != b'\n');
                Ok(written)
            }
            // A pipe without a reader. The caller tries again, with the new file if it is to be
            // opened again.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.reopen_if_requested();
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.is_within_line {
            self.reopen_if_requested();
        }
        Ok(())
    }
}

/// Opens a file to append to it, and creates it if it is missing.
fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    // A pipe without a reader must not block the agent.
    options.append(true).create(true).mode(MODE).custom_flags(OFlags::NONBLOCK.bits() as i32);
    match options.open(path) {
        // A pipe that nobody has opened for reading. Opened for both, it takes lines nevertheless,
        // up to its size, and its reader gets them when it comes.
        Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => options.read(true).open(path),
        opened => opened,
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn numbered(path: &Path, number: u64) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

fn cannot_open(path: &Path, error: &io::Error) -> anyhow::Error {
    let hint = match error.kind() {
        ErrorKind::IsADirectory => "; `--decision-log-file` must name a file".to_owned(),
        kind => folder_hint(path, kind).unwrap_or_default(),
    };
    anyhow!("cannot open the decision log `{}`: {error}{hint}", path.display())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn start(path: &Path, max_bytes: u64, files: u64) -> RotatingFile {
        RotatingFile::open(DecisionFile { path: path.to_owned(), max_bytes, files }, Arc::default()).unwrap()
    }

    #[track_caller]
    fn contents(path: &Path) -> String {
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    #[test]
    fn keeps_so_many_files_of_at_most_its_size() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, "before\n").unwrap();
        let mut file = start(&path, 10, 3);
        for number in 1..=9 {
            file.write_all(format!("line{number}\n").as_bytes()).unwrap();
        }
        let names: Vec<_> = [path.clone(), numbered(&path, 1), numbered(&path, 2)].iter().map(|path| contents(path)).collect();
        assert_eq!(names, ["line9\n", "line8\n", "line7\n"]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o137, 0);
    }

    #[test]
    fn a_single_file_begins_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut file = start(&path, 10, 1);
        file.write_all(b"one\ntwo\n").unwrap();
        file.write_all(b"three\n").unwrap();
        assert_eq!(contents(&path), "three\n");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_line_is_never_split_and_one_over_the_size_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut file = start(&path, 10, 2);
        file.write_all(b"a line of more than ten bytes, ").unwrap();
        file.write_all(b"in two writes\n").unwrap();
        assert_eq!(contents(&path), "a line of more than ten bytes, in two writes\n");
        assert!(!numbered(&path, 1).exists());
    }

    #[test]
    fn zero_never_rotates() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut file = start(&path, 0, 1);
        for _ in 0..100 {
            file.write_all(b"line\n").unwrap();
        }
        assert_eq!(contents(&path).lines().count(), 100);
    }

    #[test]
    fn a_file_that_was_truncated_has_room_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut file = start(&path, 10, 2);
        file.write_all(b"one\ntwo\n").unwrap();
        // As `copytruncate` of logrotate does.
        File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        file.write_all(b"three\n").unwrap();
        assert_eq!(contents(&path), "three\n");
        assert!(!numbered(&path, 1).exists());
    }

    #[test]
    fn one_that_cannot_be_rotated_grows_no_further() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut file = start(&path, 10, 2);
        file.write_all(b"one\ntwo\n").unwrap();
        // Renaming a file over a folder fails.
        fs::create_dir(numbered(&path, 1)).unwrap();
        assert!(file.write(b"three\n").is_err());
        assert_eq!(contents(&path), "one\ntwo\n");
        fs::remove_dir(numbered(&path, 1)).unwrap();
        file.write_all(b"four\n").unwrap();
        assert_eq!((contents(&path), contents(&numbered(&path, 1))), ("four\n".into(), "one\ntwo\n".into()));
    }

    #[test]
    fn is_opened_again_between_lines() {
        let folder = tempfile::tempdir().unwrap();
        let (path, moved) = (folder.path().join("log"), folder.path().join("moved"));
        let mut file = start(&path, 0, 1);
        file.write_all(b"one, ").unwrap();
        fs::rename(&path, &moved).unwrap();
        file.reopen.store(true, Relaxed);
        file.write_all(b"whole\n").unwrap();
        file.write_all(b"two\n").unwrap();
        assert_eq!((contents(&moved), contents(&path)), ("one, whole\n".into(), "two\n".into()));
        // Without its folder, the open file is kept.
        fs::rename(folder.path(), folder.path().with_extension("moved")).unwrap();
        file.reopen.store(true, Relaxed);
        file.write_all(b"three\n").unwrap();
        fs::rename(folder.path().with_extension("moved"), folder.path()).unwrap();
        assert_eq!(contents(&path), "two\nthree\n");
    }

    #[test]
    fn a_link_is_never_rotated() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("log"), folder.path().join("link"));
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let mut file = start(&link, 10, 2);
        file.write_all(b"one\ntwo\n").unwrap();
        file.write_all(b"three\n").unwrap();
        assert_eq!(contents(&path), "one\ntwo\nthree\n");
        assert!(!numbered(&link, 1).exists());
    }

    #[test]
    fn errors_say_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let error = |path: &Path| {
            let config = DecisionFile { path: path.to_owned(), max_bytes: 0, files: 1 };
            RotatingFile::open(config, Arc::default()).err().expect("it opens").to_string()
        };
        let missing = folder.path().join("missing/log");
        let expected = format!(
            "cannot open the decision log `{}`: No such file or directory (os error 2); create the folder `{}`",
            missing.display(),
            folder.path().join("missing").display()
        );
        assert_eq!(error(&missing), expected);
        assert!(error(folder.path()).ends_with("; `--decision-log-file` must name a file"), "{}", error(folder.path()));
    }

    #[test]
    fn a_pipe_takes_lines_without_a_reader() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        rustix::fs::mkfifoat(CWD, &path, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
        let mut file = start(&path, 10, 2);
        file.write_all(b"longer than its size\n").unwrap();
        let line = [&[b'x'; 4095][..], b"\n"].concat();
        let full = (0..1 << 20).find_map(|_| file.write(&line).err()).expect("it never fills up");
        assert_eq!(full.kind(), ErrorKind::WouldBlock);
        // A file at its path takes the lines from then on.
        fs::remove_file(&path).unwrap();
        file.reopen.store(true, Relaxed);
        assert!(file.write(b"line\n").is_ok());
        assert_eq!(contents(&path), "line\n");
    }
}
