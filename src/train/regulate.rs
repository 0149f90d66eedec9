//! What the loop does about a step whose loss or gradient norm leapt.

use super::average::Average;
use super::predictor::Predictor;
use super::regulator::{Irregular, Regulator, StepLimits};
use super::session::ActivePhase;
use super::{Event, Session, StepReport, TrainError, TrainState};
use crate::checkpoint::SkipTo;
use crate::config::SpikeAction;
use crate::gradient::trained_parameters;

impl Session {
    /// Asks the regulator about a step that was not taken, and does what it decides.
    pub(super) fn regulate(
        &mut self,
        state: &mut TrainState,
        cause: Irregular,
        (report, limits): (&StepReport, StepLimits),
        first_sequence: u64,
    ) -> Result<(), TrainError> {
        let Some(regulator) = &mut state.regulator else {
            unreachable!("only a regulator sets limits");
        };
        let (action, is_new_level) = regulator.decide();
        let step = state.progress.step;
        let sequences = self.active.phase.sequences_per_step();
        let back_to = match action {
            SpikeAction::Rollback => Some(self.roll_back(state)?),
            SpikeAction::Skip | SpikeAction::CutLr => None,
        };
        let (value, limit) = match cause {
            Irregular::Loss => (report.loss, limits.loss),
            Irregular::GradNorm => (report.grad_norm, limits.grad_norm),
        };
        self.emit(&Event::Regulated {
            step,
            cause,
            value,
            limit,
            action,
            first_sequence,
            sequences,
            back_to,
        })?;
        let lossy = back_to.map(|step| self.store.lossy(step)).transpose()?;
        if let (Some(step), Some(Some(_))) = (back_to, lossy) {
            let text = format!(
                "warning: the checkpoint of step {step} is lossy: the run goes on from near where it \
                 was, not bit for bit"
            );
            self.emit(&Event::Note { text })?;
        }
        if is_new_level {
            let text = "three irregular steps in a row count as the new level: the regulator's window \
                        begins anew";
            let text = text.to_string();
            self.emit(&Event::Note { text })?;
        }
        Ok(())
    }

    /// Goes back to the last checkpoint. The sequences since then are left out from there on.
    /// Returns the checkpoint's step.
    fn roll_back(&mut self, state: &mut TrainState) -> Result<u64, TrainError> {
        self.wait_for_save()?;
        let latest = match self.team.is_lead() {
            true => self.store.latest()?.unwrap_or(0),
            false => 0,
        };
        let step = self.team.tell(|| latest)?;
        let record = self.folder.read_record()?;
        let phase = self.timeline.of_completed(step).clone();
        let init = self.model_init();
        let mut initial = init.resumed(&self.folder, (step, &phase), record.as_ref())?;
        let restored = &mut initial.state;
        restored.pipeline = std::mem::take(&mut state.pipeline);
        let trained = trained_parameters(restored.model());
        restored.pipeline.enter_phase(&trained, &|_| false)?;
        let config = self.plan.config.regulator;
        restored.regulator = config.map(Regulator::new);
        restored.average = self.average.map(Average::new);
        restored.predictor = phase.plan.predict.map(Predictor::new);
        let collective = self.team.collective();
        restored.restore_extras(initial.extras, &self.device.device, collective)?;
        // Rank 0 may delete what the others still read.
        self.team.wait_for_all()?;
        let before = &state.progress;
        let progress = &mut restored.progress;
        if progress.phase == before.phase {
            progress.sequences = before.sequences;
        } else {
            progress.skip_to = Some(SkipTo {
                phase: before.phase,
                sequences: before.sequences,
            });
        }
        // Time was spent and passes were computed, whatever became of them.
        progress.cost = before.cost;
        let may_go_on = match (&mut restored.regulator, &state.regulator) {
            (Some(now), Some(before)) => now.rolled_back(before, step),
            _ => true,
        };
        let from = before.step;
        self.active = ActivePhase::new(&phase, &self.data, initial.reference);
        *state = initial.state;
        match may_go_on {
            true => Ok(step),
            false => Err(TrainError::Unstable {
                step: from,
                checkpoint: step,
                rollbacks: super::regulator::MOST_ROLLBACKS,
            }),
        }
    }
}
