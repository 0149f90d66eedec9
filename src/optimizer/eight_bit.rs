//! AdamW with both moments in eight bits (Dettmers et al., 2022, "8-bit Optimizers via Block-wise
//! Quantization"): two bytes a weight and an f32 for each 256, where AdamW keeps eight bytes.
//!
//! The arithmetic is AdamW's in f32, with the moments taken from their codes before and put back after.
//! A second moment whose code is that of 0 counts as half the smallest level: a gradient of less than
//! about 1 / 2500 of the largest of its 256 would otherwise be divided by nothing, and its weight leave
//! for good. Such weights take smaller steps than AdamW's. A first moment that decays by less than half the way
//! to the next level would stay where it is, and its weight go on without a gradient: where that is exactly 0, it goes
//! on to the next level.
//! The state is in this process's memory whatever the device, and the update is computed there: on a
//! GPU weights and gradients travel both ways in every step, and its memory holds no state at all.
//! Tensors of fewer than [`SMALLEST`] weights keep f32 moments, as in bitsandbytes: they save nothing,
//! and norms and biases mind more.

use std::cmp::Ordering;

use burn::tensor::{Tensor, TensorData};
use firebrick_kernels::dynamic::{BLOCK, Dynamic8, DynamicMap};
use rayon::prelude::*;

use super::{OptimizerState, StateScalar};

/// Weights of a tensor from which on its moments are in eight bits.
pub(super) const SMALLEST: usize = 4096;

/// The rule with its parameters.
#[derive(Debug, Clone, Copy)]
pub(super) struct AdamW8bit {
    pub(super) betas: [f32; 2],
    pub(super) eps: f32,
    pub(super) weight_decay: f32,
}

/// The moments of one parameter.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct State {
    updates: u64,
    moments: Moments,
}

#[derive(Debug, Clone, PartialEq)]
enum Moments {
    Exact([Vec<f32>; 2]),
    Coded([Dynamic8; 2]),
}

/// Weights that one core updates at a time: whole blocks.
const TASK: usize = 64 * BLOCK;

const NAMES: [&str; 2] = ["moment_1", "moment_2"];

fn maps() -> [&'static DynamicMap; 2] {
    [DynamicMap::signed(), DynamicMap::unsigned()]
}

/// Bytes that are kept of a parameter of so many weights.
pub(super) fn kept_bytes(weights: usize) -> u64 {
    let bytes = if weights < SMALLEST {
        8 * weights
    } else {
        2 * weights + 8 * weights.div_ceil(BLOCK)
    };
    bytes as u64
}

/// What one update multiplies with.
struct Factors {
    rule: AdamW8bit,
    learning_rate: f32,
    /// 1 - beta^t of both moments.
    corrections: [f32; 2],
}

impl Factors {
    /// One weight and its moments.
    #[inline(always)]
    fn update(&self, weight: &mut f32, gradient: f32, first: &mut f32, second: &mut f32) {
        let [beta1, beta2] = self.rule.betas;
        *first = beta1 * *first + (1.0 - beta1) * gradient;
        *second = beta2 * *second + (1.0 - beta2) * gradient * gradient;
        let mean = *first / self.corrections[0];
        let spread = (*second / self.corrections[1]).sqrt() + self.rule.eps;
        *weight -= self.learning_rate * (mean / spread + self.rule.weight_decay * *weight);
    }
}

impl AdamW8bit {
    /// The updated parameter and its state. All tensors are on the plain device.
    pub(super) fn step<const D: usize>(
        &self,
        learning_rate: f64,
        value: Tensor<D>,
        gradient: Tensor<D>,
        state: Option<State>,
    ) -> (Tensor<D>, State) {
        let (device, shape) = (value.device(), value.shape());
        let mut weights: Vec<f32> = values(value);
        let gradient: Vec<f32> = values(gradient);
        let mut state = state.unwrap_or_else(|| State::new(weights.len()));
        state.updates += 1;
        let power = i32::try_from(state.updates).unwrap_or(i32::MAX);
        let factors = Factors {
            rule: *self,
            learning_rate: learning_rate as f32,
            // In f64: 1 - 0.999 has lost four digits in f32.
            corrections: self
                .betas
                .map(|beta| (1.0 - f64::from(beta).powi(power)) as f32),
        };
        match &mut state.moments {
            Moments::Exact([first, second]) => {
                let moments = first.iter_mut().zip(second);
                let all = weights.iter_mut().zip(&gradient).zip(moments);
                all.for_each(|((weight, gradient), (first, second))| {
                    factors.update(weight, *gradient, first, second);
                });
            }
            Moments::Coded(moments) => update_coded(&factors, &mut weights, &gradient, moments),
        }
        let value = Tensor::from_data(TensorData::new(weights, shape), &device);
        (value, state)
    }
}

fn update_coded(
    factors: &Factors,
    weights: &mut [f32],
    gradient: &[f32],
    [first, second]: &mut [Dynamic8; 2],
) {
    let blocks = TASK / BLOCK;
    let tasks = weights
        .par_chunks_mut(TASK)
        .zip(gradient.par_chunks(TASK))
        .zip(first.codes.par_chunks_mut(TASK))
        .zip(first.absmax.par_chunks_mut(blocks))
        .zip(second.codes.par_chunks_mut(TASK))
        .zip(second.absmax.par_chunks_mut(blocks));
    tasks.for_each(
        |(((((weights, gradient), codes1), absmax1), codes2), absmax2)| {
            let parts = weights
                .chunks_mut(BLOCK)
                .zip(gradient.chunks(BLOCK))
                .zip(codes1.chunks_mut(BLOCK).zip(absmax1))
                .zip(codes2.chunks_mut(BLOCK).zip(absmax2));
            for (((weights, gradient), first), second) in parts {
                update_block(factors, weights, gradient, first, second);
            }
        },
    );
}

/// One block: codes of its moments, and their largest magnitudes.
fn update_block(
    factors: &Factors,
    weights: &mut [f32],
    gradient: &[f32],
    (codes1, absmax1): (&mut [u8], &mut f32),
    (codes2, absmax2): (&mut [u8], &mut f32),
) {
    let [signed, unsigned] = maps();
    let (mut m, mut v) = ([0f32; BLOCK], [0f32; BLOCK]);
    let (m, v) = (&mut m[..weights.len()], &mut v[..weights.len()]);
    signed.dequantise_block(codes1, *absmax1, m);
    unsigned.dequantise_block(codes2, *absmax2, v);
    let least = unsigned.levels()[1] / 2.0 * *absmax2;
    v.iter_mut().for_each(|v| *v = v.max(least));
    let moments = m.iter_mut().zip(v.iter_mut());
    for ((weight, gradient), (m, v)) in weights.iter_mut().zip(gradient).zip(moments) {
        factors.update(weight, *gradient, m, v);
    }
    let mut before = [0; BLOCK];
    let before = &mut before[..codes1.len()];
    before.copy_from_slice(codes1);
    *absmax1 = signed.quantise_block(m, codes1);
    *absmax2 = unsigned.quantise_block(v, codes2);
    let idle = signed.code(0.0);
    for ((code, before), gradient) in codes1.iter_mut().zip(before).zip(gradient) {
        if *gradient == 0.0 && code == before {
            *code = towards(idle, *code);
        }
    }
}

/// The next code on the way to `end`.
fn towards(end: u8, code: u8) -> u8 {
    match code.cmp(&end) {
        Ordering::Less => code + 1,
        Ordering::Equal => code,
        Ordering::Greater => code - 1,
    }
}

/// The values of a tensor, without a copy where nothing else holds them.
fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let data = tensor.into_data();
    // Parameters and their gradients are f32.
    data.try_into_vec()
        .unwrap_or_else(|error| unreachable!("f32: {error:?}"))
}

impl State {
    fn new(weights: usize) -> Self {
        let moments = if weights < SMALLEST {
            Moments::Exact([vec![0.0; weights], vec![0.0; weights]])
        } else {
            Moments::Coded(maps().map(|map| Dynamic8::zeros(map, weights)))
        };
        Self {
            updates: 0,
            moments,
        }
    }

    /// Puts it into a checkpoint, under the path of its parameter.
    pub(super) fn save(&self, path: &str, kept: &mut OptimizerState) {
        kept.scalars
            .insert(format!("{path}.updates"), StateScalar::Uint(self.updates));
        let mut put = |name: String, data: TensorData| {
            kept.tensors.insert(format!("{path}.{name}"), data);
        };
        match &self.moments {
            Moments::Exact(moments) => {
                for (name, values) in NAMES.iter().zip(moments) {
                    put(
                        name.to_string(),
                        TensorData::new(values.clone(), [values.len()]),
                    );
                }
            }
            Moments::Coded(moments) => {
                for (name, moment) in NAMES.iter().zip(moments) {
                    let (codes, absmax) = (moment.codes.clone(), moment.absmax.clone());
                    let (length, blocks) = ([codes.len()], [absmax.len()]);
                    put(format!("{name}_codes"), TensorData::new(codes, length));
                    put(format!("{name}_absmax"), TensorData::new(absmax, blocks));
                }
            }
        }
    }

    /// Takes it out of a checkpoint; none where it is not there, or is of another size.
    pub(super) fn load(path: &str, weights: usize, kept: &mut OptimizerState) -> Option<Self> {
        let updates = match kept.scalars.remove(&format!("{path}.updates"))? {
            StateScalar::Uint(updates) => updates,
            _ => return None,
        };
        let mut take = |name: String| kept.tensors.remove(&format!("{path}.{name}"));
        let floats = |data: TensorData, count: usize| {
            let values: Vec<f32> = data.try_into_vec().ok()?;
            (values.len() == count && values.iter().all(|value| value.is_finite()))
                .then_some(values)
        };
        let moments = if weights < SMALLEST {
            let [a, b] = NAMES.map(|name| floats(take(name.to_string())?, weights));
            Moments::Exact([a?, b?])
        } else {
            let [a, b] = NAMES.map(|name| {
                let codes: Vec<u8> = take(format!("{name}_codes"))?.try_into_vec().ok()?;
                let absmax = floats(take(format!("{name}_absmax"))?, weights.div_ceil(BLOCK))?;
                (codes.len() == weights).then_some(Dynamic8 { codes, absmax })
            });
            Moments::Coded([a?, b?])
        };
        Some(Self { updates, moments })
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn tensor(values: &[f32]) -> Tensor<1> {
        Tensor::from_data(
            TensorData::new(values.to_vec(), [values.len()]),
            &Device::flex(),
        )
    }

    const RULE: AdamW8bit = AdamW8bit {
        betas: [0.9, 0.95],
        eps: 1e-8,
        weight_decay: 0.1,
    };

    #[test]
    fn q7_small_tensors_are_updated_as_the_paper_says_and_large_ones_nearly_so() {
        for count in [5, SMALLEST - 1, SMALLEST, SMALLEST + 77] {
            let weights: Vec<f32> = (0..count).map(|i| (i as f32 * 0.37).sin()).collect();
            let (mut found, mut state) = (tensor(&weights), None);
            let mut expected: Vec<f64> = weights.iter().map(|&w| f64::from(w)).collect();
            let mut moments = vec![[0f64; 2]; count];
            for step in 1..=20 {
                let gradient: Vec<f32> = (0..count)
                    .map(|i| ((i * step) as f32 * 0.11).cos() * 0.2f32.powi(i as i32 % 3))
                    .collect();
                let (value, new) = RULE.step(1e-2, found, tensor(&gradient), state);
                (found, state) = (value, Some(new));
                for ((w, [m, v]), g) in expected.iter_mut().zip(&mut moments).zip(&gradient) {
                    let g = f64::from(*g);
                    *m = 0.9 * *m + 0.1 * g;
                    *v = 0.95 * *v + 0.05 * g * g;
                    let mean = *m / (1.0 - 0.9f64.powi(step as i32));
                    let spread = (*v / (1.0 - 0.95f64.powi(step as i32))).sqrt() + 1e-8;
                    *w -= 1e-2 * (mean / spread + 0.1 * *w);
                }
            }
            let found: Vec<f32> = values(found);
            let errors = found
                .iter()
                .zip(&expected)
                .map(|(f, e)| (f64::from(*f) - e).abs());
            let mean = errors.sum::<f64>() / count as f64;
            // Twenty updates of about 1e-2 each.
            let limit = if count < SMALLEST { 1e-5 } else { 1e-2 };
            assert!(mean < limit, "{count}: {mean}");
            assert_eq!(kept_bytes(count) < 8 * count as u64, count >= SMALLEST);
        }
    }

    #[test]
    fn q7_no_update_is_without_bound_and_what_has_no_gradient_any_more_stays() {
        let count = SMALLEST;
        let (mut weights, mut state) = (tensor(&vec![0.0; count]), None);
        let rule = AdamW8bit {
            weight_decay: 0.0,
            ..RULE
        };
        let mut before = vec![0.0; count];
        for step in 0..200 {
            // From one to a hundred-millionth; the smallest half of each block only in the beginning.
            let gradient = |i: usize| match i % BLOCK {
                at if at >= BLOCK / 2 && step >= 5 => 0.0,
                at => 10f32.powf(-8.0 * at as f32 / BLOCK as f32),
            };
            let gradient: Vec<f32> = (0..count).map(gradient).collect();
            let (value, new) = rule.step(1e-2, weights, tensor(&gradient), state);
            (weights, state) = (value, Some(new));
            let now: Vec<f32> = values(weights.clone());
            for (i, (now, before)) in now.iter().zip(&before).enumerate() {
                let moved = (now - before).abs();
                assert!(moved < 5e-2, "step {step}, weight {i}: {moved}");
                let is_idle = step > 150 && i % BLOCK >= BLOCK / 2;
                assert!(!is_idle || moved < 1e-4, "step {step}, weight {i}: {moved}");
            }
            before = now;
        }
    }

    #[test]
    fn q7_a_state_comes_back_as_it_was() {
        for count in [7, SMALLEST + 3] {
            let values: Vec<f32> = (0..count).map(|i| (i as f32).sin()).collect();
            let (_, state) = RULE.step(1e-2, tensor(&values), tensor(&values), None);
            let mut kept = OptimizerState::default();
            state.save("a.b", &mut kept);
            let bytes: usize = kept
                .tensors
                .values()
                .map(|data| data.as_bytes().len())
                .sum();
            assert_eq!(bytes as u64, kept_bytes(count));
            assert!(State::load("a.b", count + 1, &mut kept).is_none());
            state.save("a.b", &mut kept);
            assert_eq!(State::load("a.b", count, &mut kept), Some(state));
            assert!(kept.tensors.is_empty() && kept.scalars.is_empty());
            assert_eq!(State::load("a.b", count, &mut kept), None);
        }
    }
}
