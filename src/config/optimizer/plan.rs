//! The update rules with their parameters, as a run uses them.

use serde::Serialize;

use super::{NewtonSchulz, VelvetSignal};

/// The update rule with its parameters.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerPlan {
    /// Adam with decoupled weight decay.
    AdamW(AdamWPlan),
    /// AdamW with both moments in eight bits.
    AdamW8bit(AdamWPlan),
    /// Adam; weight decay is added to the gradient.
    Adam {
        /// Decay of the first and second moment estimates.
        betas: [f64; 2],
        /// Added to the denominator.
        eps: f64,
        /// Decay of matrices and embeddings.
        weight_decay: f64,
    },
    /// Stochastic gradient descent; weight decay is added to the gradient.
    Sgd {
        /// Momentum; 0 = none.
        momentum: f64,
        /// Whether the momentum is Nesterov's.
        nesterov: bool,
        /// Decay of matrices and embeddings.
        weight_decay: f64,
    },
    /// Sign of the gradient for matrices, Lion for vectors, decoupled weight decay.
    Sign(LionPlan),
    /// Sign of the momentum, decoupled weight decay.
    Lion(LionPlan),
    /// Factored second moments.
    Adafactor {
        /// Decay of matrices and embeddings.
        weight_decay: f64,
    },
    /// Orthogonalised momentum for the blocks' matrices, AdamW for the rest.
    Muon(MuonPlan),
    /// Muon with a second moment for each output neuron, AdamW for the rest.
    NorMuon {
        /// Decay of the second moments.
        neuron_beta: f64,
        /// Muon's numbers.
        #[serde(flatten)]
        muon: MuonPlan,
    },
    /// Adam in Shampoo's eigenbasis for the blocks' matrices, AdamW for the rest.
    Soap(SoapPlan),
    /// AdamW with a learning rate that follows the signals.
    Velvet {
        /// The signals and their bound.
        velvet: VelvetPlan,
        /// AdamW's numbers.
        #[serde(flatten)]
        adamw: AdamWPlan,
    },
}

/// The numbers of AdamW. Fields that are off are left out of a record, so that it equals the record of a
/// run from a version without them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct AdamWPlan {
    /// Decay of the first and second moment estimates.
    pub betas: [f64; 2],
    /// Added to the denominator.
    pub eps: f64,
    /// Decay of matrices and embeddings.
    pub weight_decay: f64,
    /// Whether a weight is decayed only if its update has the same sign.
    #[serde(skip_serializing_if = "is_off")]
    pub cautious_weight_decay: bool,
    /// How the second of the betas rises to its value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beta2_warmup: Option<Ramp>,
}

/// The numbers of Lion.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LionPlan {
    /// Interpolation of the update and decay of the momentum.
    pub betas: [f64; 2],
    /// Decay of matrices and embeddings.
    pub weight_decay: f64,
    /// Whether a weight is decayed only if its update has the same sign.
    #[serde(skip_serializing_if = "is_off")]
    pub cautious_weight_decay: bool,
}

/// The numbers of Muon.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MuonPlan {
    /// Momentum of the matrices.
    pub momentum: f64,
    /// Whether the momentum is Nesterov's.
    pub nesterov: bool,
    /// How the momentum rises to its value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub momentum_warmup: Option<Ramp>,
    /// The learning rate of AdamW's half as a multiple of the matrices'.
    #[serde(skip_serializing_if = "is_one")]
    pub adamw_lr_ratio: f64,
    /// The polynomials that make the momentum orthogonal.
    #[serde(skip_serializing_if = "NewtonSchulz::is_default")]
    pub newton_schulz: NewtonSchulz,
    /// AdamW's numbers, for all other parameters. The weight decay is the matrices' too.
    #[serde(flatten)]
    pub adamw: AdamWPlan,
}

/// The numbers of SOAP.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SoapPlan {
    /// Decay of the means of G Gᵀ and Gᵀ G.
    pub shampoo_beta: f64,
    /// Updates from one change of the bases to the next.
    pub precondition_frequency: u64,
    /// Longer sides are not turned.
    pub max_precondition_dim: usize,
    /// The numbers of Adam in the eigenbasis, and of AdamW for all other parameters.
    #[serde(flatten)]
    pub adamw: AdamWPlan,
}

/// The signals of Velvet.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VelvetPlan {
    /// The signals, each once; none = AdamW.
    pub signals: Vec<VelvetSignal>,
    /// The largest factor of the learning rate, and the inverse of the smallest.
    pub bound: f64,
    /// Decay of the signals' running means.
    pub smoothing: f64,
    /// Whether weights and moments stay as they are where the gradient is exactly zero.
    #[serde(skip_serializing_if = "is_off")]
    pub sparse: bool,
}

/// A number that rises in a straight line to its value.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ramp {
    /// The number in the first update.
    pub start: f64,
    /// Updates before it has its value.
    pub steps: u64,
}

fn is_one(ratio: &f64) -> bool {
    *ratio == 1.0
}

fn is_off(switch: &bool) -> bool {
    !switch
}

impl NewtonSchulz {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl AdamWPlan {
    /// AdamW without cautious decay and without warm-up of its numbers.
    pub fn new(betas: [f64; 2], eps: f64, weight_decay: f64) -> Self {
        Self {
            betas,
            eps,
            weight_decay,
            cautious_weight_decay: false,
            beta2_warmup: None,
        }
    }
}

impl LionPlan {
    /// Lion without cautious decay.
    pub fn new(betas: [f64; 2], weight_decay: f64) -> Self {
        Self {
            betas,
            weight_decay,
            cautious_weight_decay: false,
        }
    }
}

impl MuonPlan {
    /// Muon as Jordan et al. (2024) have it, with Nesterov's momentum.
    pub fn new(momentum: f64, adamw: AdamWPlan) -> Self {
        Self {
            momentum,
            nesterov: true,
            momentum_warmup: None,
            adamw_lr_ratio: 1.0,
            newton_schulz: NewtonSchulz::Quintic,
            adamw,
        }
    }
}

impl SoapPlan {
    /// SOAP with the settings of its authors' code.
    pub fn new(adamw: AdamWPlan) -> Self {
        Self {
            shampoo_beta: adamw.betas[1],
            precondition_frequency: 10,
            max_precondition_dim: 10_000,
            adamw,
        }
    }
}

impl Default for VelvetPlan {
    fn default() -> Self {
        Self {
            signals: vec![VelvetSignal::Loss, VelvetSignal::GradientNorm],
            bound: 1.25,
            smoothing: 0.95,
            sparse: false,
        }
    }
}

impl OptimizerPlan {
    /// The rule's name in a configuration.
    pub fn name(&self) -> String {
        let variant = format!("{self:?}");
        let name = variant.split([' ', '(', '{']).next();
        name.unwrap_or_default().to_lowercase()
    }
}
