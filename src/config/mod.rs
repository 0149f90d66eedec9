//! What the TOML says ([`Config`]) and what will run ([`Plan`]).
//!
//! ```text
//! file, --set -> Document -> check -> Config -> resolve -> Plan
//!                (origins)   (keys)   (serde)   (cross-field checks)
//! ```
//!
//! Nothing stops at the first mistake: [`load`] returns a plan, or a [`ConfigError`] with every
//! issue, each pointing at the text that caused it. The keys are defined once, in the structs
//! re-exported here; the checker, [`json_schema`], [`reference_markdown`] and [`template`] are
//! derived from them.
mod adapter;
mod average;
mod budget;
mod check;
mod checks;
mod document;
mod era;
mod error;
mod gradient;
mod hints;
mod keys;
mod length;
mod optimizer;
mod overrides;
mod phase;
mod phase_check;
mod phase_model;
mod plan;
mod presets;
mod reference;
mod resolve;
mod schedule;
mod schema;
mod shape;
mod source;
mod spec;
mod sweep;
mod template;

pub(crate) use adapter::whole;
pub use adapter::{AdapterPlan, LoraShape, lora_scale};
pub use average::AverageStart;
pub use budget::{Budget, BudgetKind};
pub use era::EraOutput;
pub use error::{ConfigError, Issue};
pub use firebrick_kernels::blockwise::Format as BlockFormat;
pub use firebrick_kernels::ternary::Granularity;
pub use gradient::CompressionPlan;
pub use keys::*;
pub use length::Length;
pub use optimizer::{
    AdamWPlan, LionPlan, MuonPlan, NewtonSchulz, OptimizerConfig, OptimizerName, OptimizerPlan,
    Ramp, SoapPlan, VelvetPlan, VelvetSignal,
};
pub use phase::{PathSelector, PhaseAdapter, PhaseLength, PhasePlan, ScheduleSpan};
pub use phase_check::{PhaseProblem, problems as phase_problems};
pub use phase_model::{Held, PhaseModel};
pub(crate) use plan::load_quantization;
pub use plan::{Plan, load};
pub use reference::reference_markdown;
pub use schedule::{Decay, DecayShape, LrSchedulerConfig, SchedulePlan, SchedulerName, Warmup};
pub use schema::json_schema;
pub use shape::{BlockSize, Blockwise, ModelShape, PackedLayout, RopeScaling, Ternary};
pub use source::{Location, Origin, Sources};
pub use spec::{CONFIG_JSON, DecoderSpec, SpecError};
pub use sweep::{Combination, EarlyStop, Sweep, SweepError, load_sweep};
pub use template::{TemplateName, template};
