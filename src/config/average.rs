//! When an average of the weights begins.

use super::keys::{AverageConfig, AverageStartKey};
use super::phase::PhaseLength;

/// Where in the run the average begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum AverageStart {
    /// After so many steps.
    Steps(u64),
    /// After this share of the run's steps.
    Share(f64),
}

impl AverageStart {
    /// The steps before it in a run of `steps`.
    pub fn steps_before(self, steps: u64) -> u64 {
        match self {
            Self::Steps(before) => before,
            Self::Share(share) => (share * steps as f64).round() as u64,
        }
    }
}

impl AverageConfig {
    /// Where the average begins.
    ///
    /// # Errors
    /// What is wrong with `start`, as the end of a sentence that begins with the key.
    pub fn start(&self) -> Result<AverageStart, String> {
        let text = match &self.start {
            AverageStartKey::Steps(steps) => return Ok(AverageStart::Steps(*steps)),
            AverageStartKey::Text(text) => text,
        };
        match text.parse()? {
            PhaseLength::Steps(steps) => Ok(AverageStart::Steps(steps)),
            PhaseLength::Share(share) => Ok(AverageStart::Share(share)),
            PhaseLength::Tokens(_) | PhaseLength::Rest => Err(format!(
                "is \"{}\", and an average begins after some steps or a share of the run",
                text.escape_debug()
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_average_begins_after_steps_or_a_share_of_them() {
        let start = |key| {
            let config = AverageConfig {
                start: key,
                ..AverageConfig::default()
            };
            config.start().map(|start| start.steps_before(250))
        };
        let text = |text: &str| start(AverageStartKey::Text(text.to_string()));
        assert_eq!(start(AverageStartKey::Steps(0)), Ok(0));
        assert_eq!(text("70 steps"), Ok(70));
        // 62.5 is rounded as the length of a phase is.
        assert_eq!(text("25%"), Ok(63));
        assert_eq!(text("100%"), Ok(250));
        for wrong in ["2M tokens", "rest", "half", "0%", "101%"] {
            let message = text(wrong).unwrap_err();
            assert!(message.contains(wrong), "{message}");
        }
    }
}
