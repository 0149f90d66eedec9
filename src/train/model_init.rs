//! Creates the initial state of a run: from a new model, a base model, or a checkpoint.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, FloatDType};

use super::folder::RunRecord;
use super::inputs::base_files;
use super::same_run::same_base;
use super::{RunFolder, TrainError, TrainState};
use crate::adapter::{Adapter, OWN_BASE, pissa, quantised};
use crate::checkpoint::{Progress, Weights};
use crate::config::{
    AdapterInit, AdapterPlan, DecoderSpec, Dtype, Held, PhaseModel, PhasePlan, Plan,
};
use crate::extra::Extras;
use crate::gradient::LossScale;
use crate::model::{Decoder, Tensors, folder as model_folder};
use crate::optimizer::Optimizer;
use crate::phase::Phase;

/// Creates the initial state of a session.
pub(super) struct ModelInit<'a> {
    pub(super) plan: &'a Plan,
    pub(super) spec: &'a DecoderSpec,
    pub(super) device: &'a Device,
}

/// The initial state of a session.
pub(super) struct Initial {
    pub(super) state: TrainState,
    /// The reference model of a preference loss: the base model before the run, in f32. It shares
    /// the weights that are not trained with the model where it can.
    pub(super) reference: Option<Decoder>,
    /// The initial adapter; None if it starts at zero, or if it has already been merged.
    pub(super) initial_adapter: Option<Adapter>,
    /// Parameters without optimizer state in the checkpoint.
    pub(super) without_state: Vec<String>,
    /// The saved state of other parts of the run, by owner.
    pub(super) extras: Extras,
}

impl ModelInit<'_> {
    /// The state of a new run, which begins in `phase`.
    pub(super) fn fresh(&self, phase: &Phase) -> Result<Initial, TrainError> {
        let config = &self.plan.config;
        let device = self.device.clone().autodiff();
        let (model, initial_adapter) = match &config.model.base_model {
            Some(base) => self.of_base(base, &device)?,
            None => (Decoder::new(self.spec, config.seed, &device)?, None),
        };
        let reference = self.reference_of(&model, &phase.plan)?;
        let model = self.turned(model, PhaseModel::beginning(self.plan), phase.model)?;
        let model = model.with_frozen(&phase.plan.freeze)?;
        let mut state = TrainState::new(model, optimizer(self.plan, &phase.plan));
        state.progress.loss_scale = loss_scale(&phase.plan, None);
        Ok(Initial {
            state,
            reference,
            initial_adapter,
            without_state: Vec::new(),
            extras: Extras::new(),
        })
    }

    /// The state from the checkpoint of a step that was saved in `phase`; `old` is the record of
    /// the run so far.
    pub(super) fn resumed(
        &self,
        folder: &RunFolder,
        (step, phase): (u64, &Phase),
        old: Option<&RunRecord>,
    ) -> Result<Initial, TrainError> {
        let mut snapshot = folder.checkpoints().load(step)?;
        self.renew_patience(&mut snapshot.progress, old);
        let device = self.device.clone().autodiff();
        let (model, initial_adapter, reference) = match phase.model.held() {
            Held::Adapter => {
                let (model, initial) = self.of_own_base(folder, &device)?;
                let reference = self.reference_of(&model, &phase.plan)?;
                let saved = self.adapter_of(snapshot.model.tensors());
                (saved.load(model, &device)?, initial, reference)
            }
            Held::Weights | Held::Both => {
                let reference = self.reference(&phase.plan)?;
                let model = self.of_weights(snapshot.model, phase.model, &device)?;
                (model, None, reference)
            }
        };
        let model = model.with_frozen(&phase.plan.freeze)?;
        let mut optimizer = optimizer(self.plan, &phase.plan);
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

    /// Resets the patience of a run that stopped early and is now continued. A run that crashed
    /// between its early stop and its export has no recorded end: its patience is not reset, and it
    /// stops again.
    fn renew_patience(&self, progress: &mut Progress, old: Option<&RunRecord>) {
        let end = old.and_then(|old| old.end.as_ref());
        let stopped_here = end.is_some_and(|end| end.stopped_early && end.step == progress.step);
        let counted = &mut progress.evaluations_since_best;
        if stopped_here && *counted >= self.plan.config.eval.early_stopping_patience {
            *counted = 0;
        }
    }

    /// Loads the base model and adds new adapters if the plan has any. Also returns the adapters if
    /// they do not start at zero. The result is the same every time.
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

    /// Loads the base model of a run that has already begun, and adds new adapters.
    fn of_own_base(
        &self,
        folder: &RunFolder,
        device: &Device,
    ) -> Result<(Decoder, Option<Adapter>), TrainError> {
        match (&self.plan.adapter, &self.plan.config.model.base_model) {
            // Rounding depends on the adapter's initial values, so the rounded base is saved with
            // the run.
            (Some(adapter), _) if self.plan.changes_base() => {
                let base = model_folder::load_as(self.spec, &folder.file(OWN_BASE), device)?;
                Ok((base.adapted(adapter, self.plan.config.seed)?, None))
            }
            (_, Some(base)) => self.of_base(base, device),
            (_, None) => unreachable!("an adapter has a base model"),
        }
    }

    /// The plan's adapter with the values from a checkpoint.
    fn adapter_of(&self, tensors: Tensors) -> Adapter {
        let shapes = self.plan.adapter.as_ref().map(|adapter| &adapter.layers);
        Adapter::from_tensors(shapes.unwrap_or(&BTreeMap::new()), tensors)
    }

    /// The model of a checkpoint that holds all weights, and possibly an adapter beside them.
    pub(super) fn of_weights(
        &self,
        weights: Weights,
        model: PhaseModel,
        device: &Device,
    ) -> Result<Decoder, TrainError> {
        let (weights, adapter) = weights.split_adapter();
        let decoder = weights.decoder(&model.spec(self.spec), device)?;
        let Some(plan) = model.adapter(self.plan) else {
            return Ok(decoder);
        };
        let seed = model.adapter_seed(self.plan.config.seed);
        let decoder = decoder.adapted(plan, seed)?;
        Ok(self.adapter_of(adapter).load(decoder, device)?)
    }

    /// Turns the model of the previous phase into that of this phase. If the two have different
    /// adapters, the old one is merged into the weights in f32, and the new one begins.
    pub(super) fn turned(
        &self,
        model: Decoder,
        before: PhaseModel,
        now: PhaseModel,
    ) -> Result<Decoder, TrainError> {
        if before == now {
            return Ok(model);
        }
        let model = model.merged_to_train();
        match now.adapter(self.plan) {
            Some(adapter) => {
                let seed = now.adapter_seed(self.plan.config.seed);
                Ok(model.adapted(adapter, seed)?)
            }
            None => Ok(model),
        }
    }

    /// Computes the adapter that the run began with; None if it started at zero.
    pub(super) fn initial_adapter(&self) -> Result<Option<Adapter>, TrainError> {
        let begins = |adapter: &AdapterPlan| adapter.init == AdapterInit::Pissa;
        match &self.plan.config.model.base_model {
            Some(base) if self.plan.adapter.as_ref().is_some_and(begins) => {
                Ok(self.of_base(base, self.device)?.1)
            }
            _ => Ok(None),
        }
    }

    /// Loads the reference model of a phase with a preference loss: the base model before the run.
    pub(super) fn reference(&self, phase: &PhasePlan) -> Result<Option<Decoder>, TrainError> {
        let (Some(base), Some(_)) = (&self.plan.config.model.base_model, &phase.dpo) else {
            return Ok(None);
        };
        let device = self.device.clone().autodiff();
        let (model, _) = self.of_base(base, &device)?;
        self.reference_of(&model, phase)
    }

    /// The same for a phase that begins with `model`. If only an adapter is trained, the base model
    /// is already in memory.
    pub(super) fn reference_beside(
        &self,
        folder: &RunFolder,
        model: &Decoder,
        phase: &Phase,
    ) -> Result<Option<Decoder>, TrainError> {
        let adapter = self.plan.adapter.as_ref();
        let is_as_it_was = phase.model.held() == Held::Adapter
            && adapter.is_some_and(|adapter| adapter.saved.is_empty());
        if is_as_it_was || phase.plan.dpo.is_none() {
            return self.reference_of(model, &phase.plan);
        }
        // The base model's files may have changed since the run began, which may be days ago.
        if let Some(record) = folder.read_record()? {
            same_base(
                &record,
                &base_files(self.plan)?,
                folder.path().to_path_buf(),
            )?;
        }
        self.reference(&phase.plan)
    }

    /// The reference model, made from the initial model. It shares the weights that are not
    /// trained.
    fn reference_of(
        &self,
        fresh: &Decoder,
        phase: &PhasePlan,
    ) -> Result<Option<Decoder>, TrainError> {
        if phase.dpo.is_none() {
            return Ok(None);
        }
        let takes = |adapter: &AdapterPlan| adapter.init != AdapterInit::Default;
        let plain = match (&self.plan.base, &self.plan.config.model.base_model) {
            // The initial adapter was subtracted from these weights, but the reference needs all of
            // them.
            (Some(spec), Some(folder)) if self.plan.adapter.as_ref().is_some_and(takes) => {
                model_folder::load_as(spec, folder, self.device)?
            }
            _ => fresh.valid().without_adapters(),
        };
        Ok(Some(plain.for_inference()))
    }
}

/// The optimizer of a phase, without state.
pub(super) fn optimizer(plan: &Plan, phase: &PhasePlan) -> Optimizer {
    let optimizer = Optimizer::new(&phase.optimizer);
    match &plan.adapter {
        Some(adapter) => optimizer.with_lora_plus(adapter.lora_plus_ratio),
        None => optimizer,
    }
}

/// The loss scale of an f16 phase: the current one, or a new one if there is none. None for other
/// dtypes.
pub(super) fn loss_scale(phase: &PhasePlan, before: Option<LossScale>) -> Option<LossScale> {
    (phase.dtype == Dtype::F16).then(|| before.unwrap_or_default())
}

/// The dtype of a phase's passes. The plan's dtypes have already been resolved for the device.
pub(super) fn float_dtype(dtype: Dtype) -> FloatDType {
    match dtype {
        Dtype::Bf16 => FloatDType::BF16,
        Dtype::F16 => FloatDType::F16,
        Dtype::F32 | Dtype::Auto => FloatDType::F32,
    }
}
