//! AdamW (Loshchilov and Hutter, 2019): Adam with decoupled weight decay of matrices.
//!
//! The operations and their order are those of burn 0.22's AdamW, so that runs of earlier versions go on bit for
//! bit; the rule is ours because burn's has no warm-up of the second beta, and its cautious decay asks the
//! first moment instead of the update.

use burn::tensor::{DType, Tensor};
use firebrick_kernels::difference::adam::Arithmetic;

use super::applied::Adam;
use super::decay::Decay;
use super::ramp::Ramped;
use super::rule::{StateLayout, StateTensor};
use super::rules::Rules;
use super::tensor_rule::{Own, TensorRule, TensorState};
use crate::config::AdamWPlan;

pub(super) const MOMENT_1: &str = "momentum.moment_1";
pub(super) const MOMENT_2: &str = "momentum.moment_2";

pub(super) fn rules(plan: &AdamWPlan) -> Rules {
    rules_with(plan, Form::default())
}

pub(super) fn rules_with(plan: &AdamWPlan, form: Form) -> Rules {
    let decay = Decay::new(plan.weight_decay, plan.cautious_weight_decay);
    let rule = |decay| {
        Own(AdamW {
            form,
            ..AdamW::new(plan, decay)
        })
    };
    Rules::uniform(rule(decay), rule(Decay::NONE))
}

/// What another rule makes of AdamW.
#[derive(Debug, Clone, Copy)]
pub(super) struct Form {
    /// Whether weights and moments stay as they are where the gradient is exactly zero.
    pub(super) is_sparse: bool,
    /// What the learning rate is multiplied with.
    pub(super) lr_ratio: f64,
}

impl Default for Form {
    fn default() -> Self {
        Self {
            is_sparse: false,
            lr_ratio: 1.0,
        }
    }
}

/// The rule with its parameters.
#[derive(Debug, Clone)]
pub(super) struct AdamW {
    beta_1: f32,
    beta_2: Ramped,
    eps: f32,
    decay: Decay,
    form: Form,
}

impl AdamW {
    fn new(plan: &AdamWPlan, decay: Decay) -> Self {
        Self {
            beta_1: plan.betas[0] as f32,
            beta_2: Ramped::new(plan.betas[1], plan.beta2_warmup),
            eps: plan.eps as f32,
            decay,
            form: Form::default(),
        }
    }
}

/// A running mean after one more value: `decay` times the mean so far and the rest of `value`.
pub(super) fn averaged<const D: usize>(
    mean: Option<Tensor<D>>,
    decay: f32,
    value: Tensor<D>,
) -> Tensor<D> {
    let value = value.mul_scalar(1.0 - decay);
    match mean {
        Some(mean) => mean.mul_scalar(decay).add(value),
        None => value,
    }
}

impl TensorRule for AdamW {
    /// Adam keeps the same moments.
    fn family(&self) -> &'static str {
        "adam"
    }

    fn layout(&self, dims: &[usize]) -> StateLayout {
        let tensors = [MOMENT_1, MOMENT_2].map(|name| StateTensor {
            name,
            dtype: DType::F32,
            dims: dims.to_vec(),
        });
        StateLayout {
            tensors: tensors.into(),
            scalars: &["momentum.time"],
        }
    }

    fn update<const D: usize>(
        &self,
        learning_rate: f64,
        value: Tensor<D>,
        gradient: Tensor<D>,
        state: &mut TensorState,
    ) -> Tensor<D> {
        let time = state.updates;
        let learning_rate = self.form.lr_ratio * learning_rate;
        let (beta_1, beta_2) = (self.beta_1, self.beta_2.at(time));
        // Where the gradient is zero, what was there before is put back. A moment that has not begun is zero.
        let still = self
            .form
            .is_sparse
            .then(|| gradient.clone().equal_scalar(0.0));
        let kept = |before: Option<Tensor<D>>, after: Tensor<D>| match &still {
            None => after,
            Some(still) => {
                let before = before.unwrap_or_else(|| after.zeros_like());
                after.mask_where(still.clone(), before)
            }
        };
        let old = |moment: &Option<Tensor<D>>| moment.clone().filter(|_| self.form.is_sparse);
        let before = state.take(MOMENT_1);
        let mean = kept(old(&before), averaged(before, beta_1, gradient.clone()));
        let mean = state.put(MOMENT_1, mean);
        let before = state.take(MOMENT_2);
        let squares = kept(old(&before), averaged(before, beta_2, gradient.square()));
        let squares = state.put(MOMENT_2, squares);
        let weights = still.is_some().then(|| value.clone());
        let power = i32::try_from(time).unwrap_or(i32::MAX);
        let mean = mean.div_scalar(1.0 - beta_1.powi(power));
        let squares = squares.div_scalar(self.beta_2.correction(time));
        let update = mean.div(squares.sqrt().add_scalar(self.eps));
        let value = self.decay.decayed(learning_rate, value, &update);
        kept(weights, value - update.mul_scalar(learning_rate))
    }

    fn adam(&self) -> Option<Adam> {
        Some(Adam {
            arithmetic: Arithmetic::AdamW,
            beta_1: self.beta_1,
            beta_2: self.beta_2.clone(),
            eps: self.eps,
            weight_decay: self.decay.weight_decay,
            lr_ratio: self.form.lr_ratio,
        })
    }
}

#[cfg(test)]
mod tests {
    use burn::optim::{AdamWConfig, DynOptimizer, DynState};
    use burn::tensor::{Device, Distribution};

    use super::*;
    use crate::optimizer::rule::{RuleState, UpdateRule};

    /// Weights without a gradient keep themselves and their moments; the others are AdamW's.
    #[test]
    fn o2_a_sparse_rule_leaves_alone_what_has_no_gradient() {
        let plan = AdamWPlan::new([0.9, 0.95], 1e-8, 0.1);
        let dense = AdamW::new(&plan, Decay::new(0.1, false));
        let sparse = Own(AdamW {
            form: Form {
                is_sparse: true,
                ..Form::default()
            },
            ..dense.clone()
        });
        let dense = Own(dense);
        let device = Device::flex();
        let start = Tensor::<2>::random([6, 5], Distribution::Default, &device) + 0.5;
        let rows = |gradient: Tensor<2>, seen: [f32; 6]| {
            gradient * Tensor::<1>::from_floats(seen, &device).unsqueeze_dim(1)
        };
        let steps = [
            [1.0, 1.0, 0.0, 1.0, 0.0, 1.0],
            [1.0, 0.0, 0.0, 1.0, 1.0, 1.0],
            [1.0, 0.0, 0.0, 1.0, 0.0, 1.0],
        ];
        let mut values = [start.clone(), start.clone()];
        let mut states: [Option<RuleState>; 2] = [None, None];
        for seen in steps {
            let gradient = Tensor::random([6, 5], Distribution::Default, &device) + 0.5;
            let gradient = rows(gradient, seen);
            for (i, rule) in [&dense, &sparse].into_iter().enumerate() {
                let (value, state) = rule.step(
                    2,
                    1e-2,
                    values[i].clone().into_bridge(),
                    gradient.clone().into_bridge(),
                    states[i].take(),
                );
                states[i] = state;
                values[i] = Tensor::from_bridge(value);
            }
        }
        let [start, dense, sparse] = [start, values[0].clone(), values[1].clone()]
            .map(|value| value.into_data().iter::<f32>().collect::<Vec<_>>());
        let row = |values: &[f32], i: usize| values[5 * i..][..5].to_vec();
        for always in [0, 3, 5] {
            assert_eq!(row(&sparse, always), row(&dense, always));
        }
        assert_eq!(row(&sparse, 2), row(&start, 2));
        for sometimes in [1, 4] {
            assert_ne!(row(&sparse, sometimes), row(&start, sometimes));
            assert_ne!(row(&sparse, sometimes), row(&dense, sometimes));
        }
    }

    #[test]
    fn the_steps_are_burns_bit_for_bit() {
        let plan = AdamWPlan::new([0.9, 0.95], 1e-8, 0.1);
        let decay = Decay::new(plan.weight_decay, false);
        let ours = Own(AdamW::new(&plan, decay));
        let burns = AdamWConfig::new()
            .with_beta_1(0.9)
            .with_beta_2(0.95)
            .with_epsilon(1e-8)
            .with_weight_decay(0.1)
            .build();
        let device = Device::flex();
        let random = || Tensor::<2>::random([13, 7], Distribution::Default, &device);
        let mut values = [random(), random()];
        values[1] = values[0].clone();
        let (mut own, mut other): (Option<RuleState>, Option<DynState>) = (None, None);
        for step in 0..12 {
            let rate = 1e-2 / f64::from(step + 1);
            let gradient = random() - 0.5;
            let [a, b] = values.clone().map(Tensor::into_bridge);
            let a = ours.step(2, rate, a, gradient.clone().into_bridge(), own.take());
            let b = burns.step_dyn(2, rate, b, gradient.into_bridge(), other.take());
            (own, other) = (a.1, b.1);
            values = [a.0, b.0].map(Tensor::from_bridge);
            let [a, b] = values.clone().map(Tensor::into_data);
            assert_eq!(a, b, "{step}");
        }
    }
}
