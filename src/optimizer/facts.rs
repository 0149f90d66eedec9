//! What a step knows of itself when the weights are updated.

/// The learning rate of a step, and what else a rule may go by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepFacts {
    /// The learning rate.
    pub learning_rate: f64,
    /// The mean loss of the step over all ranks, if it is known.
    pub loss: Option<f64>,
    /// The norm of the whole gradient before clipping, if it is known.
    pub grad_norm: Option<f64>,
}

impl From<f64> for StepFacts {
    /// A learning rate alone.
    fn from(learning_rate: f64) -> Self {
        Self {
            learning_rate,
            loss: None,
            grad_norm: None,
        }
    }
}
