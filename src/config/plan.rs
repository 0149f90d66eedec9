#![allow(missing_docs)]
use super::keys::DecayShape;
#[derive(Debug, Clone, PartialEq)]
pub enum OptimizerPlan {
    AdamW { betas: [f64; 2], eps: f64, weight_decay: f64 },
    Adam { betas: [f64; 2], eps: f64, weight_decay: f64 },
    Sgd { momentum: f64, nesterov: bool, weight_decay: f64 },
    Lion { betas: [f64; 2], weight_decay: f64 },
    Adafactor { weight_decay: f64 },
    Muon { momentum: f64, nesterov: bool, betas: [f64; 2], eps: f64, weight_decay: f64 },
}
#[derive(Debug, Clone, PartialEq)]
pub enum Decay { Constant, Linear, Cosine, Wsd { ratio: f64, shape: DecayShape }, Polynomial { power: f64 }, InverseSqrt }
#[derive(Debug, Clone, PartialEq)]
pub enum Warmup { Steps(u64), Ratio(f64) }
