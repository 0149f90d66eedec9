//! Token ids in a row: in memory, or in a mapped cache file.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of one stored token id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// 16 bits, for vocabularies up to 65,536.
    U16,
    /// 32 bits.
    U32,
}

impl Width {
    /// The narrowest that holds every id of a vocabulary.
    pub fn of(vocab_size: usize) -> Self {
        if vocab_size <= 1 << 16 {
            Width::U16
        } else {
            Width::U32
        }
    }

    /// Bytes per token.
    pub fn bytes(self) -> usize {
        match self {
            Width::U16 => 2,
            Width::U32 => 4,
        }
    }
}

/// A sequence of token ids, cheap to clone.
///
/// Ids are kept as little-endian bytes and decoded on access, whether they lie in memory or in a
/// file that the operating system pages in: there is one code path, and no alignment to mind.
#[derive(Clone)]
pub struct TokenStream {
    storage: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
    width: Width,
}

impl TokenStream {
    /// Takes a range of bytes as tokens. A trailing part of a token is left out.
    pub(super) fn new(
        storage: Arc<dyn AsRef<[u8]> + Send + Sync>,
        range: Range<usize>,
        width: Width,
    ) -> Self {
        Self {
            storage,
            range,
            width,
        }
    }

    /// Keeps ids in memory, 16 bits each where that is enough for `vocab_size`.
    pub fn from_ids(ids: &[u32], vocab_size: usize) -> Self {
        let mut packed = PackedIds::new(Width::of(vocab_size));
        packed.extend(ids);
        packed.into_stream()
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.bytes().len() / self.width.bytes()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How ids are stored.
    pub fn width(&self) -> Width {
        self.width
    }

    /// The ids in `range`, which must lie within `0..len()`.
    pub fn ids(&self, range: Range<usize>) -> impl Iterator<Item = u32> + '_ {
        let width = self.width.bytes();
        let bytes = &self.bytes()[range.start * width..range.end * width];
        bytes.chunks_exact(width).map(|id| match *id {
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => unreachable!("a width is 2 or 4 bytes"),
        })
    }

    /// All ids.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.ids(0..self.len())
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &(*self.storage).as_ref()[self.range.clone()]
    }
}

impl fmt::Debug for TokenStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenStream({} x {:?})", self.len(), self.width)
    }
}

impl PartialEq for TokenStream {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().eq(other.iter())
    }
}

/// Ids being collected, already at their final width: half the memory of a `Vec<u32>` for most
/// vocabularies.
pub(super) struct PackedIds {
    bytes: Vec<u8>,
    width: Width,
}

impl PackedIds {
    pub(super) fn new(width: Width) -> Self {
        Self {
            bytes: Vec::new(),
            width,
        }
    }

    /// Appends ids, which must fit the width.
    pub(super) fn extend(&mut self, ids: &[u32]) {
        for id in ids {
            let bytes = id.to_le_bytes();
            debug_assert!(self.width == Width::U32 || *id <= u32::from(u16::MAX));
            self.bytes.extend_from_slice(&bytes[..self.width.bytes()]);
        }
    }

    pub(super) fn into_stream(self) -> TokenStream {
        let range = 0..self.bytes.len();
        TokenStream::new(Arc::new(self.bytes), range, self.width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_back_at_both_widths() {
        for (vocab_size, width) in [(65_536, Width::U16), (65_537, Width::U32)] {
            let ids: Vec<u32> = vec![0, 1, 255, 256, 65_535];
            let stream = TokenStream::from_ids(&ids, vocab_size);
            assert_eq!(stream.width(), width);
            assert_eq!(stream.iter().collect::<Vec<_>>(), ids);
            assert_eq!(stream.ids(1..3).collect::<Vec<_>>(), [1, 255]);
        }
    }
}
