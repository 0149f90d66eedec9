//! Tokens and trained tokenizers on disk, so that the second run starts at once.
//!
//! An entry's name is the hash of everything that decides its contents, so an entry is never
//! stale: other data, another tokenizer or another split is another entry. What can happen is
//! that a file is damaged. Every entry therefore carries its key and the hashes of its parts; one
//! that does not check out is reported as [`Lookup::Damaged`] and made anew.
//!
//! Files are written beside their place, synced and renamed into it, so that a reader, or a crash,
//! never meets half a file. They are never changed afterwards, which is what makes it sound to map
//! them into memory.
//!
//! ```text
//! <folder>/tokens/<key>.safetensors          one tensor per stream, u16 or u32; metadata: key,
//!                                            hash per tensor, summary (JSON)
//! <folder>/tokens/<key>.tokenizer.json       {"key", "blake3", "tokenizer": tokenizer.json as text}
//! ```

use std::collections::HashMap;
use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use super::DataError;
use super::token_stream::{TokenStream, Width};
use crate::durable;

/// A folder of token files, or none.
#[derive(Debug, Clone)]
pub struct TokenCache {
    folder: Option<PathBuf>,
}

/// What a look into the cache found.
#[derive(Debug)]
pub enum Lookup<T> {
    /// The entry.
    Hit(T),
    /// No such entry.
    Miss,
    /// An entry that cannot be used, and why.
    Damaged(DataError),
}

/// Token streams by name, and a text that goes with them.
#[derive(Debug, Clone)]
pub struct TokenFile {
    /// What the owner wants to remember about the tokens.
    pub summary: String,
    /// The streams, mapped from the file.
    pub streams: HashMap<String, TokenStream>,
}

impl TokenCache {
    /// The user's cache: `$FIREBRICK_CACHE`, or `$XDG_CACHE_HOME/firebrick`, or
    /// `~/.cache/firebrick`. Without any of these variables there is no cache.
    pub fn from_environment() -> Self {
        let variable = |name| {
            env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let folder = variable("FIREBRICK_CACHE")
            .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("firebrick")))
            .or_else(|| Some(variable("HOME")?.join(".cache").join("firebrick")));
        Self {
            folder: folder.map(|folder| folder.join("tokens")),
        }
    }

    /// A cache in the folder `tokens` of this one, which is made when first written to.
    pub fn at(folder: &Path) -> Self {
        Self {
            folder: Some(folder.join("tokens")),
        }
    }

    /// Where entries are, if there is a cache.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// Looks up token streams.
    pub fn tokens(&self, key: &str) -> Lookup<TokenFile> {
        self.look_up(key, "safetensors", read_tokens)
    }

    /// Stores token streams and returns them as mapped from the file, so that the caller can let
    /// go of those in memory.
    pub fn store_tokens(
        &self,
        key: &str,
        summary: &str,
        streams: &[(String, TokenStream)],
    ) -> Result<TokenFile, DataError> {
        let path = self.write(key, "safetensors", |path| {
            write_tokens(path, key, summary, streams)
        })?;
        read_tokens(&path, key).map_err(|reason| damaged(&path, reason))
    }

    /// Looks up the tokenizer.json of a trained tokenizer.
    pub fn tokenizer(&self, key: &str) -> Lookup<String> {
        self.look_up(key, "tokenizer.json", read_tokenizer)
    }

    /// Stores the tokenizer.json of a trained tokenizer.
    pub fn store_tokenizer(&self, key: &str, tokenizer: &str) -> Result<(), DataError> {
        let entry = TokenizerEntry {
            key: key.to_string(),
            blake3: blake3::hash(tokenizer.as_bytes()).to_hex().to_string(),
            tokenizer: tokenizer.to_string(),
        };
        self.write(key, "tokenizer.json", |path| {
            let mut file = File::create(path)?;
            serde_json::to_writer(&mut file, &entry)?;
            file.flush()
        })?;
        Ok(())
    }

    fn look_up<T>(
        &self,
        key: &str,
        ending: &str,
        read: fn(&Path, &str) -> Result<T, String>,
    ) -> Lookup<T> {
        let Some(folder) = &self.folder else {
            return Lookup::Miss;
        };
        let path = folder.join(format!("{key}.{ending}"));
        if !path.exists() {
            return Lookup::Miss;
        }
        match read(&path, key) {
            Ok(entry) => Lookup::Hit(entry),
            Err(reason) => Lookup::Damaged(damaged(&path, reason)),
        }
    }

    /// Writes beside the entry's place, syncs, renames.
    fn write(
        &self,
        key: &str,
        ending: &str,
        contents: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<PathBuf, DataError> {
        let Some(folder) = &self.folder else {
            return Err(DataError::Cache {
                place: None,
                reason: "none of FIREBRICK_CACHE, XDG_CACHE_HOME and HOME is set".to_string(),
            });
        };
        fs::create_dir_all(folder).map_err(|error| damaged(folder, error.to_string()))?;
        // Several runs may write the same entry; the last rename wins, and all wrote the same thing.
        let path = folder.join(format!("{key}.{ending}"));
        durable::replace_at(&path, contents).map_err(|error| damaged(&path, error.to_string()))?;
        Ok(path)
    }
}

fn damaged(path: &Path, reason: String) -> DataError {
    DataError::Cache {
        place: Some(path.to_path_buf()),
        reason,
    }
}

#[derive(Serialize, Deserialize)]
struct TokenizerEntry {
    key: String,
    blake3: String,
    tokenizer: String,
}

fn read_tokenizer(path: &Path, key: &str) -> Result<String, String> {
    let contents = fs::read(path).map_err(|error| error.to_string())?;
    let entry: TokenizerEntry =
        serde_json::from_slice(&contents).map_err(|error| error.to_string())?;
    if entry.key != key {
        return Err("it holds another tokenizer than its name says".to_string());
    }
    if blake3::hash(entry.tokenizer.as_bytes()).to_hex().as_str() != entry.blake3 {
        return Err("its contents do not have the hash they had when written".to_string());
    }
    Ok(entry.tokenizer)
}

const KEY: &str = "key";
const SUMMARY: &str = "summary";

fn hash_name(stream: &str) -> String {
    format!("blake3.{stream}")
}

fn write_tokens(
    path: &Path,
    key: &str,
    summary: &str,
    streams: &[(String, TokenStream)],
) -> io::Result<()> {
    let mut metadata = HashMap::from([
        (KEY.to_string(), key.to_string()),
        (SUMMARY.to_string(), summary.to_string()),
    ]);
    let mut tensors = Vec::with_capacity(streams.len());
    for (name, stream) in streams {
        let hash = blake3::hash(stream.bytes()).to_hex().to_string();
        metadata.insert(hash_name(name), hash);
        let dtype = match stream.width() {
            Width::U16 => Dtype::U16,
            Width::U32 => Dtype::U32,
        };
        let tensor =
            TensorView::new(dtype, vec![stream.len()], stream.bytes()).map_err(io::Error::other)?;
        tensors.push((name, tensor));
    }
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(io::Error::other)
}

fn read_tokens(path: &Path, key: &str) -> Result<TokenFile, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let map = Arc::new(map(&file).map_err(|error| error.to_string())?);
    let bytes: &[u8] = &map;
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let metadata = header.metadata().clone().unwrap_or_default();
    if metadata.get(KEY).map(String::as_str) != Some(key) {
        return Err("it holds other tokens than its name says".to_string());
    }
    let mut streams = HashMap::new();
    for (name, tensor) in tensors.iter() {
        let width = match tensor.dtype() {
            Dtype::U16 => Width::U16,
            Dtype::U32 => Width::U32,
            other => return Err(format!("`{name}` is {other:?}, not U16 or U32")),
        };
        let hash = blake3::hash(tensor.data()).to_hex();
        if metadata.get(&hash_name(name)).map(String::as_str) != Some(hash.as_str()) {
            return Err(format!(
                "`{name}` does not have the hash it had when written"
            ));
        }
        // The tensor's data is a part of the map, so this does not go below 0.
        let start = tensor.data().as_ptr() as usize - bytes.as_ptr() as usize;
        let range = start..start + tensor.data().len();
        streams.insert(
            name.to_string(),
            TokenStream::new(map.clone(), range, width),
        );
    }
    let summary = metadata.get(SUMMARY).cloned().unwrap_or_default();
    Ok(TokenFile { summary, streams })
}

#[allow(unsafe_code)]
fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: a map is undefined behaviour only if the file changes under it. Entries are renamed
    // into place when complete and never written to again; replacing or deleting one leaves the
    // mapped inode as it is.
    unsafe { Mmap::map(file) }
}
