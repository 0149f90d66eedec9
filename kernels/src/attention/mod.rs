//! Attention of queries to a span of keys each, with rotary positions, on the CPU.
//!
//! For each head, with queries q, keys k and values v of `head_dim` numbers (Vaswani et al., 2017, section 3.2):
//!
//! ```text
//! s_ij = turn(q_i) · turn(k_j) / sqrt(head_dim)      j in the span of i
//! p_ij = exp(s_ij) / Σ_j exp(s_ij)
//! o_i  = Σ_j p_ij v_j
//! ```
//!
//! `turn` rotates by the token's position (Su et al., 2021) in the half-split form of LLaMA: element n with element
//! n + head_dim / 2. A span is a range of keys: from the first token of its text, or of its window, to the token itself.
//! Heads of queries share heads of keys and values in groups (Ainslie et al., 2023).
//!
//! Scores exist for some tens of queries at a time, in the cache, and only where they are in a span: of causal attention
//! about half. The backward pass keeps q, k and v alone and computes scores again (Dao et al., 2022, section 3.1): memory
//! grows with the tokens and not with their square. It needs no output either, since
//!
//! ```text
//! dp_ij = do_i · v_j          ds_ij = p_ij (dp_ij - Σ_j p_ij dp_ij)
//! dv_j  = Σ_i p_ij do_i       dq_i  = turn⁻¹(Σ_j ds_ij turn(k_j)) / sqrt(head_dim)
//! dk_j  = turn⁻¹(Σ_i ds_ij turn(q_i)) / sqrt(head_dim)
//! ```
//!
//! Sums are f32. Results depend on no number of threads.

mod cpu;
mod op;
pub mod reference;
#[cfg(test)]
mod tests;
mod ways;

pub use op::{AttentionOps, attention};
pub use ways::ways;

/// What the operands of attention are cut into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Sequences.
    pub rows: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values; divides `heads`.
    pub kv_heads: usize,
    /// Numbers of a head; even where there are rotary positions.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Numbers of all heads of queries.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Numbers of all heads of keys.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// Values of all tokens, row by row, and what says how they belong together.
#[derive(Debug, Clone, Copy)]
pub struct Operands<'a> {
    /// `[rows x seq, heads x head_dim]`.
    pub q: &'a [f32],
    /// `[rows x seq, kv_heads x head_dim]`.
    pub k: &'a [f32],
    /// `[rows x seq, kv_heads x head_dim]`.
    pub v: &'a [f32],
    /// `[1 or rows, seq, head_dim]`: cosines, then sines, of `head_dim / 2` angles; empty where nothing is turned.
    pub angles: &'a [f32],
    /// `[1 or rows, seq, 2]`: the first key that a query sees, and the one behind the last.
    pub spans: &'a [i32],
    /// How they are cut.
    pub shape: AttentionShape,
}

impl<'a> Operands<'a> {
    /// Tokens of a sequence.
    pub(crate) fn seq(&self) -> usize {
        self.q.len() / (self.shape.rows * self.shape.width()).max(1)
    }

    /// # Panics
    /// Where lengths do not belong together, or a span ends beyond the sequence.
    pub(crate) fn check(&self) {
        let AttentionShape {
            rows,
            heads,
            kv_heads,
            head_dim,
        } = self.shape;
        let seq = self.seq();
        assert!(kv_heads > 0 && heads % kv_heads == 0, "{:?}", self.shape);
        assert_eq!(self.q.len(), rows * seq * self.shape.width(), "queries");
        assert_eq!(self.k.len(), rows * seq * self.shape.kv_width(), "keys");
        assert_eq!(self.v.len(), self.k.len(), "values");
        let tables = |count: usize, one: usize| count == one || count == rows * one;
        let angles = self.angles.len();
        let turned = tables(angles, seq * head_dim) && head_dim % 2 == 0;
        assert!(angles == 0 || turned, "angles");
        assert!(tables(self.spans.len(), 2 * seq), "spans");
        let within = |span: &[i32; 2]| span[0] >= 0 && span[1] as i64 <= seq as i64;
        assert!(self.spans.as_chunks().0.iter().all(within), "spans");
    }

    /// The keys that a query sees.
    pub(crate) fn span(&self, row: usize, token: usize) -> std::ops::Range<usize> {
        let row = if self.spans.len() == 2 * self.seq() {
            0
        } else {
            row
        };
        let at = 2 * (row * self.seq() + token);
        let (start, end) = (self.spans[at] as usize, self.spans[at + 1].max(0) as usize);
        start.min(end)..end
    }

    /// Cosines and sines of a token.
    pub(crate) fn angles(&self, row: usize, token: usize) -> Option<(&'a [f32], &'a [f32])> {
        if self.angles.is_empty() {
            return None;
        }
        let (seq, width) = (self.seq(), self.shape.head_dim);
        let row = if self.angles.len() == seq * width {
            0
        } else {
            row
        };
        Some(self.angles[(row * seq + token) * width..][..width].split_at(width / 2))
    }
}
