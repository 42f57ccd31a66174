//! Reads files of bounded size, and says what keeps a file from being created.

use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Reads a regular file of at most `limit` bytes. Other files are an error, because reading one,
/// such as a pipe without a writer, could block forever.
pub(crate) fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    // Opening a pipe would block too.
    let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut contents = Vec::new();
    file.take(limit + 1).read_to_end(&mut contents)?;
    if contents.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than the limit of {limit} bytes")));
    }
    Ok(contents)
}

/// The folder of `path`.
pub(crate) fn folder(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// What to do if creating a file at `path` fails with `kind` because of its folder.
pub(crate) fn folder_hint(path: &Path, kind: io::ErrorKind) -> Option<String> {
    let folder = folder(path);
    match kind {
        io::ErrorKind::NotFound if !folder.exists() => Some(format!("; create the folder `{}`", folder.display())),
        io::ErrorKind::PermissionDenied => Some(format!("; the agent's user must be able to write to the folder `{}`", folder.display())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_files_up_to_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("f");
        std::fs::write(&file, "1234").unwrap();
        assert_eq!(read(&file, 4).unwrap(), b"1234");
        assert!(read(&file, 3).unwrap_err().to_string().contains("larger than the limit of 3 bytes"));
    }

    #[test]
    fn rejects_what_is_not_a_regular_file() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
        for path in [pipe.as_path(), directory.path(), Path::new("/dev/zero")] {
            assert!(read(path, 10).unwrap_err().to_string().contains("not a regular file"), "{}", path.display());
        }
    }
}
