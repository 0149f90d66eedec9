//! What a difference says of itself: the JSON in its header.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use firebrick_kernels::difference::adam::{AdamStep, Arithmetic};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::chunk::{chunk_bytes, width};
use super::lossy::{self, LossRecord};
use super::{Codec, DeltaError};

/// The version of the format that this build writes and reads.
pub(super) const VERSION: u32 = 2;

/// Name, type and shape of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Unique in its state.
    pub name: String,
    /// What its elements are.
    pub dtype: Dtype,
    /// Its dimensions.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Bytes of its elements; none if there are more than can be counted, or no whole number of them.
    pub fn bytes(&self) -> Option<usize> {
        let elements = self
            .shape
            .iter()
            .try_fold(1usize, |a, &b| a.checked_mul(b))?;
        let bits = elements.checked_mul(self.dtype.bitsize())?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// Whether a tensor can be coded as a difference from another.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        self.dtype == other.dtype && self.bytes() == other.bytes()
    }
}

/// How the tensors of a section depend on each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Rule {
    /// One tensor.
    One,
    /// A mean of gradients, a mean of their squares, and perhaps what they belong to: the first is coded beside the root
    /// of the second's parent.
    Moments,
    /// One matrix, whose difference is a product of two narrow ones: they are the first row of the table.
    LowRank,
}

/// A tensor.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Of its bytes.
    pub blake3: String,
    /// The parent's tensor that it is coded beside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// What was lost of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lossy: Option<LossRecord>,
}

impl Entry {
    pub(super) fn info(&self) -> TensorInfo {
        TensorInfo {
            name: self.name.clone(),
            dtype: self.dtype,
            shape: self.shape.clone(),
        }
    }
}

/// A step of Adam between the parent and this state, of one group of parameters. The numbers are those that the optimizer
/// computed with, to the last bit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepRecord {
    /// How the optimizer orders its operations.
    pub arithmetic: ArithmeticId,
    /// Updates up to this one, it included.
    pub time: u64,
    /// Learning rate of this step.
    pub learning_rate: f32,
    /// Decay of the mean of gradients.
    pub beta_1: f32,
    /// Decay of the mean of their squares.
    pub beta_2: f32,
    /// 1 - beta_1^time.
    pub correction_1: f32,
    /// 1 - beta_2^time.
    pub correction_2: f32,
    /// Added to the denominator.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// 1 - learning rate x weight decay.
    pub decay: f32,
}

/// [`Arithmetic`] by the name it has in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ArithmeticId {
    /// burn 0.22's AdamW.
    #[serde(rename = "burn-0.22-adamw")]
    BurnAdamW,
    /// burn 0.22's Adam.
    #[serde(rename = "burn-0.22-adam")]
    BurnAdam,
}

impl StepRecord {
    pub(super) fn step(&self) -> AdamStep {
        AdamStep {
            arithmetic: match self.arithmetic {
                ArithmeticId::BurnAdamW => Arithmetic::AdamW,
                ArithmeticId::BurnAdam => Arithmetic::Adam,
            },
            beta_1: self.beta_1,
            beta_2: self.beta_2,
            correction_1: self.correction_1,
            correction_2: self.correction_2,
            epsilon: self.epsilon,
            learning_rate: self.learning_rate,
            decay: self.decay,
        }
    }
}

/// Tensors that are coded together, chunk by chunk. Tensors in no section are their parents.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Section {
    /// The name of the first, and of the section in the file.
    pub name: String,
    pub rule: Rule,
    /// Places in the list of tensors.
    pub tensors: Vec<usize>,
    /// What leads from the parent to this state: a place in the list of steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<usize>,
    /// Chunks and the table of chunks, without what fills it up.
    pub bytes: u64,
    /// CRC-32C of the table of chunks.
    pub table: u32,
    /// Chunks by codec.
    pub codecs: BTreeMap<String, u64>,
}

/// A file that tensors are put together to.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileEntry {
    /// Relative, with `/`.
    pub path: String,
    /// Places in the list of tensors: its bytes are theirs, in this order.
    pub tensors: Vec<usize>,
}

/// The whole.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Index {
    pub version: u32,
    /// The id of the state that it is a difference from; none if it stands alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// What to look for it by: the name of a step's folder, say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_name: Option<String>,
    /// The id of the state that it makes.
    pub result: String,
    pub tensors: Vec<Entry>,
    pub sections: Vec<Section>,
    /// Steps of the optimizer that predictions follow.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<StepRecord>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileEntry>,
}

/// The id of a state: BLAKE3 of names, types, shapes and hashes of its tensors, in the order of names.
pub(super) fn state_id<'a>(entries: impl Iterator<Item = (&'a TensorInfo, &'a str)>) -> String {
    let mut lines: Vec<String> = entries
        .map(|(info, hash)| format!("{:?} {} {:?} {hash}\n", info.name, info.dtype, info.shape))
        .collect();
    lines.sort_unstable();
    let mut hasher = blake3::Hasher::new();
    for line in lines {
        hasher.update(line.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

impl Index {
    /// That nothing in it contradicts the rest: what is read of the file afterwards is bounded by what stands here, and
    /// that by the file.
    pub(super) fn check(&self, path: &Path) -> Result<(), DeltaError> {
        let checked = self.check_tensors().and_then(|()| self.check_sections());
        checked.map_err(|message| DeltaError::header(path, message))
    }

    fn check_tensors(&self) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!("it is version {}, not {VERSION}", self.version));
        }
        let is_hash = |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let mut names = HashSet::new();
        for entry in &self.tensors {
            let wrong = if !names.insert(&entry.name) {
                "is there twice"
            } else if entry.info().bytes().is_none() {
                "has a shape that cannot be"
            } else if !is_hash(&entry.blake3) {
                "has no BLAKE3"
            } else if entry.parent.is_some() && self.parent.is_none() {
                "has a parent, and the file has none"
            } else if entry.lossy.as_ref().is_some_and(|of| !lossy::is_sound(of)) {
                "has an error that cannot be"
            } else {
                continue;
            };
            return Err(format!("tensor `{}` {wrong}", entry.name));
        }
        let mut listed = self.files.iter().flat_map(|file| &file.tensors);
        match listed.find(|&&tensor| tensor >= self.tensors.len()) {
            Some(tensor) => Err(format!("a file has tensor {tensor}, which is not there")),
            None => Ok(()),
        }
    }

    fn check_sections(&self) -> Result<(), String> {
        let lengths = self.sections.iter().map(|section| section.bytes);
        // Far more than any disk has, and far from what cannot be counted.
        if lengths.fold(0u64, u64::saturating_add) > 1 << 60 {
            return Err("it has sections longer than itself".to_string());
        }
        let mut coded = HashSet::new();
        for section in &self.sections {
            let wrong = |what: &str| format!("section `{}` {what}", section.name);
            self.check_section(section).map_err(wrong)?;
            if !section.tensors.iter().all(|tensor| coded.insert(tensor)) {
                return Err(wrong("has a tensor that another has too"));
            }
        }
        for (i, entry) in self.tensors.iter().enumerate() {
            let is_empty = entry.info().bytes() == Some(0);
            if !coded.contains(&i) && entry.parent.is_none() && !is_empty {
                let name = &entry.name;
                return Err(format!("tensor `{name}` has neither bytes nor a parent"));
            }
        }
        Ok(())
    }

    fn check_section(&self, section: &Section) -> Result<(), &'static str> {
        let entries = section
            .tensors
            .iter()
            .map(|&tensor| self.tensors.get(tensor));
        let Some(entries) = entries.collect::<Option<Vec<&Entry>>>() else {
            return Err("has a tensor that is not there");
        };
        let (count, is_adams) = match section.rule {
            Rule::One | Rule::LowRank => (1..=1, false),
            Rule::Moments => (2..=3, true),
        };
        if !count.contains(&entries.len()) {
            return Err("has too many or too few tensors");
        }
        let first = entries[0].info();
        if first.name != section.name {
            return Err("has another name than its tensor");
        }
        if !entries.iter().all(|entry| entry.info().is_like(&first)) {
            return Err("has tensors of several sizes");
        }
        if is_adams && first.dtype != Dtype::F32 {
            return Err("has moments that are not f32");
        }
        let is_matrix = || first.shape.len() >= 2 && lossy::is_float(&first);
        if section.rule == Rule::LowRank && !(is_matrix() && entries[0].parent.is_some()) {
            return Err("is a product and its tensor no matrix of floats with a parent");
        }
        if section
            .step
            .is_some_and(|step| step >= self.steps.len() || !is_adams)
        {
            return Err("has a step that is not there");
        }
        if section
            .codecs
            .keys()
            .any(|name| Codec::of_name(name).is_none())
        {
            return Err("has a codec that this build does not know");
        }
        Ok(())
    }

    /// Rows of the table of a section, and bytes of a chunk at most: no codec takes more than the chunk itself, but for a
    /// byte that names another.
    pub(super) fn chunks(&self, section: &Section) -> (usize, usize) {
        let entry = &self.tensors[section.tensors[0]];
        let bytes = entry.info().bytes().unwrap_or(0);
        let longest = chunk_bytes(entry.dtype);
        let chunks = bytes.div_ceil(longest);
        match section.rule {
            // Factors that take more than the matrix would not be there.
            Rule::LowRank => (chunks + 1, bytes.max(longest) + 1),
            _ => (chunks * section.tensors.len(), longest + 1),
        }
    }
}

/// Whether whole elements fill a tensor's chunks, as the kernels want them.
pub(super) fn is_whole(info: &TensorInfo) -> bool {
    info.bytes()
        .is_some_and(|bytes| bytes.is_multiple_of(width(info.dtype)))
}
