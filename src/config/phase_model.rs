//! The form of the model in each phase.

use super::adapter::AdapterPlan;
use super::phase::PhaseAdapter;
use super::plan::Plan;
use super::spec::DecoderSpec;

/// The form of the model in a phase, which follows from all phases up to it. Everything that
/// depends on this form reads it here: how a phase begins, what a checkpoint holds and how it is
/// read, what is exported, and the sizes of all of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PhaseModel {
    /// The phase in which the model's adapter began, counted from 0; None if the model has no
    /// adapter.
    pub adapter_since: Option<usize>,
    /// Whether an adapter has been merged into the weights, so that they differ from the weights
    /// that the run began with.
    pub is_merged: bool,
}

/// What a checkpoint has to hold of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// All weights. The model has no adapter.
    Weights,
    /// An adapter, and the parameters that are trained in full beside it. The base model has the
    /// rest.
    Adapter,
    /// All weights and an adapter, because no other file has the merged weights.
    Both,
}

impl PhaseModel {
    /// The form before the first phase, with the plan's adapter.
    pub fn beginning(plan: &Plan) -> Self {
        Self {
            adapter_since: plan.adapter.as_ref().map(|_| 0),
            is_merged: false,
        }
    }

    /// The form of the model in each phase of a plan, in order.
    pub fn of_plan(plan: &Plan) -> Vec<Self> {
        let mut model = Self::beginning(plan);
        let phases = plan.phases.iter().enumerate();
        let models = phases.map(|(number, phase)| {
            if plan.adapter.is_some() {
                model = model.followed_by(number, phase.adapter);
            }
            model
        });
        models.collect()
    }

    /// The form in the phase `number` of a run with an adapter, which follows a phase of this form.
    fn followed_by(self, number: usize, adapter: PhaseAdapter) -> Self {
        match adapter {
            PhaseAdapter::Off => Self {
                adapter_since: None,
                is_merged: true,
            },
            PhaseAdapter::On if self.adapter_since.is_some() => self,
            PhaseAdapter::Restart if number == 0 => self,
            PhaseAdapter::On | PhaseAdapter::Restart => Self {
                adapter_since: Some(number),
                is_merged: true,
            },
        }
    }

    /// What a checkpoint of this model has to hold.
    pub fn held(self) -> Held {
        match (self.adapter_since, self.is_merged) {
            (None, _) => Held::Weights,
            (Some(_), false) => Held::Adapter,
            (Some(_), true) => Held::Both,
        }
    }

    /// The adapter of this model; None if it has none.
    pub fn adapter(self, plan: &Plan) -> Option<&AdapterPlan> {
        plan.adapter
            .as_ref()
            .filter(|_| self.adapter_since.is_some())
    }

    /// The spec of this model in a run that begins with a model of `spec`. Merging makes ternary
    /// and quantised weights dense.
    pub fn spec(self, spec: &DecoderSpec) -> DecoderSpec {
        if self.is_merged {
            spec.dense()
        } else {
            spec.clone()
        }
    }

    /// The seed of the adapter's initial values in a run with seed `seed`. Each adapter of a run
    /// has its own; the first has that of a run without phases.
    pub fn adapter_seed(self, seed: u64) -> u64 {
        let number = match self.adapter_since {
            None | Some(0) => return seed,
            Some(number) => number as u64,
        };
        let mut key = blake3::Hasher::new_derive_key("firebrick adapter of a phase v1");
        key.update(&seed.to_le_bytes());
        key.update(&number.to_le_bytes());
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&key.finalize().as_bytes()[..8]);
        u64::from_le_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p1_what_a_model_is_follows_from_all_phases_up_to_it() {
        use PhaseAdapter::{Off, On, Restart};
        let models = |phases: &[PhaseAdapter]| {
            let mut model = PhaseModel {
                adapter_since: Some(0),
                is_merged: false,
            };
            let models = phases.iter().enumerate().map(|(number, &adapter)| {
                model = model.followed_by(number, adapter);
                (model.held(), model.adapter_since)
            });
            models.collect::<Vec<_>>()
        };
        assert_eq!(
            models(&[On, On, Off, Off, On, On]),
            [
                (Held::Adapter, Some(0)),
                (Held::Adapter, Some(0)),
                (Held::Weights, None),
                (Held::Weights, None),
                (Held::Both, Some(4)),
                (Held::Both, Some(4)),
            ]
        );
        assert_eq!(
            models(&[Restart, Restart, Restart]),
            [
                (Held::Adapter, Some(0)),
                (Held::Both, Some(1)),
                (Held::Both, Some(2)),
            ]
        );
        assert_eq!(models(&[Off]), [(Held::Weights, None)]);
    }

    #[test]
    fn p1_every_adapter_of_a_run_begins_otherwise() {
        let seed = |number| {
            let model = PhaseModel {
                adapter_since: Some(number),
                is_merged: number > 0,
            };
            model.adapter_seed(7)
        };
        assert_eq!(seed(0), 7);
        assert!(seed(1) != 7 && seed(1) != seed(2));
    }
}
