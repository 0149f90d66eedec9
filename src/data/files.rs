//! From the paths in the config to files: globs, order, hashes, UTF-8.
//!
//! The order of the files is the order of the text, so it must be the same on every machine:
//! the matches of all patterns of a dataset are put together, sorted by name and each file is
//! taken once, also when two patterns or two links lead to it. As in a shell, wildcards do not
//! match names that start with a dot, so `**/*.md` does not wander into `.git`.
//!
//! Every file is hashed before anything else is done with it. The hashes name the data in
//! run.json and are the key under which its tokens are cached.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::DataError;

/// One input file, as run.json records it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// The path, relative to the working directory where the config has it so.
    pub path: PathBuf,
    /// Size in bytes.
    pub bytes: u64,
    /// BLAKE3 of the bytes, in hex.
    pub blake3: String,
}

impl FileRecord {
    /// Reads a file once to hash it. Memory: one buffer, whatever the file's size.
    pub fn survey(path: &Path) -> Result<Self, DataError> {
        let unreadable = |source| DataError::Unreadable {
            path: path.to_path_buf(),
            source,
        };
        let mut file = File::open(path).map_err(unreadable)?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; 1 << 20];
        let mut bytes = 0;
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    hasher.update(&buffer[..n]);
                    bytes += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(unreadable(error)),
            }
        }
        Ok(Self {
            path: path.to_path_buf(),
            bytes,
            blake3: hasher.finalize().to_hex().to_string(),
        })
    }

    /// The file's text. An error if its bytes are no longer those that were hashed, because the
    /// tokens would then be cached under the hash of other data.
    pub(super) fn read_text(&self) -> Result<Text, DataError> {
        let bytes = fs::read(&self.path).map_err(|source| DataError::Unreadable {
            path: self.path.clone(),
            source,
        })?;
        if blake3::hash(&bytes).to_hex().as_str() != self.blake3 {
            return Err(DataError::Changed {
                path: self.path.clone(),
            });
        }
        decode(bytes, &self.path)
    }
}

/// The decoded contents of a file.
pub(super) struct Text {
    /// The text, line ends as they are, without a byte order mark.
    pub(super) text: String,
    /// Whether there was a byte order mark.
    pub(super) byte_order_mark: bool,
}

fn decode(bytes: Vec<u8>, path: &Path) -> Result<Text, DataError> {
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        let bytes = error.as_bytes();
        DataError::NotUtf8 {
            path: path.to_path_buf(),
            line: 1 + bytes[..offset].iter().filter(|&&b| b == b'\n').count(),
            offset,
            // valid_up_to is the index of a byte that is not valid, so it exists.
            byte: bytes[offset],
            utf16: bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]),
        }
    })?;
    let byte_order_mark = text.starts_with('\u{feff}');
    if byte_order_mark {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(Text {
        text,
        byte_order_mark,
    })
}

/// The files that `patterns` name: sorted, each once. Every pattern must match something.
pub fn expand(patterns: &[String]) -> Result<Vec<PathBuf>, DataError> {
    let mut found = Vec::new();
    for pattern in patterns {
        let path = Path::new(pattern);
        // A file may really be called `a[1].txt`: what exists is meant literally.
        if path.exists() || !has_wildcard(pattern) {
            found.push(existing_file(path)?);
        } else {
            found.extend(matches(pattern)?);
        }
    }
    found.sort();
    let mut seen = HashSet::new();
    let mut files = Vec::with_capacity(found.len());
    for path in found {
        let identity = fs::canonicalize(&path).map_err(|source| DataError::Unreadable {
            path: path.clone(),
            source,
        })?;
        if seen.insert(identity) {
            files.push(path);
        }
    }
    Ok(files)
}

/// The path of one file that must exist, `./` taken off so that it sorts with its siblings.
pub(super) fn existing_file(path: &Path) -> Result<PathBuf, DataError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Err(DataError::IsDirectory {
            path: path.to_path_buf(),
        }),
        // A pipe or a device would be read for ever, or only once.
        Ok(metadata) if !metadata.is_file() => Err(DataError::Unreadable {
            path: path.to_path_buf(),
            source: io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"),
        }),
        Ok(_) => Ok(path.strip_prefix(".").unwrap_or(path).to_path_buf()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(DataError::Missing {
            path: path.to_path_buf(),
            directory: working_directory(),
        }),
        Err(source) => Err(DataError::Unreadable {
            path: path.to_path_buf(),
            source,
        }),
    }
}

fn matches(pattern: &str) -> Result<Vec<PathBuf>, DataError> {
    let options = glob::MatchOptions {
        case_sensitive: true,
        require_literal_separator: true,
        require_literal_leading_dot: true,
    };
    let entries = glob::glob_with(pattern, options).map_err(|error| DataError::BadPattern {
        pattern: pattern.to_string(),
        position: error.pos,
        reason: error.msg,
    })?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| DataError::Unreadable {
            path: error.path().to_path_buf(),
            source: error.into(),
        })?;
        // `docs/**` matches folders too; the files in them are what is meant.
        if !path.is_dir() {
            found.push(existing_file(&path)?);
        }
    }
    if found.is_empty() {
        return Err(DataError::NoMatch {
            pattern: pattern.to_string(),
            directory: working_directory(),
        });
    }
    Ok(found)
}

fn has_wildcard(pattern: &str) -> bool {
    pattern.contains(['*', '?', '['])
}

/// Where relative paths start, for messages.
pub(super) fn working_directory() -> PathBuf {
    std::env::current_dir().unwrap_or_else(|_| PathBuf::from("."))
}
