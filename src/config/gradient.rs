//! What `[gradient]` comes to.

use serde::Serialize;

use super::keys::CompressionMethod;

/// How the gradients of workers are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CompressionPlan {
    /// What a worker sends; never [`CompressionMethod::None`].
    pub method: CompressionMethod,
    /// Bytes of the gradient in f32 for each byte that a worker sends. None for a method whose ratio is
    /// fixed.
    pub ratio: Option<f64>,
    /// Steps at the beginning whose gradients travel whole.
    pub warmup_steps: u64,
    /// Whether a worker keeps what it has not sent.
    pub error_feedback: bool,
    /// What a residual is multiplied by in each step.
    pub residual_decay: f64,
}

impl CompressionMethod {
    /// The method's name in the file.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::TopK => "topk",
            Self::RandomK => "randomk",
            Self::Ternary => "ternary",
            Self::Sign => "sign",
            Self::PowerSgd => "powersgd",
            Self::Demo => "demo",
            Self::VsaRotate => "vsa-rotate",
            Self::VsaSketch => "vsa-sketch",
        }
    }

    /// The residual's decay if the file has none.
    pub(super) fn default_decay(self) -> f64 {
        match self {
            Self::Demo | Self::VsaRotate => 0.999,
            _ => 1.0,
        }
    }
}
