//! Causal self-attention with grouped key/value heads, rotary positions and a key/value cache.
//!
//! The query heads of one group are stacked along the sequence axis, so that a group meets its
//! key/value head in one matrix product and no key or value is ever copied per query head:
//! queries `[batch, kv_heads, group x seq, head_dim]`, keys `[batch, kv_heads, keys, head_dim]`.

use burn::module::Module;
use burn::tensor::activation::softmax;
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::init::Init;
use super::layers::{Linear, residual_std};
use crate::config::ModelShape;

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
    /// `[heads x head_dim, dim]`.
    pub o_proj: Linear,
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
        let linear = |name: &str, dims, std| {
            Linear::new(init, &format!("{path}.{name}"), dims, shape.bias, std)
        };
        Self {
            q_proj: linear("q_proj", [dim, queries], std),
            k_proj: linear("k_proj", [dim, keys], std),
            v_proj: linear("v_proj", [dim, keys], std),
            o_proj: linear("o_proj", [queries, dim], residual_std(shape)),
            heads: shape.num_attention_heads,
            kv_heads: shape.num_key_value_heads,
            head_dim: shape.head_dim,
        }
    }

    /// `[batch x seq, dim]` -> `[batch x seq, dim]`. With a cache, the new keys and values are
    /// appended to it and attended to together with the old ones.
    pub(super) fn forward(
        &self,
        x: Tensor<2>,
        context: &Context,
        cache: Option<&mut LayerCache>,
    ) -> Tensor<2> {
        let [batch, seq] = context.dims;
        let group = self.heads / self.kv_heads;
        let queries = self.split(self.q_proj.forward(x.clone()), context, self.heads);
        let keys = self.split(self.k_proj.forward(x.clone()), context, self.kv_heads);
        let values = self.split(self.v_proj.forward(x), context, self.kv_heads);
        let (queries, keys) = match &context.rotary {
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
        if let Some(mask) = context.mask(group) {
            scores = scores + mask;
        }
        let mixed = softmax(scores, 3).cast(dtype).matmul(values);

        let mixed = mixed
            .reshape([batch, self.heads, seq, self.head_dim])
            .swap_dims(1, 2)
            .reshape([batch * seq, self.heads * self.head_dim]);
        self.o_proj.forward(mixed)
    }

    /// `[batch x seq, heads x head_dim]` -> `[batch, heads, seq, head_dim]`.
    fn split(&self, x: Tensor<2>, context: &Context, heads: usize) -> Tensor<4> {
        let [batch, seq] = context.dims;
        x.reshape([batch, seq, heads, self.head_dim])
            .swap_dims(1, 2)
    }
}

/// What all layers of one forward pass share.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    /// Batch and sequence length of the tokens going in.
    pub(super) dims: [usize; 2],
    pub(super) rotary: Option<Rotary>,
    /// Additive mask `[1 or batch, 1, seq, keys]`, f32; none when every query sees every key.
    pub(super) mask: Option<Tensor<4>>,
}

impl Context {
    /// The same off the autodiff device.
    pub(crate) fn inner(&self) -> Self {
        Self {
            dims: self.dims,
            rotary: self.rotary.as_ref().map(Rotary::inner),
            mask: self.mask.as_ref().map(|mask| mask.clone().inner()),
        }
    }

    /// The mask for `group` stacked query heads: `[1 or batch, 1, group x seq, keys]`.
    fn mask(&self, group: usize) -> Option<Tensor<4>> {
        self.mask
            .as_ref()
            .map(|mask| mask.clone().repeat_dim(2, group))
    }
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
        head_dim: usize,
        theta: f64,
        (device, dtype): (&Device, DType),
    ) -> Self {
        let half = head_dim / 2;
        let seq = positions.len() / rows;
        // Angles are computed in f32 as the reference implementations do, to give their logits.
        let frequencies: Vec<f32> = (0..half)
            .map(|i| 1.0 / (theta as f32).powf(2.0 * i as f32 / head_dim as f32))
            .collect();
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
