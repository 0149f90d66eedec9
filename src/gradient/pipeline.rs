//! What happens to a gradient between the backward pass and the update.
//!
//! A [`Pipeline`] is a list of stages, empty by default. Each [`Stage`] is given the gradient of
//! this rank and may change it; what leaves the last one is summed over the ranks. A stage that
//! keeps something from step to step, such as the residual of error feedback, gives it to the
//! checkpoint as [`ExtraState`] under a name of its own.

use super::Gradient;
use crate::collective::{Collective, CollectiveError};
use crate::extra::{ExtraState, Extras, is_owner};

/// Something done to the gradient of every step.
pub trait Stage: Send {
    /// The name that the stage's state is saved under, of lower-case letters, digits, `-` and `_`.
    fn owner(&self) -> &str;

    /// Changes the gradient of a step. Called on every rank, for the same steps in the same order.
    ///
    /// # Errors
    /// Whatever makes it pointless to go on.
    fn apply(
        &mut self,
        gradient: Gradient,
        context: &StepContext,
    ) -> Result<Gradient, PipelineError>;

    /// What has to be saved to go on exactly; empty for a stage without memory.
    fn state(&self) -> ExtraState {
        ExtraState::default()
    }

    /// Puts back what [`state`](Self::state) gave.
    ///
    /// # Errors
    /// [`PipelineError::State`] for a state that is not this stage's.
    fn load(&mut self, state: ExtraState) -> Result<(), PipelineError> {
        if state == ExtraState::default() {
            return Ok(());
        }
        Err(PipelineError::State {
            owner: self.owner().to_string(),
            reason: "this stage keeps no state".to_string(),
        })
    }
}

/// What a stage may know of the step.
#[derive(Clone, Copy)]
pub struct StepContext<'a> {
    /// Optimizer steps completed before this one.
    pub step: u64,
    /// The seed of the run.
    pub seed: u64,
    /// The other ranks.
    pub collective: &'a dyn Collective,
}

/// A gradient that could not be passed on.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// The ranks could not meet.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A stage failed.
    #[error("gradient stage `{owner}`: {reason}")]
    Stage {
        /// The stage.
        owner: String,
        /// What happened.
        reason: String,
    },
    /// A saved state that does not belong to the stage.
    #[error("the saved state of gradient stage `{owner}` cannot be used: {reason}")]
    State {
        /// The stage.
        owner: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// The stages between backward and update.
#[derive(Default)]
pub struct Pipeline {
    stages: Vec<Box<dyn Stage>>,
}

impl Pipeline {
    /// A pipeline of these stages, in this order.
    ///
    /// # Errors
    /// [`PipelineError::Stage`] for an owner's name that a checkpoint cannot have, and for two stages
    /// with the same owner: their states could not be told apart.
    pub fn new(stages: Vec<Box<dyn Stage>>) -> Result<Self, PipelineError> {
        for (place, stage) in stages.iter().enumerate() {
            if !is_owner(stage.owner()) {
                return Err(PipelineError::Stage {
                    owner: stage.owner().to_string(),
                    reason: "its name is made of other characters than a-z, 0-9, _ and -"
                        .to_string(),
                });
            }
            let mut before = stages[..place].iter();
            if before.any(|other| other.owner() == stage.owner()) {
                return Err(PipelineError::Stage {
                    owner: stage.owner().to_string(),
                    reason: "there are two of that name".to_string(),
                });
            }
        }
        Ok(Self { stages })
    }

    /// Whether a gradient comes out as it goes in.
    pub fn is_identity(&self, collective: &dyn Collective) -> bool {
        self.stages.is_empty() && collective.ranks() == 1
    }

    /// Passes the gradient of this rank through all stages and sums it over the ranks.
    ///
    /// # Errors
    /// [`PipelineError`]
    pub fn reduce(
        &mut self,
        gradient: Gradient,
        context: &StepContext,
    ) -> Result<Gradient, PipelineError> {
        let mut gradient = gradient;
        for stage in &mut self.stages {
            gradient = stage.apply(gradient, context)?;
        }
        if context.collective.ranks() > 1 {
            gradient.try_update(|parameter, values| {
                context.collective.sum_gradient(&parameter.path, values)
            })?;
        }
        Ok(gradient)
    }

    /// What the stages have to save, by owner; a stage that keeps nothing is there with nothing.
    pub fn state(&self) -> Extras {
        let stages = self.stages.iter();
        stages
            .map(|stage| (stage.owner().to_string(), stage.state()))
            .collect()
    }

    /// Puts back what [`state`](Self::state) gave. Takes the states of its stages out of `extras`;
    /// what is left belongs to somebody else. Returns the owners that have nothing in `extras`:
    /// their stages begin anew.
    ///
    /// # Errors
    /// [`PipelineError::State`]
    pub fn load(&mut self, extras: &mut Extras) -> Result<Vec<String>, PipelineError> {
        let mut new = Vec::new();
        for stage in &mut self.stages {
            match extras.remove(stage.owner()) {
                Some(state) => stage.load(state)?,
                None => new.push(stage.owner().to_string()),
            }
        }
        Ok(new)
    }
}

impl std::fmt::Debug for Pipeline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let owners: Vec<&str> = self.stages.iter().map(|stage| stage.owner()).collect();
        f.debug_struct("Pipeline").field("stages", &owners).finish()
    }
}
