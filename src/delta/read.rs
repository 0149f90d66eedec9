//! Reading a difference: its tensors, chunk by chunk, out of its parent's.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use firebrick_kernels::lossy::Factors;
use rayon::prelude::*;

use super::chunk::{self, Codec, Known, Scratch, chunk_bytes, width};
use super::container::Reader;
use super::hash::{of_chunk, of_chunks};
use super::index::{Rule, state_id};
use super::lossy::{Basis, LossRecord};
use super::predict::Prediction;
use super::product;
use super::write::{Moments, StateHashes};
use super::{DeltaError, Source, TensorInfo};

/// A state that a file tells, beside a parent or alone.
pub struct Delta<'a> {
    reader: Reader,
    parent: Option<Box<dyn Source + 'a>>,
    tensors: HashMap<String, Place>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    tensor: usize,
    /// The section, and which of its tensors this is; none of what is the parent's as it is.
    coded: Option<(usize, usize)>,
}

impl std::fmt::Debug for Delta<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Delta")
            .field("path", &self.reader.path)
            .finish_non_exhaustive()
    }
}

/// A difference's header, checked, without a parent yet.
#[derive(Debug)]
pub struct Opened(Reader);

/// Opens a difference and checks its header and tables.
///
/// # Errors
/// A file that cannot be read, or is not what it should be.
pub fn open(path: &Path) -> Result<Opened, DeltaError> {
    Reader::open(path).map(Opened)
}

impl Opened {
    /// The id of the state it is a difference from.
    pub fn parent_id(&self) -> Option<&str> {
        self.0.index.parent.as_deref()
    }

    /// What to look for that state by.
    pub fn parent_name(&self) -> Option<&str> {
        self.0.index.parent_name.as_deref()
    }

    /// The state it makes.
    pub fn state(&self) -> StateHashes {
        let tensors = self.0.index.tensors.iter();
        StateHashes {
            id: self.0.index.result.clone(),
            tensors: tensors
                .map(|entry| (entry.name.clone(), entry.blake3.clone()))
                .collect(),
        }
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.0.length
    }

    /// Bytes of the state's tensors.
    pub fn state_bytes(&self) -> u64 {
        let tensors = self.0.index.tensors.iter();
        let bytes = tensors.filter_map(|entry| entry.info().bytes());
        bytes.map(|bytes| bytes as u64).fold(0, u64::saturating_add)
    }

    /// Chunks by codec.
    pub fn codecs(&self) -> BTreeMap<String, u64> {
        let mut codecs = BTreeMap::new();
        for section in &self.0.index.sections {
            for (name, count) in &section.codecs {
                *codecs.entry(name.clone()).or_default() += count;
            }
        }
        codecs
    }

    /// The tensors that are not what they were, and by how much.
    pub fn lossy(&self) -> BTreeMap<String, LossRecord> {
        let tensors = self.0.index.tensors.iter();
        let lossy = tensors.filter_map(|entry| Some((entry.name.clone(), entry.lossy?)));
        lossy.collect()
    }

    /// Files that tensors are put together to: relative paths, and tensors in order.
    pub(super) fn files(&self) -> Vec<(String, Vec<String>)> {
        let Reader { index, .. } = &self.0;
        let name = |&tensor: &usize| index.tensors[tensor].name.clone();
        let files = index.files.iter();
        files
            .map(|file| (file.path.clone(), file.tensors.iter().map(name).collect()))
            .collect()
    }

    /// With its parent, which has to have the tensors that it is held against. Whether they are the right ones shows when
    /// what they lead to is hashed.
    ///
    /// # Errors
    /// No parent where one is needed; a parent without a tensor that is needed, or with another.
    pub fn beside<'a>(self, parent: Option<Box<dyn Source + 'a>>) -> Result<Delta<'a>, DeltaError> {
        let Self(reader) = self;
        let index = &reader.index;
        let infos: HashMap<String, TensorInfo> = match &parent {
            None => HashMap::new(),
            Some(parent) => {
                let tensors = parent.tensors().into_iter();
                tensors.map(|info| (info.name.clone(), info)).collect()
            }
        };
        let described = parent
            .as_ref()
            .map_or("nothing".to_string(), |parent| parent.describe());
        for entry in &index.tensors {
            let Some(name) = &entry.parent else { continue };
            let message = match infos.get(name) {
                None => format!("it has no tensor `{name}`"),
                Some(info) if !info.is_like(&entry.info()) => {
                    format!("tensor `{name}` is {} {:?} there", info.dtype, info.shape)
                }
                Some(_) => continue,
            };
            return Err(DeltaError::OtherParent {
                path: reader.path.clone(),
                parent: described,
                message,
            });
        }
        let mut tensors: HashMap<String, Place> = index
            .tensors
            .iter()
            .enumerate()
            .map(|(tensor, entry)| {
                (
                    entry.name.clone(),
                    Place {
                        tensor,
                        coded: None,
                    },
                )
            })
            .collect();
        for (section, described) in index.sections.iter().enumerate() {
            for (i, &tensor) in described.tensors.iter().enumerate() {
                let place = Place {
                    tensor,
                    coded: Some((section, i)),
                };
                tensors.insert(index.tensors[tensor].name.clone(), place);
            }
        }
        Ok(Delta {
            reader,
            parent,
            tensors,
        })
    }
}

impl Delta<'_> {
    /// The state that the file says it makes.
    pub fn state(&self) -> StateHashes {
        let tensors = self.reader.index.tensors.iter();
        StateHashes {
            id: self.reader.index.result.clone(),
            tensors: tensors
                .map(|entry| (entry.name.clone(), entry.blake3.clone()))
                .collect(),
        }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.reader.path
    }

    /// What is coded together, and so takes least to read together.
    pub fn moments(&self) -> Vec<Moments> {
        let Reader { index, .. } = &self.reader;
        let sections = index.sections.iter();
        let together = sections.filter_map(|section| {
            let mut names = section
                .tensors
                .iter()
                .map(|&tensor| &index.tensors[tensor].name);
            Some(Moments {
                first: names.next()?.clone(),
                second: names.next()?.clone(),
                parameter: names.next().cloned(),
                step: None,
            })
        });
        together.collect()
    }

    fn parents(&self, names: &[&str], chunk: usize) -> Result<Vec<Cow<'_, [u8]>>, DeltaError> {
        match &self.parent {
            Some(parent) if !names.is_empty() => parent.read(names, chunk),
            _ => Ok(Vec::new()),
        }
    }

    /// A chunk of all tensors of a section.
    fn section(&self, section: usize, chunk: usize) -> Result<Vec<Vec<u8>>, DeltaError> {
        let Reader { index, path, .. } = &self.reader;
        let described = &index.sections[section];
        let entries: Vec<_> = described
            .tensors
            .iter()
            .map(|&tensor| &index.tensors[tensor])
            .collect();
        let names: Vec<&str> = entries
            .iter()
            .filter_map(|entry| entry.parent.as_deref())
            .collect();
        let mut parents = self.parents(&names, chunk)?.into_iter();
        let parents: Vec<_> = entries
            .iter()
            .map(|entry| entry.parent.as_ref().and_then(|_| parents.next()))
            .collect();
        let step = described.step.map(|step| &index.steps[step]);
        let prediction = Prediction::new(described.rule, step);
        let before: Vec<Option<&[u8]>> = parents.iter().map(Option::as_deref).collect();
        let mut children: Vec<Vec<u8>> = Vec::with_capacity(entries.len());
        for (i, (entry, parent)) in entries.iter().zip(&parents).enumerate() {
            let is_product = described.rule == Rule::LowRank;
            let row = chunk * entries.len() + i + usize::from(is_product);
            let (codec, bytes) = self.reader.chunk(section, row)?;
            let factors = if codec == Codec::LowRank {
                Some(self.factors(section)?)
            } else {
                None
            };
            let known = Known {
                dtype: entry.dtype,
                parent: parent.as_deref(),
                roots: prediction.roots(i, &before),
                basis: factors.as_ref().map(|factors| Basis {
                    factors,
                    start: chunk * chunk_bytes(entry.dtype) / width(entry.dtype),
                }),
            };
            let after: Vec<&[u8]> = children.iter().map(Vec::as_slice).collect();
            let predict = || prediction.of(i, &before, &after);
            let length = chunk_bytes(entry.dtype);
            let total = entry.info().bytes().unwrap_or(0);
            let mut child = vec![0; length.min(total - chunk * length)];
            let decoded = Scratch::with(|scratch| {
                chunk::decode_beside(codec, known, predict, &bytes, scratch, &mut child)
            });
            decoded.map_err(|error| match (&self.parent, &entry.parent) {
                // These are the bytes that were written: their CRC says so.
                (Some(parent), Some(_)) => DeltaError::OtherParent {
                    path: path.clone(),
                    parent: parent.describe(),
                    message: format!("beside it, tensor `{}` makes no sense: {error}", entry.name),
                },
                _ => DeltaError::tensor(path, &entry.name, error.to_string()),
            })?;
            children.push(child);
        }
        Ok(children)
    }

    /// The factors of a section that is a product.
    fn factors(&self, section: usize) -> Result<Factors, DeltaError> {
        let Reader { index, path, .. } = &self.reader;
        let described = &index.sections[section];
        let info = index.tensors[described.tensors[0]].info();
        let damaged = || DeltaError::tensor(path, &info.name, "it has no factors of its shape");
        if described.rule != Rule::LowRank {
            return Err(damaged());
        }
        let (_, bytes) = self.reader.chunk(section, 0)?;
        let [rows, cols] = product::dims(&info);
        Factors::read(rows, cols, &bytes).ok_or_else(damaged)
    }
}

impl Source for Delta<'_> {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.reader
            .index
            .tensors
            .iter()
            .map(super::index::Entry::info)
            .collect()
    }

    fn read(&self, names: &[&str], chunk: usize) -> Result<Vec<Cow<'_, [u8]>>, DeltaError> {
        let index = &self.reader.index;
        let mut read: Vec<Option<Cow<[u8]>>> = names.iter().map(|_| None).collect();
        // What is the parent's, all at once.
        let is_parents = |name: &&str| self.tensors[*name].coded.is_none();
        let of_parent: Vec<usize> = (0..names.len())
            .filter(|&i| is_parents(&names[i]))
            .collect();
        let parents = of_parent.iter().map(|&i| {
            let entry = &index.tensors[self.tensors[names[i]].tensor];
            // An index says of a tensor without bytes and without a parent that it is empty: it has no chunk.
            entry.parent.as_deref().unwrap_or_default()
        });
        let parents: Vec<&str> = parents.collect();
        for (&i, bytes) in of_parent.iter().zip(self.parents(&parents, chunk)?) {
            read[i] = Some(bytes);
        }
        let mut sections: BTreeMap<usize, Vec<(usize, usize)>> = BTreeMap::new();
        for (i, name) in names.iter().enumerate() {
            if let Some((section, place)) = self.tensors[*name].coded {
                sections.entry(section).or_default().push((i, place));
            }
        }
        for (section, wanted) in sections {
            let mut children = self.section(section, chunk)?;
            for (i, place) in wanted {
                read[i] = Some(Cow::Owned(std::mem::take(&mut children[place])));
            }
        }
        Ok(read.into_iter().map(Option::unwrap_or_default).collect())
    }

    fn describe(&self) -> String {
        self.reader.path.display().to_string()
    }

    fn lossy(&self, name: &str) -> Option<LossRecord> {
        let place = self.tensors.get(name)?;
        self.reader.index.tensors[place.tensor].lossy
    }
}

/// Reads the tensors that are wanted, some chunks at a time on all threads, shows their bytes in order, and holds them
/// against their hashes. Others that are coded with one of them are shown too.
///
/// # Errors
/// The source's; `show`'s; a tensor that is not the one that was saved.
pub fn restore(
    delta: &Delta,
    wanted: impl Fn(&str) -> bool,
    mut show: impl FnMut(&TensorInfo, &[u8]) -> Result<(), DeltaError>,
) -> Result<(), DeltaError> {
    let index = &delta.reader.index;
    let mut order: Vec<Vec<usize>> = index
        .sections
        .iter()
        .map(|section| section.tensors.clone())
        .collect();
    let coded: std::collections::HashSet<usize> = order.iter().flatten().copied().collect();
    order.extend(
        (0..index.tensors.len())
            .filter(|tensor| !coded.contains(tensor))
            .map(|tensor| vec![tensor]),
    );
    for group in order {
        let infos: Vec<TensorInfo> = group
            .iter()
            .map(|&tensor| index.tensors[tensor].info())
            .collect();
        let names: Vec<&str> = infos.iter().map(|info| info.name.as_str()).collect();
        if !names.iter().any(|name| wanted(name)) {
            continue;
        }
        let hashes = walk(delta, &names, &infos[0], |place, bytes| {
            show(&infos[place], bytes)
        })?;
        for ((&tensor, info), hash) in group.iter().zip(&infos).zip(hashes) {
            if index.tensors[tensor].blake3 != hash {
                return Err(delta.blame(info, &hash));
            }
        }
    }
    Ok(())
}

impl Delta<'_> {
    /// Why a tensor is not what it should be.
    fn blame(&self, info: &TensorInfo, found: &str) -> DeltaError {
        let Reader { index, path, .. } = &self.reader;
        let entry = &index.tensors[self.tensors[&info.name].tensor];
        let message = format!("its BLAKE3 is {found}, saved was {}", entry.blake3);
        match (&self.parent, &entry.parent) {
            // The file's own bytes have their CRCs: what is wrong came with the parent.
            (Some(parent), Some(name)) => DeltaError::OtherParent {
                path: path.clone(),
                parent: parent.describe(),
                message: format!(
                    "with its tensor `{name}`, tensor `{}` is another one",
                    info.name
                ),
            },
            _ => DeltaError::tensor(path, &info.name, message),
        }
    }
}

/// Reads tensors of one size, side by side. Returns their hashes.
fn walk(
    source: &dyn Source,
    names: &[&str],
    info: &TensorInfo,
    mut show: impl FnMut(usize, &[u8]) -> Result<(), DeltaError>,
) -> Result<Vec<String>, DeltaError> {
    let (length, total) = (chunk_bytes(info.dtype), info.bytes().unwrap_or(0));
    let chunks: Vec<usize> = (0..total.div_ceil(length)).collect();
    let mut hashes = vec![Vec::with_capacity(chunks.len()); names.len()];
    for chunks in chunks.chunks(4 * rayon::current_num_threads()) {
        let read: Vec<_> = chunks
            .par_iter()
            .map(|&chunk| {
                let read = source.read(names, chunk)?;
                let hashed = read.into_iter().map(|bytes| {
                    let hash = of_chunk(&bytes, chunk * length, total);
                    (bytes, hash)
                });
                Ok(hashed.collect::<Vec<_>>())
            })
            .collect::<Result<_, DeltaError>>()?;
        for read in read {
            for (place, (bytes, hash)) in read.into_iter().enumerate() {
                show(place, &bytes)?;
                hashes[place].push(hash);
            }
        }
    }
    let whole = |chunks: &Vec<_>| of_chunks(chunks, length, total).to_hex().to_string();
    Ok(hashes.iter().map(whole).collect())
}

/// The hashes of a state, of which some are known.
pub(super) fn hash_rest(
    source: &dyn Source,
    known: &BTreeMap<&String, String>,
) -> Result<StateHashes, DeltaError> {
    let mut tensors = BTreeMap::new();
    let infos = source.tensors();
    for info in &infos {
        let hash = match known.get(&info.name) {
            Some(hash) => hash.clone(),
            None => {
                let hashes = walk(source, &[&info.name], info, |_, _| Ok(()))?;
                hashes.into_iter().next().unwrap_or_default()
            }
        };
        tensors.insert(info.name.clone(), hash);
    }
    let id = state_id(
        infos
            .iter()
            .map(|info| (info, tensors[&info.name].as_str())),
    );
    Ok(StateHashes { id, tensors })
}

/// The id of a state and the hashes of its tensors.
///
/// # Errors
/// The source's.
pub fn hashes(source: &dyn Source) -> Result<StateHashes, DeltaError> {
    hash_rest(source, &BTreeMap::new())
}
