//! `[model]`: a preset and overrides, or a shape, to a complete and consistent shape.

use super::Checks;
use crate::config::keys::{Architecture, Config, Dtype, ModelConfig};
use crate::config::shape::ModelShape;

impl Checks<'_> {
    /// Resolves the shape and writes it back into the configuration in place of the preset.
    pub(super) fn model(&mut self, config: &mut Config) -> Option<ModelShape> {
        let written = config.model.clone();
        let mut model = match written.preset {
            Some(preset) => with_overrides(preset.model_config(), &written),
            None => written.clone(),
        };
        model.preset = None;
        self.family(&written)?;
        self.required(&model)?;
        let positions = self.positions(&written, &model, config.data.sequence_len);
        let shape = ModelShape::of(&model, positions)?;
        self.heads(&written, &shape);
        self.refused_by_family(&written, &shape);
        config.model = shape.to_config(config.model.dtype);
        Some(shape)
    }

    /// A preset's other numbers make no sense in the other family.
    fn family(&mut self, written: &ModelConfig) -> Option<()> {
        let (Some(preset), Some(architecture)) = (written.preset, written.architecture) else {
            return Some(());
        };
        if preset.model_config().architecture == Some(architecture) {
            return Some(());
        }
        self.refuse(
            &["model.architecture", "model.preset"],
            format!(
                "preset {} is not a {} model",
                preset.name(),
                architecture.name()
            ),
            "remove architecture, or the preset",
        );
        None
    }

    fn required(&mut self, model: &ModelConfig) -> Option<()> {
        let required = [
            ("architecture", model.architecture.is_some()),
            ("hidden_size", model.hidden_size.is_some()),
            ("num_hidden_layers", model.num_hidden_layers.is_some()),
            ("num_attention_heads", model.num_attention_heads.is_some()),
        ];
        let absent: Vec<&str> = required
            .iter()
            .filter(|(_, given)| !given)
            .map(|(name, _)| *name)
            .collect();
        if absent.is_empty() {
            return Some(());
        }
        self.refuse(
            &["model"],
            format!("[model] needs {}", absent.join(", ")),
            "or a published shape, as in preset = \"stories-15m\"",
        );
        None
    }

    /// The longest sequence. gpt2's position table is as long as it says; a rotary model without
    /// an explicit limit grows with the data.
    fn positions(&mut self, written: &ModelConfig, model: &ModelConfig, sequence: usize) -> usize {
        let positions = model.max_position_embeddings.unwrap_or(sequence);
        if positions >= sequence {
            return positions;
        }
        let is_explicit = written.max_position_embeddings.is_some();
        if !is_explicit && model.architecture == Some(Architecture::Llama) {
            return sequence;
        }
        self.refuse(
            &[
                "data.sequence_len",
                "model.max_position_embeddings",
                "model.preset",
            ],
            format!(
                "`sequence_len` in [data] is {sequence}, but the model has {positions} positions"
            ),
            &format!("sequence_len = {positions}, or max_position_embeddings = {sequence}"),
        );
        positions
    }

    fn heads(&mut self, written: &ModelConfig, shape: &ModelShape) {
        let (hidden, heads, kv) = (
            shape.hidden_size,
            shape.num_attention_heads,
            shape.num_key_value_heads,
        );
        let given = ["model.hidden_size", "model.num_attention_heads"];
        let is_gpt2 = shape.architecture == Architecture::Gpt2;
        if hidden % heads != 0 && (written.head_dim.is_none() || is_gpt2) {
            self.refuse(
                &given,
                format!("hidden_size {hidden} is not divisible by {heads} attention heads"),
                "change one of hidden_size and num_attention_heads",
            );
        } else if is_gpt2 && shape.head_dim != hidden / heads {
            self.refuse(
                &["model.head_dim", given[0], given[1]],
                format!(
                    "gpt2's head_dim is hidden_size / num_attention_heads = {}",
                    hidden / heads
                ),
                "remove head_dim",
            );
        } else if !is_gpt2 && !shape.head_dim.is_multiple_of(2) {
            self.refuse(
                &["model.head_dim", given[1], given[0]],
                format!(
                    "head_dim {} is odd: rotary positions turn pairs of dimensions",
                    shape.head_dim
                ),
                "choose num_attention_heads so that hidden_size / num_attention_heads is even",
            );
        }
        if is_gpt2 && kv != heads {
            self.refuse(
                &["model.num_key_value_heads", given[1]],
                format!("gpt2 has a key/value head for each of its {heads} attention heads"),
                "remove num_key_value_heads, or use architecture = \"llama\"",
            );
        } else if heads % kv != 0 {
            self.refuse(
                &["model.num_key_value_heads", given[1], "model.preset"],
                format!("{heads} attention heads cannot share {kv} key/value heads evenly"),
                "num_key_value_heads has to divide num_attention_heads",
            );
        }
    }

    fn refused_by_family(&mut self, written: &ModelConfig, shape: &ModelShape) {
        match shape.architecture {
            Architecture::Llama if written.bias == Some(true) => self.refuse(
                &["model.bias", "model.architecture"],
                "llama has no biases".to_string(),
                "remove bias, or use architecture = \"gpt2\"",
            ),
            Architecture::Gpt2 if written.rope_theta.is_some() => self.refuse(
                &["model.rope_theta", "model.architecture"],
                "gpt2 learns its positions: rope_theta has no effect".to_string(),
                "remove rope_theta, or use architecture = \"llama\"",
            ),
            _ => {}
        }
    }
}

/// The preset's keys, with those that were written taking precedence.
fn with_overrides(preset: ModelConfig, written: &ModelConfig) -> ModelConfig {
    ModelConfig {
        preset: None,
        architecture: written.architecture.or(preset.architecture),
        hidden_size: written.hidden_size.or(preset.hidden_size),
        intermediate_size: written.intermediate_size.or(preset.intermediate_size),
        num_hidden_layers: written.num_hidden_layers.or(preset.num_hidden_layers),
        num_attention_heads: written.num_attention_heads.or(preset.num_attention_heads),
        num_key_value_heads: written.num_key_value_heads.or(preset.num_key_value_heads),
        head_dim: written.head_dim.or(preset.head_dim),
        max_position_embeddings: written
            .max_position_embeddings
            .or(preset.max_position_embeddings),
        tie_word_embeddings: written.tie_word_embeddings.or(preset.tie_word_embeddings),
        bias: written.bias.or(preset.bias),
        norm_eps: written.norm_eps.or(preset.norm_eps),
        rope_theta: written.rope_theta.or(preset.rope_theta),
        initializer_range: written.initializer_range.or(preset.initializer_range),
        dtype: written.dtype,
    }
}

impl ModelShape {
    /// Fills in what follows from the other keys; `None` when a required one is absent.
    pub(in crate::config) fn of(model: &ModelConfig, positions: usize) -> Option<Self> {
        let architecture = model.architecture?;
        let hidden_size = model.hidden_size?;
        let num_attention_heads = model.num_attention_heads?;
        let intermediate_size = match architecture {
            Architecture::Gpt2 => 4 * hidden_size,
            Architecture::Llama => (8 * hidden_size).div_ceil(3).next_multiple_of(32),
        };
        Some(ModelShape {
            architecture,
            hidden_size,
            intermediate_size: model.intermediate_size.unwrap_or(intermediate_size),
            num_hidden_layers: model.num_hidden_layers?,
            num_attention_heads,
            num_key_value_heads: model.num_key_value_heads.unwrap_or(num_attention_heads),
            head_dim: model
                .head_dim
                .unwrap_or((hidden_size / num_attention_heads).max(1)),
            max_position_embeddings: positions,
            tie_word_embeddings: model.tie_word_embeddings.unwrap_or(true),
            bias: model.bias.unwrap_or(false),
            norm_eps: model.norm_eps.unwrap_or(1e-5),
            rope_theta: model.rope_theta.unwrap_or(10_000.0),
            initializer_range: model.initializer_range.unwrap_or(0.02),
        })
    }

    /// The shape as keys of `[model]`, those that its family refuses left out.
    fn to_config(&self, dtype: Dtype) -> ModelConfig {
        let is_llama = self.architecture == Architecture::Llama;
        ModelConfig {
            preset: None,
            architecture: Some(self.architecture),
            hidden_size: Some(self.hidden_size),
            intermediate_size: Some(self.intermediate_size),
            num_hidden_layers: Some(self.num_hidden_layers),
            num_attention_heads: Some(self.num_attention_heads),
            num_key_value_heads: Some(self.num_key_value_heads),
            head_dim: Some(self.head_dim),
            max_position_embeddings: Some(self.max_position_embeddings),
            tie_word_embeddings: Some(self.tie_word_embeddings),
            bias: Some(self.bias),
            norm_eps: Some(self.norm_eps),
            rope_theta: is_llama.then_some(self.rope_theta),
            initializer_range: Some(self.initializer_range),
            dtype,
        }
    }
}
