//! How verbs that generate choose tokens.

use clap::Args;

use crate::generate::Sampling;

/// Flags of `generate` and `chat`.
#[derive(Debug, Args)]
pub(super) struct SamplingArgs {
    /// Randomness; 0 takes the most likely token every time
    #[arg(long, default_value_t = 0.8, value_name = "T", value_parser = at_least_zero)]
    temperature: f64,
    /// Choose among the K most likely tokens; 0 = all
    #[arg(long, default_value_t = 0, value_name = "K")]
    top_k: usize,
    /// Choose among the fewest tokens whose probabilities reach P
    #[arg(long, default_value_t = 1.0, value_name = "P", value_parser = share)]
    top_p: f64,
    /// Drop tokens less likely than this share of the most likely one
    #[arg(long, default_value_t = 0.0, value_name = "P", value_parser = share)]
    min_p: f64,
    /// Make tokens that occurred less likely; 1 = off
    #[arg(long, default_value_t = 1.0, value_name = "X", value_parser = penalty)]
    repetition_penalty: f64,
    /// Seed of the choice
    #[arg(long, default_value_t = 0, value_name = "S")]
    pub(super) seed: u64,
}

impl SamplingArgs {
    pub(super) fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
        }
    }
}

fn at_least_zero(text: &str) -> Result<f64, String> {
    number(text, "0 or more", |value| value >= 0.0)
}

fn penalty(text: &str) -> Result<f64, String> {
    number(text, "between 0.01 and 100", |value| {
        (0.01..=100.0).contains(&value)
    })
}

fn share(text: &str) -> Result<f64, String> {
    number(text, "between 0 and 1", |value| {
        (0.0..=1.0).contains(&value)
    })
}

fn number(text: &str, range: &str, fits: impl Fn(f64) -> bool) -> Result<f64, String> {
    let value: f64 = text
        .parse()
        .map_err(|_| format!("`{text}` is not a number"))?;
    if value.is_finite() && fits(value) {
        Ok(value)
    } else {
        Err(format!("must be {range}"))
    }
}
