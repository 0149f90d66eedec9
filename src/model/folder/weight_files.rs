//! The weights of a folder: one file, or the shards an index names.
//!
//! Nothing is believed before it is checked: the index may name only plain files of this folder,
//! each tensor must be in exactly the shard the index puts it in, and offsets, shapes and sizes are
//! verified by `safetensors` against the length of the file.
//!
//! Files are mapped to read their headers. Tensors are read a piece at a time: the pages of a map would
//! count as this process's memory, and a file that is cut short meanwhile would end it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensors};
use serde::Deserialize;

use super::layout::Source;
use super::tensors::{as_f32, malformed};
use super::{INDEX, WEIGHTS, packed};
use crate::config::PackedLayout;
use crate::model::ModelError;

/// The index of the largest published models is below this.
const MAX_INDEX_BYTES: u64 = 1 << 26;

/// model.safetensors.index.json; its metadata is for people.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Files and where in them each tensor lies.
pub(super) struct WeightFiles {
    files: Vec<(PathBuf, File)>,
    tensors: HashMap<String, Place>,
    /// What headers name as the layout of packed weights.
    layouts: Vec<(PathBuf, String)>,
}

struct Place {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// The weights' files, and the index where there is one.
pub(super) fn weight_paths(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let single = folder.join(WEIGHTS);
    // As in transformers, one file wins over an index.
    if single.exists() {
        return Ok(vec![single]);
    }
    let index = read_index(folder)?;
    let shards: BTreeSet<&String> = index.weight_map.values().collect();
    let shards = shards.into_iter().map(|shard| folder.join(shard));
    Ok(std::iter::once(folder.join(INDEX)).chain(shards).collect())
}

impl WeightFiles {
    pub(super) fn open(folder: &Path) -> Result<Self, ModelError> {
        let mut weights = Self {
            files: Vec::new(),
            tensors: HashMap::new(),
            layouts: Vec::new(),
        };
        let single = folder.join(WEIGHTS);
        if single.exists() {
            weights.add(single, |_| Ok(()))?;
            return Ok(weights);
        }
        let index = read_index(folder)?;
        let shards: BTreeSet<&String> = index.weight_map.values().collect();
        for shard in shards {
            weights.add(folder.join(shard), |name| {
                let message = match index.weight_map.get(name) {
                    Some(listed) if listed == shard => return Ok(()),
                    Some(listed) => format!("puts tensor `{name}` in {listed}, but {shard} has it"),
                    None => format!("does not list tensor `{name}`, which is in {shard}"),
                };
                Err(index_error(folder, message))
            })?;
        }
        let listed = index.weight_map.iter();
        for (name, shard) in listed {
            if !weights.tensors.contains_key(name) {
                let message = format!("puts tensor `{name}` in {shard}, which does not have it");
                return Err(index_error(folder, message));
            }
        }
        Ok(weights)
    }

    /// Maps a file and takes up its tensors, each once `accept` has seen its name.
    fn add(
        &mut self,
        path: PathBuf,
        accept: impl Fn(&str) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        let (file, map) = map(&path).map_err(ModelError::io(&path))?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(malformed(&path))?;
        // The data begins after the header and the eight bytes of its length.
        let data = header + 8;
        for (name, info) in metadata.tensors() {
            accept(&name)?;
            let place = Place {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: data + info.data_offsets.0,
                end: data + info.data_offsets.1,
            };
            self.tensors.insert(name, place);
        }
        let named = metadata.metadata().as_ref();
        if let Some(layout) = named.and_then(|names| names.get(packed::NAME_OF_LAYOUT)) {
            self.layouts.push((path.clone(), layout.clone()));
        }
        self.files.push((path, file));
        Ok(())
    }

    /// Shows the bytes of a tensor, so many whole elements at a time.
    fn pieces(
        &self,
        place: &Place,
        mut show: impl FnMut(&[u8]) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        let (path, file) = &self.files[place.file];
        let mut file = file;
        let mut left = place.end - place.start;
        let mut piece = vec![0; left.min(PIECE)];
        let io = ModelError::io;
        file.seek(SeekFrom::Start(place.start as u64))
            .map_err(io(path))?;
        while left > 0 {
            let count = left.min(PIECE);
            file.read_exact(&mut piece[..count]).map_err(io(path))?;
            show(&piece[..count])?;
            left -= count;
        }
        Ok(())
    }

    /// That no header names another layout of packed weights than config.json does.
    pub(super) fn check_layout(&self, expected: Option<PackedLayout>) -> Result<(), ModelError> {
        let expected = expected.map_or("none", PackedLayout::name);
        match self.layouts.iter().find(|(_, named)| named != expected) {
            Some((path, named)) => Err(ModelError::PackedLayout {
                path: path.clone(),
                named: named.clone(),
                expected: expected.to_string(),
            }),
            None => Ok(()),
        }
    }
}

impl Source for WeightFiles {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Some(self.tensors.get(name)?.shape.clone())
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        let place = self.tensors.get(name).ok_or_else(|| is_missing(name))?;
        if place.dtype != Dtype::U8 {
            return Err(ModelError::TensorMismatch {
                name: name.to_string(),
                expected: "U8".to_string(),
                found: format!("{:?}", place.dtype),
            });
        }
        let mut bytes = Vec::with_capacity(place.end - place.start);
        self.pieces(place, |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(bytes)
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let place = self.tensors.get(name).ok_or_else(|| is_missing(name))?;
        let mut values = Vec::with_capacity(place.shape.iter().product());
        self.pieces(place, |piece| as_f32(name, place.dtype, piece, &mut values))?;
        Ok(values)
    }
}

fn is_missing(name: &str) -> ModelError {
    ModelError::MissingTensor {
        name: name.to_string(),
    }
}

fn index_error(folder: &Path, message: String) -> ModelError {
    ModelError::Index {
        path: folder.join(INDEX),
        message,
    }
}

fn read_index(folder: &Path) -> Result<Index, ModelError> {
    let path = folder.join(INDEX);
    let io = ModelError::io;
    regular(&path).map_err(io(&path))?;
    let file = File::open(&path).map_err(io(&path))?;
    let mut bytes = Vec::new();
    file.take(MAX_INDEX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(io(&path))?;
    if bytes.len() as u64 > MAX_INDEX_BYTES {
        let message = format!("is larger than {MAX_INDEX_BYTES} bytes: not an index");
        return Err(index_error(folder, message));
    }
    let index: Index = serde_json::from_slice(&bytes)
        .map_err(|error| index_error(folder, format!("is not an index: {error}")))?;
    match index.weight_map.values().find(|name| !is_plain(name)) {
        Some(name) => Err(index_error(
            folder,
            format!("names {name:?}, which is not a safetensors file in this folder"),
        )),
        None if index.weight_map.is_empty() => {
            Err(index_error(folder, "lists no tensor".to_string()))
        }
        None => Ok(index),
    }
}

/// One name, not a path: an index says what is in the folder, not what is elsewhere.
fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let one = matches!(
        (components.next(), components.next()),
        (Some(Component::Normal(only)), None) if only == name
    );
    one && name.ends_with(".safetensors") && !name.contains(['\\', ':', '\0'])
}

/// A pipe or a device would be read for ever. Links are followed: a hub's cache is made of them.
pub(super) fn regular(path: &Path) -> std::io::Result<()> {
    if fs::metadata(path)?.is_file() {
        Ok(())
    } else {
        let kind = std::io::ErrorKind::InvalidInput;
        Err(std::io::Error::new(kind, "not a regular file"))
    }
}

#[allow(unsafe_code)]
fn map(path: &Path) -> std::io::Result<(File, Mmap)> {
    regular(path)?;
    let file = File::open(path)?;
    // SAFETY: a map is undefined behaviour only if the file changes under it. It is held while the
    // header is read; our own files are renamed into place when complete and never written to again.
    let map = unsafe { Mmap::map(&file) }?;
    Ok((file, map))
}

/// Bytes of a tensor that are read at a time: a multiple of every element's size.
const PIECE: usize = 1 << 20;
