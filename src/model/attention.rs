//! Causal self-attention with grouped key/value heads, rotary positions and a key/value cache.
//!
//! On the CPU a whole batch is attended to by one [operation](firebrick_kernels::attention). On a GPU,
//! and where there is a cache, burn's operations are composed: the query heads of one group are
//! stacked along the sequence axis, so that a group meets its key/value head in one matrix product and
//! no key or value is ever copied per query head: queries `[batch, kv_heads, group x seq, head_dim]`, keys `[batch, kv_heads, keys, head_dim]`.

use burn::module::Module;
use burn::tensor::activation::softmax;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use firebrick_kernels::attention::{AttentionShape, attention};

use super::init::Init;
use super::layers::{Norm, residual_std};
use super::linear::Linear;
use super::lora::Dropout;
use crate::config::{ModelShape, RopeScaling};

/// Added to the score of a key that must not be seen. Finite, because infinities are not portable
/// to every GPU; far below any score, so that its weight is exactly 0 after the softmax.
const UNSEEN: f32 = -1e30;

/// Multi-head attention.
#[derive(Module, Debug)]
pub struct Attention {
    /// `[dim, heads x head_dim]`.
    pub q_proj: Linear,
    /// `[dim, kv_heads x head_dim]`.
    pub k_proj: Linear,
    /// `[dim, kv_heads x head_dim]`.
    pub v_proj: Linear,
    /// `[heads x head_dim]`, bitnet only: over what goes into o_proj.
    pub attn_sub_norm: Option<Norm>,
    /// `[heads x head_dim, dim]`.
    pub o_proj: Linear,
    /// `[head_dim]`, qwen3 only: over each head's queries, before they are turned.
    pub q_norm: Option<Norm>,
    /// `[head_dim]`, qwen3 only: over each head's keys, before they are turned.
    pub k_norm: Option<Norm>,
    #[module(skip)]
    heads: usize,
    #[module(skip)]
    kv_heads: usize,
    #[module(skip)]
    head_dim: usize,
}

impl Attention {
    pub(super) fn new(init: &Init, path: &str, shape: &ModelShape) -> Self {
        let (dim, std) = (shape.hidden_size, shape.initializer_range);
        let queries = shape.num_attention_heads * shape.head_dim;
        let keys = shape.num_key_value_heads * shape.head_dim;
        let linear = |name: &str, dims, bias, std| {
            let path = format!("{path}.{name}");
            Linear::of_block(init, &path, shape, (dims, bias, std))
        };
        let bias = shape.bias || shape.qkv_bias;
        let norm = |width| Norm::of_width(init, shape, width);
        let head_norm = || shape.qk_norm.then(|| norm(shape.head_dim));
        Self {
            q_proj: linear("q_proj", [dim, queries], bias, std),
            k_proj: linear("k_proj", [dim, keys], bias, std),
            v_proj: linear("v_proj", [dim, keys], bias, std),
            attn_sub_norm: shape.is_bitnet_form().then(|| norm(queries)),
            o_proj: linear("o_proj", [queries, dim], shape.bias, residual_std(shape)),
            q_norm: head_norm(),
            k_norm: head_norm(),
            heads: shape.num_attention_heads,
            kv_heads: shape.num_key_value_heads,
            head_dim: shape.head_dim,
        }
    }

    pub(super) fn linears(&mut self) -> impl Iterator<Item = &mut Linear> {
        let projections = [
            &mut self.q_proj,
            &mut self.k_proj,
            &mut self.v_proj,
            &mut self.o_proj,
        ];
        projections.into_iter()
    }

    /// `[batch x seq, dim]` -> `[batch x seq, dim]`. With a cache, the new keys and values are
    /// appended to it and attended to together with the old ones.
    pub(super) fn forward(
        &self,
        x: Tensor<2>,
        context: &Context,
        cache: Option<&mut LayerCache>,
    ) -> Tensor<2> {
        let projections = [&self.q_proj, &self.k_proj, &self.v_proj];
        let dropout = context.dropout.as_ref();
        let [queries, keys, values] = Linear::forward_shared(projections, x, dropout);
        let queries = self.normed(&self.q_norm, queries);
        let keys = self.normed(&self.k_norm, keys);
        let mixed = match &context.sight {
            Sight::Spans { angles, spans } => {
                // What is in a cache is not in the spans.
                assert!(cache.is_none(), "a cache goes with a mask");
                let shape = AttentionShape {
                    rows: context.dims[0],
                    heads: self.heads,
                    kv_heads: self.kv_heads,
                    head_dim: self.head_dim,
                };
                attention(
                    [queries, keys, values],
                    angles.clone(),
                    spans.clone(),
                    shape,
                )
            }
            Sight::Mask { rotary, mask } => {
                let mask = mask.as_ref();
                self.compose([queries, keys, values], context.dims, (rotary, mask), cache)
            }
        };
        let mixed = match &self.attn_sub_norm {
            Some(norm) => norm.forward(mixed),
            None => mixed,
        };
        self.o_proj.forward_dropping(mixed, dropout)
    }

    /// Queries, keys and values `[batch x seq, heads x head_dim]` -> `[batch x seq, heads x head_dim]`, by burn's
    /// operations.
    fn compose(
        &self,
        [queries, keys, values]: [Tensor<2>; 3],
        dims: [usize; 2],
        (rotary, mask): (&Option<Rotary>, Option<&Tensor<4>>),
        cache: Option<&mut LayerCache>,
    ) -> Tensor<2> {
        let [batch, seq] = dims;
        let group = self.heads / self.kv_heads;
        let queries = self.split(queries, dims, self.heads);
        let keys = self.split(keys, dims, self.kv_heads);
        let values = self.split(values, dims, self.kv_heads);
        let (queries, keys) = match rotary {
            Some(rotary) => (rotary.turn(queries), rotary.turn(keys)),
            None => (queries, keys),
        };
        let (keys, values) = match cache {
            Some(cache) => cache.append(keys, values),
            None => (keys, values),
        };

        let queries = queries
            .mul_scalar((self.head_dim as f64).powf(-0.5))
            .reshape([batch, self.kv_heads, group * seq, self.head_dim]);
        let dtype = queries.dtype();
        let mut scores = queries.matmul(keys.swap_dims(2, 3)).cast(DType::F32);
        if let Some(mask) = mask {
            // One for each of the stacked query heads.
            scores = scores + mask.clone().repeat_dim(2, group);
        }
        let mixed = softmax(scores, 3).cast(dtype).matmul(values);

        mixed
            .reshape([batch, self.heads, seq, self.head_dim])
            .swap_dims(1, 2)
            .reshape([batch * seq, self.heads * self.head_dim])
    }

    /// `[batch x seq, heads x head_dim]`, each head normalised where there is a norm for it.
    fn normed(&self, norm: &Option<Norm>, x: Tensor<2>) -> Tensor<2> {
        let Some(norm) = norm else { return x };
        let [rows, width] = x.dims();
        let heads = x.reshape([rows * width / self.head_dim, self.head_dim]);
        norm.forward(heads).reshape([rows, width])
    }

    /// `[batch x seq, heads x head_dim]` -> `[batch, heads, seq, head_dim]`.
    fn split(&self, x: Tensor<2>, [batch, seq]: [usize; 2], heads: usize) -> Tensor<4> {
        x.reshape([batch, seq, heads, self.head_dim])
            .swap_dims(1, 2)
    }
}

/// What all layers of one forward pass share.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    /// Batch and sequence length of the tokens going in.
    pub(super) dims: [usize; 2],
    pub(super) sight: Sight,
    /// What adapters drop in training.
    pub(super) dropout: Option<Dropout>,
}

impl Context {
    /// The same in a pass in which adapters drop a part of what goes into them.
    pub(crate) fn with_dropout(self, dropout: Option<Dropout>) -> Self {
        Self { dropout, ..self }
    }

    /// The same off the autodiff device.
    pub(crate) fn inner(&self) -> Self {
        Self {
            dims: self.dims,
            sight: match &self.sight {
                Sight::Spans { .. } => self.sight.clone(),
                Sight::Mask { rotary, mask } => Sight::Mask {
                    rotary: rotary.as_ref().map(Rotary::inner),
                    mask: mask.as_ref().map(|mask| mask.clone().inner()),
                },
            },
            dropout: self.dropout,
        }
    }
}

/// Where tokens stand, and which keys each query sees.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "there is one in a pass")]
pub(super) enum Sight {
    /// As the operation of the CPU takes it, off the autodiff device.
    Spans {
        /// `[1 or batch, seq, head_dim]`, f32: cosines, then sines; without elements, nothing is turned.
        angles: Tensor<3>,
        /// `[1 or batch, seq, 2]`: the first key that a query sees, and the one behind the last.
        spans: Tensor<3, Int>,
    },
    /// As burn's operations take it.
    Mask {
        rotary: Option<Rotary>,
        /// Additive mask `[1 or batch, 1, seq, keys]`, f32; none when every query sees every key.
        mask: Option<Tensor<4>>,
    },
}

/// Angles of positions `[rows, seq]` row-major, as [`Sight::Spans`] has them.
pub(super) fn angles(
    positions: &[u32],
    rows: usize,
    shape: &ModelShape,
    device: &Device,
) -> Tensor<3> {
    let (frequencies, seq) = (frequencies(shape), positions.len() / rows);
    let turned = positions.iter().flat_map(|&position| {
        let angles = frequencies.iter().map(move |f| position as f32 * f);
        angles.clone().map(f32::cos).chain(angles.map(f32::sin))
    });
    let data = TensorData::new(turned.collect::<Vec<f32>>(), [rows, seq, shape.head_dim]);
    Tensor::from_data(data, (device, DType::F32))
}

/// Spans of texts, `[rows, seq]` row-major by what names the text of each token, as [`Sight::Spans`] has them: a query
/// sees its own text, `window` tokens at most, up to itself.
pub(super) fn spans(texts: &[u32], rows: usize, window: usize, device: &Device) -> Tensor<3, Int> {
    let seq = texts.len() / rows;
    let mut spans = Vec::with_capacity(2 * texts.len());
    for row in texts.chunks(seq.max(1)) {
        let mut first = 0;
        for (token, text) in row.iter().enumerate() {
            if *text != row[first] {
                first = token;
            }
            let start = first.max((token + 1).saturating_sub(window));
            spans.extend([start as i32, token as i32 + 1]);
        }
    }
    Tensor::from_data(TensorData::new(spans, [rows, seq, 2]), device)
}

/// Additive mask `[rows, 1, seq, keys]` from one predicate per row: may query `i` see key `j`?
pub(super) fn additive_mask(
    rows: usize,
    seq: usize,
    keys: usize,
    device: &Device,
    visible: impl Fn(usize, usize, usize) -> bool,
) -> Tensor<4> {
    let mut mask = vec![0.0; rows * seq * keys];
    for (cell, value) in mask.iter_mut().enumerate() {
        let (row, query, key) = (cell / (seq * keys), cell / keys % seq, cell % keys);
        if !visible(row, query, key) {
            *value = UNSEEN;
        }
    }
    Tensor::from_data(TensorData::new(mask, [rows, 1, seq, keys]), device)
}

/// Rotary positions (Su et al., 2021) in the half-split form of LLaMA: element i turns with
/// element i + head_dim/2. The partner is fetched by a product with a signed permutation matrix,
/// which is exact, and cheaper under autodiff than slicing and concatenating.
#[derive(Debug, Clone)]
pub(super) struct Rotary {
    /// `[1 or batch, 1, seq, head_dim]`.
    cos: Tensor<4>,
    sin: Tensor<4>,
    /// `[1, 1, head_dim, head_dim]`: x · partner = (-x2, x1).
    partner: Tensor<4>,
}

impl Rotary {
    /// Tables in `dtype` for the given positions, `[rows, seq]` row-major; one row serves the whole
    /// batch.
    pub(super) fn new(
        positions: &[u32],
        rows: usize,
        shape: &ModelShape,
        (device, dtype): (&Device, DType),
    ) -> Self {
        let head_dim = shape.head_dim;
        let half = head_dim / 2;
        let seq = positions.len() / rows;
        let frequencies = frequencies(shape);
        let angles = || {
            positions.iter().flat_map(|&p| {
                frequencies
                    .iter()
                    .chain(&frequencies)
                    .map(move |f| p as f32 * f)
            })
        };
        let table = |values: Vec<f32>| {
            let data = TensorData::new(values, [rows, 1, seq, head_dim]);
            Tensor::<4>::from_data(data, device).cast(dtype)
        };
        let mut partner = vec![0.0; head_dim * head_dim];
        for i in 0..half {
            partner[(i + half) * head_dim + i] = -1.0;
            partner[i * head_dim + i + half] = 1.0;
        }
        Self {
            cos: table(angles().map(f32::cos).collect()),
            sin: table(angles().map(f32::sin).collect()),
            partner: Tensor::<4>::from_data(
                TensorData::new(partner, [1, 1, head_dim, head_dim]),
                device,
            )
            .cast(dtype),
        }
    }

    fn inner(&self) -> Self {
        Self {
            cos: self.cos.clone().inner(),
            sin: self.sin.clone().inner(),
            partner: self.partner.clone().inner(),
        }
    }

    /// `[batch, heads, seq, head_dim]`, each vector turned by its position.
    fn turn(&self, x: Tensor<4>) -> Tensor<4> {
        let partner = x.clone().matmul(self.partner.clone());
        x * self.cos.clone() + partner * self.sin.clone()
    }
}

/// Radians per position `[head_dim / 2]`. Angles are computed in f32 as the reference
/// implementations do, to give their logits.
fn frequencies(shape: &ModelShape) -> Vec<f32> {
    let (theta, head_dim) = (shape.rope_theta as f32, shape.head_dim);
    let plain = (0..head_dim / 2).map(|i| 1.0 / theta.powf(2.0 * i as f32 / head_dim as f32));
    match shape.rope_scaling {
        None => plain.collect(),
        Some(RopeScaling::Linear { factor }) => plain.map(|f| f / factor as f32).collect(),
        Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        }) => {
            let (factor, original) = (factor as f32, original_max_position_embeddings as f64);
            let longest = (original / low_freq_factor) as f32;
            let shortest = (original / high_freq_factor) as f32;
            let stretched = |f: f32| {
                let wavelength = 2.0 * std::f32::consts::PI / f;
                if wavelength > longest {
                    return f / factor;
                }
                if wavelength < shortest {
                    return f;
                }
                // 0 at the longest wavelength that is touched, 1 at the shortest.
                let kept = (original as f32 / wavelength - low_freq_factor as f32)
                    / (high_freq_factor - low_freq_factor) as f32;
                (1.0 - kept) * f / factor + kept * f
            };
            plain.map(stretched).collect()
        }
    }
}

/// Keys and values of the tokens seen so far in one layer. Room doubles as it fills up.
#[derive(Debug, Clone, Default)]
pub(super) struct LayerCache {
    /// `[batch, kv_heads, room, head_dim]`.
    store: Option<[Tensor<4>; 2]>,
    length: usize,
}

impl LayerCache {
    /// Appends `[batch, kv_heads, seq, head_dim]`, returns everything up to now.
    fn append(&mut self, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let end = self.length + keys.dims()[2];
        let [old_keys, old_values] = match self.store.take() {
            Some(store) => store.map(|old| grown(old, end)),
            None => [grown(keys.clone(), end), grown(values.clone(), end)],
        };
        let all_keys = put(old_keys, self.length, keys);
        let all_values = put(old_values, self.length, values);
        self.length = end;
        let seen = |all: &Tensor<4>| all.clone().narrow(2, 0, end);
        let result = (seen(&all_keys), seen(&all_values));
        self.store = Some([all_keys, all_values]);
        result
    }

    /// Forgets all but the last `count` tokens.
    pub(super) fn keep_last(&mut self, count: usize) {
        let first = self.length.saturating_sub(count);
        let last = |all: Tensor<4>| all.narrow(2, first, self.length - first);
        self.store = self.store.take().map(|store| store.map(last));
        self.length -= first;
    }
}

/// `old` with room for at least `length` tokens.
fn grown(old: Tensor<4>, length: usize) -> Tensor<4> {
    let [batch, heads, room, head_dim] = old.dims();
    if room >= length && room >= LEAST_ROOM {
        return old;
    }
    let room = length.next_power_of_two().max(LEAST_ROOM);
    let fresh = Tensor::zeros([batch, heads, room, head_dim], (&old.device(), old.dtype()));
    put(fresh, 0, old)
}

/// Tokens that a cache has room for from the start.
const LEAST_ROOM: usize = 64;

/// Writes `piece` into `whole` from token `at` on.
fn put(whole: Tensor<4>, at: usize, piece: Tensor<4>) -> Tensor<4> {
    let [batch, heads, seq, head_dim] = piece.dims();
    whole.slice_assign([0..batch, 0..heads, at..at + seq, 0..head_dim], piece)
}
