//! Files that are old or new, never half: write beside, flush to the disk, rename over.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Replaces `path` with what `write` puts into the file it is given the path of. After a crash or a
/// full disk at any moment `path` holds either its former content or all of the new.
///
/// # Errors
/// Whatever the file system says; the half-written temporary is removed.
pub fn replace_at(path: &Path, write: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let temporary = temporary_beside(path);
    let renamed = write(&temporary)
        .and_then(|()| File::open(&temporary)?.sync_all())
        .and_then(|()| fs::rename(&temporary, path));
    if renamed.is_err() {
        // The error that matters is the one being returned.
        let _ = fs::remove_file(&temporary);
    }
    renamed?;
    sync_folder(parent(path))
}

/// [`replace_at`] for content that is written as a stream.
///
/// # Errors
/// As [`replace_at`].
pub fn replace(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    replace_at(path, |temporary| {
        let mut buffered = io::BufWriter::with_capacity(1 << 20, File::create(temporary)?);
        write(&mut buffered)?;
        buffered.flush()
    })
}

/// [`replace`] with bytes that are at hand.
///
/// # Errors
/// As [`replace`].
pub fn replace_with(path: &Path, content: impl AsRef<[u8]>) -> io::Result<()> {
    replace(path, |file| file.write_all(content.as_ref()))
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

fn parent(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// In the same folder, so that the rename stays within one file system; named after the process and
/// the write, so that two of them do not write into each other's file.
fn temporary_beside(path: &Path) -> PathBuf {
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let (process, write) = (std::process::id(), WRITES.fetch_add(1, Ordering::Relaxed));
    parent(path).join(format!(".{name}.{process}-{write}.tmp"))
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
}
