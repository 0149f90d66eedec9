//! One chunk of a tensor, coded in the way that takes the fewest bytes.

use std::cell::Cell;

use firebrick_kernels::difference::{self, DifferenceError, Element, MOST, Path, Scale};
use firebrick_kernels::lossy::Loss;
use safetensors::Dtype;

use super::lossy::{self, Basis, Treatment};
use super::{sparse, wide};

/// How a chunk is coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Codec {
    /// It is the parent's: no bytes.
    Same,
    /// Its bytes as they are.
    Raw,
    /// Where it differs from the parent, and what stands there.
    Sparse,
    /// The differences of numbers, under an entropy coder ([`firebrick_kernels::difference`]).
    Intdiff,
    /// Any of these, beside what the optimizer's update rule predicts in place of the parent.
    Predicted,
    /// Lossy: eight bits an element, a scale for each block ([`firebrick_kernels::lossy`]).
    Int8,
    /// Lossy: four bits an element.
    Int4,
    /// Lossy: a sign for each element.
    OneBit,
    /// Lossy: as [`Int4`](Self::Int4), with the elements that move furthest as they are.
    Hybrid,
    /// Lossy: the product of two narrow matrices, which belong to the whole tensor.
    LowRank,
    /// As [`Sparse`](Self::Sparse), under the entropy coder.
    Scattered,
}

impl Codec {
    pub(super) const ALL: [Self; 11] = [
        Self::Same,
        Self::Raw,
        Self::Sparse,
        Self::Intdiff,
        Self::Predicted,
        Self::Int8,
        Self::Int4,
        Self::OneBit,
        Self::Hybrid,
        Self::LowRank,
        Self::Scattered,
    ];

    /// As it stands in a file.
    pub(super) fn id(self) -> u8 {
        self as u8
    }

    pub(super) fn of_id(id: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.id() == id)
    }

    pub(super) fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.name() == name)
    }

    /// Whether what comes back may be another than it was.
    pub fn is_lossy(self) -> bool {
        match self {
            Self::Same
            | Self::Raw
            | Self::Sparse
            | Self::Scattered
            | Self::Intdiff
            | Self::Predicted => false,
            Self::Int8 | Self::Int4 | Self::OneBit | Self::Hybrid | Self::LowRank => true,
        }
    }

    /// Its name in an index.
    pub fn name(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::Raw => "raw",
            Self::Sparse => "sparse",
            Self::Intdiff => "intdiff",
            Self::Predicted => "predicted",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::OneBit => "onebit",
            Self::Hybrid => "hybrid",
            Self::LowRank => "lowrank",
            Self::Scattered => "scattered",
        }
    }
}

/// What the kernels make of a dtype; none of eight bytes or of fewer than eight bits.
pub(super) fn element(dtype: Dtype) -> Element {
    match dtype {
        Dtype::F32 => Element::F32,
        Dtype::F16 => Element::F16,
        Dtype::BF16 => Element::Bf16,
        Dtype::I16 | Dtype::U16 => Element::Bits16,
        Dtype::I32 | Dtype::U32 => Element::Bits32,
        // Of complex numbers and whatever comes, the bytes.
        _ => Element::Bits8,
    }
}

/// Bytes of an element that is coded as one.
pub(super) fn width(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F64 | Dtype::I64 | Dtype::U64 => 8,
        other => element(other).width(),
    }
}

/// Bytes of all chunks of a tensor but its last: a power of two.
pub(super) fn chunk_bytes(dtype: Dtype) -> usize {
    (MOST * width(dtype)).min(1 << 19)
}

/// What both sides know of a chunk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known<'a> {
    pub dtype: Dtype,
    /// As many bytes as the chunk has; none for a tensor that is new.
    pub parent: Option<&'a [u8]>,
    /// f32 whose root is a scale of the chunk's numbers.
    pub roots: Option<&'a [u8]>,
    /// Where the tensor's difference is a product of matrices.
    pub basis: Option<Basis<'a>>,
}

/// What coding needs room for.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) lossy: lossy::Scratch,
    pub(super) difference: difference::Scratch,
    zeros: Vec<u8>,
    other: Vec<u8>,
}

impl Scratch {
    /// Work with this thread's, which stays for the next time. What is done meanwhile on the same thread has another.
    pub(super) fn with<T>(work: impl FnOnce(&mut Self) -> T) -> T {
        thread_local! {
            static OF_THREAD: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
        }
        let mut scratch = OF_THREAD.take().unwrap_or_default();
        let result = work(&mut scratch);
        OF_THREAD.set(Some(scratch));
        result
    }
}

/// One changed element in so many makes a list of them worth trying.
const SPARSE: usize = 32;

/// A list of changes of so few bytes is taken without looking for anything smaller.
const CERTAIN: usize = 256;

/// Of so many bytes a prediction has to save one, or coding beside the parent is tried too.
const POOR: usize = 2;

/// Appends a chunk to `out`, beside its parent or beside what is predicted of it.
pub(super) fn encode_beside(
    known: Known,
    predicted: Option<&[u8]>,
    child: &[u8],
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) -> Codec {
    let Some(predicted) = predicted else {
        return encode(known, child, scratch, out);
    };
    let start = out.len();
    out.push(0);
    let beside = Known {
        parent: Some(predicted),
        ..known
    };
    out[start] = encode(beside, child, scratch, out).id();
    let length = out.len() - start;
    if length > child.len() / POOR {
        let mut plain = Vec::new();
        let codec = encode(known, child, scratch, &mut plain);
        if plain.len() <= length {
            out.truncate(start);
            out.extend_from_slice(&plain);
            return codec;
        }
    }
    Codec::Predicted
}

/// Appends a chunk to `out`, of which something may be lost: what it comes back as is left in the scratch then.
pub(super) fn encode_lossy(
    known: Known,
    treatment: &Treatment,
    child: &[u8],
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) -> (Codec, Loss) {
    let start = out.len();
    let (element, parent) = (element(known.dtype), known.parent.unwrap_or_default());
    let exact = |scratch: &mut Scratch, out: &mut Vec<u8>| {
        let loss = lossy::none(element, parent, child);
        (encode(known, child, scratch, out), loss)
    };
    if parent == child {
        return exact(scratch, out);
    }
    let room = (&mut scratch.lossy, &mut scratch.difference);
    let of = (parent, known.basis);
    let Some(loss) = lossy::encode(treatment, element, of, child, room, out) else {
        return exact(scratch, out);
    };
    let length = out.len() - start;
    let foreseen = difference::estimate(Path::detect(), element, scale(known), (parent, child));
    if length >= child.len() || foreseen.is_ok_and(|foreseen| foreseen <= length) {
        let mut plain = Vec::new();
        let (codec, none) = exact(scratch, &mut plain);
        if plain.len() <= length {
            out.truncate(start);
            out.extend_from_slice(&plain);
            return (codec, none);
        }
    }
    (treatment.method.codec(), loss)
}

/// Puts into `child` what [`encode_beside`] was given.
pub(super) fn decode_beside(
    codec: Codec,
    known: Known,
    predict: impl FnOnce() -> Option<Vec<u8>>,
    bytes: &[u8],
    scratch: &mut Scratch,
    child: &mut [u8],
) -> Result<(), ChunkError> {
    if codec != Codec::Predicted {
        return decode(codec, known, bytes, scratch, child);
    }
    let predicted = predict().ok_or(ChunkError::NoParent)?;
    let (&codec, bytes) = bytes.split_first().ok_or(ChunkError::Length)?;
    let codec = Codec::of_id(codec).ok_or(ChunkError::Codec)?;
    let beside = Known {
        parent: Some(&predicted),
        ..known
    };
    decode(codec, beside, bytes, scratch, child)
}

/// Appends a chunk to `out`, beside its parent or alone.
pub(super) fn encode(
    known: Known,
    child: &[u8],
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) -> Codec {
    let start = out.len();
    let width = width(known.dtype);
    let mut codec = Codec::Intdiff;
    if let Some(parent) = known.parent {
        if parent == child {
            return Codec::Same;
        }
        let most = child.len() / width / SPARSE;
        if let Some(changes) = sparse::changes(width, parent, child, most) {
            let element = sparse_element(known.dtype);
            codec = sparse::encode(element, &changes, &mut scratch.difference, out);
            let length = out.len() - start;
            let is_told = |element| sparse::are_told_by_parents(element, &changes, parent, length);
            // Few bytes either way, or nothing to be won.
            if length < CERTAIN || !element.is_none_or(is_told) {
                return or_raw(codec, start, child, out);
            }
        }
    }
    // Into room that stays: it is more than what comes out takes.
    let mut other = std::mem::take(&mut scratch.other);
    other.clear();
    differences(known, child, scratch, &mut other);
    if codec == Codec::Intdiff || other.len() < out.len() - start {
        out.truncate(start);
        out.extend_from_slice(&other);
        codec = Codec::Intdiff;
    }
    scratch.other = other;
    or_raw(codec, start, child, out)
}

/// A chunk as it is, if it is no larger so.
fn or_raw(codec: Codec, start: usize, child: &[u8], out: &mut Vec<u8>) -> Codec {
    if out.len() - start < child.len() {
        return codec;
    }
    out.truncate(start);
    out.extend_from_slice(child);
    Codec::Raw
}

/// What the coder of changes makes of a dtype.
fn sparse_element(dtype: Dtype) -> Option<Element> {
    (width(dtype) < 8).then(|| element(dtype))
}

fn differences(known: Known, child: &[u8], scratch: &mut Scratch, out: &mut Vec<u8>) {
    let Scratch {
        difference, zeros, ..
    } = scratch;
    let parent = known
        .parent
        .unwrap_or_else(|| zeros_for(zeros, child.len()));
    if width(known.dtype) == 8 {
        return wide::encode(known.dtype, parent, child, difference, out);
    }
    let (element, scale) = (element(known.dtype), scale(known));
    // Chunks are no longer than they may be, and what is known of one is as long as it is.
    difference::encode(
        Path::detect(),
        element,
        scale,
        (parent, child),
        difference,
        out,
    )
    .expect("a chunk of the right length");
}

/// Puts into `child` what [`encode`] was given.
fn decode(
    codec: Codec,
    known: Known,
    bytes: &[u8],
    scratch: &mut Scratch,
    child: &mut [u8],
) -> Result<(), ChunkError> {
    let parent = || known.parent.ok_or(ChunkError::NoParent);
    match codec {
        Codec::Same => {
            if !bytes.is_empty() {
                return Err(ChunkError::Length);
            }
            child.copy_from_slice(parent()?);
        }
        Codec::Raw => {
            if bytes.len() != child.len() {
                return Err(ChunkError::Length);
            }
            child.copy_from_slice(bytes);
        }
        Codec::Sparse => {
            child.copy_from_slice(parent()?);
            sparse::unlist(width(known.dtype), bytes, child)?;
        }
        Codec::Scattered => {
            child.copy_from_slice(parent()?);
            let element = sparse_element(known.dtype).ok_or(ChunkError::Codec)?;
            sparse::decode(element, bytes, child)?;
        }
        Codec::Predicted => return Err(ChunkError::Codec),
        Codec::Int8 | Codec::Int4 | Codec::OneBit | Codec::Hybrid | Codec::LowRank => {
            lossy::decode(
                codec,
                element(known.dtype),
                (parent()?, known.basis),
                bytes,
                child,
            )?;
        }
        Codec::Intdiff => {
            let zeros = &mut scratch.zeros;
            let parent = known
                .parent
                .unwrap_or_else(|| zeros_for(zeros, child.len()));
            if width(known.dtype) == 8 {
                wide::decode(known.dtype, parent, bytes, child)?;
            } else {
                let (element, scale) = (element(known.dtype), scale(known));
                difference::decode(Path::detect(), element, scale, parent, bytes, child)?;
            }
        }
    }
    Ok(())
}

fn scale(known: Known) -> Scale {
    known.roots.map_or(Scale::Chunk, Scale::Root)
}

fn zeros_for(zeros: &mut Vec<u8>, length: usize) -> &[u8] {
    zeros.resize(zeros.len().max(length), 0);
    &zeros[..length]
}

/// Bytes that [`encode`] did not write.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChunkError {
    #[error("a chunk is of another length than it should be")]
    Length,
    #[error("a chunk is said to be near a parent that it does not have")]
    NoParent,
    #[error("a chunk is coded in a way that there is not")]
    Codec,
    #[error("a chunk changes what is not there")]
    Place,
    #[error("a chunk is damaged: {0}")]
    Difference(#[from] DifferenceError),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DTYPES: [Dtype; 11] = [
        Dtype::F32,
        Dtype::F64,
        Dtype::F16,
        Dtype::BF16,
        Dtype::I8,
        Dtype::BOOL,
        Dtype::U16,
        Dtype::I32,
        Dtype::U64,
        Dtype::F8_E4M3,
        Dtype::C64,
    ];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn d2_a_chunk_of_any_bits_comes_back_and_is_never_larger(
            dtype in prop::sample::select(&DTYPES),
            parent in prop::collection::vec(any::<u64>(), 0..300),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>(), 0u32..64), 0..300),
            alone: bool,
        ) {
            let parent: Vec<u8> = parent.into_iter().flat_map(u64::to_le_bytes).collect();
            let mut child = parent.clone();
            for (at, value, shift) in changes {
                if child.is_empty() {
                    break;
                }
                let at = at.index(child.len() / 8) * 8;
                let before = u64::from_le_bytes(child[at..at + 8].try_into().unwrap());
                child[at..at + 8].copy_from_slice(&before.wrapping_add(value >> shift).to_le_bytes());
            }
            let known = Known { dtype, parent: (!alone).then_some(&parent), roots: None, basis: None };
            let (mut scratch, mut out) = (Scratch::default(), vec![7]);
            let codec = encode(known, &child, &mut scratch, &mut out);
            prop_assert!(out.len() - 1 <= child.len());
            let mut back = vec![0xa5; child.len()];
            decode(codec, known, &out[1..], &mut scratch, &mut back).unwrap();
            prop_assert_eq!(&back, &child);
        }

        #[test]
        fn d2_any_bytes_as_a_chunk_are_an_error_or_something(
            dtype in prop::sample::select(&DTYPES),
            codec in prop::sample::select(&Codec::ALL),
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            elements in 0usize..20,
        ) {
            let parent = vec![3; 8 * elements];
            let mut child = vec![0; 8 * elements];
            let known = Known { dtype, parent: Some(&parent), roots: None, basis: None };
            let _ = decode(codec, known, &bytes, &mut Scratch::default(), &mut child);
        }
    }

    #[test]
    fn d2_a_few_changes_are_listed_and_few_bytes() {
        let parent: Vec<u8> = (0..40_000u32)
            .flat_map(|i| (i as f32).sin().to_le_bytes())
            .collect();
        let mut child = parent.clone();
        child[4000..4004].copy_from_slice(&f32::from_bits(0x7fc0_1234).to_le_bytes());
        child[80_000..80_004].copy_from_slice(&(-0.0f32).to_le_bytes());
        let known = Known {
            dtype: Dtype::F32,
            parent: Some(&parent),
            roots: None,
            basis: None,
        };
        let (mut scratch, mut out) = (Scratch::default(), Vec::new());
        assert_eq!(encode(known, &child, &mut scratch, &mut out), Codec::Sparse);
        assert!(out.len() < 16, "{}", out.len());
        assert_eq!(encode(known, &parent, &mut scratch, &mut out), Codec::Same);
    }

    /// Numbers of all sizes, and some of them moved to the next but one.
    fn scattered(elements: u32, is_moved: impl Fn(u32, f32) -> bool) -> (Vec<u8>, Vec<u8>) {
        let (mut parent, mut child) = (Vec::new(), Vec::new());
        for i in 0..elements {
            let random = i
                .wrapping_mul(0x9e37_79b9)
                .rotate_left(13)
                .wrapping_mul(0x85eb_ca6b);
            let value = 0.9f32.powi((random % 100) as i32);
            let bits = (value.to_bits() >> 16) as u16;
            let moved = if is_moved(random >> 8, value) {
                bits + 2
            } else {
                bits
            };
            parent.extend(bits.to_le_bytes());
            child.extend(moved.to_le_bytes());
        }
        (parent, child)
    }

    fn coded(dtype: Dtype, parent: &[u8], child: &[u8]) -> (Codec, usize) {
        let known = Known {
            dtype,
            parent: Some(parent),
            roots: None,
            basis: None,
        };
        let (mut scratch, mut out) = (Scratch::default(), Vec::new());
        let codec = encode(known, child, &mut scratch, &mut out);
        let mut back = vec![0xa5; child.len()];
        decode(codec, known, &out, &mut scratch, &mut back).unwrap();
        assert!(back == child);
        (codec, out.len())
    }

    #[test]
    fn d2_scattered_changes_are_coded_near_their_entropy() {
        let elements = 1 << 17;
        let (parent, child) = scattered(elements, |random, _| random % 100 == 0);
        let (codec, length) = coded(Dtype::BF16, &parent, &child);
        assert_eq!(codec, Codec::Scattered);
        // Of a one in a hundred: where it is. That it moved by two is always the same.
        let share: f64 = 0.01;
        let entropy = -share * share.log2() - (1.0 - share) * (1.0 - share).log2();
        let bound = entropy * f64::from(elements) / 8.0;
        // Two tables and the coders' states are two hundred bytes and more.
        assert!((length as f64) < 1.1 * bound + 300.0, "{length} {bound}");
        // As 64-bit integers they are listed.
        assert!(matches!(
            coded(Dtype::I64, &parent[..80_000], &child[..80_000]).0,
            Codec::Sparse | Codec::Intdiff
        ));
    }

    #[test]
    fn d2_changes_that_the_parents_tell_of_are_no_list() {
        // All of the smallest numbers, and no others: there is nothing to say of where they are.
        let (parent, child) = scattered(1 << 17, |_, value| value < 1.05 * 0.9f32.powi(99));
        let (codec, length) = coded(Dtype::BF16, &parent, &child);
        let (_, scattered) = {
            let (parent, child) = scattered(1 << 17, |random, _| random % 100 == 0);
            coded(Dtype::BF16, &parent, &child)
        };
        assert_eq!(codec, Codec::Intdiff);
        assert!(3 * length < 2 * scattered, "{length} {scattered}");
    }
}
