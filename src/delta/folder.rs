//! One model folder as the difference from another, byte for byte.
//!
//! A safetensors file is its header and its tensors; any other file is one tensor of bytes. Names are
//! `file#header`, `file:tensor` and `file`. A tensor is held against its namesake in the base, wherever that lies: a
//! fine-tune may be cut into other shards than its base.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::chunk::chunk_bytes;
use super::read::open;
use super::write::write_files;
use super::{DeltaError, Options, Parent, Source, TensorInfo, Written, restore};
use crate::durable;

/// What a header's length is written in.
const PREFIX: u64 = 8;
/// What safetensors allows a header.
const MOST_HEADER: u64 = 100_000_000;
/// Folders of a run that are no part of its model.
const OF_RUN: [&str; 3] = ["checkpoints", "logs", "tb"];

/// The files of a folder as a state.
pub struct Folder {
    path: PathBuf,
    files: Vec<OpenFile>,
    tensors: HashMap<String, Place>,
    /// Where in the folder tensors of a name lie, the first by file.
    namesakes: HashMap<String, String>,
}

struct OpenFile {
    /// Relative, with `/`.
    name: String,
    path: PathBuf,
    file: File,
    /// In the order of its bytes.
    tensors: Vec<String>,
}

struct Place {
    info: TensorInfo,
    /// In safetensors files, the name without the file's.
    plain: Option<String>,
    file: usize,
    start: u64,
}

impl Folder {
    /// Takes up all files of a folder but hidden ones, and in a run's folder the run's own.
    ///
    /// # Errors
    /// A file that cannot be read; a .safetensors file that is none.
    pub fn open(path: &Path) -> Result<Self, DeltaError> {
        let mut names = Vec::new();
        let is_run = path.join("run.json").exists();
        list(path, "", is_run, &mut names)?;
        names.sort_unstable();
        let mut folder = Self {
            path: path.to_path_buf(),
            files: Vec::new(),
            tensors: HashMap::new(),
            namesakes: HashMap::new(),
        };
        for name in names {
            folder.add(name)?;
        }
        Ok(folder)
    }

    fn add(&mut self, name: String) -> Result<(), DeltaError> {
        let path = self.path.join(&name);
        let file = File::open(&path).map_err(DeltaError::io(&path))?;
        let length = file.metadata().map_err(DeltaError::io(&path))?.len();
        let (mut header, mut inside) = (length, Vec::new());
        if name.ends_with(".safetensors") {
            (header, inside) = contents(&path, &file, length)?;
        }
        let own = if inside.is_empty() {
            name.clone()
        } else {
            format!("{name}#header")
        };
        let mut tensors = Vec::with_capacity(inside.len() + 1);
        let place = self.files.len();
        let mut put = |name: String, plain: Option<String>, dtype, shape, start| {
            let info = TensorInfo {
                name: name.clone(),
                dtype,
                shape,
            };
            let file = place;
            tensors.push(name.clone());
            self.tensors.insert(
                name,
                Place {
                    info,
                    plain,
                    file,
                    start,
                },
            );
        };
        put(own, None, Dtype::U8, vec![header as usize], 0);
        for (tensor, dtype, shape, start) in inside {
            let own = format!("{name}:{tensor}");
            self.namesakes.entry(tensor.clone()).or_insert(own.clone());
            put(own, Some(tensor), dtype, shape, header + start);
        }
        self.files.push(OpenFile {
            name,
            path,
            file,
            tensors,
        });
        Ok(())
    }

    /// What each tensor of `child` is held against here, where that has another name.
    fn names_for(&self, child: &Self) -> HashMap<String, String> {
        let moved = child
            .tensors
            .iter()
            .filter(|(name, _)| !self.tensors.contains_key(*name));
        let found = moved.filter_map(|(name, place)| {
            let here = self.namesakes.get(place.plain.as_ref()?)?;
            Some((name.clone(), here.clone()))
        });
        found.collect()
    }
}

impl Source for Folder {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.tensors
            .values()
            .map(|place| place.info.clone())
            .collect()
    }

    fn read(&self, names: &[&str], chunk: usize) -> Result<Vec<Cow<'_, [u8]>>, DeltaError> {
        let read = names.iter().map(|&name| {
            let Place {
                info, file, start, ..
            } = &self.tensors[name];
            let length = chunk_bytes(info.dtype);
            let total = info.bytes().unwrap_or(0);
            let mut bytes = vec![0; length.min(total - chunk * length)];
            let OpenFile { file, path, .. } = &self.files[*file];
            let at = start + (chunk * length) as u64;
            durable::read_at(file, at, &mut bytes).map_err(DeltaError::io(path))?;
            Ok(Cow::Owned(bytes))
        });
        read.collect()
    }

    fn describe(&self) -> String {
        self.path.display().to_string()
    }
}

/// Files below `folder`, relative to it, with `/`.
fn list(
    folder: &Path,
    prefix: &str,
    is_run: bool,
    names: &mut Vec<String>,
) -> Result<(), DeltaError> {
    let io = || DeltaError::io(folder);
    for entry in fs::read_dir(folder).map_err(io())? {
        let path = entry.map_err(io())?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.starts_with('.') {
            continue;
        }
        // Links to files are followed: the cache of a hub is made of them.
        let kind = fs::metadata(&path).map_err(DeltaError::io(&path))?;
        let relative = format!("{prefix}{name}");
        if kind.is_file() {
            if name.contains('\\') || path.file_name().is_some_and(|name| name.to_str().is_none()) {
                return Err(DeltaError::header(
                    &path,
                    "it has a name that other systems cannot have",
                ));
            }
            names.push(relative);
        } else if !kind.is_dir() {
            return Err(DeltaError::header(
                &path,
                "it is neither a file nor a folder",
            ));
        } else if path.is_symlink() {
            // It may lead back here.
            return Err(DeltaError::header(
                &path,
                "it is a link to a folder: name that folder, or copy it",
            ));
        } else if !(is_run && OF_RUN.contains(&name.as_str())) {
            list(&path, &format!("{relative}/"), false, names)?;
        }
    }
    Ok(())
}

/// The tensors of a safetensors file in the order of their bytes: names, types, shapes, and where they begin after the
/// header, whose length with what comes before it is returned first.
type Contents = (u64, Vec<(String, Dtype, Vec<usize>, u64)>);

fn contents(path: &Path, file: &File, length: u64) -> Result<Contents, DeltaError> {
    let malformed = |source| DeltaError::Safetensors {
        path: path.to_path_buf(),
        source,
    };
    use safetensors::SafeTensorError as Error;
    let mut prefix = [0; PREFIX as usize];
    if length < PREFIX {
        return Err(malformed(Error::HeaderTooSmall));
    }
    durable::read_at(file, 0, &mut prefix).map_err(DeltaError::io(path))?;
    let header = u64::from_le_bytes(prefix);
    if header > MOST_HEADER {
        return Err(malformed(Error::HeaderTooLarge));
    }
    if header > length - PREFIX {
        return Err(malformed(Error::InvalidHeaderLength));
    }
    let mut text = vec![0; header as usize];
    durable::read_at(file, PREFIX, &mut text).map_err(DeltaError::io(path))?;
    let metadata: Metadata = serde_json::from_slice(&text)
        .map_err(|error| malformed(Error::InvalidHeaderDeserialization(error)))?;
    let tensors = metadata.tensors().into_iter();
    let mut tensors: Vec<_> = tensors
        .map(|(name, info)| {
            (
                name,
                info.dtype,
                info.shape.clone(),
                info.data_offsets.0 as u64,
                info.data_offsets.1,
            )
        })
        .collect();
    // Empty tensors begin where the next one does.
    tensors.sort_by_key(|(_, _, _, start, end)| (*start, *end));
    let end = tensors.last().map_or(0, |(.., end)| *end as u64);
    if PREFIX + header + end != length {
        return Err(malformed(Error::MetadataIncompleteBuffer));
    }
    let tensors = tensors
        .into_iter()
        .map(|(name, dtype, shape, start, _)| (name, dtype, shape, start));
    Ok((PREFIX + header, tensors.collect()))
}

/// Writes `tuned` as the difference from `base` to a new file, and reads it back.
///
/// # Errors
/// Either folder's; a file of that name; the file system's.
pub fn make(
    base: &Path,
    tuned: &Path,
    out: &Path,
    options: &Options,
) -> Result<Written, DeltaError> {
    if out.exists() {
        let exists = std::io::ErrorKind::AlreadyExists.into();
        return Err(DeltaError::io(out)(exists));
    }
    let (base, tuned) = (Folder::open(base)?, Folder::open(tuned)?);
    let files = tuned
        .files
        .iter()
        .map(|file| (file.name.clone(), file.tensors.clone()));
    let files = files.collect();
    let parent = Parent {
        names: base.names_for(&tuned),
        source: &base,
        name: None,
        known: None,
    };
    let mut written = None;
    let replaced = durable::replace_made(out, |temporary| {
        written = Some(write_files(
            temporary,
            Some(&parent),
            &tuned,
            options,
            files,
        )?);
        let delta = open(temporary)?.beside(Some(Box::new(&base)))?;
        restore(&delta, |_| true, |_, _| Ok(()))
    });
    replaced.map_err(|error| match error {
        durable::Failed::Making(error) => error,
        durable::Failed::Replacing(error) => DeltaError::io(out)(error),
    })?;
    Ok(written.expect("it was written before it was read"))
}

/// Makes the folder that a difference was made from, out of its base: all of it, or nothing.
///
/// # Errors
/// A base that is not the one it was made from; a damaged file; a folder that holds something; the file system's.
pub fn apply(base: &Path, delta: &Path, out: &Path) -> Result<Vec<PathBuf>, DeltaError> {
    let empty = match fs::read_dir(out).map(|mut entries| entries.next().is_none()) {
        Ok(empty) => Some(empty),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(DeltaError::io(out)(error)),
    };
    if empty == Some(false) {
        return Err(DeltaError::io(out)(
            std::io::ErrorKind::DirectoryNotEmpty.into(),
        ));
    }
    let opened = open(delta)?;
    let files = opened.files();
    check_paths(delta, &files)?;
    let delta = opened.beside(Some(Box::new(Folder::open(base)?)))?;
    let temporary = durable::temporary_beside(out);
    let made = fill(&delta, &files, &temporary).and_then(|()| {
        if empty.is_some() {
            fs::remove_dir(out).map_err(DeltaError::io(out))?;
        }
        durable::rename(&temporary, out).map_err(DeltaError::io(out))
    });
    if made.is_err() {
        // The error that matters is the one being returned.
        let _ = fs::remove_dir_all(&temporary);
    }
    made?;
    durable::sync_folder(durable::parent(out)).map_err(DeltaError::io(out))?;
    Ok(files.iter().map(|(path, _)| out.join(path)).collect())
}

/// Paths of a file from elsewhere: below the folder they are meant for, each once.
fn check_paths(delta: &Path, files: &[(String, Vec<String>)]) -> Result<(), DeltaError> {
    if files.is_empty() {
        return Err(DeltaError::header(
            delta,
            "it is the difference of a run's states, and not of folders",
        ));
    }
    let mut seen = HashSet::new();
    for (path, _) in files {
        let mut parts = Path::new(path).components();
        let is_below = parts.all(|part| matches!(part, Component::Normal(_)));
        let is_plain = !path.is_empty() && !path.contains(['\\', '\0', ':']);
        if !is_below || !is_plain || !seen.insert(path) {
            return Err(DeltaError::header(
                delta,
                format!("it has a file with the path {path:?}"),
            ));
        }
    }
    Ok(())
}

fn fill(
    delta: &super::Delta,
    files: &[(String, Vec<String>)],
    out: &Path,
) -> Result<(), DeltaError> {
    let infos: HashMap<String, TensorInfo> = delta
        .tensors()
        .into_iter()
        .map(|info| (info.name.clone(), info))
        .collect();
    // Where each tensor goes: perhaps to several places.
    let mut places: BTreeMap<&str, Vec<(usize, u64)>> = BTreeMap::new();
    let mut open = Vec::with_capacity(files.len());
    for (i, (name, tensors)) in files.iter().enumerate() {
        let mut at = 0;
        for tensor in tensors {
            places.entry(tensor).or_default().push((i, at));
            at += infos[tensor].bytes().unwrap_or(0) as u64;
        }
        let path = out.join(name);
        durable::create_folder(durable::parent(&path)).map_err(DeltaError::io(&path))?;
        open.push(durable::Scattered::create(&path).map_err(DeltaError::io(&path))?);
    }
    let mut done: HashMap<String, u64> = HashMap::new();
    restore(
        delta,
        |_| true,
        |info, bytes| {
            let at = done.entry(info.name.clone()).or_default();
            for &(file, start) in places.get(info.name.as_str()).into_iter().flatten() {
                let file = &mut open[file];
                file.write_at(start + *at, bytes)
                    .map_err(DeltaError::io(file.path()))?;
            }
            *at += bytes.len() as u64;
            Ok(())
        },
    )?;
    for file in open {
        let path = file.path().to_path_buf();
        file.finish().map_err(DeltaError::io(path))?;
    }
    Ok(())
}
