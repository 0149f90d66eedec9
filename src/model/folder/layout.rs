//! Which tensors a family's files hold, and which of our parameters are in them.
//!
//! [`FileTensor`] is one row of that table; reading and writing both walk it. Our linear weights are
//! `[in, out]`, files hold `[out, in]`, except GPT-2's (`Conv1D`), which hold `[in, out]` too. Fused
//! tensors lie along the output dimension. GPT-2's biases always exist in files: a model without
//! biases writes zeros.

use std::collections::HashSet;

use burn::tensor::TensorData;
use firebrick_kernels::blockwise::Quantised;

use super::blockwise::{self, Matrix};
use super::packed;
use super::tensors::floats;
use crate::config::{Architecture, DecoderSpec, ModelShape, PackedLayout, Ternary};
use crate::model::{ModelError, Tensors};

/// One tensor of a model's files.
#[derive(Debug, Clone, PartialEq)]
struct FileTensor {
    name: String,
    /// In the file.
    shape: Vec<usize>,
    layout: Layout,
    /// Paths of our parameters in it, in order, and their widths along the dimension they share.
    parts: Vec<(String, usize)>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Layout {
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

/// A linear layer as files have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileLinear {
    /// The module's name.
    pub(crate) name: String,
    /// Paths of our layers in it, in order, and their outputs.
    pub(crate) parts: Vec<(String, usize)>,
}

/// The linear layers of a model's files, with the names they have where weights are dense.
pub(crate) fn file_linears(spec: &DecoderSpec) -> Vec<FileLinear> {
    let dense = dense(spec);
    let known: HashSet<String> = dense
        .shape
        .linear_layers(dense.vocab_size)
        .into_iter()
        .map(|layer| format!("{}.weight", layer.path))
        .collect();
    let matrices = table(&dense).filter(|tensor| known.contains(&tensor.path()));
    let linears = matrices.map(|tensor| {
        let bare = |path: &str| path.trim_end_matches(".weight").to_string();
        let parts = tensor.parts.iter();
        FileLinear {
            name: bare(&tensor.name),
            parts: parts.map(|(path, width)| (bare(path), *width)).collect(),
        }
    });
    linears.collect()
}

/// The tensors of a model's files whose parameters are all in `own`, which is left with the rest.
pub(crate) fn some_file_tensors(spec: &DecoderSpec, own: &mut Tensors) -> Tensors {
    let dense = dense(spec);
    let whole = |tensor: &FileTensor, own: &Tensors| {
        let mut parts = tensor.parts.iter();
        !tensor.parts.is_empty() && parts.all(|(path, _)| own.contains_key(path))
    };
    let mut found = Tensors::new();
    for tensor in table(&dense) {
        if whole(&tensor, own) {
            let data = tensor.pack(own);
            found.insert(tensor.name, data);
        }
    }
    found
}

/// Our parameters out of those tensors of a model's files that `source` has, which is left with the
/// rest.
///
/// # Errors
/// A tensor of another shape.
pub(crate) fn some_own_tensors(
    spec: &DecoderSpec,
    source: &mut Tensors,
) -> Result<Tensors, ModelError> {
    let dense = dense(spec);
    let mut own = Tensors::new();
    for tensor in table(&dense) {
        match source.shape(&tensor.name) {
            None => {}
            Some(found) if found != tensor.shape => {
                return Err(ModelError::TensorMismatch {
                    name: tensor.name,
                    expected: format!("{:?}", tensor.shape),
                    found: format!("{found:?}"),
                });
            }
            Some(_) => {
                let values = source.take(&tensor.name)?;
                tensor.unpack(values, &mut own)?;
            }
        }
    }
    Ok(own)
}

/// The same decoder with weights that are not packed.
fn dense(spec: &DecoderSpec) -> DecoderSpec {
    let mut dense = spec.clone();
    dense.shape.ternary = None;
    dense.shape.blockwise = None;
    dense
}

/// Where tensors under their file names come from.
pub(super) trait Source {
    /// The shape of a tensor, if it is there.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;
    /// All there are.
    fn names(&self) -> Vec<String>;
    /// The values of a tensor that is there.
    fn values(&self, name: &str) -> Result<Vec<f32>, ModelError>;
    /// The bytes of a tensor that is there, and is bytes.
    fn bytes(&self, name: &str) -> Result<Vec<u8>, ModelError>;
    /// The values, where the tensor is not needed again.
    fn take(&mut self, name: &str) -> Result<Vec<f32>, ModelError> {
        self.values(name)
    }
}

impl Source for Tensors {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Some(self.get(name)?.shape().as_slice().to_vec())
    }

    fn names(&self) -> Vec<String> {
        self.keys().cloned().collect()
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let data = self.get(name).cloned();
        data.map(floats).ok_or_else(|| missing(name))
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        let data = self.get(name).ok_or_else(|| missing(name))?;
        let bytes = data.as_slice::<u8>().map(<[u8]>::to_vec);
        bytes.map_err(|_| ModelError::TensorMismatch {
            name: name.to_string(),
            expected: "U8".to_string(),
            found: format!("{:?}", data.dtype()),
        })
    }

    fn take(&mut self, name: &str) -> Result<Vec<f32>, ModelError> {
        self.remove(name).map(floats).ok_or_else(|| missing(name))
    }
}

/// Our parameters out of a model's files. Every name and shape is checked before the first value is
/// read, so that a file that lies about itself costs no memory.
///
/// # Errors
/// A tensor that is missing, unexpected or of another shape; a value that cannot be honoured.
pub(super) fn own_tensors(
    spec: &DecoderSpec,
    mut source: impl Source,
    mut quantiser: Option<&mut Quantiser>,
) -> Result<Tensors, ModelError> {
    let quantised = blockwise::matrices(spec);
    for tensor in table(spec) {
        match source.shape(&tensor.name) {
            None if tensor.layout == Layout::Zeros => {}
            None => return Err(missing(&tensor.name)),
            Some(found) if found != tensor.shape => {
                return Err(ModelError::TensorMismatch {
                    name: tensor.name,
                    expected: format!("{:?}", tensor.shape),
                    found: format!("{found:?}"),
                });
            }
            Some(_) => {}
        }
    }
    for (name, expected) in quantised.iter().flat_map(Matrix::tensors) {
        let Some(found) = source.shape(&name) else {
            return Err(missing(&name));
        };
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            return Err(ModelError::TensorMismatch {
                name,
                expected: format!("{expected:?}"),
                found: format!("{found:?}"),
            });
        }
    }
    check_the_rest(spec, &quantised, &source)?;
    let mut own = Tensors::new();
    for tensor in table(spec) {
        if tensor.layout == Layout::Zeros && source.shape(&tensor.name).is_none() {
            continue;
        }
        if let Layout::Packed(layout, dims) = tensor.layout {
            let bytes = source.bytes(&tensor.name)?;
            let words = packed::read(&tensor.name, bytes, layout, dims)?;
            own.insert(tensor.path(), words);
            continue;
        }
        let values = source.take(&tensor.name)?;
        let is_scale = is_exact(spec, &tensor.name);
        if let Some(&value) = values.iter().find(|&&value| is_scale && value < 0.0) {
            let name = tensor.name;
            return Err(ModelError::NegativeScale { name, value });
        }
        match &mut quantiser {
            Some(quantiser) if tensor.is_linear() => {
                tensor.quantise(values, quantiser, &mut own)?
            }
            _ => tensor.unpack(values, &mut own)?,
        }
    }
    for matrix in &quantised {
        matrix.read(&mut source, &mut own)?;
    }
    Ok(own)
}

/// Makes codes of the weights `[out, in]`, row after row, of the layer at a path.
pub type Quantiser<'a> = dyn FnMut(&str, &[f32], [usize; 2]) -> Result<Quantised, ModelError> + 'a;

/// A model's files out of our parameters.
pub(super) fn file_tensors(spec: &DecoderSpec, mut own: Tensors) -> Tensors {
    let mut files = Tensors::new();
    for tensor in table(spec) {
        let data = tensor.pack(&mut own);
        files.insert(tensor.name, data);
    }
    for matrix in blockwise::matrices(spec) {
        matrix.write(&mut own, &mut files);
    }
    files
}

/// Tensors in the files that are not in the table.
fn check_the_rest(
    spec: &DecoderSpec,
    quantised: &[Matrix],
    source: &impl Source,
) -> Result<(), ModelError> {
    let mut known: HashSet<String> = table(spec).map(|tensor| tensor.name).collect();
    let codes = quantised.iter().flat_map(Matrix::tensors);
    known.extend(codes.map(|(name, _)| name));
    for name in source.names() {
        if known.contains(&name) || is_derived(&name, spec.shape.architecture) {
            continue;
        }
        let tied = spec.shape.tie_word_embeddings && name == HEAD;
        if !tied {
            return Err(ModelError::UnexpectedTensor { name });
        }
        // Some exports keep the tied head as a tensor of its own.
        let embedding = embedding_name(spec.shape.architecture);
        if source.values(&name)? != source.values(embedding)? {
            return Err(ModelError::TensorMismatch {
                name,
                expected: "a copy of the embedding (tie_word_embeddings)".to_string(),
                found: "other values".to_string(),
            });
        }
    }
    Ok(())
}

/// Constants that older exports keep beside the weights: GPT-2's causal mask, rotary frequencies.
fn is_derived(name: &str, architecture: Architecture) -> bool {
    let derived: &[&str] = match architecture {
        Architecture::Gpt2 => &[".attn.bias", ".attn.masked_bias"],
        _ => &[".rotary_emb.inv_freq"],
    };
    derived.iter().any(|ending| name.ends_with(ending))
}

const HEAD: &str = "lm_head.weight";

fn embedding_name(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Gpt2 => "transformer.wte.weight",
        _ => "model.embed_tokens.weight",
    }
}

fn missing(name: &str) -> ModelError {
    ModelError::MissingTensor {
        name: name.to_string(),
    }
}

/// Every tensor of a model's files, layer by layer; made as it is walked, since the number of layers
/// may be a lie.
fn table(spec: &DecoderSpec) -> impl Iterator<Item = FileTensor> + '_ {
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
const SCALE: &str = "_scale";

/// Whether a tensor is f32 in files whatever the other weights are rounded to.
pub(crate) fn is_exact(spec: &DecoderSpec, name: &str) -> bool {
    let packed = spec.shape.ternary.and_then(|ternary| ternary.packed);
    let is_quantised = spec.shape.blockwise.is_some();
    packed.is_some() && name.ends_with(SCALE) || is_quantised && blockwise::is_scale(name)
}

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
    fn path(&self) -> String {
        self.parts
            .first()
            .map_or_else(String::new, |(path, _)| path.clone())
    }

    /// Whether it holds the weights of a block's linear layers.
    fn is_linear(&self) -> bool {
        let path = self.path();
        path.starts_with("layers.") && path.ends_with("_proj.weight")
    }

    /// Its values as codes of its parts. `values` has as many elements as `shape`.
    fn quantise(
        self,
        values: Vec<f32>,
        quantiser: &mut Quantiser,
        own: &mut Tensors,
    ) -> Result<(), ModelError> {
        let path = |path: &str| path.trim_end_matches(".weight").to_string();
        let mut quantise = |name: &str, weights: &[f32], dims| {
            let quantised = quantiser(&path(name), weights, dims)?;
            blockwise::put(name, quantised.operands(), own);
            Ok(())
        };
        if self.layout == Layout::Transposed {
            let inputs = self.shape[1];
            let mut start = 0;
            return self.parts.iter().try_for_each(|(name, outputs)| {
                let rows = &values[start * inputs..(start + outputs) * inputs];
                start += outputs;
                quantise(name, rows, [*outputs, inputs])
            });
        }
        let mut parts = Tensors::new();
        self.unpack(values, &mut parts)?;
        for (name, data) in parts {
            let dims = [data.shape().as_slice()[0], data.shape().as_slice()[1]];
            let turned = transpose(&floats(data), dims[0], dims[1]);
            quantise(&name, &turned, [dims[1], dims[0]])?;
        }
        Ok(())
    }

    /// Its values as parameters of ours. `values` has as many elements as `shape`.
    fn unpack(self, values: Vec<f32>, own: &mut Tensors) -> Result<(), ModelError> {
        let total = self.shape.last().copied().unwrap_or(1);
        let mut start = 0;
        match self.layout {
            Layout::Zeros if values.iter().any(|&value| value != 0.0) => {
                // Absent in our sense: a file may hold zeros, anything else would be lost.
                return Err(ModelError::UnexpectedTensor { name: self.name });
            }
            Layout::Zeros | Layout::Packed(..) => {}
            Layout::Same => {
                if let [(path, _)] = self.parts.as_slice() {
                    own.insert(path.clone(), TensorData::new(values, self.shape));
                }
            }
            Layout::Transposed => {
                for (path, rows) in self.parts {
                    let part = &values[start * total..(start + rows) * total];
                    let part = transpose(part, rows, total);
                    own.insert(path, TensorData::new(part, [total, rows]));
                    start += rows;
                }
            }
            Layout::Columns => {
                for (path, width) in self.parts {
                    let rows = values.chunks(total);
                    let part: Vec<f32> = rows
                        .flat_map(|row| &row[start..start + width])
                        .copied()
                        .collect();
                    let mut shape = self.shape.clone();
                    if let Some(last) = shape.last_mut() {
                        *last = width;
                    }
                    own.insert(path, TensorData::new(part, shape));
                    start += width;
                }
            }
        }
        Ok(())
    }

    /// Takes its parameters out of ours. A module has every parameter in its table.
    fn pack(&self, own: &mut Tensors) -> TensorData {
        if let Layout::Packed(layout, dims) = self.layout {
            let path = self.path();
            let words = own.remove(&path);
            let words =
                words.unwrap_or_else(|| unreachable!("{path} is not a parameter of this model"));
            return packed::write(words, layout, dims);
        }
        let mut part = |path: &String| {
            let data = own.remove(path);
            floats(data.unwrap_or_else(|| unreachable!("{path} is not a parameter of this model")))
        };
        let count = self.shape.iter().product();
        let values = match self.layout {
            Layout::Zeros | Layout::Packed(..) => vec![0.0; count],
            Layout::Same => self.parts.iter().flat_map(|(path, _)| part(path)).collect(),
            Layout::Transposed => {
                let input = self.shape[1];
                let parts = self.parts.iter();
                let turned = parts.map(|(path, rows)| transpose(&part(path), input, *rows));
                joined(turned.collect())
            }
            Layout::Columns => {
                let parts: Vec<(Vec<f32>, usize)> = self
                    .parts
                    .iter()
                    .map(|(path, width)| (part(path), *width))
                    .collect();
                let rows = count / self.shape.last().copied().unwrap_or(1);
                let mut values = Vec::with_capacity(count);
                for row in 0..rows {
                    for (part, width) in &parts {
                        values.extend_from_slice(&part[row * width..(row + 1) * width]);
                    }
                }
                values
            }
        };
        TensorData::new(values, self.shape.clone())
    }
}

/// One after the other; a single one is not copied.
fn joined(mut parts: Vec<Vec<f32>>) -> Vec<f32> {
    match parts.len() {
        1 => parts.remove(0),
        _ => parts.concat(),
    }
}

/// `[rows, cols]` -> `[cols, rows]`.
pub(crate) fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    // Blocks keep both the reads and the writes within a few cache lines.
    const BLOCK: usize = 32;
    for row_block in (0..rows).step_by(BLOCK) {
        for col_block in (0..cols).step_by(BLOCK) {
            for row in row_block..(row_block + BLOCK).min(rows) {
                for col in col_block..(col_block + BLOCK).min(cols) {
                    out[col * rows + row] = values[row * cols + col];
                }
            }
        }
    }
    out
}
