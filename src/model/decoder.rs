//! The decoder: embedding, blocks, norm, head.

use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};

use super::ModelError;
use super::adapted::Trained;
use super::attention::{
    Attention, Context, LayerCache, Rotary, Sight, additive_mask, angles, spans,
};
use super::init::Init;
use super::layers::{Embedding, Mlp, Norm};
use super::linear::Linear;
use super::loss::{TokenLoss, cross_entropy, cross_entropy_nats, cross_entropy_sum};
use super::output::era;
use super::parameters::{MapParameters, map_parameters};
use crate::config::{DecoderSpec, PackedLayout, Ternary};
use crate::data::Batch;
use crate::device::is_cpu;

/// A decoder-only transformer of any supported family. Parameters are named as in Hugging Face's
/// LLaMA without the `model.` prefix: `layers.0.self_attn.q_proj.weight`.
///
/// ```
/// use burn::tensor::Device;
/// use firebrick::config::Preset;
/// use firebrick::data::Batch;
/// use firebrick::model::{Decoder, DecoderSpec};
///
/// let spec = DecoderSpec {
///     shape: Preset::Stories260K.shape(),
///     vocab_size: 512,
///     eos_token_id: Some(2),
///     bos_token_id: Some(1),
/// };
/// let model = Decoder::new(&spec, 42, &Device::flex())?;
/// let logits = model.forward(&Batch::of_row(&[1, 403, 407]))?;
/// assert_eq!(logits.dims(), [2, 512]);
/// # Ok::<(), firebrick::model::ModelError>(())
/// ```
#[derive(Module, Debug)]
pub struct Decoder {
    /// `[vocab, dim]`.
    pub embed_tokens: Embedding,
    /// `[positions, dim]`, gpt2 only.
    pub embed_positions: Option<Embedding>,
    /// The blocks, first to last.
    pub layers: Vec<Block>,
    /// The norm before the head.
    pub norm: Norm,
    /// `[dim, vocab]`; none when the embedding is the head too.
    pub lm_head: Option<Linear>,
    #[module(skip)]
    spec: DecoderSpec,
    #[module(skip)]
    pub(super) trained: Trained,
    /// The share of the rounded values in ternary weights and their inputs.
    #[module(skip)]
    ternary_blend: f64,
}

/// One block: x + attention(norm(x)), then x + mlp(norm(x)).
#[derive(Module, Debug)]
pub struct Block {
    /// Before attention.
    pub input_layernorm: Norm,
    /// Attention.
    pub self_attn: Attention,
    /// Before the feed-forward layer.
    pub post_attention_layernorm: Norm,
    /// The feed-forward layer.
    pub mlp: Mlp,
}

impl Block {
    pub(super) fn linears(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.self_attn.linears().chain(self.mlp.linears())
    }

    /// `[batch x seq, dim]` -> `[batch x seq, dim]`.
    pub(crate) fn forward(&self, x: Tensor<2>, context: &Context) -> Tensor<2> {
        self.forward_cached(x, context, None)
    }

    fn forward_cached(
        &self,
        x: Tensor<2>,
        context: &Context,
        cache: Option<&mut LayerCache>,
    ) -> Tensor<2> {
        let attended =
            self.self_attn
                .forward(self.input_layernorm.forward(x.clone()), context, cache);
        let x = x + attended;
        let normed = self.post_attention_layernorm.forward(x.clone());
        let fed = self.mlp.forward(normed, context.dropout.as_ref());
        x + fed
    }
}

impl Decoder {
    /// A decoder with random weights, a function of (spec, seed). Weights are drawn when first
    /// used. On `device.autodiff()` it can be trained; on a plain device it can only run.
    ///
    /// # Errors
    /// [`SpecError::Shape`](crate::config::SpecError) for a shape no decoder can have.
    pub fn new(spec: &DecoderSpec, seed: u64, device: &Device) -> Result<Self, ModelError> {
        spec.check()?;
        let init = Init::new(seed, device);
        let shape = &spec.shape;
        let (dim, std) = (shape.hidden_size, shape.initializer_range);
        let layers = (0..shape.num_hidden_layers).map(|i| Block {
            input_layernorm: Norm::new(&init, shape),
            self_attn: Attention::new(&init, &format!("layers.{i}.self_attn"), shape),
            post_attention_layernorm: Norm::new(&init, shape),
            mlp: Mlp::new(&init, &format!("layers.{i}.mlp"), shape),
        });
        let learned_positions = shape.is_gpt2_form();
        Ok(Self {
            embed_tokens: Embedding::new(&init, "embed_tokens", [spec.vocab_size, dim], std),
            embed_positions: learned_positions.then(|| {
                let dims = [shape.max_position_embeddings, dim];
                Embedding::new(&init, "embed_positions", dims, std)
            }),
            layers: layers.collect(),
            norm: Norm::new(&init, shape),
            lm_head: (!shape.tie_word_embeddings)
                .then(|| Linear::new(&init, "lm_head", [dim, spec.vocab_size], false, std)),
            spec: spec.clone(),
            trained: Trained::default(),
            ternary_blend: 1.0,
        })
    }

    /// What this decoder was built from.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// The same decoder with its weights, and so what it computes, in `dtype`. On an autodiff
    /// device its parameters are leaves of their own: gradients do not reach the original.
    pub fn cast(self, dtype: FloatDType) -> Self {
        map_parameters(self, &mut Cast { dtype })
    }

    /// The same decoder with its ternary weights rounded once, instead of in every forward pass.
    /// What `self` is rounded from is what an optimizer changes: the gradient of a rounded weight is
    /// its gradient, straight through.
    ///
    /// Before [`cast`](Self::cast): weights are rounded from f32. To compute with, not to save: files
    /// hold latent or packed weights, and rounding what is rounded already changes its scale.
    #[doc(hidden)]
    pub fn rounded(mut self) -> Self {
        self.block_linears().for_each(Linear::round);
        self
    }

    /// The same decoder with its ternary weights, and the inputs that are rounded for them, blended
    /// with their values before rounding: `share` 0 computes as a dense decoder, 1 as a ternary one.
    /// A decoder of dense weights stays as it is. To compute with, not to save.
    pub fn with_ternary_blend(mut self, share: f64) -> Self {
        self.block_linears()
            .for_each(|linear| linear.blend_ternary(share));
        self.ternary_blend = share;
        self
    }

    /// The same decoder with products of ternary weights and eight-bit activations computed as
    /// integers, where the device has a kernel for that.
    pub(crate) fn with_integer_products(mut self) -> Self {
        self.block_linears().for_each(Linear::multiply_integers);
        self
    }

    /// The same decoder with its ternary weights in two bits each, for inference: products are of
    /// integers. It has no gradient with respect to them. `layout` is how files are to keep them.
    ///
    /// # Errors
    /// [`ModelError::NotTernary`] for a decoder of dense weights.
    pub fn packed(self, layout: PackedLayout) -> Result<Self, ModelError> {
        match self.spec.shape.ternary {
            Some(_) => Ok(self.in_bits(layout)),
            None => Err(ModelError::NotTernary),
        }
    }

    /// The same decoder as inference computes it: ternary weights packed on the CPU, where that is the
    /// fastest, and rounded once elsewhere. On the CPU a folder of latent weights and its packed export
    /// so give the same text. To compute with, not to save, as [`rounded`](Self::rounded).
    pub(crate) fn for_inference(self) -> Self {
        match self.spec.shape.ternary {
            Some(Ternary { packed: None, .. })
                if is_cpu(&self.device()) && self.ternary_blend == 1.0 =>
            {
                self.in_bits(PackedLayout::Compute)
            }
            _ => self.rounded().with_fixed_norms(),
        }
    }

    pub(super) fn in_bits(mut self, layout: PackedLayout) -> Self {
        if let Some(ternary) = &mut self.spec.shape.ternary {
            ternary.packed = Some(layout);
        }
        self.block_linears().for_each(Linear::pack);
        self
    }

    /// Its layers have.
    pub(super) fn become_dense(&mut self) {
        self.spec = self.spec.dense();
    }

    pub(super) fn block_linears(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.layers.iter_mut().flat_map(Block::linears)
    }

    /// Logits `[rows x cols, vocab]`, f32, for every token of a batch.
    ///
    /// # Errors
    /// [`ModelError::TooLong`] when a position is past a learned position table.
    pub fn forward(&self, batch: &Batch) -> Result<Tensor<2>, ModelError> {
        Ok(self.head(self.hidden(batch)?))
    }

    /// What comes out of the last block, `[rows x cols, dim]`.
    pub(crate) fn hidden(&self, batch: &Batch) -> Result<Tensor<2>, ModelError> {
        self.hidden_in(&self.context(batch), batch)
    }

    /// As [`hidden`](Self::hidden), where what the blocks share is there already.
    pub(crate) fn hidden_in(
        &self,
        context: &Context,
        batch: &Batch,
    ) -> Result<Tensor<2>, ModelError> {
        let embedded = self.embed_batch(batch)?;
        let blocks = self.layers.iter();
        Ok(blocks.fold(embedded, |x, block| block.forward(x, context)))
    }

    /// What goes into the first block, `[rows x cols, dim]`.
    pub(crate) fn embed_batch(&self, batch: &Batch) -> Result<Tensor<2>, ModelError> {
        let dims = [batch.rows, batch.cols];
        self.embed(&batch.tokens, &batch.positions, dims, &self.device())
    }

    /// Loss of a whole batch with its gradient scaled by `scale`; see [`cross_entropy`].
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn loss(&self, batch: &Batch, scale: f64) -> Result<TokenLoss, ModelError> {
        let hidden = self.hidden(batch)?;
        Ok(self.loss_of_tokens(hidden, batch, 0..batch.targets.len(), scale))
    }

    /// The loss of some tokens of a batch, from what the last block makes of them, `[tokens, dim]`.
    pub(crate) fn loss_of_tokens(
        &self,
        hidden: Tensor<2>,
        batch: &Batch,
        tokens: Range<usize>,
        scale: f64,
    ) -> TokenLoss {
        let device = self.device().inner();
        let (targets, weights) = targets(batch, tokens, &device);
        cross_entropy(self.head(hidden), targets, weights, scale)
    }

    /// Tokens whose logits are computed at a time, of `tokens` in all: the logits of a large
    /// vocabulary are the largest tensor of a step, and nothing needs all of them at once.
    pub(crate) fn logit_chunks(&self, tokens: usize) -> impl Iterator<Item = Range<usize>> {
        let chunk = logit_chunk(tokens, self.spec.vocab_size);
        let starts = (0..tokens).step_by(chunk);
        starts.map(move |start| start..(start + chunk).min(tokens))
    }

    /// Σ weight · nats over a batch `[1]`. Call it on `model.valid()`: a tracked forward that is
    /// never followed by a backward keeps its graph.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn evaluate(&self, batch: &Batch) -> Result<Tensor<1>, ModelError> {
        let device = self.device();
        let hidden = self.hidden(batch)?;
        let sums = self.logit_chunks(batch.targets.len()).map(|tokens| {
            let hidden = hidden.clone().narrow(0, tokens.start, tokens.len());
            let (targets, weights) = targets(batch, tokens, &device);
            cross_entropy_sum(self.head(hidden), targets, weights)
        });
        let zero = Tensor::zeros([1], &device);
        Ok(sums.fold(zero, |total, sum| total + sum))
    }

    /// Weight · nats of each token of a batch, from what the last block makes of them
    /// `[rows x cols, dim]`, on the plain device.
    pub(crate) fn token_nats(&self, hidden: Tensor<2>, batch: &Batch) -> Vec<f32> {
        let device = self.device();
        let mut nats = Vec::with_capacity(batch.targets.len());
        for tokens in self.logit_chunks(batch.targets.len()) {
            let hidden = hidden.clone().narrow(0, tokens.start, tokens.len());
            let (targets, weights) = targets(batch, tokens, &device);
            let chunk = cross_entropy_nats(self.head(hidden), targets, weights);
            nats.extend(chunk.into_data().iter::<f32>());
        }
        nats
    }

    /// Logits `[1, vocab]` after the last of `tokens`, which continue the sequence in `cache`.
    ///
    /// # Errors
    /// [`ModelError::TooLong`] when the cache or a learned position table is full.
    pub fn decode(&self, tokens: &[u32], cache: &mut KvCache) -> Result<Tensor<2>, ModelError> {
        let (past, seq) = (cache.length, tokens.len());
        let length = past + seq;
        if length > cache.capacity {
            return Err(ModelError::TooLong {
                length,
                limit: cache.capacity,
            });
        }
        let device = self.device();
        let window = self.window();
        cache.forget_beyond(window);
        let (forgotten, keys) = (cache.forgotten, length - cache.forgotten);
        let positions: Vec<u32> = (past..length).map(|p| p as u32).collect();
        let mask = (seq > 1 || keys > window).then(|| {
            additive_mask(1, seq, keys, &device, |_, query, key| {
                let (query, key) = (past + query, forgotten + key);
                key <= query && query - key < window
            })
        });
        let rotary = self.rotary(&positions, 1, &device);
        let context = Context {
            dims: [1, seq],
            sight: Sight::Mask { rotary, mask },
            dropout: None,
        };
        let mut hidden = self.embed(tokens, &positions, [1, seq], &device)?;
        for (block, layer) in self.layers.iter().zip(&mut cache.layers) {
            hidden = block.forward_cached(hidden, &context, Some(layer));
        }
        cache.length = length;
        Ok(self.head(hidden.narrow(0, seq - 1, 1)))
    }

    fn embed(
        &self,
        tokens: &[u32],
        positions: &[u32],
        dims: [usize; 2],
        device: &Device,
    ) -> Result<Tensor<2>, ModelError> {
        let embedded = self.embed_tokens.forward(ids(tokens, dims, device));
        let Some(table) = &self.embed_positions else {
            return Ok(embedded);
        };
        let limit = table.weight.lazy_shape()[0];
        match positions.iter().max() {
            Some(&last) if last as usize >= limit => Err(ModelError::TooLong {
                length: last as usize + 1,
                limit,
            }),
            _ => Ok(embedded + table.forward(ids(positions, dims, device))),
        }
    }

    fn head(&self, hidden: Tensor<2>) -> Tensor<2> {
        let hidden = self.norm.forward(hidden);
        let logits = match &self.lm_head {
            Some(head) => head.forward(hidden),
            None => hidden.matmul(self.embed_tokens.weight.val().transpose()),
        };
        let logits = logits.cast(DType::F32);
        match self.spec.shape.output_activation {
            Some(activation) => era(logits, activation),
            None => logits,
        }
    }

    /// What the blocks share in a forward pass over `batch`.
    pub(crate) fn context(&self, batch: &Batch) -> Context {
        let device = &self.device();
        let (rows, cols) = (batch.rows, batch.cols);
        // Most batches are rows of one text each: what one of them sees, and its positions, serve all.
        let same = |values: &[u32]| values.chunks(cols).all(|row| row == &values[..cols]);
        let rotary_rows = if same(&batch.positions) { 1 } else { rows };
        let mask_rows = if same(&batch.segment_ids) { 1 } else { rows };
        let positions = &batch.positions[..rotary_rows * cols];
        let texts = &batch.segment_ids[..mask_rows * cols];
        let window = self.window();
        let sight = if is_cpu(device) {
            let plain = &device.clone().inner();
            let shape = &self.spec.shape;
            Sight::Spans {
                angles: if shape.is_gpt2_form() {
                    Tensor::zeros([0, 0, 0], (plain, DType::F32))
                } else {
                    angles(positions, rotary_rows, shape, plain)
                },
                spans: spans(texts, mask_rows, window, plain),
            }
        } else {
            let mask = additive_mask(mask_rows, cols, cols, device, |row, query, key| {
                let text = |token: usize| texts[row * cols + token];
                key <= query && query - key < window && text(key) == text(query)
            });
            Sight::Mask {
                rotary: self.rotary(positions, rotary_rows, device),
                mask: Some(mask),
            }
        };
        Context {
            dims: [rows, cols],
            sight,
            dropout: None,
        }
    }

    fn rotary(&self, positions: &[u32], rows: usize, device: &Device) -> Option<Rotary> {
        let shape = &self.spec.shape;
        (!shape.is_gpt2_form()).then(|| {
            let place = (device, self.norm.weight.val().dtype());
            Rotary::new(positions, rows, shape, place)
        })
    }

    /// Tokens that a token attends to, itself included.
    fn window(&self) -> usize {
        self.spec.shape.sliding_window.unwrap_or(usize::MAX)
    }

    /// The same, without drawing weights that have not been drawn yet.
    pub(super) fn lazy_device(&self) -> Device {
        self.norm.weight.lazy_device()
    }

    /// Where its weights are.
    pub fn device(&self) -> Device {
        self.norm.weight.val().device()
    }
}

struct Cast {
    dtype: FloatDType,
}

impl MapParameters for Cast {
    fn map<const D: usize>(&mut self, path: &str, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        // The scales of codes stay as exact as they are.
        if path.ends_with(".weight.scales") {
            return param;
        }
        let value = param.val();
        let (on_tape, trained) = (value.is_autodiff(), value.is_require_grad());
        // Lengths of weights are divided by norms of weights, which are f32.
        let dtype = match path.ends_with(".adapter.magnitude") {
            true => FloatDType::F32,
            false => self.dtype,
        };
        let value = value.inner().cast(dtype);
        let value = match (on_tape, trained) {
            (true, true) => Tensor::from_inner(value).require_grad(),
            (true, false) => Tensor::from_inner(value),
            (false, _) => value,
        };
        Param::initialized(param.id, value)
    }
}

/// Keys and values of a sequence being generated.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    capacity: usize,
    length: usize,
    /// Tokens at the beginning that no later one can attend to, and that are no longer held.
    forgotten: usize,
}

impl KvCache {
    /// For one sequence of at most `capacity` tokens; memory is taken as they come, and with a
    /// sliding window for about two windows at most.
    pub fn new(model: &Decoder, capacity: usize) -> Self {
        let layers = model.layers.iter().map(|_| LayerCache::default()).collect();
        Self {
            layers,
            capacity,
            length: 0,
            forgotten: 0,
        }
    }

    /// Lets go of what lies before a sliding window. Not at every token, since that moves the rest:
    /// a cache holds at most two windows.
    fn forget_beyond(&mut self, window: usize) {
        let held = self.length - self.forgotten;
        if held / 2 >= window {
            self.layers
                .iter_mut()
                .for_each(|layer| layer.keep_last(window));
            self.forgotten = self.length - window;
        }
    }

    /// Tokens seen so far.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing has been seen yet.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

/// `[batch, seq]` ids on a device. Ids fit i32: vocabularies and positions are below 2^31.
fn ids(values: &[u32], dims: [usize; 2], device: &Device) -> Tensor<2, Int> {
    let values: Vec<i32> = values.iter().map(|&id| id as i32).collect();
    Tensor::from_data(TensorData::new(values, dims), device)
}

/// Targets and weights, each `[tokens]`, of some tokens of a batch.
fn targets(batch: &Batch, tokens: Range<usize>, device: &Device) -> (Tensor<1, Int>, Tensor<1>) {
    let count = tokens.len();
    let targets = ids(&batch.targets[tokens.clone()], [1, count], device).reshape([count]);
    let weights = TensorData::new(batch.weights[tokens].to_vec(), [count]);
    (targets, Tensor::from_data(weights, device))
}

/// How many of some tokens have their logits computed at a time: as many as [`LOGIT_CHUNK_BYTES`] hold,
/// and enough in any case for an efficient product. Chunks are even: the head's weights are read
/// anew for each, and for a rest of a few tokens that takes nearly as long.
pub(crate) fn logit_chunk(tokens: usize, vocab_size: usize) -> usize {
    let most = (LOGIT_CHUNK_BYTES / 4 / vocab_size).max(64);
    tokens.div_ceil(tokens.div_ceil(most).max(1)).max(1)
}

const LOGIT_CHUNK_BYTES: usize = 64 << 20;
