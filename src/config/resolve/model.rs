//! `[model]`: a preset and overrides, a shape, or a base model, to a complete and consistent shape.

use std::path::Path;

use crate::config::checks::Checks;
use crate::config::era::EraOutput;
use crate::config::keys::{
    Architecture, Config, Dtype, ModelConfig, OutputActivationConfig, OutputActivationKind,
    RopeScalingConfig, RopeScalingKind,
};
use crate::config::shape::{ModelShape, RopeScaling};
use crate::config::spec::DecoderSpec;

impl Checks<'_> {
    /// Resolves the shape and writes it back into the configuration in place of the preset.
    pub(super) fn model(
        &mut self,
        config: &mut Config,
    ) -> Option<(ModelShape, Option<DecoderSpec>)> {
        match self.longest_sequences(config) {
            (Some(phase), length) => {
                self.in_phase(phase, |checks| checks.model_for(config, length))
            }
            (None, length) => self.model_for(config, length),
        }
    }

    /// The shape of a model that is trained on sequences of up to `sequence` tokens.
    fn model_for(
        &mut self,
        config: &mut Config,
        sequence: usize,
    ) -> Option<(ModelShape, Option<DecoderSpec>)> {
        let written = config.model.clone();
        if let Some(folder) = &written.base_model {
            let base = self.base_model(&written, folder, sequence)?;
            config.model = base.shape.to_config(written.dtype);
            config.model.base_model = Some(folder.clone());
            return Some((base.shape.clone(), Some(base)));
        }
        let mut model = match written.preset {
            Some(preset) => with_overrides(preset.model_config(), &written),
            None => written.clone(),
        };
        model.preset = None;
        self.family(&written)?;
        self.required(&model)?;
        let eval = config.eval.sequence_len.unwrap_or(sequence);
        let positions = self.positions(&written, &model, (sequence, eval));
        let shape = ModelShape::of(&model, positions)?;
        self.heads(&written, &shape);
        self.refused_by_family(&written, &shape);
        self.rope_scaling(&written, &shape);
        config.model = shape.to_config(written.dtype);
        Some((shape, None))
    }

    /// A base model has its shape already: what the file says beside it has to agree.
    fn base_model(
        &mut self,
        written: &ModelConfig,
        folder: &Path,
        sequence: usize,
    ) -> Option<DecoderSpec> {
        let key = "model.base_model";
        if written.preset.is_some() {
            self.refuse(
                &["model.preset", key],
                "`preset` together with `base_model` in [model]".to_string(),
                "keep one: random weights of a published shape, or a trained model",
            );
            return None;
        }
        let base = match DecoderSpec::read(folder) {
            Ok(base) => base,
            Err(error) => {
                let help = "base_model names a folder with config.json, model.safetensors and \
                            tokenizer.json: a Hugging Face model or a finished run";
                let help = error.help().unwrap_or(help.to_string());
                self.refuse(&[key], format!("base_model: {error}"), &help);
                return None;
            }
        };
        let mut shape = base.shape.to_config(written.dtype);
        shape.hidden_act = base.shape.hidden_act;
        for (name, said, has) in differences(written, &shape) {
            self.refuse(
                &[&format!("model.{name}"), key],
                format!("{name} = {said} in [model], but the base model's is {has}"),
                &format!("remove {name}: a base model brings its shape"),
            );
        }
        let positions = base.shape.max_position_embeddings;
        if sequence > positions {
            self.refuse(
                &["data.sequence_len", key],
                format!(
                    "{} is {sequence}, but the base model has {positions} positions",
                    self.describe("data.sequence_len")
                ),
                &format!("sequence_len = {positions}"),
            );
        }
        Some(base)
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
    fn positions(
        &mut self,
        written: &ModelConfig,
        model: &ModelConfig,
        (sequence, eval): (usize, usize),
    ) -> usize {
        let longest = sequence.max(eval);
        let positions = model.max_position_embeddings.unwrap_or(longest);
        if positions >= sequence {
            return positions;
        }
        let is_explicit = written.max_position_embeddings.is_some();
        if !is_explicit && model.architecture != Some(Architecture::Gpt2) {
            return longest;
        }
        self.refuse(
            &[
                "data.sequence_len",
                "model.max_position_embeddings",
                "model.preset",
            ],
            format!(
                "{} is {sequence}, but the model has {positions} positions",
                self.describe("data.sequence_len")
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
        let queries = heads.saturating_mul(shape.head_dim);
        if shape.is_bitnet_form() && queries != hidden {
            self.refuse(
                &["model.head_dim", given[0], given[1]],
                format!(
                    "bitnet's heads are as wide together as hidden_size = {hidden}, not {queries}"
                ),
                "remove head_dim",
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
        let family = shape.architecture.name();
        let is_gpt2 = shape.is_gpt2_form();
        if !is_gpt2 && written.bias == Some(true) {
            self.refuse(
                &["model.bias", "model.architecture"],
                format!("{family} has no biases to switch on"),
                "remove bias, or use architecture = \"gpt2\"; qwen2 has those of its family",
            );
        }
        let rotary = [
            ("rope_theta", written.rope_theta.is_some()),
            ("rope_scaling", written.rope_scaling.is_some()),
        ];
        if is_gpt2 && written.hidden_act.is_some() {
            self.refuse(
                &["model.hidden_act", "model.architecture"],
                "gpt2's feed-forward layer has no gate: hidden_act has no effect".to_string(),
                "remove hidden_act, or use architecture = \"llama\"",
            );
        }
        for (name, _) in rotary.iter().filter(|(_, given)| is_gpt2 && *given) {
            self.refuse(
                &[&format!("model.{name}"), "model.architecture"],
                format!("gpt2 learns its positions: {name} has no effect"),
                &format!("remove {name}, or use architecture = \"llama\""),
            );
        }
        let no_window = matches!(
            shape.architecture,
            Architecture::Llama | Architecture::Bitnet | Architecture::Gpt2
        );
        if no_window && written.sliding_window.is_some() {
            self.refuse(
                &["model.sliding_window", "model.architecture"],
                format!("{family} attends to every earlier token: it has no sliding window"),
                "remove sliding_window, or use architecture = \"mistral\"",
            );
        }
    }

    fn rope_scaling(&mut self, written: &ModelConfig, shape: &ModelShape) {
        let Some(scaling) = &written.rope_scaling else {
            return;
        };
        if shape.architecture == Architecture::Phi3 {
            self.refuse(
                &["model.rope_scaling", "model.architecture"],
                "phi3 has no linear or llama3 rope scaling".to_string(),
                "remove rope_scaling, or use architecture = \"mistral\"",
            );
        }
        let key = |name: &str| format!("model.rope_scaling.{name}");
        let llama3 = [
            ("low_freq_factor", scaling.low_freq_factor.is_some()),
            ("high_freq_factor", scaling.high_freq_factor.is_some()),
            (
                "original_max_position_embeddings",
                scaling.original_max_position_embeddings.is_some(),
            ),
        ];
        for (name, given) in llama3 {
            let useless = given && scaling.kind != RopeScalingKind::Llama3;
            self.only_with(useless, &key(name), &key("type"), "\"llama3\"");
        }
        if scaling.kind != RopeScalingKind::Llama3 {
            return;
        }
        if scaling.original_max_position_embeddings.is_none() {
            self.refuse(
                &[
                    &key("original_max_position_embeddings"),
                    &key("type"),
                    "model.rope_scaling",
                ],
                "rope_scaling of type \"llama3\" needs `original_max_position_embeddings`"
                    .to_string(),
                "the context's length before it was stretched: 8192 for Llama 3.1",
            );
        }
        let (low, high) = bounds(scaling);
        if low >= high {
            self.refuse(
                &[
                    &key("low_freq_factor"),
                    &key("high_freq_factor"),
                    "model.rope_scaling",
                ],
                format!("low_freq_factor {low} is not below high_freq_factor {high}"),
                "Llama 3.1 has 1 and 4",
            );
        }
    }
}

/// Keys that were written and are not what the shape has: name, written value, the shape's.
fn differences(written: &ModelConfig, shape: &ModelConfig) -> Vec<(String, String, String)> {
    let mut written = ModelConfig {
        base_model: None,
        ..written.clone()
    };
    // Keys inside that were left out have defaults.
    let scaling = written.rope_scaling.as_ref().map(RopeScaling::of);
    written.rope_scaling = scaling.map(RopeScaling::to_config);
    let table = |model: &ModelConfig| toml::Table::try_from(model).unwrap_or_default();
    let has = table(shape);
    let found = table(&written).into_iter().filter_map(|(name, value)| {
        let has = has.get(&name);
        let shown = has.map_or("none".to_string(), toml::Value::to_string);
        (has != Some(&value)).then(|| (name, value.to_string(), shown))
    });
    found.collect()
}

/// `low_freq_factor` and `high_freq_factor`: Llama 3.1's where the file does not say.
fn bounds(scaling: &RopeScalingConfig) -> (f64, f64) {
    let low = scaling.low_freq_factor.unwrap_or(1.0);
    (low, scaling.high_freq_factor.unwrap_or(4.0))
}

/// The preset's keys, with those that were written taking precedence.
fn with_overrides(preset: ModelConfig, written: &ModelConfig) -> ModelConfig {
    ModelConfig {
        preset: None,
        base_model: None,
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
        zero_init_output: written.zero_init_output.or(preset.zero_init_output),
        hidden_act: written.hidden_act.or(preset.hidden_act),
        output_activation: written
            .output_activation
            .clone()
            .or(preset.output_activation),
        dtype: written.dtype,
        sliding_window: written.sliding_window.or(preset.sliding_window),
        rope_scaling: written.rope_scaling.clone().or(preset.rope_scaling),
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
            _ => (8 * hidden_size).div_ceil(3).next_multiple_of(32),
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
            qkv_bias: architecture == Architecture::Qwen2,
            qk_norm: architecture == Architecture::Qwen3,
            norm_eps: model.norm_eps.unwrap_or(1e-5),
            rope_theta: model.rope_theta.unwrap_or(10_000.0),
            rope_scaling: model.rope_scaling.as_ref().map(RopeScaling::of),
            sliding_window: model.sliding_window,
            hidden_act: model.hidden_act.or(architecture.hidden_act()),
            output_activation: model.output_activation.as_ref().map(|output| EraOutput {
                min_entropy: output.min_entropy,
            }),
            initializer_range: model.initializer_range.unwrap_or(0.02),
            zero_init_output: model.zero_init_output.unwrap_or(false),
            ternary: None,
            blockwise: None,
        })
    }

    /// The shape as keys of `[model]`, those that its family refuses left out.
    fn to_config(&self, dtype: Dtype) -> ModelConfig {
        ModelConfig {
            preset: None,
            base_model: None,
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
            rope_theta: (!self.is_gpt2_form()).then_some(self.rope_theta),
            initializer_range: Some(self.initializer_range),
            // Runs that began before these keys have none of them in their resolved.toml.
            zero_init_output: self.zero_init_output.then_some(true),
            hidden_act: self
                .hidden_act
                .filter(|_| self.hidden_act != self.architecture.hidden_act()),
            output_activation: self.output_activation.map(|era| OutputActivationConfig {
                kind: OutputActivationKind::Era,
                min_entropy: era.min_entropy,
            }),
            dtype,
            sliding_window: self.sliding_window,
            rope_scaling: self.rope_scaling.map(RopeScaling::to_config),
        }
    }
}

impl RopeScaling {
    fn of(config: &RopeScalingConfig) -> Self {
        let (low_freq_factor, high_freq_factor) = bounds(config);
        match config.kind {
            RopeScalingKind::Linear => Self::Linear {
                factor: config.factor,
            },
            RopeScalingKind::Llama3 => Self::Llama3 {
                factor: config.factor,
                low_freq_factor,
                high_freq_factor,
                // Its absence has been refused; 1 only keeps the other checks going.
                original_max_position_embeddings: config
                    .original_max_position_embeddings
                    .unwrap_or(1),
            },
        }
    }

    fn to_config(self) -> RopeScalingConfig {
        let none = RopeScalingConfig {
            kind: RopeScalingKind::Linear,
            factor: 1.0,
            low_freq_factor: None,
            high_freq_factor: None,
            original_max_position_embeddings: None,
        };
        match self {
            Self::Linear { factor } => RopeScalingConfig { factor, ..none },
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => RopeScalingConfig {
                kind: RopeScalingKind::Llama3,
                factor,
                low_freq_factor: Some(low_freq_factor),
                high_freq_factor: Some(high_freq_factor),
                original_max_position_embeddings: Some(original_max_position_embeddings),
            },
        }
    }
}
