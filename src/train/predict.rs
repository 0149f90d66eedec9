//! A step without a backward pass: tries a predicted update, and keeps it if a forward pass agrees.

use std::sync::Arc;
use std::time::Instant;

use burn::module::Module;
use rayon::prelude::*;

use super::predictor::{Role, TurnedOff};
use super::{Event, Session, StepRecord, StepSettings, TrainError, TrainState};
use crate::checkpoint::Cost;
use crate::data::Batch;
use crate::device::lanes;
use crate::environment::resident_memory_bytes;
use crate::gradient::{Gradient, ParameterOrder};
use crate::model::{Decoder, ModelError};
use crate::objective::{Objective, Sums};

impl Session {
    /// The role of the next step; None in a phase that computes every step.
    pub(super) fn role(&self, state: &TrainState) -> Option<Role> {
        let place = state.progress.step - self.active.phase.first_step;
        state
            .predictor
            .as_ref()
            .map(|predictor| predictor.role(place))
    }

    /// Tries a predicted step. Returns whether it was kept; if not, everything is as before.
    pub(super) fn predict(
        &mut self,
        state: &mut TrainState,
        settings: &StepSettings,
    ) -> Result<bool, TrainError> {
        let begun = Instant::now();
        let Some((loss, batches)) = self.last_batches(state) else {
            return Ok(false);
        };
        let (model, optimizer) = (state.model().clone(), state.optimizer.snapshot());
        if !state.take_prediction(settings) {
            return Ok(false);
        }
        let objective = self.active.objective.as_ref();
        let mut sums = forward_loss(state.model(), &batches, objective, settings)?;
        let own: usize = batches.iter().map(|batch| batch.rows * batch.cols).sum();
        let mut tokens = [own as f64];
        self.team.collective().sum(&mut sums)?;
        self.team.collective().sum(&mut tokens)?;
        let tried = sums[0] / sums[1];
        let is_kept = tried.is_finite() && tried <= loss;
        if is_kept {
            state.progress.step += 1;
            state.progress.val_loss = None;
            state.average_weights();
        } else {
            state.optimizer.restore(optimizer);
            state.change_model(|_, _| model);
        }
        if let Some(predictor) = &mut state.predictor {
            predictor.count(is_kept);
        }
        let flops = self.flops_per_token[self.active.phase.number].forward;
        state.progress.cost += Cost {
            backward_passes: 0,
            flops: tokens[0] * flops,
            train_seconds: begun.elapsed().as_secs_f64(),
            ..Cost::default()
        };
        let step = state.progress.step + u64::from(!is_kept);
        self.emit(&Event::Predicted {
            step,
            is_kept,
            loss_before: loss,
            loss_after: tried.to_string(),
        })?;
        self.note_turned_off(state)?;
        self.note_average(state)?;
        if is_kept {
            self.clock.stepped(begun.elapsed(), 0.0);
            let record = StepRecord {
                step,
                phase: self.phase_name(),
                tokens: state.progress.tokens,
                loss: tried,
                lr: settings.learning_rate,
                grad_norm: 0.0,
                tokens_per_second: self.clock.tokens_per_second(),
                memory_bytes: resident_memory_bytes(),
                regulated: state.decisions(),
                prediction: state.prediction(Some(Role::Predict)),
                exchange: None,
                cost: state.progress.cost,
                metrics: Default::default(),
            };
            self.emit(&Event::Step(record))?;
        }
        Ok(is_kept)
    }

    /// Says why prediction was turned off.
    pub(super) fn note_turned_off(&mut self, state: &mut TrainState) -> Result<(), TrainError> {
        let Some(predictor) = &mut state.predictor else {
            return Ok(());
        };
        let reason = match predictor.take_turned_off() {
            None => return Ok(()),
            Some(TurnedOff::Cosine(cosine)) => {
                format!("the cosine between prediction and truth was {cosine:.3}")
            }
            Some(TurnedOff::Rejections(count)) => {
                format!("{count} predictions in a row were rejected")
            }
        };
        let text = format!(
            "prediction is off for the rest of the phase after step {}: {reason}",
            state.progress.step
        );
        self.emit(&Event::Note { text })
    }

    /// The loss of the last computed step, and its batches.
    fn last_batches(&self, state: &TrainState) -> Option<(f64, Vec<Batch>)> {
        let loss = state.predictor.as_ref()?.last_loss()?;
        let sequences = self.active.phase.sequences_per_step();
        let first = state.progress.sequences.checked_sub(sequences)?;
        Some((loss, self.active.micro_batches(first, self.team.rank())))
    }
}

impl TrainState {
    /// Begins a computed step of this role. Returns the weights before it, if the predictor compares
    /// them with those after it.
    pub(super) fn begin_step(&mut self, role: Option<Role>) -> Option<Gradient> {
        let predictor = self.predictor.as_mut()?;
        predictor.begin(role?);
        let watches = predictor.watches_weights();
        watches.then(|| {
            let order = Arc::new(ParameterOrder::of(self.model()));
            Gradient::of_weights(self.model(), &order)
        })
    }

    /// Shows the predictor a computed step: its loss, and the weights before it.
    pub(super) fn learn_to_predict(&mut self, loss: f64, before: Option<Gradient>) {
        let Some(mut predictor) = self.predictor.take() else {
            return;
        };
        predictor.take_loss(loss);
        if let Some(before) = before {
            predictor.take_weights(before, self.model());
        }
        self.predictor = Some(predictor);
    }

    /// Applies the predicted update. Returns false if there is no prediction.
    fn take_prediction(&mut self, settings: &StepSettings) -> bool {
        let Some(predictor) = &self.predictor else {
            return false;
        };
        if let Some(gradient) = predictor.gradient() {
            let norm = gradient.norm();
            let gradient = gradient.clip(norm, settings.max_grad_norm);
            let rate = settings.learning_rate;
            self.change_model(|model, optimizer| optimizer.step(model, gradient, rate));
            return true;
        }
        match predictor.displacement(self.model()) {
            Some(displacement) => {
                self.change_model(|model, _| displacement.added_to(model));
                true
            }
            None => false,
        }
    }
}

/// The summed loss of a step's batches and their weight, by a forward pass without gradients.
fn forward_loss(
    model: &Decoder,
    batches: &[Batch],
    objective: &dyn Objective,
    settings: &StepSettings,
) -> Result<[f64; 2], ModelError> {
    let model = model
        .valid()
        .with_ternary_blend(settings.ternary_blend)
        .for_inference()
        .cast(settings.dtype);
    let together = objective.rows_together();
    let lanes = lanes(&model.device());
    let (mut sums, mut weight) = (Sums::default(), 0.0);
    for batch in batches {
        let groups = batch.rows / together;
        let count = lanes.clamp(1, groups.max(1));
        let shards: Vec<Batch> = (0..count)
            .map(|shard| {
                let first = together * (shard * groups / count);
                let last = together * ((shard + 1) * groups / count);
                batch.rows(first..last)
            })
            .collect();
        let found: Vec<Sums> = shards
            .par_iter()
            .map(|shard| objective.measure(&model, shard))
            .collect::<Result<_, _>>()?;
        found.iter().for_each(|found| sums.add(found));
        weight += objective.weight(batch);
    }
    Ok([sums.loss, weight])
}
