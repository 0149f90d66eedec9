//! Small models and batches that the behaviour tests share.
#![allow(dead_code, missing_docs)]

use firebrick::config::{
    Architecture, EraOutput, Granularity, HiddenAct, ModelShape, RopeScaling, Ternary,
};
use firebrick::data::Batch;
use firebrick::model::DecoderSpec;

/// A shape with every dimension different, so that a mix-up shows.
pub fn tiny(architecture: Architecture) -> DecoderSpec {
    let llama = architecture != Architecture::Gpt2;
    DecoderSpec {
        shape: ModelShape {
            architecture,
            hidden_size: 24,
            intermediate_size: 40,
            num_hidden_layers: 2,
            num_attention_heads: if llama { 4 } else { 3 },
            num_key_value_heads: if llama { 2 } else { 3 },
            head_dim: if llama { 6 } else { 8 },
            max_position_embeddings: 16,
            tie_word_embeddings: true,
            bias: false,
            qkv_bias: architecture == Architecture::Qwen2,
            qk_norm: architecture == Architecture::Qwen3,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: None,
            sliding_window: None,
            initializer_range: 0.2,
            hidden_act: architecture.hidden_act(),
            output_activation: None,
            zero_init_output: false,
            ternary: None,
            blockwise: None,
        },
        vocab_size: 13,
        eos_token_id: None,
        bos_token_id: None,
    }
}

/// Small models with ternary weights: each granularity, with and without rounded activations, in
/// LLaMA's form and BitNet's. Widths are multiples of 16, and different.
pub fn ternary() -> Vec<DecoderSpec> {
    let forms = [
        (Architecture::Llama, Granularity::Tensor, true),
        (Architecture::Bitnet, Granularity::Tensor, true),
        (Architecture::Qwen2, Granularity::Row, true),
        (Architecture::Llama, Granularity::Row, false),
        (Architecture::Bitnet, Granularity::Group(16), true),
        (Architecture::Phi3, Granularity::Group(16), false),
    ];
    let specs = forms.map(|(architecture, granularity, rounds_activations)| {
        let mut spec = tiny(architecture);
        spec.shape.hidden_size = 32;
        spec.shape.intermediate_size = 48;
        spec.shape.head_dim = 8;
        spec.shape.ternary = Some(Ternary {
            granularity,
            rounds_activations,
            packed: None,
        });
        spec
    });
    specs.to_vec()
}

/// Every architecture with every option that changes its parameters.
pub fn variants() -> Vec<(String, DecoderSpec)> {
    let mut all = Vec::new();
    for architecture in [
        Architecture::Mistral,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Phi3,
    ] {
        let mut spec = tiny(architecture);
        spec.shape.tie_word_embeddings = architecture == Architecture::Qwen2;
        spec.shape.sliding_window = Some(4);
        all.push((format!("{} window=4", architecture.name()), spec));
    }
    all.push(("bitnet".to_string(), tiny(Architecture::Bitnet)));
    for spec in ternary() {
        let name = spec.shape.architecture.name();
        all.push((format!("{name} {:?}", spec.shape.ternary), spec));
    }
    let linear = RopeScaling::Linear { factor: 4.0 };
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
    };
    for scaling in [linear, llama3] {
        let mut spec = tiny(Architecture::Qwen3);
        spec.shape.rope_scaling = Some(scaling);
        all.push((format!("qwen3 {scaling:?}"), spec));
    }
    for (architecture, act) in [
        (Architecture::Qwen3, HiddenAct::Relu2),
        (Architecture::Llama, HiddenAct::GeluEra),
    ] {
        let mut spec = tiny(architecture);
        spec.shape.hidden_act = Some(act);
        all.push((format!("{} {}", architecture.name(), act.name()), spec));
    }
    let mut spec = tiny(Architecture::Gpt2);
    spec.shape.output_activation = Some(EraOutput { min_entropy: 1.0 });
    all.push(("gpt2 with ERA".to_string(), spec));
    for tied in [true, false] {
        for kv_heads in [1, 2, 4] {
            let mut spec = tiny(Architecture::Llama);
            spec.shape.tie_word_embeddings = tied;
            spec.shape.num_key_value_heads = kv_heads;
            all.push((format!("llama tied={tied} kv_heads={kv_heads}"), spec));
        }
        for bias in [true, false] {
            let mut spec = tiny(Architecture::Gpt2);
            spec.shape.tie_word_embeddings = tied;
            spec.shape.bias = bias;
            all.push((format!("gpt2 tied={tied} bias={bias}"), spec));
        }
    }
    all
}

/// `rows` sequences of arbitrary but fixed tokens.
pub fn batch(rows: usize, cols: usize, vocab: usize) -> Batch {
    let token = |i: usize| ((i * i * 7 + i * 3 + 1) % vocab) as u32;
    let cells = rows * cols;
    Batch {
        rows,
        cols,
        tokens: (0..cells).map(token).collect(),
        targets: (0..cells).map(|i| token(i + 1)).collect(),
        weights: vec![1.0; cells],
        segment_ids: vec![0; cells],
        positions: (0..cells).map(|i| (i % cols) as u32).collect(),
    }
}

/// Largest absolute difference.
pub fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}
