//! Files that are old or new, never half: write beside, flush to the disk, rename over.
//!
//! Everything that changes a run folder goes through here, each change one function, so that tests
//! can look at the folder after every single one: a kill comes between two of them, or in the
//! middle of a write.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// A change that was just made to the file system.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(test), expect(dead_code, reason = "only tests look at changes"))]
pub(crate) enum Change<'a> {
    /// Content was added to a file; a kill can leave any part of it.
    Written(&'a Path),
    /// Something appeared, moved or went, at once.
    Named,
}

#[cfg(not(test))]
fn changed(_change: Change) {}

#[cfg(test)]
use watch::changed;

/// Replaces `path` with what `write` puts into the file it is given the path of. After a crash or a
/// full disk at any moment `path` holds either its former content or all of the new.
///
/// # Errors
/// Whatever the file system says; the half-written temporary is removed.
pub fn replace_at(path: &Path, write: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let temporary = temporary_beside(path);
    let renamed = write(&temporary)
        .and_then(|()| File::open(&temporary)?.sync_all())
        .and_then(|()| rename(&temporary, path));
    if renamed.is_err() {
        // The error that matters is the one being returned.
        let _ = fs::remove_file(&temporary);
    }
    renamed?;
    sync_folder(parent(path))
}

/// Why a file was not replaced.
#[derive(Debug)]
pub(crate) enum Failed<E> {
    /// What was to be its content could not be made.
    Making(E),
    /// The file system's.
    Replacing(io::Error),
}

/// [`replace_at`] for content whose making can fail in more ways than a write.
pub(crate) fn replace_made<E>(
    path: &Path,
    make: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), Failed<E>> {
    let mut failure = None;
    let replaced = replace_at(path, |temporary| {
        make(temporary).map_err(|error| {
            failure = Some(error);
            io::Error::other("not made")
        })
    });
    match (failure, replaced) {
        (Some(error), _) => Err(Failed::Making(error)),
        (None, Err(error)) => Err(Failed::Replacing(error)),
        (None, Ok(())) => Ok(()),
    }
}

/// [`replace_at`] for content that is written as a stream.
///
/// # Errors
/// As [`replace_at`].
pub fn replace(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    replace_at(path, |temporary| create(temporary, write).map(drop))
}

/// Creates a file, or empties it, and streams its content. Not flushed to the disk yet.
///
/// # Errors
/// Whatever the file system says.
pub fn create(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<File> {
    let mut buffered = io::BufWriter::with_capacity(1 << 20, File::create(path)?);
    changed(Change::Named);
    write(&mut buffered)?;
    let file = buffered.into_inner().map_err(|error| error.into_error())?;
    changed(Change::Written(path));
    Ok(file)
}

/// A file whose beginning is written last, when what comes after it is known.
pub(crate) struct Draft {
    path: PathBuf,
    file: io::BufWriter<File>,
    length: u64,
}

impl Draft {
    /// Creates a file, or empties it.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let file = io::BufWriter::with_capacity(1 << 20, File::create(path)?);
        changed(Change::Named);
        Ok(Self {
            path: path.to_path_buf(),
            file,
            length: 0,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves room, of a file that is still empty.
    pub(crate) fn skip(&mut self, length: u64) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(length))?;
        self.length = length;
        Ok(())
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Writes the beginning, in the room that was left, and flushes all to the disk. Returns the file's length.
    pub(crate) fn finish(self, start: &[u8]) -> io::Result<u64> {
        let mut file = self.file.into_inner().map_err(|error| error.into_error())?;
        changed(Change::Written(&self.path));
        file.seek(SeekFrom::Start(0))?;
        file.write_all(start)?;
        changed(Change::Written(&self.path));
        file.sync_all()?;
        Ok(self.length.max(start.len() as u64))
    }
}

/// A file that is written in pieces, in any order.
pub(crate) struct Scattered {
    path: PathBuf,
    file: File,
}

impl Scattered {
    /// Creates a file, or empties it.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let file = File::create(path)?;
        changed(Change::Named);
        Ok(Self {
            path: path.to_path_buf(),
            file,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(at))?;
        self.file.write_all(bytes)
    }

    /// Flushes it to the disk.
    pub(crate) fn finish(self) -> io::Result<()> {
        changed(Change::Written(&self.path));
        self.file.sync_all()
    }
}

/// Fills `bytes` from a place in a file, whatever else reads it at the same time.
#[cfg(unix)]
pub(crate) fn read_at(file: &File, at: u64, bytes: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

/// Fills `bytes` from a place in a file, whatever else reads it at the same time.
#[cfg(windows)]
pub(crate) fn read_at(file: &File, mut at: u64, mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let read = std::os::windows::fs::FileExt::seek_read(file, bytes, at)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes = &mut bytes[read..];
        at += read as u64;
    }
    Ok(())
}

/// Appends to a file that was opened for it, with one write: a kill can leave a part of `content`.
///
/// # Errors
/// Whatever the file system says.
pub fn append(file: &mut File, path: &Path, content: &[u8]) -> io::Result<()> {
    if !content.is_empty() {
        file.write_all(content)?;
        changed(Change::Written(path));
    }
    Ok(())
}

/// [`replace`] with bytes that are at hand.
///
/// # Errors
/// As [`replace`].
pub fn replace_with(path: &Path, content: impl AsRef<[u8]>) -> io::Result<()> {
    replace(path, |file| file.write_all(content.as_ref()))
}

/// Renames a file or a folder.
///
/// # Errors
/// Whatever the file system says.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    changed(Change::Named);
    Ok(())
}

/// Makes a folder and those above it.
///
/// # Errors
/// Whatever the file system says.
pub fn create_folder(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    changed(Change::Named);
    Ok(())
}

/// What a person can do about a file system error, where its kind says enough.
pub fn help(error: &io::Error) -> Option<&'static str> {
    match error.kind() {
        io::ErrorKind::AlreadyExists => Some("choose another name, or move the old file away"),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Some("choose a folder that you may write to, or change its permissions")
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            Some("make room, or choose a folder on a larger disk; what was saved before is intact")
        }
        io::ErrorKind::NotADirectory => {
            Some("a file is where a folder is needed: choose another path")
        }
        _ => None,
    }
}

/// Deletes a file; one that is not there is as good as deleted.
///
/// # Errors
/// Whatever the file system says.
pub fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => {
            changed(Change::Named);
            Ok(())
        }
    }
}

/// Deletes a folder with what is in it, entry by entry.
///
/// # Errors
/// Whatever the file system says.
pub fn remove_folder(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_folder(&entry.path())?;
        } else {
            remove_file(&entry.path())?;
        }
    }
    fs::remove_dir(path)?;
    changed(Change::Named);
    Ok(())
}

/// Deletes the temporaries that processes which were killed in the middle of [`replace_at`] left
/// in a folder. The caller sees to it that no other process is writing there. An absent folder has
/// none.
///
/// # Errors
/// Whatever the file system says.
pub fn sweep(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if is_temporary(&entry.file_name().to_string_lossy()) && entry.file_type()?.is_file() {
            remove_file(&entry.path())?;
        }
    }
    Ok(())
}

/// Makes renames in a folder survive a power failure.
///
/// # Errors
/// Whatever the file system says.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    // Only Unix can open a folder as a file; elsewhere the rename itself is all there is.
    if cfg!(unix) {
        File::open(folder)?.sync_all()
    } else {
        Ok(())
    }
}

/// The folder that a path is in.
pub(crate) fn parent(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// In the same folder, so that the rename stays within one file system; named after the process and
/// the write, so that two of them do not write into each other's file.
pub(crate) fn temporary_beside(path: &Path) -> PathBuf {
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let (process, write) = (std::process::id(), WRITES.fetch_add(1, Ordering::Relaxed));
    parent(path).join(format!(".{name}.{process}-{write}.tmp"))
}

/// Whether a file name is one that [`replace_at`] gives its temporaries: `.name.12-3.tmp`.
pub fn is_temporary(name: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    name.starts_with('.')
        && name
            .strip_suffix(".tmp")
            .and_then(|rest| rest.rsplit_once('.'))
            .and_then(|(_, numbers)| numbers.split_once('-'))
            .is_some_and(|(process, write)| number(process) && number(write))
}

/// Lets a test look at the file system after every change this thread makes to it.
#[cfg(test)]
pub(crate) mod watch {
    use std::cell::RefCell;

    use super::Change;

    type Watcher = Box<dyn FnMut(Change)>;

    thread_local! {
        static WATCHER: RefCell<Option<Watcher>> = const { RefCell::new(None) };
    }

    /// Calls `watcher` after every change that `body` makes.
    pub(crate) fn watching<T>(
        watcher: impl FnMut(Change) + 'static,
        body: impl FnOnce() -> T,
    ) -> T {
        WATCHER.set(Some(Box::new(watcher)));
        let result = body();
        WATCHER.set(None);
        result
    }

    pub(super) fn changed(change: Change) {
        WATCHER.with_borrow_mut(|watcher| {
            if let Some(watcher) = watcher {
                watcher(change);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_content_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        replace_with(&path, "old").unwrap();
        let failed = replace(&path, |file| {
            file.write_all(b"half of the n")?;
            Err(io::Error::other("disk full"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn r10_temporaries_that_a_kill_left_are_swept_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let left = temporary_beside(&path("model.safetensors"));
        let others = [".a.tmp", ".a.1-.tmp", "a.1-2.tmp", ".lock", ".a.1-2.tmp.x"];
        for name in others.iter().map(|name| path(name)).chain([left.clone()]) {
            fs::write(name, "half").unwrap();
        }
        sweep(folder.path()).unwrap();
        assert!(!left.exists());
        assert!(others.iter().all(|name| path(name).exists()));
        sweep(&path("absent")).unwrap();
    }
}
