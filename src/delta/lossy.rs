//! What may be lost of a difference for the sake of size, and how much of it is.
//!
//! A lossy chunk is decoded when it is written: what comes back is what is hashed, what later differences are taken from,
//! and what every element's error is measured on. Elements that no code can say (infinite, NaN, and for some methods those
//! that move furthest) are listed with their bits.

use std::collections::BTreeSet;

use firebrick_kernels::difference::{self, Element, MOST, Path, Scale};
use firebrick_kernels::lossy::{
    Factors, Levels, Loss, NO_LIMIT, Quantised, Rounding, loss, mean_square, misses, pack,
    quantise, reconstruct, unpack,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::chunk::{ChunkError, Codec};
use super::{TensorInfo, sparse};

/// How a difference is made smaller than it can be without loss.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum Method {
    /// Eight bits an element, a scale for each 64.
    Int8,
    /// Four bits an element, a scale for each 32.
    Int4,
    /// A sign for each element, a scale for each 128.
    OneBit,
    /// Each matrix the product of two narrow ones in eight bits.
    LowRank,
    /// As int4, with the elements that move furthest stored exactly.
    Hybrid,
}

impl Method {
    /// Its name in files and on the command line.
    pub fn name(self) -> &'static str {
        self.codec().name()
    }

    pub(super) fn codec(self) -> Codec {
        match self {
            Self::Int8 => Codec::Int8,
            Self::Int4 => Codec::Int4,
            Self::OneBit => Codec::OneBit,
            Self::LowRank => Codec::LowRank,
            Self::Hybrid => Codec::Hybrid,
        }
    }
}

/// Permission to lose something.
#[derive(Debug, Clone, PartialEq)]
pub struct Lossy {
    /// How.
    pub method: Method,
    /// The least share of a change that has to be kept, in sums of squares, between 0 and 1: chunks that keep less are
    /// stored exactly. It is a matrix's for [`Method::LowRank`], whose rank follows from it; there it is 0.95 if nothing
    /// is asked for.
    pub energy: Option<f64>,
    /// Names of tensors that are stored exactly all the same.
    pub exact: BTreeSet<String>,
}

impl Lossy {
    /// A method, for all tensors that it can be for.
    pub fn new(method: Method) -> Self {
        Self {
            method,
            energy: None,
            exact: BTreeSet::new(),
        }
    }

    /// Whether anything of a tensor may be lost: it has to be a matrix of floats, since vectors are few numbers that
    /// matter much.
    pub(super) fn allows(&self, info: &TensorInfo) -> bool {
        info.shape.len() >= 2 && is_float(info) && !self.exact.contains(&info.name)
    }
}

pub(super) fn is_float(info: &TensorInfo) -> bool {
    use safetensors::Dtype;
    matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// What was lost of a tensor: a bound that every element was held against when it was written.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossRecord {
    /// How.
    pub method: Method,
    /// No element is further from what it was than this.
    pub largest_error: f32,
    /// The L2 norm of errors over that of what the tensor had moved by.
    pub relative_error: f32,
}

impl LossRecord {
    /// Rounded so that it bounds what was measured.
    pub(super) fn new(method: Method, loss: &Loss) -> Option<Self> {
        let relative = loss.relative();
        (loss.error > 0.0).then(|| Self {
            method,
            largest_error: loss.largest,
            relative_error: (relative as f32).next_up(),
        })
    }

    /// Together with what had been lost before.
    pub(super) fn after(self, before: Option<Self>) -> Self {
        let (largest, relative) = before.map_or((0.0, 0.0), |before| {
            (before.largest_error, before.relative_error)
        });
        Self {
            largest_error: self.largest_error + largest,
            relative_error: self.relative_error + relative,
            ..self
        }
    }

    /// One that has no longer text.
    pub(super) fn longest() -> Self {
        // Nine digits that are needed, and four zeros before them.
        let longest = 1.000_000_25e-5;
        Self {
            method: Method::LowRank,
            largest_error: longest,
            relative_error: longest,
        }
    }
}

/// Whether all numbers can be, of a file from elsewhere.
pub(super) fn is_sound(record: &LossRecord) -> bool {
    let is_sound = |value: f32| value.is_finite() && value >= 0.0;
    is_sound(record.largest_error) && is_sound(record.relative_error)
}

/// The matrices whose product a tensor's difference is, and the chunk's first element.
#[derive(Debug, Clone, Copy)]
pub(super) struct Basis<'a> {
    pub factors: &'a Factors,
    pub start: usize,
}

/// What is done to a tensor.
#[derive(Debug, Clone, Copy)]
pub(super) struct Treatment {
    pub method: Method,
    pub rounding: Rounding,
    pub energy: Option<f64>,
}

#[derive(Debug, Default)]
pub(super) struct Scratch {
    quantised: Quantised,
    /// What a chunk comes back as.
    pub back: Vec<u8>,
    /// The same without what is listed.
    base: Vec<u8>,
    packed: Vec<u8>,
}

/// `hybrid` stores what moves further than so many times the root of a chunk's mean square. Of 2 to 5 this loses least for
/// its bytes on real checkpoints (docs/log.md).
const FAR: f64 = 3.5;

/// Codes are entropy-coded where that saves one byte in so many.
const WORTH: usize = 16;

/// Appends a chunk to `out` and leaves in `scratch.back` what it comes back as; none if the energy that was asked for is
/// not kept. Nothing has been appended then.
pub(super) fn encode(
    treatment: &Treatment,
    element: Element,
    (parent, basis): (&[u8], Option<Basis>),
    child: &[u8],
    (scratch, differences): (&mut Scratch, &mut difference::Scratch),
    out: &mut Vec<u8>,
) -> Option<Loss> {
    let Scratch {
        quantised,
        back,
        base,
        packed,
    } = scratch;
    let path = Path::detect();
    let width = element.width();
    base.resize(child.len(), 0);
    let levels = levels(treatment.method.codec());
    match (levels, basis) {
        (Some(levels), _) => {
            let limit = if treatment.method == Method::Hybrid {
                (FAR * mean_square(path, element, parent, child).ok()?.sqrt()) as f32
            } else {
                NO_LIMIT
            };
            let how = (levels, treatment.rounding);
            quantise(path, element, how, limit, (parent, child), quantised).ok()?;
            let coded = (quantised.scales.as_slice(), quantised.codes.as_slice());
            reconstruct(path, element, levels, coded, parent, base).ok()?;
        }
        (None, Some(Basis { factors, start })) => {
            quantised.exact.clear();
            factors
                .reconstruct(path, element, start, parent, base)
                .ok()?;
        }
        (None, None) => return None,
    }
    back.clear();
    back.extend_from_slice(base);
    // Of what comes back, too, some may be what it must not be.
    let missed = misses(element, treatment.rounding, child, base).ok()?;
    for &place in quantised.exact.iter().chain(&missed) {
        let range = place as usize * width..(place as usize + 1) * width;
        back[range.clone()].copy_from_slice(&child[range.clone()]);
        // Whatever stands here, it is listed: another processor may have another NaN.
        base[range.clone()].copy_from_slice(&child[range.clone()]);
        base[range.start] ^= 1;
    }
    let lost = loss(path, element, parent, child, back).ok()?;
    if treatment
        .energy
        .is_some_and(|energy| levels.is_some() && lost.error > (1.0 - energy) * lost.change)
    {
        return None;
    }
    if let Some(levels) = levels {
        packed.resize(levels.packed(quantised.codes.len()), 0);
        pack(path, levels, &quantised.codes, packed);
        let start = out.len();
        out.push(0);
        out.extend([0; 4]);
        out.extend(
            quantised
                .scales
                .iter()
                .flat_map(|scale| scale.to_le_bytes()),
        );
        let at = out.len();
        if entropy(&quantised.codes) < (packed.len() - packed.len() / WORTH) as f64 {
            let codes: Vec<u8> = quantised.codes.iter().map(|&code| code as u8).collect();
            let zeros = vec![0; codes.len()];
            let of = (zeros.as_slice(), codes.as_slice());
            difference::encode(path, Element::Bits8, Scale::Chunk, of, differences, out).ok()?;
            out[start] = 1;
        }
        if out[start] == 0 || out.len() - at >= packed.len() {
            out[start] = 0;
            out.truncate(at);
            out.extend_from_slice(packed);
        }
        let length = (out.len() - at) as u32;
        out[start + 1..start + 5].copy_from_slice(&length.to_le_bytes());
    }
    sparse::list_all(width, base, back, out);
    Some(lost)
}

/// What is lost of a chunk that is stored exactly.
pub(super) fn none(element: Element, parent: &[u8], child: &[u8]) -> Loss {
    loss(Path::detect(), element, parent, child, child).unwrap_or_default()
}

/// Puts into `child` what [`encode`] left in its scratch.
pub(super) fn decode(
    codec: Codec,
    element: Element,
    (parent, basis): (&[u8], Option<Basis>),
    bytes: &[u8],
    child: &mut [u8],
) -> Result<(), ChunkError> {
    let path = Path::detect();
    let no_float = |_| ChunkError::Codec;
    let Some(levels) = levels(codec) else {
        let Basis { factors, start } = basis.ok_or(ChunkError::Codec)?;
        let made = factors.reconstruct(path, element, start, parent, child);
        made.map_err(no_float)?;
        return sparse::unlist(element.width(), bytes, child);
    };
    let elements = child.len() / element.width();
    let (&[coded, l0, l1, l2, l3], rest) =
        bytes.split_first_chunk::<5>().ok_or(ChunkError::Length)?;
    let scales = 2 * elements.div_ceil(levels.block());
    let (scales, rest) = rest.split_at_checked(scales).ok_or(ChunkError::Length)?;
    let scales: Vec<u16> = scales
        .as_chunks()
        .0
        .iter()
        .map(|bytes| u16::from_le_bytes(*bytes))
        .collect();
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    let (packed, listed) = rest.split_at_checked(length).ok_or(ChunkError::Length)?;
    let mut codes = vec![0i8; elements];
    match coded {
        0 if packed.len() == levels.packed(elements) => unpack(path, levels, packed, &mut codes),
        1 if elements <= MOST => {
            let (zeros, mut bytes) = (vec![0; elements], vec![0; elements]);
            difference::decode(
                path,
                Element::Bits8,
                Scale::Chunk,
                &zeros,
                packed,
                &mut bytes,
            )?;
            codes
                .iter_mut()
                .zip(bytes)
                .for_each(|(code, byte)| *code = byte as i8);
        }
        _ => return Err(ChunkError::Length),
    }
    let made = reconstruct(path, element, levels, (&scales, &codes), parent, child);
    made.map_err(no_float)?;
    sparse::unlist(element.width(), listed, child)
}

fn levels(codec: Codec) -> Option<Levels> {
    match codec {
        Codec::Int8 => Some(Levels::Int8),
        Codec::Int4 | Codec::Hybrid => Some(Levels::Int4),
        Codec::OneBit => Some(Levels::Sign),
        _ => None,
    }
}

/// Bytes that codes take at least if each is coded by how often it comes: judged by some of them.
fn entropy(codes: &[i8]) -> f64 {
    /// One run of codes in so many is counted.
    const RUNS: usize = 8;
    const RUN: usize = 64;
    let every = if codes.len() < 1 << 14 { 1 } else { RUNS };
    let mut counts = [0u32; 256];
    for runs in codes.chunks(every * RUN) {
        for &code in &runs[..runs.len().min(RUN)] {
            counts[usize::from(code as u8)] += 1;
        }
    }
    let total = f64::from(counts.iter().sum::<u32>());
    let of = |&count: &u32| match count {
        0 => 0.0,
        count => f64::from(count) / total * (total / f64::from(count)).log2(),
    };
    counts.iter().map(of).sum::<f64>() * codes.len() as f64 / 8.0
}
