//! What a run will need, before it starts: parameters, arithmetic, memory.
//!
//! [`Memory`] is a sum that a person can follow, taken at the moment of a step at which most is
//! held. Its terms follow from the shapes of what burn keeps for the backward pass; how they were
//! found and how well they hold is in docs/performance.md, and `cargo bench --bench memory` holds
//! them against real runs.

mod activations;
mod fit;
mod flops;
mod memory;
mod term;
mod weights;

use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::{Device, Tensor};

pub use fit::{Shortage, available_bytes, fit};
pub use flops::Flops;
pub use memory::{Memory, Moment};
pub use term::Term;

use crate::config::{
    AdapterPlan, CompressionPlan, Config, DecoderSpec, Dtype, Held, PhaseModel, PhasePlan, Plan,
};
use crate::gradient::trained_parameters;
use crate::model::{Decoder, ModelError, VisitParameters};
use crate::optimizer::Optimizer;

/// What a run will need.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Forecast {
    /// The name of the phase that needs the most memory; None if the run has one phase.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// All parameters; a tied head counts once.
    pub parameters: u64,
    /// Those that are trained.
    pub trainable: u64,
    /// Multiplications and additions for one token, forward and backward.
    pub flops_per_token: f64,
    /// Bytes held at the moment at which most are held.
    pub peak_bytes: u64,
    /// What they are made of.
    pub memory: Memory,
}

/// What memory depends on besides the plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Conditions {
    /// Shards of a batch computed at the same time; see [`lanes`](crate::device::lanes).
    pub lanes: usize,
    /// Whether tensors lie in this process's own memory: on the CPU.
    pub is_cpu: bool,
    /// What the process holds before it builds the model: program and tokens.
    pub process_bytes: u64,
}

/// A phase, and the parts of its plan that its memory depends on.
#[derive(Clone, Copy)]
struct OfPhase<'a> {
    config: &'a Config,
    phase: &'a PhasePlan,
    /// The adapter of its model.
    adapter: Option<&'a AdapterPlan>,
    /// What a checkpoint has to hold of its model.
    held: Held,
    /// Whether the reference of a preference loss is the base model that is already in memory. A
    /// later phase loads the base model again if modules beside the adapter are trained in full.
    shares_base: bool,
    /// How the gradients of workers are compressed.
    compression: Option<&'a CompressionPlan>,
}

/// The model of a phase in a run that begins with a model of `spec`. Its shapes are correct, but
/// its weights are not initialised, so that counting parameters costs nothing.
///
/// # Errors
/// [`ModelError::Spec`] for a shape no decoder can have.
pub(crate) fn outline(
    plan: &Plan,
    model: PhaseModel,
    spec: &DecoderSpec,
) -> Result<Decoder, ModelError> {
    let decoder = Decoder::new(&model.spec(spec), 0, &Device::flex())?;
    match model.adapter(plan) {
        Some(adapter) => decoder.outlined(adapter, 0),
        None => Ok(decoder),
    }
}

impl Forecast {
    /// Bytes that the run holds between its steps, while another run trains.
    pub fn waiting_bytes(&self) -> u64 {
        let held = [
            "weights",
            "reference",
            "optimizer",
            "prediction",
            "average",
            "residuals",
            "copy being saved",
            "process",
        ];
        let terms = self.memory.terms.iter();
        let held = terms.filter(|term| held.contains(&term.name));
        held.map(|term| term.bytes).sum()
    }

    /// The forecast for a phase of a plan and its model, in a run that begins with a model of
    /// `spec`. The phase's dtype has to be resolved.
    ///
    /// # Errors
    /// [`ModelError::Spec`] for a shape no decoder can have.
    pub fn new(
        (plan, phase, model): (&Plan, &PhasePlan, PhaseModel),
        spec: &DecoderSpec,
        conditions: Conditions,
    ) -> Result<Self, ModelError> {
        let outline = outline(plan, model, spec)?.with_frozen(&phase.freeze)?;
        let spec = outline.spec();
        let adapter = model.adapter(plan);
        let begins_run = plan.phases.first() == Some(phase);
        let is_base_as_it_was = adapter.is_some_and(|adapter| adapter.saved.is_empty());
        let of = OfPhase {
            config: &plan.config,
            phase,
            adapter,
            held: model.held(),
            shares_base: model.held() == Held::Adapter && (begins_run || is_base_as_it_was),
            compression: plan.compression.as_ref(),
        };
        let parameters = outline.params();
        let trainable = outline.trained_params() as u64;
        let state = Optimizer::new(&phase.optimizer).state_bytes(&outline);
        let counts = memory::Counts {
            parameters,
            trainable,
            copied: match of.held {
                // Frozen parameters are saved too.
                Held::Weights | Held::Adapter => outline.saved_params() as u64,
                Held::Both => parameters,
            },
            optimizer_state: state,
            averaged: averaged_weights((plan, phase, model), spec)?,
            merged: match has_merged(plan, phase) {
                true => parameters,
                false => 0,
            },
            matrices: trained_parameters(&outline)
                .iter()
                .filter(|parameter| parameter.dims.len() > 1)
                .map(|matrix| matrix.dims.iter().product::<usize>() as u64)
                .sum(),
        };
        let memory = Memory::new(of, spec, counts, conditions);
        let has_phases = plan.phases.len() > 1;
        Ok(Self {
            phase: has_phases.then(|| phase.name.clone()),
            parameters,
            trainable,
            flops_per_token: flops::per_token(of, spec, &outline).step,
            peak_bytes: memory.peak_bytes(),
            memory,
        })
    }
}

/// Whether a phase up to `phase` begins by merging the adapter of the one before.
fn has_merged(plan: &Plan, phase: &PhasePlan) -> bool {
    let models = PhaseModel::of_plan(plan);
    let last = plan.phases.iter().position(|other| other == phase);
    let until = &models[..=last.unwrap_or(0)];
    until.windows(2).any(|pair| {
        pair[0].adapter_since.is_some() && pair[0].adapter_since != pair[1].adapter_since
    })
}

/// The number of weights that the average of a run holds in a phase: those that the phase trains,
/// and those that it freezes after earlier phases have trained them; 0 without an average.
///
/// # Errors
/// [`ModelError::Spec`] for a shape no decoder can have.
pub(crate) fn averaged_weights(
    (plan, phase, model): (&Plan, &PhasePlan, PhaseModel),
    spec: &DecoderSpec,
) -> Result<u64, ModelError> {
    #[derive(Default)]
    struct Sizes(BTreeMap<String, usize>);
    impl VisitParameters for Sizes {
        fn visit<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>) {
            let size = param.lazy_shape().num_elements();
            self.0.insert(path.to_string(), size);
        }
    }
    if plan.config.average.is_none() {
        return Ok(0);
    }
    let mut sizes = Sizes::default();
    // An average begins anew where the model gets other parameters.
    let same = plan.phases.iter().zip(PhaseModel::of_plan(plan));
    let same = same.filter(|(_, other)| *other == model);
    let earlier = same.map(|(other, _)| other);
    let earlier = earlier.take_while(|other| *other != phase);
    for phase in earlier.chain([phase]) {
        let outline = outline(plan, model, spec)?.with_frozen(&phase.freeze)?;
        outline.visit_trained(&mut sizes);
    }
    Ok(sizes.0.values().map(|&size| size as u64).sum())
}

/// The arithmetic for one token of a phase; that of a step is [`Forecast::flops_per_token`].
///
/// # Errors
/// [`ModelError::Spec`] for a shape no decoder can have.
pub fn flops_of_phase(
    (plan, phase, model): (&Plan, &PhasePlan, PhaseModel),
    spec: &DecoderSpec,
) -> Result<Flops, ModelError> {
    let outline = outline(plan, model, spec)?.with_frozen(&phase.freeze)?;
    let of = OfPhase {
        config: &plan.config,
        phase,
        adapter: model.adapter(plan),
        held: model.held(),
        shares_base: false,
        compression: None,
    };
    Ok(flops::per_token(of, outline.spec(), &outline))
}

/// Bytes of an element of a resolved dtype.
fn element_bytes(dtype: Dtype) -> u64 {
    match dtype {
        Dtype::Bf16 | Dtype::F16 => 2,
        Dtype::F32 | Dtype::Auto => 4,
    }
}
