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

use burn::tensor::kind::BridgeTensor;
use burn::tensor::{DType, Device, Tensor, TensorData};
use firebrick_kernels::dynamic::{BLOCK, Dynamic8, DynamicMap};
use rayon::prelude::*;

use super::decay::Decay;
use super::ramp::Ramped;
use super::rule::{RuleState, SavedState, StateLayout, StateTensor, UpdateRule};
use super::rules::Rules;
use super::tensor_rule::on_device;
use super::{OptimizerState, StateScalar};
use crate::config::AdamWPlan;
use crate::model::Tensors;

/// Tensors with at least this many weights keep their moments in eight bits.
const SMALLEST: usize = 4096;

pub(super) fn rules(plan: &AdamWPlan) -> Rules {
    let rule = |decay| AdamW8bit {
        beta_1: plan.betas[0] as f32,
        beta_2: Ramped::new(plan.betas[1], plan.beta2_warmup),
        eps: plan.eps as f32,
        decay,
    };
    let decay = Decay::new(plan.weight_decay, plan.cautious_weight_decay);
    Rules::uniform(rule(decay), rule(Decay::NONE))
}

/// The rule with its parameters.
#[derive(Debug, Clone)]
struct AdamW8bit {
    beta_1: f32,
    beta_2: Ramped,
    eps: f32,
    decay: Decay,
}

/// The moments of one parameter.
#[derive(Debug, Clone, PartialEq)]
struct State {
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

const UPDATES: &str = "updates";
const EXACT: [&str; 2] = ["moment_1", "moment_2"];
/// Codes and absmax of both moments.
const CODED: [[&str; 2]; 2] = [
    ["moment_1_codes", "moment_1_absmax"],
    ["moment_2_codes", "moment_2_absmax"],
];

fn maps() -> [&'static DynamicMap; 2] {
    [DynamicMap::signed(), DynamicMap::unsigned()]
}

/// The factors of one update.
struct Factors {
    betas: [f32; 2],
    eps: f32,
    decay: Decay,
    learning_rate: f32,
    /// 1 - beta^t of both moments.
    corrections: [f32; 2],
}

impl Factors {
    /// One weight and its moments.
    #[inline(always)]
    fn update(&self, weight: &mut f32, gradient: f32, first: &mut f32, second: &mut f32) {
        let [beta1, beta2] = self.betas;
        *first = beta1 * *first + (1.0 - beta1) * gradient;
        *second = beta2 * *second + (1.0 - beta2) * gradient * gradient;
        let mean = *first / self.corrections[0];
        let spread = (*second / self.corrections[1]).sqrt() + self.eps;
        let update = mean / spread;
        let is_opposed = self.decay.is_cautious && update * *weight < 0.0;
        let decay = if is_opposed {
            0.0
        } else {
            self.decay.weight_decay
        };
        *weight -= self.learning_rate * (update + decay * *weight);
    }
}

impl AdamW8bit {
    /// Updates a parameter's weights and state.
    fn update(&self, learning_rate: f64, weights: &mut [f32], gradient: &[f32], state: &mut State) {
        state.updates += 1;
        let power = i32::try_from(state.updates).unwrap_or(i32::MAX);
        // In f64: 1 - 0.999 has lost four digits in f32.
        let constant = |beta: f32| (1.0 - f64::from(beta).powi(power)) as f32;
        let beta_2 = self.beta_2.at(state.updates);
        let factors = Factors {
            betas: [self.beta_1, beta_2],
            eps: self.eps,
            decay: self.decay,
            learning_rate: learning_rate as f32,
            corrections: [
                constant(self.beta_1),
                if self.beta_2.is_constant() {
                    constant(beta_2)
                } else {
                    self.beta_2.correction(state.updates)
                },
            ],
        };
        match &mut state.moments {
            Moments::Exact([first, second]) => {
                let moments = first.iter_mut().zip(second);
                let all = weights.iter_mut().zip(gradient).zip(moments);
                all.for_each(|((weight, gradient), (first, second))| {
                    factors.update(weight, *gradient, first, second);
                });
            }
            Moments::Coded(moments) => update_coded(&factors, weights, gradient, moments),
        }
    }
}

impl UpdateRule for AdamW8bit {
    fn state_family(&self) -> &'static str {
        "adamw8bit"
    }

    fn layout(&self, dims: &[usize]) -> StateLayout {
        let weights = dims.iter().product();
        let tensor = |name, dtype, length| StateTensor {
            name,
            dtype,
            dims: vec![length],
        };
        let tensors = if weights < SMALLEST {
            let moments = EXACT.map(|name| tensor(name, DType::F32, weights));
            Vec::from(moments)
        } else {
            let moments = CODED.map(|[codes, absmax]| {
                let blocks = weights.div_ceil(BLOCK);
                [
                    tensor(codes, DType::U8, weights),
                    tensor(absmax, DType::F32, blocks),
                ]
            });
            moments.into_iter().flatten().collect()
        };
        StateLayout {
            tensors,
            scalars: &[UPDATES],
        }
    }

    fn step(
        &self,
        _rank: usize,
        learning_rate: f64,
        value: BridgeTensor,
        gradient: BridgeTensor,
        state: Option<RuleState>,
    ) -> (BridgeTensor, Option<RuleState>) {
        // The tensor's rank does not matter: only its data is read.
        let value = Tensor::<1>::from_bridge(value);
        let gradient = Tensor::<1>::from_bridge(gradient);
        let device = value.device();
        let value = value.into_data();
        let shape = value.shape().clone();
        let (mut weights, gradient) = (values(value), values(gradient.into_data()));
        let state = state.map(RuleState::into_inner::<State>);
        let mut state = state.unwrap_or_else(|| State::new(weights.len()));
        self.update(learning_rate, &mut weights, &gradient, &mut state);
        let value = on_device(TensorData::new(weights, shape), &device);
        (value, Some(RuleState::new(self, state)))
    }

    fn save(&self, path: &str, state: &RuleState, _spare: Tensors, saved: &mut OptimizerState) {
        let State { updates, moments } = state.inner();
        let mut put = |name: &str, data: TensorData| {
            saved.tensors.insert(format!("{path}.{name}"), data);
        };
        match moments {
            Moments::Exact(moments) => {
                for (name, values) in EXACT.iter().zip(moments) {
                    put(name, TensorData::new(values.clone(), [values.len()]));
                }
            }
            Moments::Coded(moments) => {
                for ([codes, absmax], moment) in CODED.iter().zip(moments) {
                    let (length, blocks) = ([moment.codes.len()], [moment.absmax.len()]);
                    put(codes, TensorData::new(moment.codes.clone(), length));
                    put(absmax, TensorData::new(moment.absmax.clone(), blocks));
                }
            }
        }
        let updates = StateScalar::Uint(*updates);
        saved.scalars.insert(format!("{path}.{UPDATES}"), updates);
    }

    fn load(&self, dims: &[usize], mut saved: SavedState, _device: &Device) -> Option<RuleState> {
        let Some(&StateScalar::Uint(updates)) = saved.scalars.get(UPDATES) else {
            return None;
        };
        let mut take = |name: &str| saved.tensors.remove(name);
        let floats = |data: TensorData| {
            let values: Vec<f32> = data.try_into_vec().ok()?;
            values
                .iter()
                .all(|value| value.is_finite())
                .then_some(values)
        };
        let moments = if dims.iter().product::<usize>() < SMALLEST {
            let [a, b] = EXACT.map(|name| floats(take(name)?));
            Moments::Exact([a?, b?])
        } else {
            let [a, b] = CODED.map(|[codes, absmax]| {
                let codes = take(codes)?.try_into_vec().ok()?;
                let absmax = floats(take(absmax)?)?;
                Some(Dynamic8 { codes, absmax })
            });
            Moments::Coded([a?, b?])
        };
        Some(RuleState::new(self, State { updates, moments }))
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

/// The values of a tensor. They are not copied if no one else holds the tensor.
fn values(data: TensorData) -> Vec<f32> {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(weight_decay: f64) -> AdamW8bit {
        AdamW8bit {
            beta_1: 0.9,
            beta_2: Ramped::new(0.95, None),
            eps: 1e-8,
            decay: Decay::new(weight_decay, false),
        }
    }

    #[test]
    fn q7_small_tensors_are_updated_as_the_paper_says_and_large_ones_nearly_so() {
        for count in [5, SMALLEST - 1, SMALLEST, SMALLEST + 77] {
            let mut found: Vec<f32> = (0..count).map(|i| (i as f32 * 0.37).sin()).collect();
            let mut state = State::new(count);
            let mut expected: Vec<f64> = found.iter().map(|&w| f64::from(w)).collect();
            let mut moments = vec![[0f64; 2]; count];
            for step in 1..=20 {
                let gradient: Vec<f32> = (0..count)
                    .map(|i| ((i * step) as f32 * 0.11).cos() * 0.2f32.powi(i as i32 % 3))
                    .collect();
                rule(0.1).update(1e-2, &mut found, &gradient, &mut state);
                for ((w, [m, v]), g) in expected.iter_mut().zip(&mut moments).zip(&gradient) {
                    let g = f64::from(*g);
                    *m = 0.9 * *m + 0.1 * g;
                    *v = 0.95 * *v + 0.05 * g * g;
                    let mean = *m / (1.0 - 0.9f64.powi(step as i32));
                    let spread = (*v / (1.0 - 0.95f64.powi(step as i32))).sqrt() + 1e-8;
                    *w -= 1e-2 * (mean / spread + 0.1 * *w);
                }
            }
            let errors = found
                .iter()
                .zip(&expected)
                .map(|(f, e)| (f64::from(*f) - e).abs());
            let mean = errors.sum::<f64>() / count as f64;
            // Twenty updates of about 1e-2 each.
            let limit = if count < SMALLEST { 1e-5 } else { 1e-2 };
            assert!(mean < limit, "{count}: {mean}");
            let bytes = rule(0.1).state_bytes(&[count]);
            assert_eq!(bytes < 8 * count as u64, count >= SMALLEST);
        }
    }

    #[test]
    fn q7_no_update_is_without_bound_and_what_has_no_gradient_any_more_stays() {
        let count = SMALLEST;
        let (mut weights, mut state) = (vec![0.0; count], State::new(count));
        let rule = rule(0.0);
        let mut before = vec![0.0; count];
        for step in 0..200 {
            // From one to a hundred-millionth; the smallest half of each block only in the beginning.
            let gradient = |i: usize| match i % BLOCK {
                at if at >= BLOCK / 2 && step >= 5 => 0.0,
                at => 10f32.powf(-8.0 * at as f32 / BLOCK as f32),
            };
            let gradient: Vec<f32> = (0..count).map(gradient).collect();
            rule.update(1e-2, &mut weights, &gradient, &mut state);
            for (i, (now, before)) in weights.iter().zip(&before).enumerate() {
                let moved = (now - before).abs();
                assert!(moved < 5e-2, "step {step}, weight {i}: {moved}");
                let is_idle = step > 150 && i % BLOCK >= BLOCK / 2;
                assert!(!is_idle || moved < 1e-4, "step {step}, weight {i}: {moved}");
            }
            before.clone_from(&weights);
        }
    }

    #[test]
    fn q7_a_state_comes_back_as_it_was() {
        let device = Device::flex();
        for dims in [[1, 7], [3, SMALLEST / 3 + 1]] {
            let count: usize = dims.iter().product();
            let values: Vec<f32> = (0..count).map(|i| (i as f32).sin()).collect();
            let mut state = State::new(count);
            rule(0.1).update(1e-2, &mut values.clone(), &values, &mut state);
            let kept = RuleState::new(&rule(0.1), state.clone());
            let save = || {
                let mut saved = OptimizerState::default();
                rule(0.1).save("a.b", &kept, Tensors::new(), &mut saved);
                SavedState::take("a.b", &mut saved).unwrap()
            };
            let load = |saved: SavedState| saved.load("a.b", &dims, &rule(0.1), &device);
            assert_eq!(load(save()).unwrap().inner::<State>(), &state);
            // A value that is not a number would spread through the weights.
            let mut broken = save();
            let is_float = |data: &&mut TensorData| data.dtype() == DType::F32;
            let data = broken.tensors.values_mut().find(is_float).unwrap();
            let mut values: Vec<f32> = data.clone().try_into_vec().unwrap();
            values[0] = f32::NAN;
            *data = TensorData::new(values, data.shape().clone());
            assert!(load(broken).is_err());
        }
    }
}
