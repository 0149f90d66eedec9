//! Stages that process the gradient between the backward pass and the update.
//!
//! A [`Pipeline`] is a list of stages, empty by default. Each [`Stage`] receives the gradient of
//! this rank and may change it. The output of the last stage is summed over the ranks, in f32 or by
//! an [`Exchange`]. A stage that keeps something from step to step saves it in the checkpoint as
//! [`ExtraState`] under its own name.

use super::compress::RatioError;
use super::exchange::{Exchange, ExchangeReport, OWNER};
use super::{Gradient, NamedParameter};
use crate::collective::{Collective, CollectiveError};
use crate::extra::{ExtraState, Extras, is_owner};

/// An operation on the gradient of every step.
pub trait Stage: Send {
    /// The name under which the stage's state is saved: lower-case letters, digits, `-` and `_`.
    fn owner(&self) -> &str;

    /// Changes the gradient of a step. Called on every rank, for the same steps in the same order.
    ///
    /// # Errors
    /// Any failure after which the run cannot go on.
    fn apply(
        &mut self,
        gradient: Gradient,
        context: &StepContext,
    ) -> Result<Gradient, PipelineError>;

    /// The state that the stage needs to continue exactly; empty for a stage without memory.
    fn state(&self) -> ExtraState {
        ExtraState::default()
    }

    /// Restores what [`state`](Self::state) returned.
    ///
    /// # Errors
    /// [`PipelineError::State`] for a state that does not belong to this stage.
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

/// The step that a stage is called in.
#[derive(Clone, Copy)]
pub struct StepContext<'a> {
    /// Optimizer steps completed before this one.
    pub step: u64,
    /// The seed of the run.
    pub seed: u64,
    /// The connection to the other ranks.
    pub collective: &'a dyn Collective,
}

/// Why the gradient could not be processed.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// An exchange between ranks failed.
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
    /// A ratio that a method of compression does not reach.
    #[error(transparent)]
    Ratio(#[from] RatioError),
    /// A saved state that does not belong to the stage.
    #[error("the saved state of gradient stage `{owner}` cannot be used: {reason}")]
    State {
        /// The stage.
        owner: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// The stages between backward pass and update.
#[derive(Default)]
pub struct Pipeline {
    stages: Vec<Box<dyn Stage>>,
    /// None adds the gradients in f32.
    exchange: Option<Box<dyn Exchange>>,
}

/// Owners of state that are not stages.
const RESERVED: [&str; 4] = ["average", OWNER, "predictor", "regulator"];

impl Pipeline {
    /// A pipeline of these stages, in this order.
    ///
    /// # Errors
    /// [`PipelineError::Stage`] for an owner's name that is not valid in a checkpoint, and for two
    /// stages with the same owner, whose states could not be told apart.
    pub fn new(stages: Vec<Box<dyn Stage>>) -> Result<Self, PipelineError> {
        for (place, stage) in stages.iter().enumerate() {
            if !is_owner(stage.owner()) {
                return Err(PipelineError::Stage {
                    owner: stage.owner().to_string(),
                    reason: "its name is made of other characters than a-z, 0-9, _ and -"
                        .to_string(),
                });
            }
            if RESERVED.contains(&stage.owner()) {
                return Err(PipelineError::Stage {
                    owner: stage.owner().to_string(),
                    reason: "a part of the training loop has this name".to_string(),
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
        Ok(Self {
            stages,
            exchange: None,
        })
    }

    /// The same stages with another way to add the gradients of the ranks.
    pub fn with_exchange(self, exchange: Box<dyn Exchange>) -> Self {
        Self {
            exchange: Some(exchange),
            ..self
        }
    }

    /// Whether the pipeline leaves every gradient unchanged.
    pub fn is_identity(&self, collective: &dyn Collective) -> bool {
        self.stages.is_empty() && self.exchange.is_none() && collective.ranks() == 1
    }

    /// Whether the gradients of a rank's logical workers stay apart until [`reduce`](Self::reduce).
    /// Without an exchange their sum is as good.
    pub fn needs_each_worker(&self) -> bool {
        self.exchange.is_some()
    }

    /// Passes the gradient of this rank through all stages and sums it over the ranks. With several
    /// logical workers, `gradients` are theirs.
    ///
    /// # Errors
    /// [`PipelineError`]; also for stages with several logical workers, whose states a stage cannot
    /// tell apart.
    pub fn reduce(
        &mut self,
        gradients: Vec<Gradient>,
        context: &StepContext,
    ) -> Result<Gradient, PipelineError> {
        if let (Some(exchange), true) = (&mut self.exchange, self.stages.is_empty()) {
            return exchange.reduce(gradients, context);
        }
        if let (Some(stage), 2..) = (self.stages.first(), gradients.len()) {
            return Err(PipelineError::Stage {
                owner: stage.owner().to_string(),
                reason: "stages and a compressed exchange go together with one logical worker only"
                    .to_string(),
            });
        }
        let mut gradient = gradients
            .into_iter()
            .reduce(Gradient::add)
            .unwrap_or_default();
        for stage in &mut self.stages {
            gradient = stage.apply(gradient, context)?;
        }
        if let Some(exchange) = &mut self.exchange {
            return exchange.reduce(vec![gradient], context);
        }
        if context.collective.ranks() > 1 {
            gradient.try_update(|parameter, values| {
                context.collective.sum_gradient(&parameter.path, values)
            })?;
        }
        Ok(gradient)
    }

    /// What the last exchange was; None for a sum in f32, and before the first step.
    pub fn exchange_report(&self) -> Option<ExchangeReport> {
        self.exchange.as_ref()?.report()
    }

    /// The state of the stages and of the exchange that is saved on rank 0, by owner. A stage that
    /// keeps nothing has an empty entry. Called on every rank.
    ///
    /// # Errors
    /// [`PipelineError::Collective`]; [`PipelineError::Stage`] for a stage that does not keep the same
    /// on every rank: a checkpoint has one state of each stage.
    pub fn state(&self, collective: &dyn Collective) -> Result<Extras, PipelineError> {
        let stages = self.stages.iter();
        let mut all: Extras = stages
            .map(|stage| (stage.owner().to_string(), stage.state()))
            .collect();
        if collective.ranks() > 1 {
            for (owner, state) in &all {
                let of_ranks = collective.gather(fingerprint(state))?;
                if let Some(rank) = of_ranks.iter().position(|other| *other != of_ranks[0]) {
                    return Err(PipelineError::Stage {
                        owner: owner.clone(),
                        reason: format!(
                            "it keeps something else on rank {rank} than on rank 0, and a checkpoint has \
                             one state of each stage"
                        ),
                    });
                }
            }
        }
        if let Some(exchange) = &self.exchange {
            all.insert(OWNER.to_string(), exchange.state(collective)?);
        }
        Ok(all)
    }

    /// Enters a phase that trains the parameters `trained`; `is_new` says which of them begin anew.
    ///
    /// # Errors
    /// As [`Exchange::enter_phase`].
    pub fn enter_phase(
        &mut self,
        trained: &[NamedParameter],
        is_new: &dyn Fn(&str) -> bool,
    ) -> Result<(), PipelineError> {
        match &mut self.exchange {
            Some(exchange) => exchange.enter_phase(trained, is_new),
            None => Ok(()),
        }
    }

    /// Restores what [`state`](Self::state) returned, on all ranks together. Removes the states of
    /// this pipeline from `extras` and leaves those of other owners.
    ///
    /// # Errors
    /// [`PipelineError::State`]
    pub fn load(
        &mut self,
        extras: &mut Extras,
        collective: &dyn Collective,
    ) -> Result<Restored, PipelineError> {
        let (mut new, mut note) = (Vec::new(), None);
        for stage in &mut self.stages {
            match extras.remove(stage.owner()) {
                Some(state) => stage.load(state)?,
                None => new.push(stage.owner().to_string()),
            }
        }
        if let Some(exchange) = &mut self.exchange {
            match extras.remove(OWNER) {
                Some(state) => note = exchange.load(state, collective)?,
                None => {
                    // Also drops what it kept until now.
                    exchange.load(ExtraState::default(), collective)?;
                    new.push(OWNER.to_string());
                }
            }
        }
        Ok(Restored { new, note })
    }
}

/// A hash of a state.
fn fingerprint(state: &ExtraState) -> Vec<u8> {
    let mut hash = blake3::Hasher::new();
    for (name, data) in &state.tensors {
        hash.update(format!("{name} {:?} {:?}", data.dtype(), data.shape()).as_bytes());
        hash.update(data.as_bytes());
    }
    hash.update(format!("{:?}", state.scalars).as_bytes());
    hash.finalize().as_bytes().to_vec()
}

/// What was restored of a saved state.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// The owners without a saved state: they begin from an empty one.
    pub new: Vec<String>,
    /// What a user should know about what was restored.
    pub note: Option<String>,
}

impl std::fmt::Debug for Pipeline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let owners: Vec<&str> = self.stages.iter().map(|stage| stage.owner()).collect();
        f.debug_struct("Pipeline").field("stages", &owners).finish()
    }
}
