//! Writing a difference: chunks are coded on all threads, a few at a time, and written in order.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use firebrick_kernels::lossy::{Factors, Loss};
use rayon::prelude::*;

use super::chunk::{self, Known, Scratch, chunk_bytes, width};
use super::container::{OpenSection, Writer};
use super::hash::{ChunkHash, of_chunk, of_chunks};
use super::index::{FileEntry, Index, Rule, Section, StepRecord, is_whole, state_id};
use super::lossy::{Basis, LossRecord, Lossy};
use super::plan::{self, Group};
use super::predict::Prediction;
use super::product;
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

/// How a state is written.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options {
    /// What belongs together.
    pub moments: Vec<Moments>,
    /// What may be lost; nothing without it, and nothing of a tensor without a parent. Means of squares that it covers are
    /// rounded up, in eight bits whatever the method.
    pub lossy: Option<Lossy>,
}

/// One chunk of each tensor of a group.
struct Coded {
    chunks: Vec<CodedChunk>,
    /// Before the first chunk of a product.
    factors: Option<Vec<u8>>,
    /// Of the parents.
    parents: Vec<Option<ChunkHash>>,
}

struct CodedChunk {
    codec: Codec,
    bytes: Vec<u8>,
    hash: ChunkHash,
    loss: Loss,
}

/// Writes what `child` is beside its parent, or alone, to a new file, and flushes it to the disk.
///
/// Memory: some chunks a thread, whatever the size of tensors; with [`Method::LowRank`](super::Method::LowRank) some
/// copies of a matrix.
///
/// # Errors
/// [`DeltaError::Source`] for a source that cannot be read and for a parent that is not the
/// expected one; any other error is about the new file. After an error the file is incomplete, and
/// the caller has to make sure that it is not used.
pub fn write(
    path: &Path,
    parent: Option<&Parent>,
    child: &dyn Source,
    options: &Options,
) -> Result<Written, DeltaError> {
    write_files(path, parent, child, options, Vec::new())
}

pub(super) fn write_files(
    path: &Path,
    parent: Option<&Parent>,
    child: &dyn Source,
    options: &Options,
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
    let groups = plan::groups(&tensors, parent, &of_parent, options);
    let places: HashMap<&str, usize> = tensors
        .iter()
        .enumerate()
        .map(|(i, info)| (info.name.as_str(), i))
        .collect();
    let files = files.into_iter().map(|(path, names)| FileEntry {
        path,
        tensors: names.iter().map(|name| places[name.as_str()]).collect(),
    });
    let mut index = plan::longest_index(&tensors, &groups, files.collect(), child);
    index.parent_name = parent.and_then(|parent| parent.name.clone());
    let writer = Writer::create(path, &index)?;

    let mut assembly = Assembly {
        groups: &groups,
        writer,
        section: OpenSection::default(),
        is_product: false,
        described: std::mem::take(&mut index.sections).into_iter(),
        sections: Vec::new(),
        hashes: Hashes {
            child: vec![Vec::new(); tensors.len()],
            parent: HashMap::new(),
        },
        losses: vec![Loss::default(); tensors.len()],
    };
    let jobs: Vec<(usize, usize)> = (0..groups.len())
        .flat_map(|group| (0..groups[group].chunks).map(move |chunk| (group, chunk)))
        .collect();
    let mut factors: HashMap<usize, Factors> = HashMap::new();
    let mut before: (&[(usize, usize)], Vec<Coded>) = (&[], Vec::new());
    // Enough to keep all threads at work while the slowest of them ends.
    for jobs in jobs.chunks(2 * rayon::current_num_threads()) {
        factors.retain(|&place, _| place == jobs[0].0);
        for &(place, _) in jobs.iter().filter(|(_, chunk)| *chunk == 0) {
            if let Some(found) = find_factors(&groups[place], &tensors, parent, child)? {
                factors.insert(place, found);
            }
        }
        let encode = || -> Result<Vec<Coded>, DeltaError> {
            let of = |&(place, chunk): &(usize, usize)| {
                let job = Job {
                    group: &groups[place],
                    tensors: &tensors,
                    parent,
                    child,
                    factors: factors.get(&place),
                };
                Scratch::with(|scratch| job.encode(chunk, scratch))
            };
            jobs.par_iter().map(of).collect()
        };
        // What was coded before is written meanwhile.
        let (put, coded) = rayon::join(|| assembly.put(before), encode);
        put?;
        before = (jobs, coded?);
    }
    assembly.put(before)?;
    let Assembly {
        writer,
        sections,
        hashes,
        losses,
        ..
    } = assembly;
    index.sections = sections;
    for group in &groups {
        for &tensor in &group.tensors {
            let entry = &mut index.tensors[tensor];
            let method = group.treatment.map(|treatment| treatment.method);
            let lost = method.and_then(|method| LossRecord::new(method, &losses[tensor]));
            // Nothing brings back what the child had lost before.
            let before = child.lossy(&entry.name);
            entry.lossy = lost.map(|lost| lost.after(before)).or(before);
        }
    }
    finish(index, writer, (parent, &of_parent), &tensors, &hashes)
}

/// What is made of coded chunks, in order.
struct Assembly<'a> {
    groups: &'a [Group],
    writer: Writer,
    section: OpenSection,
    /// Whether the section begins with factors.
    is_product: bool,
    /// Sections to come, as they were foreseen.
    described: std::vec::IntoIter<Section>,
    sections: Vec<Section>,
    hashes: Hashes,
    losses: Vec<Loss>,
}

impl Assembly<'_> {
    /// Takes up chunks: groups and numbers of chunks, and what has become of them.
    fn put(&mut self, (jobs, coded): (&[(usize, usize)], Vec<Coded>)) -> Result<(), DeltaError> {
        for (&(place, chunk), coded) in jobs.iter().zip(coded) {
            let group = &self.groups[place];
            if let Some(factors) = coded.factors {
                self.writer
                    .chunk(&mut self.section, Codec::LowRank, &factors)?;
                self.is_product = true;
            }
            for (&tensor, coded) in group.tensors.iter().zip(&coded.chunks) {
                self.writer
                    .chunk(&mut self.section, coded.codec, &coded.bytes)?;
                self.hashes.child[tensor].push(coded.hash);
                self.losses[tensor] = self.losses[tensor].and(coded.loss);
            }
            for (name, hash) in group.parents.iter().zip(coded.parents) {
                if let (Some(name), Some(hash)) = (name, hash) {
                    let chunks = self.hashes.parent.entry(name.clone()).or_default();
                    // Two tensors may have the same parent.
                    if chunks.len() == chunk {
                        chunks.push(hash);
                    }
                }
            }
            if chunk + 1 == group.chunks {
                self.end()?;
            }
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), DeltaError> {
        let mut described = self.described.next().expect("a section for each group");
        if !std::mem::take(&mut self.is_product) && described.rule == Rule::LowRank {
            described.rule = Rule::One;
        }
        if self
            .writer
            .end(std::mem::take(&mut self.section), &mut described)?
        {
            self.sections.push(described);
        }
        Ok(())
    }
}

/// The factors of a matrix that may be told as a product, if that takes few enough.
fn find_factors(
    group: &Group,
    tensors: &[TensorInfo],
    parent: Option<&Parent>,
    child: &dyn Source,
) -> Result<Option<Factors>, DeltaError> {
    let (Rule::LowRank, Some(parent), [Some(name)]) = (group.rule, parent, &group.parents[..])
    else {
        return Ok(None);
    };
    let pair = product::Pair {
        info: &tensors[group.tensors[0]],
        child,
        parent: (parent.source, name),
    };
    let energy = group.treatment.and_then(|treatment| treatment.energy);
    pair.factors(energy.unwrap_or(product::ENERGY))
        .map_err(DeltaError::of_source)
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
            Some(parent.check(&found).map_err(DeltaError::of_source)?)
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

/// All that coding a chunk needs to know.
struct Job<'a> {
    group: &'a Group,
    tensors: &'a [TensorInfo],
    parent: Option<&'a Parent<'a>>,
    child: &'a dyn Source,
    factors: Option<&'a Factors>,
}

impl Job<'_> {
    fn encode(&self, chunk: usize, scratch: &mut Scratch) -> Result<Coded, DeltaError> {
        let Self {
            group,
            tensors,
            parent,
            child,
            ..
        } = self;
        let names: Vec<&str> = group
            .tensors
            .iter()
            .map(|&tensor| tensors[tensor].name.as_str())
            .collect();
        let children = child.read(&names, chunk).map_err(DeltaError::of_source)?;
        let parent_names: Vec<&str> = group.parents.iter().flatten().map(String::as_str).collect();
        let mut read = match parent {
            Some(parent) if !parent_names.is_empty() => parent
                .source
                .read(&parent_names, chunk)
                .map_err(DeltaError::of_source)?,
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
                basis: self.factors.map(|factors| Basis {
                    factors,
                    start: offset / width(info.dtype),
                }),
            };
            let mut bytes = Vec::new();
            let (codec, loss) = if !is_whole(info) {
                bytes.extend_from_slice(child);
                (Codec::Raw, Loss::default())
            } else if let Some(treatment) = &group.treatment {
                chunk::encode_lossy(known, treatment, child, scratch, &mut bytes)
            } else {
                let predicted = prediction.of(i, &before, &after);
                let predicted = predicted.as_deref();
                let codec = chunk::encode_beside(known, predicted, child, scratch, &mut bytes);
                (codec, Loss::default())
            };
            // What it will be read as, which is what is hashed.
            let kept = if codec.is_lossy() {
                scratch.lossy.back.as_slice()
            } else {
                child
            };
            let hash = of_chunk(kept, offset, total);
            chunks.push(CodedChunk {
                codec,
                bytes,
                hash,
                loss,
            });
        }
        let parents = parents.iter().map(|parent| {
            parent
                .as_deref()
                .map(|bytes| of_chunk(bytes, offset, total))
        });
        let factors = self.factors.filter(|_| chunk == 0).map(|factors| {
            let mut bytes = Vec::new();
            factors.write(&mut bytes);
            bytes
        });
        Ok(Coded {
            parents: parents.collect(),
            chunks,
            factors,
        })
    }
}
