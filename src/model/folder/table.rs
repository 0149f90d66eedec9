//! Which tensors a family's files hold, and which of our parameters are in them.
//!
//! [`FileTensor`] is one row of that table; [reading and writing](super::layout) both walk it. Our linear
//! weights are `[in, out]`, files hold `[out, in]`, except GPT-2's (`Conv1D`), which hold `[in, out]`
//! too. Fused tensors lie along the output dimension. GPT-2's biases always exist in files: a model
//! without biases writes zeros.

use super::packed;
use crate::config::{Architecture, DecoderSpec, ModelShape, PackedLayout, Ternary};

/// One tensor of a model's files.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct FileTensor {
    pub(super) name: String,
    /// In the file.
    pub(super) shape: Vec<usize>,
    pub(super) layout: Layout,
    /// Paths of our parameters in it, in order, and their widths along the dimension they share.
    pub(super) parts: Vec<(String, usize)>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Layout {
    /// As in memory.
    Same,
    /// `[out, in]` of parameters `[in, out]`, one after the other.
    Transposed,
    /// `[in, out]` of parameters `[in, out]`, or `[out]` of `[out]`, side by side.
    Columns,
    /// No parameter: zeros.
    Zeros,
    /// Bytes of packed trits `[out, in]` of so many outputs and inputs.
    Packed(PackedLayout, [usize; 2]),
}

/// Constants that older exports keep beside the weights: GPT-2's causal mask, rotary frequencies.
pub(super) fn is_derived(name: &str, architecture: Architecture) -> bool {
    let derived: &[&str] = match architecture {
        Architecture::Gpt2 => &[".attn.bias", ".attn.masked_bias"],
        _ => &[".rotary_emb.inv_freq"],
    };
    derived.iter().any(|ending| name.ends_with(ending))
}

pub(super) const HEAD: &str = "lm_head.weight";

pub(super) fn embedding_name(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Gpt2 => "transformer.wte.weight",
        _ => "model.embed_tokens.weight",
    }
}

/// Every tensor of a model's files, layer by layer; made as it is walked, since the number of layers
/// may be a lie.
pub(super) fn table(spec: &DecoderSpec) -> impl Iterator<Item = FileTensor> + '_ {
    let shape = &spec.shape;
    let is_gpt2 = shape.architecture == Architecture::Gpt2;
    let (dim, vocab) = (shape.hidden_size, spec.vocab_size);
    let embedding = embedding_name(shape.architecture);
    let mut first = vec![same(embedding, "embed_tokens.weight", &[vocab, dim])];
    let mut last = Vec::new();
    if is_gpt2 {
        let positions = [shape.max_position_embeddings, dim];
        let name = "transformer.wpe.weight";
        first.push(same(name, "embed_positions.weight", &positions));
        last.push(same("transformer.ln_f.weight", "norm.weight", &[dim]));
        last.push(gpt2_bias(shape, "transformer.ln_f", &[("norm", dim)]));
    } else {
        last.push(same("model.norm.weight", "norm.weight", &[dim]));
    }
    if !shape.tie_word_embeddings {
        last.push(transposed(HEAD.to_string(), dim, &[(HEAD, vocab)], ""));
    }
    let layers = (0..shape.num_hidden_layers).flat_map(move |layer| {
        if is_gpt2 {
            gpt2_layer(shape, layer)
        } else {
            rotary_layer(shape, layer)
        }
    });
    first.into_iter().chain(layers).chain(last)
}

fn rotary_layer(shape: &ModelShape, layer: usize) -> Vec<FileTensor> {
    let (dim, ffn) = (shape.hidden_size, shape.intermediate_size);
    let queries = shape.num_attention_heads * shape.head_dim;
    let keys = shape.num_key_value_heads * shape.head_dim;
    let ours = format!("layers.{layer}.");
    let named = |module: &str| format!("model.{ours}{module}");
    let vector = |module: &str, leaf: &str, width: usize| {
        let path = format!("{ours}{module}.{leaf}");
        same(&format!("model.{path}"), &path, &[width])
    };
    let matrix = |module: &str, dim: usize, parts: &[(&str, usize)]| {
        transposed(named(&format!("{module}.weight")), dim, parts, &ours)
    };
    let qkv = [
        ("self_attn.q_proj.weight", queries),
        ("self_attn.k_proj.weight", keys),
        ("self_attn.v_proj.weight", keys),
    ];
    let gate_up = [("mlp.gate_proj.weight", ffn), ("mlp.up_proj.weight", ffn)];
    let out = [("self_attn.o_proj.weight", dim)];
    let down = [("mlp.down_proj.weight", dim)];

    let mut table = vec![
        vector("input_layernorm", "weight", dim),
        vector("post_attention_layernorm", "weight", dim),
    ];
    if let Some(ternary) = shape.ternary.filter(|ternary| ternary.packed.is_some()) {
        // Every matrix has scales of its own: none are fused.
        let of_dim = qkv.iter().chain(&gate_up).map(|part| (part, dim));
        let all = of_dim.chain([(&out[0], queries), (&down[0], ffn)]);
        for ((path, outputs), inputs) in all {
            table.extend(packed_matrix(&ours, path, [*outputs, inputs], ternary));
        }
    } else if shape.blockwise.is_none() {
        table.push(matrix("self_attn.o_proj", queries, &out));
        table.push(matrix("mlp.down_proj", ffn, &down));
        if shape.architecture == Architecture::Phi3 {
            table.push(matrix("self_attn.qkv_proj", dim, &qkv));
            table.push(matrix("mlp.gate_up_proj", dim, &gate_up));
        } else {
            for part in qkv.iter().chain(&gate_up) {
                let module = part.0.trim_end_matches(".weight");
                table.push(matrix(module, dim, &[*part]));
            }
        }
    }
    if shape.is_bitnet_form() {
        table.push(vector("self_attn.attn_sub_norm", "weight", queries));
        table.push(vector("mlp.ffn_sub_norm", "weight", ffn));
    }
    if shape.qkv_bias {
        for (path, width) in qkv {
            let module = path.trim_end_matches(".weight");
            table.push(vector(module, "bias", width));
        }
    }
    if shape.qk_norm {
        table.push(vector("self_attn.q_norm", "weight", shape.head_dim));
        table.push(vector("self_attn.k_norm", "weight", shape.head_dim));
    }
    table
}

/// Our modules and the widths of their outputs.
type Outputs<'a> = &'a [(&'a str, usize)];

fn gpt2_layer(shape: &ModelShape, layer: usize) -> Vec<FileTensor> {
    let (dim, ffn) = (shape.hidden_size, shape.intermediate_size);
    let qkv = [
        ("self_attn.q_proj", dim),
        ("self_attn.k_proj", dim),
        ("self_attn.v_proj", dim),
    ];
    // Name in the file, width of the input (0: a norm), ours.
    let modules: [(&str, usize, Outputs); 6] = [
        ("ln_1", 0, &[("input_layernorm", dim)]),
        ("ln_2", 0, &[("post_attention_layernorm", dim)]),
        ("attn.c_attn", dim, &qkv),
        ("attn.c_proj", dim, &[("self_attn.o_proj", dim)]),
        ("mlp.c_fc", dim, &[("mlp.up_proj", ffn)]),
        ("mlp.c_proj", ffn, &[("mlp.down_proj", dim)]),
    ];
    let mut table = Vec::with_capacity(2 * modules.len());
    for (name, input, parts) in modules {
        let module = format!("transformer.h.{layer}.{name}");
        let ours: Vec<(String, usize)> = parts
            .iter()
            .map(|(path, width)| (format!("layers.{layer}.{path}"), *width))
            .collect();
        let ours: Vec<(&str, usize)> = ours.iter().map(|(path, w)| (path.as_str(), *w)).collect();
        if input == 0 || shape.blockwise.is_none() {
            table.push(columns(format!("{module}.weight"), input, &ours, "weight"));
        }
        table.push(gpt2_bias(shape, &module, &ours));
    }
    table
}

fn gpt2_bias(shape: &ModelShape, module: &str, parts: &[(&str, usize)]) -> FileTensor {
    let mut tensor = columns(format!("{module}.bias"), 0, parts, "bias");
    if !shape.bias {
        tensor.layout = Layout::Zeros;
        tensor.parts.clear();
    }
    tensor
}

/// The trits and the scales of a matrix `[out, in]`.
fn packed_matrix(prefix: &str, path: &str, dims: [usize; 2], ternary: Ternary) -> [FileTensor; 2] {
    let layout = ternary.packed.unwrap_or_default();
    let [outputs, inputs] = dims;
    let name = format!("model.{prefix}{path}");
    let path = format!("{prefix}{path}");
    let scales = ternary.granularity.scales(outputs, inputs);
    let scale = same(
        &format!("{name}{SCALE}"),
        &format!("{path}.scales"),
        &[scales],
    );
    let trits = FileTensor {
        name,
        shape: packed::file_shape(layout, dims),
        layout: Layout::Packed(layout, dims),
        parts: vec![(format!("{path}.words"), outputs)],
    };
    [trits, scale]
}

/// Ends the name of a packed matrix's scales, as in transformers' own packed form.
pub(super) const SCALE: &str = "_scale";

fn same(name: &str, path: &str, shape: &[usize]) -> FileTensor {
    FileTensor {
        name: name.to_string(),
        shape: shape.to_vec(),
        layout: Layout::Same,
        parts: vec![(path.to_string(), shape[0])],
    }
}

/// `[sum of widths, input]`; `prefix` goes before each path.
fn transposed(name: String, input: usize, parts: &[(&str, usize)], prefix: &str) -> FileTensor {
    let width = parts.iter().map(|(_, width)| width).sum();
    FileTensor {
        name,
        shape: vec![width, input],
        layout: Layout::Transposed,
        parts: parts
            .iter()
            .map(|(path, width)| (format!("{prefix}{path}"), *width))
            .collect(),
    }
}

/// `[input, sum of widths]`, or a vector where there is no input; `leaf` goes after each path.
fn columns(name: String, input: usize, parts: &[(&str, usize)], leaf: &str) -> FileTensor {
    let width = parts.iter().map(|(_, width)| width).sum();
    FileTensor {
        name,
        shape: if input == 0 {
            vec![width]
        } else {
            vec![input, width]
        },
        layout: Layout::Columns,
        parts: parts
            .iter()
            .map(|(path, width)| (format!("{path}.{leaf}"), *width))
            .collect(),
    }
}

impl FileTensor {
    /// Of its first part.
    pub(super) fn path(&self) -> String {
        self.parts
            .first()
            .map_or_else(String::new, |(path, _)| path.clone())
    }

    /// Whether it holds the weights of a block's linear layers.
    pub(super) fn is_linear(&self) -> bool {
        let path = self.path();
        path.starts_with("layers.") && path.ends_with("_proj.weight")
    }
}
