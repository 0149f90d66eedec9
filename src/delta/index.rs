//! What a difference says of itself: the JSON in its header.

use std::collections::BTreeMap;
use std::path::Path;

use firebrick_kernels::difference::adam::{AdamStep, Arithmetic};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::chunk::{chunk_bytes, width};
use super::{Codec, DeltaError};

/// The version of the format that this build writes and reads.
pub(super) const VERSION: u32 = 1;

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
        let wrong = |message: String| Err(DeltaError::header(path, message));
        if self.version != VERSION {
            return wrong(format!("it is version {}, not {VERSION}", self.version));
        }
        let is_hash = |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let mut names = std::collections::HashSet::new();
        for entry in &self.tensors {
            if !names.insert(&entry.name) {
                return wrong(format!("it has tensor `{}` twice", entry.name));
            }
            if entry.info().bytes().is_none() {
                return wrong(format!(
                    "tensor `{}` has a shape that cannot be",
                    entry.name
                ));
            }
            if !is_hash(&entry.blake3) {
                return wrong(format!("tensor `{}` has no BLAKE3", entry.name));
            }
            if entry.parent.is_some() && self.parent.is_none() {
                return wrong(format!(
                    "tensor `{}` has a parent, and the file has none",
                    entry.name
                ));
            }
        }
        let lengths = self.sections.iter().map(|section| section.bytes);
        let sum = lengths.fold(0u64, |sum, bytes| sum.saturating_add(bytes));
        // Far more than any disk has, and far from what cannot be counted.
        if sum > 1 << 60 {
            return wrong("it has sections longer than itself".to_string());
        }
        let mut coded = vec![false; self.tensors.len()];
        for section in &self.sections {
            let [first, ..] = section.tensors[..] else {
                return wrong(format!("section `{}` has no tensor", section.name));
            };
            let count = match section.rule {
                Rule::One => 1..=1,
                Rule::Moments => 2..=3,
            };
            if !count.contains(&section.tensors.len()) {
                return wrong(format!(
                    "section `{}` has too many or too few tensors",
                    section.name
                ));
            }
            let first = self.tensors.get(first).map(Entry::info);
            for &tensor in &section.tensors {
                let Some(entry) = self.tensors.get(tensor) else {
                    return wrong(format!(
                        "section `{}` has a tensor that is not there",
                        section.name
                    ));
                };
                if std::mem::replace(&mut coded[tensor], true) {
                    return wrong(format!("tensor `{}` is in two sections", entry.name));
                }
                let info = entry.info();
                if !first.as_ref().is_some_and(|first| first.is_like(&info)) {
                    return wrong(format!(
                        "section `{}` has tensors of several sizes",
                        section.name
                    ));
                }
                if section.rule == Rule::Moments && entry.dtype != Dtype::F32 {
                    return wrong(format!(
                        "tensor `{}` is no moment: it is not f32",
                        entry.name
                    ));
                }
            }
            if section
                .step
                .is_some_and(|step| step >= self.steps.len() || section.rule == Rule::One)
            {
                return wrong(format!(
                    "section `{}` has a step that is not there",
                    section.name
                ));
            }
            if first.is_none_or(|first| first.name != section.name) {
                return wrong(format!(
                    "section `{}` has another name than its tensor",
                    section.name
                ));
            }
            let known = section
                .codecs
                .keys()
                .all(|name| Codec::of_name(name).is_some());
            if !known {
                return wrong(format!(
                    "section `{}` has a codec that this build does not know",
                    section.name
                ));
            }
        }
        for (entry, coded) in self.tensors.iter().zip(coded) {
            let is_empty = entry.info().bytes() == Some(0);
            if !coded && entry.parent.is_none() && !is_empty {
                return wrong(format!(
                    "tensor `{}` has neither bytes nor a parent",
                    entry.name
                ));
            }
        }
        let listed = self.files.iter().flat_map(|file| &file.tensors);
        if let Some(tensor) = listed
            .into_iter()
            .find(|&&tensor| tensor >= self.tensors.len())
        {
            return wrong(format!("a file has tensor {tensor}, which is not there"));
        }
        Ok(())
    }

    /// Rows of the table of a section, and chunks of each of its tensors.
    pub(super) fn chunks(&self, section: &Section) -> (usize, usize) {
        let entry = &self.tensors[section.tensors[0]];
        let bytes = entry.info().bytes().unwrap_or(0);
        let chunks = bytes.div_ceil(chunk_bytes(entry.dtype));
        (chunks * section.tensors.len(), chunks)
    }
}

/// Whether whole elements fill a tensor's chunks, as the kernels want them.
pub(super) fn is_whole(info: &TensorInfo) -> bool {
    info.bytes()
        .is_some_and(|bytes| bytes.is_multiple_of(width(info.dtype)))
}
