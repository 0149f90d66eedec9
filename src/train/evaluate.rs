//! Evaluation during training: the loss on the validation split, and completions of sample prompts.

use super::{Event, Session, TrainError, TrainState};
use crate::checkpoint::{BestEvaluation, Progress};
use crate::device::lanes;
use crate::generate::{GenerateError, Sampling, TextRequest, complete};
use crate::model::Decoder;
use crate::objective::{Evaluation, evaluate_together};

impl Session {
    pub(super) fn evaluate_if_due(
        &mut self,
        state: &mut TrainState,
    ) -> Result<Option<Evaluation>, TrainError> {
        if self.is_due(state.progress.step, self.plan.config.eval.eval_steps) {
            self.evaluate(state)
        } else {
            Ok(None)
        }
    }

    /// Measures the validation split and completes the sample prompts, with the average of the
    /// weights if it has begun.
    pub(super) fn evaluate(
        &mut self,
        state: &mut TrainState,
    ) -> Result<Option<Evaluation>, TrainError> {
        // Off the autodiff device: a tracked forward without a backward keeps its graph for good.
        let blend = self.active.ternary_blend_after(state.progress.step);
        let (model, weights) = state.evaluated_model();
        let model = model
            .with_ternary_blend(blend)
            .for_inference()
            .cast(self.active.dtype);
        let result = self.measure(&model)?;
        if let Some(evaluation) = &result {
            // A blended model is not the one that would be exported, so it cannot be the best.
            let best = match blend == 1.0 {
                true => state.progress.take_evaluation(evaluation.val_loss),
                false => {
                    state.progress.val_loss = Some(evaluation.val_loss);
                    false
                }
            };
            self.emit(&Event::Evaluated {
                step: state.progress.step,
                evaluation: evaluation.clone(),
                weights,
                best,
                tokens: state.progress.tokens,
                cost: state.progress.cost,
            })?;
        }
        self.complete_prompts(&model, state.progress.step)?;
        Ok(result)
    }

    /// Evaluates the phase's validation split; None if it has none.
    fn measure(&self, model: &Decoder) -> Result<Option<Evaluation>, TrainError> {
        let active = &self.active;
        // All lanes together use as much memory as a training step.
        let lanes = lanes(&model.device());
        let plan = &active.phase.plan;
        let tokens = plan.micro_batch_size * plan.data.sequence_len;
        let length = plan.eval_sequence_len.unwrap_or(plan.data.sequence_len);
        let rows = (tokens / length).max(1).div_ceil(lanes);
        let bytes = active.data.source.val_bytes();
        let batches = active.data.eval_view.eval_batches(rows);
        let measured = batches.map(|batches| {
            let objective = active.objective.as_ref();
            evaluate_together(model, objective, batches, bytes, self.team.collective())
        });
        Ok(measured.transpose()?)
    }

    fn complete_prompts(&mut self, model: &Decoder, step: u64) -> Result<(), TrainError> {
        if !self.team.is_lead() {
            return Ok(());
        }
        for prompt in self.plan.config.eval.sample_prompts.clone() {
            // What cannot be shown is no reason to lose what has been trained.
            let event = match self.sample(model, &prompt) {
                Ok(completion) => Event::Sample {
                    step,
                    prompt,
                    completion,
                },
                Err(error) => Event::Note {
                    text: format!("warning: no sample of {prompt:?}: {error}"),
                },
            };
            self.emit(&event)?;
        }
        Ok(())
    }

    fn sample(&self, model: &Decoder, prompt: &str) -> Result<String, GenerateError> {
        let eval = &self.plan.config.eval;
        let sampling = Sampling {
            temperature: eval.sample_temperature,
            ..Sampling::default()
        };
        let data = self.active.data.source.as_ref();
        let prompt = data.prompt(prompt)?;
        let request = TextRequest {
            prompt: &prompt,
            max_new_tokens: eval.sample_tokens,
            sampling,
            seed: self.plan.config.seed,
            stop: &[],
        };
        Ok(complete(model, data.tokenizer(), &request, |_| {})?.0)
    }
}

impl Progress {
    /// Records an evaluation. Returns whether its loss is the lowest so far.
    fn take_evaluation(&mut self, val_loss: f64) -> bool {
        let lower = |best: BestEvaluation| val_loss < best.val_loss;
        let best = val_loss.is_finite() && self.best.is_none_or(lower);
        self.val_loss = Some(val_loss);
        self.evaluations_since_best += 1;
        if best {
            self.best = Some(BestEvaluation {
                step: self.step,
                val_loss,
            });
            self.evaluations_since_best = 0;
        }
        best
    }
}
