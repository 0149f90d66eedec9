//! `[average]`: whether the average begins before the run ends.

use crate::config::checks::Checks;
use crate::config::keys::Config;
use crate::config::length::Length;

impl Checks<'_> {
    /// Checks when the average begins. How many steps a run of tokens or epochs has is known only
    /// once its data is counted.
    pub(super) fn average(&mut self, config: &Config, length: Option<Length>) {
        let Some(average) = &config.average else {
            return;
        };
        let start = match average.start() {
            Ok(start) => start,
            Err(message) => {
                let key = "average.start";
                let message = format!("{} {message}", self.describe(key));
                self.refuse(&[key], message, "1000 (steps) or \"75%\"");
                return;
            }
        };
        let Some(Length::Steps(steps)) = length else {
            return;
        };
        let before = start.steps_before(steps);
        let first = before.saturating_add(average.every);
        if first > steps {
            let keys = match before >= steps {
                true => ["average.start", "average.every", "average"],
                false => ["average.every", "average.start", "average"],
            };
            self.refuse(
                &keys,
                format!(
                    "the average of [average] would begin at step {first}, and the run has {steps} \
                     steps"
                ),
                "lower start or every, or remove the section",
            );
        }
    }
}
