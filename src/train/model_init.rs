//! Where a run begins: a new model, a base model, or a checkpoint.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, FloatDType};

use super::folder::RunRecord;
use super::{RunFolder, TrainError, TrainState};
use crate::adapter::{Adapter, OWN_BASE, pissa, quantised};
use crate::checkpoint::Progress;
use crate::config::{AdapterInit, DecoderSpec, Dtype, PhasePlan, Plan};
use crate::extra::Extras;
use crate::gradient::LossScale;
use crate::model::{Decoder, folder as model_folder};
use crate::optimizer::Optimizer;

/// Makes the state that a run begins with.
pub(super) struct ModelInit<'a> {
    pub(super) plan: &'a Plan,
    pub(super) spec: &'a DecoderSpec,
    pub(super) device: &'a Device,
}

/// The state that a session begins with.
pub(super) struct Initial {
    pub(super) state: TrainState,
    /// The base model without adapters, in f32, where answers are held against it. It shares the
    /// weights that are not trained with the model.
    pub(super) reference: Option<Decoder>,
    /// The initial adapter; none if it starts at zero.
    pub(super) initial_adapter: Option<Adapter>,
    /// Parameters that the checkpoint has no optimizer state for.
    pub(super) without_state: Vec<String>,
    /// What other parts of the run have saved, by owner.
    pub(super) extras: Extras,
}

impl ModelInit<'_> {
    /// The state of a new run, whose first phase is `phase`.
    pub(super) fn fresh(&self, phase: &PhasePlan) -> Result<Initial, TrainError> {
        let config = &self.plan.config;
        let device = self.device.clone().autodiff();
        let (model, initial_adapter) = match &config.model.base_model {
            Some(base) => self.of_base(base, &device)?,
            None => (Decoder::new(self.spec, config.seed, &device)?, None),
        };
        let reference = self.reference_of(&model);
        let model = model.with_frozen(&phase.freeze)?;
        let mut state = TrainState::new(model, optimizer(self.plan, phase));
        state.progress.loss_scale = loss_scale(phase, None);
        Ok(Initial {
            state,
            reference,
            initial_adapter,
            without_state: Vec::new(),
            extras: Extras::new(),
        })
    }

    /// The state of the checkpoint of a step, which was saved in `phase`; `old` is the record of
    /// the run up to now.
    pub(super) fn resumed(
        &self,
        folder: &RunFolder,
        (step, phase): (u64, &PhasePlan),
        old: Option<&RunRecord>,
    ) -> Result<Initial, TrainError> {
        let mut snapshot = folder.checkpoints().load(step)?;
        self.renew_patience(&mut snapshot.progress, old);
        let device = self.device.clone().autodiff();
        let mut reference = None;
        let (model, initial_adapter) =
            match (&self.plan.adapter, &self.plan.config.model.base_model) {
                (Some(adapter), Some(base)) => {
                    let saved = Adapter::from_tensors(&adapter.layers, snapshot.model.tensors());
                    let (model, initial) = match self.plan.changes_base() {
                        // Rounding has chosen it once; it is part of what was trained.
                        true => {
                            let base = folder.file(OWN_BASE);
                            let base = model_folder::load_as(self.spec, &base, &device)?;
                            (base.adapted(adapter, self.plan.config.seed)?, None)
                        }
                        false => self.of_base(base, &device)?,
                    };
                    reference = self.reference_of(&model);
                    (saved.load(model, &device)?, initial)
                }
                (_, base) => {
                    if let Some(base) = base.as_ref().filter(|_| self.needs_reference()) {
                        reference = self.reference_of(&self.of_base(base, &device)?.0);
                    }
                    let model = snapshot.model.decoder(self.spec, &device)?;
                    (model, None)
                }
            };
        let model = model.with_frozen(&phase.freeze)?;
        let mut optimizer = optimizer(self.plan, phase);
        let without_state = optimizer.load_state(&model, snapshot.optimizer, self.device)?;
        let mut state = TrainState::new(model, optimizer);
        state.progress = snapshot.progress;
        Ok(Initial {
            state,
            reference,
            initial_adapter,
            without_state,
            extras: snapshot.extra,
        })
    }

    /// A run that goes on after it stopped early has its patience anew; one that a crash kept from
    /// its export has no end on record, and stops again.
    fn renew_patience(&self, progress: &mut Progress, old: Option<&RunRecord>) {
        let end = old.and_then(|old| old.end.as_ref());
        let stopped_here = end.is_some_and(|end| end.stopped_early && end.step == progress.step);
        let counted = &mut progress.evaluations_since_best;
        if stopped_here && *counted >= self.plan.config.eval.early_stopping_patience {
            *counted = 0;
        }
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
                let (model, initial) = pissa(model, adapter, seed);
                (model, Some(initial))
            }
            AdapterInit::Default | AdapterInit::Loftq => (model, None),
        })
    }

    /// The base model alone, loaded anew: what answers are held against.
    pub(super) fn reference(&self) -> Result<Option<Decoder>, TrainError> {
        let Some(base) = &self.plan.config.model.base_model else {
            return Ok(None);
        };
        let device = self.device.clone().autodiff();
        let (model, _) = self.of_base(base, &device)?;
        Ok(self.reference_of(&model))
    }

    fn needs_reference(&self) -> bool {
        self.plan.phases.iter().any(|phase| phase.dpo.is_some())
    }

    /// The base model alone, where answers are held against it. It shares the weights that are not
    /// trained.
    fn reference_of(&self, fresh: &Decoder) -> Option<Decoder> {
        let plain = || fresh.valid().without_adapters().for_inference();
        self.needs_reference().then(plain)
    }
}

/// The optimizer of a phase, without any state yet.
pub(super) fn optimizer(plan: &Plan, phase: &PhasePlan) -> Optimizer {
    let optimizer = Optimizer::new(&phase.optimizer);
    match &plan.adapter {
        Some(adapter) => optimizer.with_lora_plus(adapter.lora_plus_ratio),
        None => optimizer,
    }
}

/// The loss scale of a phase: what it was up to now, or a new one, in f16; none in other dtypes.
pub(super) fn loss_scale(phase: &PhasePlan, before: Option<LossScale>) -> Option<LossScale> {
    (phase.dtype == Dtype::F16).then(|| before.unwrap_or_default())
}

/// What the passes of a phase compute in. The plan's dtypes have been resolved for the device.
pub(super) fn float_dtype(dtype: Dtype) -> FloatDType {
    match dtype {
        Dtype::Bf16 => FloatDType::BF16,
        Dtype::F16 => FloatDType::F16,
        Dtype::F32 | Dtype::Auto => FloatDType::F32,
    }
}
