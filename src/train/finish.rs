//! The end of a run: its model or adapter, and the last of its record.

use super::card::{ExportedStep, model_card};
use super::export::Exported;
use super::folder::FinalRecord;
use super::inputs::files_of;
use super::{EvaluatedWeights, Evaluation, Event, Outcome, Session, TrainError, TrainState};
use crate::checkpoint::Progress;
use crate::data::Bigram;

/// Largest training split that the bigram baseline is fitted on: it is counted in memory.
const BIGRAM_LIMIT: u64 = 50_000_000;

impl Session {
    /// Exports the best model, else the last, and closes the record. Rank 0 does, and tells the others
    /// how it went.
    pub(super) fn finish(
        &mut self,
        state: &mut TrainState,
        evaluation: Option<Evaluation>,
    ) -> Result<Outcome, TrainError> {
        if self.team.ranks() == 1 {
            return self.finish_alone(state, evaluation);
        }
        let of_lead = match self.team.is_lead() {
            true => Some(self.finish_alone(state, evaluation.clone())?),
            false => None,
        };
        let told = self.team.tell(|| {
            let outcome = of_lead.as_ref();
            let weights = outcome.and_then(|outcome| outcome.exported_weights);
            let bigram = outcome.and_then(|outcome| outcome.bigram);
            (
                outcome.map_or(0, |outcome| outcome.exported_step),
                weights,
                bigram,
            )
        })?;
        let (exported_step, exported_weights, bigram) = told;
        Ok(of_lead.unwrap_or_else(|| Outcome {
            folder: self.folder.path().to_path_buf(),
            progress: state.progress.clone(),
            evaluation,
            loss_unit: self.active.objective.spec().loss_unit.into_owned(),
            bigram,
            exported_step,
            exported_weights,
            stopped_early: self.stops_early(&state.progress),
        }))
    }

    fn finish_alone(
        &mut self,
        state: &mut TrainState,
        evaluation: Option<Evaluation>,
    ) -> Result<Outcome, TrainError> {
        let measured = state.evaluated_weights();
        let progress = &mut state.progress;
        let last = progress.step;
        let stopped_early = self.stops_early(progress);
        if let Some(reason) = &self.cut {
            let text = format!("the run ends after step {last}: {reason}");
            self.emit(&Event::Note { text })?;
        } else if stopped_early {
            self.emit(&Event::StoppedEarly {
                step: last,
                evaluations: progress.evaluations_since_best,
                best_step: progress.best.map_or(0, |best| best.step),
            })?;
        }
        let Exported {
            step: exported_step,
            weights,
            which: exported_weights,
        } = self.exported(progress)?;
        if exported_weights == Some(EvaluatedWeights::Current) {
            let text = format!(
                "the average of the weights had not begun at step {exported_step}: the weights of \
                 that step are exported"
            );
            self.emit(&Event::Note { text })?;
        }
        let phase = self.timeline.of_completed(exported_step);
        let (model, data) = (phase.model, self.data[phase.number].source.clone());
        self.export(model, weights)?;
        progress.seconds = self.clock.total_seconds();
        let mut record = self.folder.read_record()?;
        let device = record
            .as_ref()
            .and_then(|record| record.device["name"].as_str());
        let loss_unit = self.active.objective.spec().loss_unit.into_owned();
        let card = model_card(
            (&self.plan, model, device),
            (data.as_ref(), &files_of(&self.data), &loss_unit),
            progress,
            ExportedStep {
                step: exported_step,
                weights: exported_weights,
            },
        );
        self.folder.write("README.md", &card)?;
        let bigram = self.bigram();
        if let Some(record) = &mut record {
            record.exported_step = Some(exported_step);
            record.exported_weights = exported_weights;
            record.bigram_loss = bigram;
            self.folder.write_record(record)?;
        }
        self.emit(&Event::Finished {
            step: last,
            exported_step,
            exported_weights,
            bigram,
            stopped_early,
        })?;
        // Last of all: a run whose record has an end is complete, and not looked at again.
        if let Some(mut record) = record {
            let steps = self.timeline.steps();
            record.end = Some(FinalRecord {
                cut: self.cut.clone(),
                weights: measured.filter(|_| progress.val_loss.is_some()),
                ..FinalRecord::new(progress, steps, stopped_early)
            });
            self.folder.write_record(&record)?;
        }
        let folder = self.folder.path().to_path_buf();
        Ok(Outcome {
            folder,
            progress: progress.clone(),
            evaluation,
            loss_unit,
            bigram,
            exported_step,
            exported_weights,
            stopped_early,
        })
    }

    /// What to export: the weights of the best step, or the last if the best is gone or
    /// unreadable.
    fn exported(&mut self, progress: &Progress) -> Result<Exported, TrainError> {
        let last = progress.step;
        let best = progress.best.map(|best| best.step);
        if let Some(best) = best.filter(|&best| best != last && self.store.has(best)) {
            match self.exported_at(best) {
                Ok(exported) => return Ok(exported),
                Err(error) => {
                    let text = format!(
                        "warning: the checkpoint of step {best}, the best, cannot be read: the last is \
                         exported. {error}"
                    );
                    self.emit(&Event::Note { text })?;
                }
            }
        }
        self.exported_at(last)
    }

    /// Nats per token of the bigram model on the validation split.
    fn bigram(&self) -> Option<f64> {
        // Of rows, which are trained in parts, it would say nothing.
        let corpus = self.exported_data().text()?;
        if corpus.train_tokens() > BIGRAM_LIMIT {
            return None;
        }
        let train = corpus.train.iter().map(|stream| &stream.tokens);
        let model = Bigram::fit(train, corpus.tokenizer.vocab_size());
        model.nats_per_token(corpus.val.as_ref()?)
    }
}
