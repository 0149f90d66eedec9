//! Where a run begins: a new model, a base model, or a checkpoint.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, FloatDType};

use super::folder::RunRecord;
use super::{RunFolder, TrainError};
use crate::adapter::{Adapter, OWN_BASE, pissa, quantised};
use crate::checkpoint::Progress;
use crate::config::{AdapterInit, DecoderSpec, Dtype, Plan};
use crate::gradient::LossScale;
use crate::model::{Decoder, folder as model_folder};
use crate::optimizer::Optimizer;

/// Where a run begins.
pub(super) struct Start<'a> {
    pub(super) plan: &'a Plan,
    pub(super) spec: &'a DecoderSpec,
    pub(super) device: &'a Device,
    /// What the forward and backward pass compute in.
    pub(super) dtype: FloatDType,
}

/// What changes from step to step.
pub(super) struct State {
    pub(super) model: Decoder,
    /// The base model as it came, in the dtype of the run, where answers are held against it.
    pub(super) reference: Option<Decoder>,
    /// The adapter as it began, where that is not nothing.
    pub(super) beginning: Option<Adapter>,
    pub(super) optimizer: Optimizer,
    pub(super) progress: Progress,
}

impl Start<'_> {
    pub(super) fn fresh(&self) -> Result<State, TrainError> {
        let config = &self.plan.config;
        let device = self.device.clone().autodiff();
        let (model, beginning) = match &config.model.base_model {
            Some(base) => self.of_base(base, &device)?,
            None => (Decoder::new(self.spec, config.seed, &device)?, None),
        };
        let scaled = config.model.dtype == Dtype::F16;
        Ok(State {
            reference: self.reference(&model),
            model,
            beginning,
            optimizer: self.optimizer(),
            progress: Progress {
                loss_scale: scaled.then(LossScale::default),
                ..Progress::default()
            },
        })
    }

    /// From a checkpoint; `old` is the record of the run up to now.
    pub(super) fn resumed(
        &self,
        folder: &RunFolder,
        step: u64,
        old: Option<&RunRecord>,
    ) -> Result<State, TrainError> {
        let mut snapshot = folder.checkpoints().load(step)?;
        // A run that goes on after it stopped early has its patience anew; one that a crash kept
        // from its export has no end on record, and stops again.
        let end = old.and_then(|old| old.end.as_ref());
        let counted = &mut snapshot.progress.evaluations_since_best;
        let stopped_here = end.is_some_and(|end| end.stopped_early && end.step == step);
        if stopped_here && *counted >= self.plan.config.eval.early_stopping_patience {
            *counted = 0;
        }
        let device = self.device.clone().autodiff();
        let mut reference = None;
        let (model, beginning) = match (&self.plan.adapter, &self.plan.config.model.base_model) {
            (Some(adapter), Some(base)) => {
                let saved = Adapter::from_tensors(&adapter.layers, snapshot.model.tensors());
                let (model, beginning) = match self.plan.changes_base() {
                    // Rounding has chosen it once; it is part of what was trained.
                    true => {
                        let base = folder.file(OWN_BASE);
                        let base = model_folder::load_as(self.spec, &base, &device)?;
                        (base.adapted(adapter, self.plan.config.seed)?, None)
                    }
                    false => self.of_base(base, &device)?,
                };
                reference = self.reference(&model);
                (saved.load(model, &device)?, beginning)
            }
            (_, base) => {
                if let Some(base) = base.as_ref().filter(|_| self.plan.dpo().is_some()) {
                    reference = self.reference(&self.of_base(base, &device)?.0);
                }
                let model = snapshot.model.decoder(self.spec, &device)?;
                (model, None)
            }
        };
        let mut optimizer = self.optimizer();
        let fresh = optimizer.load_state(&model, snapshot.optimizer, self.device)?;
        // Before the first step there is no state; nor in a run whose every step was skipped as not
        // finite, of which it is said.
        if !fresh.is_empty() && snapshot.progress.step > 0 {
            tracing::warn!(
                "no optimizer state of {} parameters, which start fresh: {}",
                fresh.len(),
                fresh.join(", ")
            );
        }
        Ok(State {
            model,
            reference,
            beginning,
            optimizer,
            progress: snapshot.progress,
        })
    }

    /// A base model with new adapters, where the plan has any, and these adapters where they are not
    /// nothing to begin with. The same every time.
    fn of_base(
        &self,
        folder: &Path,
        device: &Device,
    ) -> Result<(Decoder, Option<Adapter>), TrainError> {
        let seed = self.plan.config.seed;
        let Some(adapter) = &self.plan.adapter else {
            return Ok((model_folder::load_as(self.spec, folder, device)?, None));
        };
        let in_files = self
            .plan
            .base
            .as_ref()
            .and_then(|base| base.shape.blockwise);
        if let (Some(blockwise), None) = (self.spec.shape.blockwise, in_files) {
            let plan = (adapter, seed);
            let model = quantised(self.spec, blockwise, folder, plan, device)?;
            return Ok((model, None));
        }
        let model = model_folder::load_as(self.spec, folder, device)?;
        let model = model.adapted(adapter, seed)?;
        Ok(match adapter.init {
            AdapterInit::Pissa => {
                let (model, beginning) = pissa(model, adapter, seed);
                (model, Some(beginning))
            }
            AdapterInit::Default | AdapterInit::Loftq => (model, None),
        })
    }

    /// The base model alone, where answers are held against it, in the dtype that it computes in. In f32
    /// it shares the weights that are not trained.
    fn reference(&self, fresh: &Decoder) -> Option<Decoder> {
        let is_held = self.plan.dpo().is_some();
        let plain = || fresh.valid().without_adapters().for_inference();
        is_held.then(|| plain().cast(self.dtype))
    }

    fn optimizer(&self) -> Optimizer {
        let optimizer = Optimizer::new(&self.plan.optimizer);
        match &self.plan.adapter {
            Some(adapter) => optimizer.with_lora_plus(adapter.lora_plus_ratio),
            None => optimizer,
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::DType;

    use super::*;
    use crate::config::{AdapterConfig, Config, DatasetConfig, Task};

    #[test]
    fn dpo_the_reference_is_rounded_once_and_shares_weights_where_it_can() {
        let mut config = Config {
            task: Task::Dpo,
            adapter: Some(AdapterConfig::default()),
            ..Config::default()
        };
        config.model.base_model = Some("tests/data/reference/llama".into());
        config.data.datasets.push(DatasetConfig::new("x.jsonl"));
        config.train.max_steps = Some(1);
        let plan = Plan::from_config(config).unwrap();
        for dtype in [FloatDType::F32, FloatDType::BF16] {
            let start = Start {
                plan: &plan,
                spec: plan.base.as_ref().unwrap(),
                device: &Device::flex(),
                dtype,
            };
            let reference = start.fresh().unwrap().reference.unwrap();
            assert_eq!(reference.norm.weight.val().dtype(), DType::from(dtype));
            assert!(!reference.is_adapted());
        }
    }
}
