//! BLAKE3 of tensors whose chunks are hashed apart, on many threads and in any order.
//!
//! BLAKE3 is a tree: a chunk of a power of two of bytes is a subtree whose value does not depend on what comes after it.

use blake3::hazmat::{
    HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};
use blake3::{Hash, Hasher};

/// What is known of one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChunkHash {
    /// All there is.
    Whole(Hash),
    /// A subtree's value.
    Part([u8; 32]),
}

/// Hashes the bytes of a chunk, `offset` bytes into a tensor of `total` bytes.
pub(super) fn of_chunk(bytes: &[u8], offset: usize, total: usize) -> ChunkHash {
    if bytes.len() == total {
        return ChunkHash::Whole(blake3::hash(bytes));
    }
    let mut hasher = Hasher::new();
    hasher.set_input_offset(offset as u64).update(bytes);
    ChunkHash::Part(hasher.finalize_non_root())
}

/// The hash of a tensor of `total` bytes out of those of its chunks of `chunk` bytes, in order.
pub(super) fn of_chunks(chunks: &[ChunkHash], chunk: usize, total: usize) -> Hash {
    match chunks {
        [] => blake3::hash(&[]),
        [ChunkHash::Whole(hash)] => *hash,
        _ => {
            let (left, right) = halves(chunks, chunk, total);
            merge_subtrees_root(&left, &right, Mode::Hash)
        }
    }
}

fn halves(chunks: &[ChunkHash], chunk: usize, total: usize) -> ([u8; 32], [u8; 32]) {
    let left = left_subtree_len(total as u64) as usize;
    let (first, second) = chunks.split_at(left / chunk);
    (
        subtree(first, chunk, left),
        subtree(second, chunk, total - left),
    )
}

fn subtree(chunks: &[ChunkHash], chunk: usize, total: usize) -> [u8; 32] {
    match chunks {
        [ChunkHash::Part(value)] => *value,
        [ChunkHash::Whole(hash)] => *hash.as_bytes(),
        _ => {
            let (left, right) = halves(chunks, chunk, total);
            merge_subtrees_non_root(&left, &right, Mode::Hash)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn d1_chunks_hash_to_what_the_whole_does() {
        let bytes: Vec<u8> = (0..70_001u32)
            .map(|i| (i.wrapping_mul(i) >> 7) as u8)
            .collect();
        let chunk = 4096;
        for total in [
            0, 1, 4095, 4096, 4097, 8192, 8193, 12_288, 20_000, 65_536, 70_001,
        ] {
            let parts = bytes[..total].chunks(chunk).enumerate();
            let chunks: Vec<_> = parts
                .map(|(i, part)| of_chunk(part, i * chunk, total))
                .collect();
            assert_eq!(
                of_chunks(&chunks, chunk, total),
                blake3::hash(&bytes[..total]),
                "{total}"
            );
        }
    }
}
