//! `[regulator]`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[regulator]`: what to do with a step whose loss or gradient norm leaps. Without the section
/// every finite step is taken. Steps that are not finite are the matter of `train.on_nonfinite`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RegulatorConfig {
    /// A loss so many standard deviations above the mean of the window is a spike. 0 = off.
    #[schemars(range(min = 0.0, max = 1000.0), extend("x-aliases" = ["axolotl: loss_watchdog_threshold", "spike_threshold"]))]
    pub spike_sigma: f64,
    /// A gradient norm so many times the median of the window is an explosion. 0 = off.
    #[schemars(range(min = 0.0, max = 1000000.0))]
    pub norm_factor: f64,
    /// Steps that the mean and the median are taken over. Nothing is judged before so many steps of
    /// a phase were taken.
    #[schemars(range(min = 5, max = 100000), extend("x-aliases" = ["axolotl: loss_watchdog_patience"]))]
    pub window: usize,
    /// What is done about either.
    pub on_spike: SpikeAction,
}

impl Default for RegulatorConfig {
    fn default() -> Self {
        Self {
            spike_sigma: 3.0,
            norm_factor: 10.0,
            window: 50,
            on_spike: SpikeAction::Skip,
        }
    }
}

/// What is done about a step whose loss or gradient norm leaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SpikeAction {
    /// Leave the weights as they are and go on with the next sequences.
    Skip,
    /// Go back to the last checkpoint, and from there on with the sequences after this step's. Three
    /// times at the same checkpoint end the run.
    Rollback,
    /// Leave the weights as they are, and halve the learning rate for as many steps as the window
    /// has.
    CutLr,
}
