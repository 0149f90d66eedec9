//! The length of a run.

/// The length of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    /// Optimizer steps.
    Steps(u64),
    /// Passes over the training data.
    Epochs(f64),
    /// Trained tokens.
    Tokens(u64),
}
