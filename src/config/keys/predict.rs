//! `mode` and `predict` of a phase.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the steps of a phase get their gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PhaseMode {
    /// Every step computes its gradient.
    #[default]
    Full,
    /// One step in so many is predicted from the steps before it.
    Predict,
}

/// `predict`: steps without a backward pass. In each cycle of `every` steps the last one is
/// predicted: its update is tried, and one forward pass of the batch before decides whether it is
/// kept. If it is not, the step is computed after all. The first step of each cycle compares what
/// would have been predicted for it with its true gradient.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PredictConfig {
    /// What the prediction is made of.
    pub method: PredictMethod,
    /// Steps of a cycle, the last of which is predicted.
    #[schemars(range(min = 2, max = 1000))]
    pub every: u64,
    /// Prediction is turned off for the rest of the phase if the cosine between a prediction and
    /// the truth is below this.
    #[schemars(range(min = -1.0, max = 1.0))]
    pub min_cosine: f64,
    /// Prediction is turned off for the rest of the phase after so many rejections in a row.
    #[schemars(range(min = 1, max = 1000000))]
    pub max_rejections: u64,
}

impl Default for PredictConfig {
    fn default() -> Self {
        Self {
            method: PredictMethod::Momentum,
            every: 4,
            min_cosine: 0.5,
            max_rejections: 3,
        }
    }
}

/// What a prediction is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PredictMethod {
    /// The gradient is the mean of the last ones, with weights .9^age. Keeps one gradient.
    Momentum,
    /// The gradient continues a straight line through the last ones, fitted for each weight by least
    /// squares with weights .95^age. Keeps two gradients.
    LeastSquares,
    /// The weights move as far as in the mean step of the cycle. Keeps one copy of the weights.
    Weights,
}
