//! `[[phase]]`.

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{DataConfig, DpoConfig, Dtype, PhaseMode, PredictConfig, Task};
use crate::config::optimizer::OptimizerConfig;
use crate::config::phase::PhaseAdapter;
use crate::config::schedule::LrSchedulerConfig;

/// `[[phase]]`: one phase of the run. Phases follow each other in the order of the file. A key that
/// a phase has replaces the key of the same name in its section while the phase lasts. A run
/// without `[[phase]]` has one phase.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PhaseConfig {
    /// Name of the phase in messages, metrics and the report. Default: its number, as in "phase-2".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["long"]))]
    pub name: Option<String>,
    /// Length of the phase: optimizer steps (1000), trained tokens ("2M tokens"), a share of the run
    /// ("30%"), or "rest" for everything that the other phases leave. A share is of the run's steps,
    /// or of its tokens if the run's length is in tokens or epochs. If every phase has a length in
    /// steps, or every phase one in tokens, `[train]` needs no length.
    #[schemars(extend("examples" = ["30%"], "x-aliases" = ["steps", "duration"]))]
    pub length: PhaseLengthKey,
    /// The task of this phase. With another task than the run's, the keys of `[data]` that depend
    /// on the task take their defaults, unless the phase has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<Task>,
    /// Tokens per training sequence in this phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16777216))]
    pub sequence_len: Option<usize>,
    /// Sequences per forward and backward pass in this phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1048576))]
    pub micro_batch_size: Option<usize>,
    /// Passes per optimizer step in this phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1048576))]
    pub gradient_accumulation_steps: Option<usize>,
    /// Largest norm of the whole gradient in this phase; 0 = off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0))]
    pub max_grad_norm: Option<f64>,
    /// Compute dtype of this phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// Whether this phase recomputes the forward pass of each block in the backward pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradient_checkpointing: Option<bool>,
    /// The share of the rounded values in ternary weights and their inputs, at the first step of the
    /// phase and at the last, with a straight line between: 0 computes as a dense model, 1 as a
    /// ternary one. Needs weights = "ternary" in `[quantization]`; the last phase has to end at 1.
    /// Default: [1.0, 1.0].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(inner(range(min = 0.0, max = 1.0)), extend("examples" = [[0.0, 1.0]], "x-aliases" = ["lambda"]))]
    pub ternary_blend: Option<[f64; 2]>,
    /// Keys of `[optimizer]` for this phase, as in { learning_rate = 2e-3 }. With another `name`,
    /// keys of `[optimizer]` that this rule does not have are left out. State that means the same
    /// under both rules is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "keys_of_optimizer")]
    pub optimizer: Option<toml::Table>,
    /// A learning-rate schedule of the phase's own, over the steps of the phase. Nothing is taken
    /// from `[lr_scheduler]`. Without it the phase follows the run's one schedule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "schedule_of_phase")]
    pub lr_scheduler: Option<LrSchedulerConfig>,
    /// Keys of `[data]` for this phase, as in { datasets = [...] }. Each phase begins a new order
    /// of its data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "keys_of_data")]
    pub data: Option<toml::Table>,
    /// `[dpo]` for a phase with task = "dpo".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "keys_of_dpo")]
    pub dpo: Option<DpoConfig>,
    /// Parameters that this phase does not train, as beginnings of their paths: "embed_tokens",
    /// "layers.0-3", "layers.0-3.mlp". The backward pass ends at the first trained layer. In a
    /// phase with an adapter, this is in addition to what the adapter freezes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("examples" = [["embed_tokens", "layers.0-3"]], "x-aliases" = ["axolotl: unfrozen_parameters", "LLaMA-Factory: freeze_trainable_layers", "frozen_layers"]))]
    pub freeze: Vec<String>,
    /// How the steps of the phase get their gradient. Default: full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<PhaseMode>,
    /// How steps are predicted, with mode = "predict".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predict: Option<PredictConfig>,
    /// What happens to the `[adapter]` when this phase begins. Default: on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PhaseAdapter>,
}

/// `length` of a phase.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum PhaseLengthKey {
    /// Optimizer steps.
    Steps(#[schemars(range(min = 1, max = 1000000000000u64))] u64),
    /// "2M tokens", "30%" or "rest".
    Text(String),
}

impl PhaseConfig {
    /// A phase of this length that differs from the run in nothing.
    pub fn new(length: PhaseLengthKey) -> Self {
        Self {
            name: None,
            length,
            task: None,
            sequence_len: None,
            micro_batch_size: None,
            gradient_accumulation_steps: None,
            max_grad_norm: None,
            dtype: None,
            gradient_checkpointing: None,
            ternary_blend: None,
            optimizer: None,
            lr_scheduler: None,
            data: None,
            dpo: None,
            freeze: Vec::new(),
            mode: None,
            predict: None,
            adapter: None,
        }
    }
}

fn keys_of_optimizer(generator: &mut SchemaGenerator) -> Schema {
    let example = json!({ "learning_rate": 2e-3 });
    part_of::<OptimizerConfig>("optimizer", &[], example, generator)
}

fn keys_of_data(generator: &mut SchemaGenerator) -> Schema {
    let example = json!({ "datasets": [{ "path": "data/answers.jsonl" }] });
    part_of::<DataConfig>("data", &[], example, generator)
}

fn keys_of_dpo(generator: &mut SchemaGenerator) -> Schema {
    part_of::<DpoConfig>("dpo", &[], json!({ "beta": 0.1 }), generator)
}

/// A schedule without a name would be a cosine, whatever the run's schedule is.
fn schedule_of_phase(generator: &mut SchemaGenerator) -> Schema {
    let example = json!({ "name": "constant", "warmup_steps": 100 });
    part_of::<LrSchedulerConfig>("lr_scheduler", &["name"], example, generator)
}

/// The schema of a table with keys of a section. The keys have no defaults here: an absent key
/// takes the section's value. `x-part-of` names the section, where the keys are documented.
fn part_of<T: JsonSchema>(
    section: &str,
    required: &[&str],
    example: Value,
    generator: &mut SchemaGenerator,
) -> Schema {
    let mut schema = T::json_schema(generator);
    schema.insert("required".to_string(), required.into());
    schema.insert("examples".to_string(), json!([example]));
    schema.insert("x-part-of".to_string(), section.into());
    let properties = schema.get_mut("properties").and_then(Value::as_object_mut);
    for key in properties.into_iter().flat_map(|keys| keys.values_mut()) {
        if let Some(key) = key.as_object_mut() {
            key.remove("default");
        }
    }
    schema
}
