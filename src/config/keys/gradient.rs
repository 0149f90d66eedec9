//! `[gradient]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[gradient]`: the gradients of several workers, and how they become one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GradientConfig {
    /// Workers of each process, for experiments with data-parallel training on one machine. They take
    /// turns: each computes gradient_accumulation_steps micro-batches of every step, so that a step has
    /// so many times as many sequences.
    #[schemars(range(min = 1, max = 1024), extend("x-aliases" = ["world_size", "num_workers", "num_processes"]))]
    pub logical_workers: usize,
    /// Seconds that a rank waits for the others. Then the run ends with an error that names the rank that
    /// did not come. The ranks also wait while rank 0 prepares the data, waits for a save, or writes
    /// samples.
    #[schemars(range(min = 1, max = 1000000), extend("x-aliases" = ["torch: timeout", "HF: ddp_timeout"]))]
    pub timeout_seconds: u64,
    /// How gradients are compressed. Without the section they are added in f32.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-aliases" = ["DeepSpeed: compression_training", "ddp_comm_hook", "comm_hook"]))]
    pub compression: Option<CompressionConfig>,
}

impl Default for GradientConfig {
    fn default() -> Self {
        Self {
            logical_workers: 1,
            timeout_seconds: 600,
            compression: None,
        }
    }
}

/// `[gradient.compression]`: each worker sends a code of its gradient and keeps the error for later
/// steps. Matrices are coded; norms and biases travel whole up to a ratio of 100, and above it in
/// bf16 in every tenth step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CompressionConfig {
    /// What a worker sends.
    #[schemars(extend("x-aliases" = ["compressor", "type"]))]
    pub method: CompressionMethod,
    /// Bytes of the gradient in f32 for each byte that a worker sends in a step. Default: 32. The ratio
    /// of sign is fixed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1.0, max = 100000.0), extend("examples" = [32.0], "x-aliases" = ["compression_ratio"]))]
    pub ratio: Option<f64>,
    /// Steps at the beginning whose gradients travel whole.
    #[schemars(range(max = 1000000000000u64), extend("x-aliases" = ["torch: start_powerSGD_iter", "DeepSpeed: freeze_step"]))]
    pub warmup_steps: u64,
    /// Whether a worker keeps what it has not sent. Without it, that is lost.
    #[schemars(extend("x-aliases" = ["torch: use_error_feedback"]))]
    pub error_feedback: bool,
    /// What a worker multiplies its residual by in each step. At 1 the residual is the error of
    /// earlier steps; below 1 it is a momentum, and goes with optimizer.name = "sign". Default: 0.999
    /// for vsa-rotate and demo, 1 for the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0, "examples" = [0.999], "x-aliases" = ["DeMo: compression_decay"]))]
    pub residual_decay: Option<f64>,
}

impl Default for CompressionConfig {
    fn default() -> Self {
        Self {
            method: CompressionMethod::VsaRotate,
            ratio: None,
            warmup_steps: 0,
            error_feedback: true,
            residual_decay: None,
        }
    }
}

/// What a worker sends of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CompressionMethod {
    /// Everything, in f32.
    None,
    /// The largest elements of each block of 4,096, in bf16.
    TopK,
    /// Elements at random places, in f32.
    RandomK,
    /// The signs of the largest elements of each block of 4,096, with one magnitude for the block.
    Ternary,
    /// The sign of every element, with one magnitude for each 128: 28 times fewer bytes.
    Sign,
    /// Two thin matrices whose product is near the gradient (Vogels et al., 2019).
    PowerSgd,
    /// The largest frequencies of each tile of 64 x 64 (Peng et al., 2024). The residual is the momentum.
    Demo,
    /// As ternary, after random signs and a Walsh-Hadamard transform of each block. The residual is the
    /// momentum.
    #[serde(rename = "vsa-rotate")]
    VsaRotate,
    /// A linear sketch finds the elements that are large in the sum over all workers; their values
    /// travel in f32.
    #[serde(rename = "vsa-sketch")]
    VsaSketch,
}
