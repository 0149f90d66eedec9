//! One micro-batch of token sequences, on the host.

use std::ops::Range;

/// Token sequences of equal length with everything the loss needs to know about each token.
///
/// All five arrays are row-major `[rows, cols]`. Targets are already shifted: `targets[i]` is the
/// token that follows `tokens[i]`, so a model's logits at `i` are held against `targets[i]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Sequences.
    pub rows: usize,
    /// Tokens per sequence.
    pub cols: usize,
    /// Input token ids `[rows, cols]`.
    pub tokens: Vec<u32>,
    /// The token to predict at each position `[rows, cols]`.
    pub targets: Vec<u32>,
    /// Weight of each prediction in the loss `[rows, cols]`: 1 = trained, 0 = padding or masked.
    pub weights: Vec<f32>,
    /// Attention stays within tokens of equal ids, which stand next to each other `[rows, cols]`.
    pub segment_ids: Vec<u32>,
    /// Position of each token within its segment `[rows, cols]`.
    pub positions: Vec<u32>,
}

impl Batch {
    /// One text as one row: every token but the last is an input, every token but the first a
    /// target.
    ///
    /// ```
    /// let batch = firebrick::data::Batch::of_row(&[5, 6, 7]);
    /// assert_eq!((batch.tokens, batch.targets), (vec![5, 6], vec![6, 7]));
    /// ```
    pub fn of_row(tokens: &[u32]) -> Batch {
        let cols = tokens.len().saturating_sub(1);
        Batch {
            rows: 1,
            cols,
            tokens: tokens[..cols].to_vec(),
            targets: tokens[tokens.len() - cols..].to_vec(),
            weights: vec![1.0; cols],
            segment_ids: vec![0; cols],
            positions: (0..cols as u32).collect(),
        }
    }

    /// A text to be looked at and not trained on: every token is an input, and there is no loss.
    ///
    /// ```
    /// let batch = firebrick::data::Batch::of_prompt(&[5, 6, 7]);
    /// assert_eq!((batch.tokens.as_slice(), batch.weight()), (&[5, 6, 7][..], 0.0));
    /// ```
    pub fn of_prompt(tokens: &[u32]) -> Batch {
        let cols = tokens.len();
        Batch {
            rows: 1,
            cols,
            tokens: tokens.to_vec(),
            targets: vec![0; cols],
            weights: vec![0.0; cols],
            segment_ids: vec![0; cols],
            positions: (0..cols as u32).collect(),
        }
    }

    /// The given rows as a batch of their own.
    pub fn rows(&self, rows: Range<usize>) -> Batch {
        let cells = rows.start * self.cols..rows.end * self.cols;
        Batch {
            rows: rows.len(),
            cols: self.cols,
            tokens: self.tokens[cells.clone()].to_vec(),
            targets: self.targets[cells.clone()].to_vec(),
            weights: self.weights[cells.clone()].to_vec(),
            segment_ids: self.segment_ids[cells.clone()].to_vec(),
            positions: self.positions[cells].to_vec(),
        }
    }

    /// Sum of the loss weights: the number of trained tokens when weights are 0 and 1.
    pub fn weight(&self) -> f64 {
        self.weights.iter().map(|&w| f64::from(w)).sum()
    }
}
