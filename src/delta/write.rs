//! Writing a difference: chunks are coded on all threads, a few at a time, and written in order.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use rayon::prelude::*;

use super::chunk::{self, Known, Scratch, chunk_bytes};
use super::container::{OpenSection, Writer};
use super::hash::{ChunkHash, of_chunk, of_chunks};
use super::index::{
    Entry, FileEntry, Index, Rule, Section, StepRecord, VERSION, is_whole, state_id,
};
use super::predict::Prediction;
use super::{Codec, DeltaError, Source, TensorInfo};

/// What belongs together in the child.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// The mean of gradients.
    pub first: String,
    /// The mean of their squares.
    pub second: String,
    /// What they are the moments of.
    pub parameter: Option<String>,
    /// The one step that leads to them from the parent, where it is one.
    pub step: Option<StepRecord>,
}

/// A parent, and what is known of it.
pub struct Parent<'a> {
    /// Its tensors.
    pub source: &'a dyn Source,
    /// Which of its tensors a tensor of the child is held against; its namesake where nothing stands here.
    pub names: HashMap<String, String>,
    /// What to look for it by when the difference is read.
    pub name: Option<String>,
    /// Its id and the hashes of its tensors, where they are known: it is checked against them.
    pub known: Option<StateHashes>,
}

/// The id of a state, and the BLAKE3 of each of its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateHashes {
    /// Of names, types, shapes and hashes.
    pub id: String,
    /// By name, in hexadecimal.
    pub tensors: BTreeMap<String, String>,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the file.
    pub bytes: u64,
    /// Bytes of the state's tensors.
    pub state_bytes: u64,
    /// The state's id and hashes.
    pub state: StateHashes,
}

/// Tensors that are coded together.
struct Group {
    rule: Rule,
    /// Places in the list of tensors.
    tensors: Vec<usize>,
    /// The parent's, in the same order.
    parents: Vec<Option<String>>,
    chunks: usize,
    step: Option<StepRecord>,
}

/// One chunk of each tensor of a group.
struct Coded {
    chunks: Vec<(Codec, Vec<u8>, ChunkHash)>,
    /// Of the parents.
    parents: Vec<Option<ChunkHash>>,
}

/// Writes what `child` is beside its parent, or alone, to a new file, and flushes it to the disk.
///
/// Memory: some chunks a thread, whatever the size of tensors.
///
/// # Errors
/// A source that cannot be read, a parent that is not what it is known to be, the file system's. The file is incomplete
/// then; who calls sees to it that no one takes it for complete.
pub fn write(
    path: &Path,
    parent: Option<&Parent>,
    child: &dyn Source,
    moments: &[Moments],
) -> Result<Written, DeltaError> {
    write_files(path, parent, child, moments, Vec::new())
}

pub(super) fn write_files(
    path: &Path,
    parent: Option<&Parent>,
    child: &dyn Source,
    moments: &[Moments],
    files: Vec<(String, Vec<String>)>,
) -> Result<Written, DeltaError> {
    let mut tensors = child.tensors();
    tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    let of_parent: HashMap<String, TensorInfo> = match parent {
        None => HashMap::new(),
        Some(parent) => {
            let tensors = parent.source.tensors().into_iter();
            tensors.map(|info| (info.name.clone(), info)).collect()
        }
    };
    let groups = group(&tensors, parent, &of_parent, moments);
    let places: HashMap<&str, usize> = tensors
        .iter()
        .enumerate()
        .map(|(i, info)| (info.name.as_str(), i))
        .collect();
    let files = files.into_iter().map(|(path, names)| FileEntry {
        path,
        tensors: names.iter().map(|name| places[name.as_str()]).collect(),
    });
    let mut index = longest_index(&tensors, &groups, files.collect());
    index.parent_name = parent.and_then(|parent| parent.name.clone());
    let mut writer = Writer::create(path, &index)?;

    let mut hashes = Hashes {
        child: vec![Vec::new(); tensors.len()],
        parent: HashMap::new(),
    };
    let mut described = std::mem::take(&mut index.sections).into_iter();
    let mut section = OpenSection::default();
    let jobs: Vec<(usize, usize)> = (0..groups.len())
        .flat_map(|group| (0..groups[group].chunks).map(move |chunk| (group, chunk)))
        .collect();
    // Enough to keep all threads at work while the slowest of them ends.
    let at_once = 2 * rayon::current_num_threads();
    for jobs in jobs.chunks(at_once) {
        let coded: Vec<Coded> = jobs
            .par_iter()
            .map_init(Scratch::default, |scratch, &(group, chunk)| {
                encode(&groups[group], &tensors, chunk, parent, child, scratch)
            })
            .collect::<Result<_, _>>()?;
        for (&(place, chunk), coded) in jobs.iter().zip(coded) {
            let group = &groups[place];
            for (&tensor, (codec, bytes, hash)) in group.tensors.iter().zip(&coded.chunks) {
                writer.chunk(&mut section, *codec, bytes)?;
                hashes.child[tensor].push(*hash);
            }
            for (name, hash) in group.parents.iter().zip(coded.parents) {
                if let (Some(name), Some(hash)) = (name, hash) {
                    let chunks = hashes.parent.entry(name.clone()).or_default();
                    // Two tensors may have the same parent.
                    if chunks.len() == chunk {
                        chunks.push(hash);
                    }
                }
            }
            if chunk + 1 == group.chunks {
                let mut described = described.next().expect("a section for each group");
                if writer.end(std::mem::take(&mut section), &mut described)? {
                    index.sections.push(described);
                }
            }
        }
    }
    finish(index, writer, (parent, &of_parent), &tensors, &hashes)
}

/// Chunks' hashes, in order.
struct Hashes {
    child: Vec<Vec<ChunkHash>>,
    parent: HashMap<String, Vec<ChunkHash>>,
}

fn finish(
    mut index: Index,
    writer: Writer,
    (parent, of_parent): (Option<&Parent>, &HashMap<String, TensorInfo>),
    tensors: &[TensorInfo],
    hashes: &Hashes,
) -> Result<Written, DeltaError> {
    let whole = |info: &TensorInfo, chunks: &[ChunkHash]| {
        let hash = of_chunks(chunks, chunk_bytes(info.dtype), info.bytes().unwrap_or(0));
        hash.to_hex().to_string()
    };
    for (entry, (info, chunks)) in index
        .tensors
        .iter_mut()
        .zip(tensors.iter().zip(&hashes.child))
    {
        entry.blake3 = whole(info, chunks);
    }
    index.parent = match parent {
        None => None,
        Some(parent) => {
            let found = hashes
                .parent
                .iter()
                .map(|(name, chunks)| (name, whole(&of_parent[name], chunks)));
            let found: BTreeMap<&String, String> = found.collect();
            Some(parent.check(&found)?)
        }
    };
    let entries = tensors.iter().zip(&index.tensors);
    index.result = state_id(entries.map(|(info, entry)| (info, entry.blake3.as_str())));
    let bytes = writer.finish(&index)?;
    let names = index
        .tensors
        .iter()
        .map(|entry| (entry.name.clone(), entry.blake3.clone()));
    Ok(Written {
        bytes,
        state_bytes: tensors
            .iter()
            .filter_map(TensorInfo::bytes)
            .map(|bytes| bytes as u64)
            .sum(),
        state: StateHashes {
            id: index.result.clone(),
            tensors: names.collect(),
        },
    })
}

impl<'a> Parent<'a> {
    /// A parent of which nothing is known but what is read.
    pub fn new(source: &'a dyn Source) -> Self {
        Self {
            source,
            names: HashMap::new(),
            name: None,
            known: None,
        }
    }
}

impl Parent<'_> {
    /// Holds the hashes of what was read of it against those it is known by. Returns its id.
    fn check(&self, found: &BTreeMap<&String, String>) -> Result<String, DeltaError> {
        let Some(known) = &self.known else {
            return super::read::hash_rest(self.source, found).map(|hashes| hashes.id);
        };
        for (name, hash) in found {
            if known.tensors.get(*name) != Some(hash) {
                let message = "its BLAKE3 is another than it was saved with";
                let parent = self.source.describe();
                return Err(DeltaError::tensor(Path::new(&parent), name, message));
            }
        }
        Ok(known.id.clone())
    }
}

fn group(
    tensors: &[TensorInfo],
    parent: Option<&Parent>,
    of_parent: &HashMap<String, TensorInfo>,
    moments: &[Moments],
) -> Vec<Group> {
    let places: HashMap<&str, usize> = tensors
        .iter()
        .enumerate()
        .map(|(i, info)| (info.name.as_str(), i))
        .collect();
    let parent_of = |tensor: usize| -> Option<String> {
        let info = &tensors[tensor];
        let name = parent?.names.get(&info.name).unwrap_or(&info.name);
        of_parent
            .get(name)
            .filter(|other| other.is_like(info))
            .map(|_| name.clone())
    };
    let make = |rule: Rule, places: Vec<usize>, step: Option<StepRecord>| {
        let info = &tensors[places[0]];
        Group {
            rule,
            parents: places.iter().map(|&tensor| parent_of(tensor)).collect(),
            chunks: info.bytes().unwrap_or(0).div_ceil(chunk_bytes(info.dtype)),
            tensors: places,
            step,
        }
    };
    let mut grouped = vec![false; tensors.len()];
    let mut groups = Vec::new();
    for of in moments {
        let names = [Some(&of.first), Some(&of.second), of.parameter.as_ref()];
        let found: Option<Vec<usize>> = names
            .into_iter()
            .flatten()
            .map(|name| places.get(name.as_str()).copied())
            .collect();
        let Some(found) = found else { continue };
        let alike = found.iter().all(|&tensor| {
            let info = &tensors[tensor];
            info.is_like(&tensors[found[0]])
                && info.dtype == safetensors::Dtype::F32
                && parent_of(tensor).is_some()
        });
        if alike && found.iter().all(|&tensor| !grouped[tensor]) {
            found.iter().for_each(|&tensor| grouped[tensor] = true);
            groups.push(make(Rule::Moments, found, of.step));
        }
    }
    let rest = (0..tensors.len()).filter(|&tensor| !grouped[tensor]);
    groups.extend(rest.map(|tensor| make(Rule::One, vec![tensor], None)));
    // As tensors come: the parts of one layer next to each other.
    groups.sort_by_key(|group| group.tensors[0]);
    groups
}

/// An index with everything that is known before coding, and the longest text for what is not.
fn longest_index(tensors: &[TensorInfo], groups: &[Group], files: Vec<FileEntry>) -> Index {
    let hash = "0".repeat(64);
    let mut entries: Vec<Entry> = tensors
        .iter()
        .map(|info| Entry {
            name: info.name.clone(),
            dtype: info.dtype,
            shape: info.shape.clone(),
            blake3: hash.clone(),
            parent: None,
        })
        .collect();
    for group in groups {
        for (&tensor, parent) in group.tensors.iter().zip(&group.parents) {
            entries[tensor].parent.clone_from(parent);
        }
    }
    let mut steps: Vec<StepRecord> = Vec::new();
    for step in groups.iter().filter_map(|group| group.step) {
        if !steps.contains(&step) {
            steps.push(step);
        }
    }
    let place_of = |step: StepRecord| steps.iter().position(|other| *other == step);
    let sections = groups
        .iter()
        .filter(|group| group.chunks > 0)
        .map(|group| Section {
            step: group.step.and_then(place_of),
            name: tensors[group.tensors[0]].name.clone(),
            rule: group.rule,
            tensors: group.tensors.clone(),
            // Rounded up it has to be a number, too.
            bytes: u64::MAX / 2,
            table: u32::MAX,
            codecs: Codec::names()
                .map(|name| (name.to_string(), u64::MAX))
                .collect(),
        });
    Index {
        version: VERSION,
        parent: Some(hash.clone()),
        parent_name: None,
        result: hash.clone(),
        sections: sections.collect(),
        steps,
        tensors: entries,
        files,
    }
}

fn encode(
    group: &Group,
    tensors: &[TensorInfo],
    chunk: usize,
    parent: Option<&Parent>,
    child: &dyn Source,
    scratch: &mut Scratch,
) -> Result<Coded, DeltaError> {
    let names: Vec<&str> = group
        .tensors
        .iter()
        .map(|&tensor| tensors[tensor].name.as_str())
        .collect();
    let children = child.read(&names, chunk)?;
    let parent_names: Vec<&str> = group.parents.iter().flatten().map(String::as_str).collect();
    let mut read = match parent {
        Some(parent) if !parent_names.is_empty() => parent.source.read(&parent_names, chunk)?,
        _ => Vec::new(),
    }
    .into_iter();
    let parents: Vec<_> = group
        .parents
        .iter()
        .map(|name| name.as_ref().and_then(|_| read.next()))
        .collect();

    let info = &tensors[group.tensors[0]];
    let (offset, total) = (chunk * chunk_bytes(info.dtype), info.bytes().unwrap_or(0));
    let prediction = Prediction::new(group.rule, group.step.as_ref());
    let before: Vec<Option<&[u8]>> = parents.iter().map(Option::as_deref).collect();
    let mut chunks = Vec::with_capacity(children.len());
    for (i, child) in children.iter().enumerate() {
        let after: Vec<&[u8]> = children[..i].iter().map(|child| &**child).collect();
        let known = Known {
            dtype: tensors[group.tensors[i]].dtype,
            parent: before[i],
            roots: prediction.roots(i, &before),
        };
        let mut bytes = Vec::with_capacity(child.len() / 2);
        let codec = if is_whole(info) {
            let predicted = prediction.of(i, &before, &after);
            chunk::encode_beside(known, predicted.as_deref(), child, scratch, &mut bytes)
        } else {
            bytes.extend_from_slice(child);
            Codec::Raw
        };
        chunks.push((codec, bytes, of_chunk(child, offset, total)));
    }
    let parents = parents.iter().map(|parent| {
        parent
            .as_deref()
            .map(|bytes| of_chunk(bytes, offset, total))
    });
    Ok(Coded {
        parents: parents.collect(),
        chunks,
    })
}
