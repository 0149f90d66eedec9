//! `runner generate`: complete a prompt. Standard output is the completion alone.

use std::io::{IsTerminal, Read, Write};

use clap::Args;
use serde_json::json;

use super::model::ModelArgs;
use super::{CliError, DeviceArgs};
use crate::generate::{Sampling, TextRequest, complete};

/// Arguments of `runner generate`.
#[derive(Debug, Args)]
pub(super) struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue; `-` reads standard input
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: String,
    /// Most tokens to add
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_new_tokens: usize,
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
    seed: u64,
    /// End the completion before this text; repeatable
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print ids and timings as JSON instead of the text
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &GenerateArgs) -> Result<(), CliError> {
    let place = args.model.find()?;
    let tokenizer = place.tokenizer()?;
    let model = place.load(&args.device.open()?)?;
    let prompt = match args.prompt.as_str() {
        "-" => standard_input()?,
        text => text.to_string(),
    };
    let request = TextRequest {
        prompt: &prompt,
        max_new_tokens: args.max_new_tokens,
        sampling: Sampling {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            min_p: args.min_p,
            repetition_penalty: args.repetition_penalty,
        },
        seed: args.seed,
        stop: &args.stop,
    };
    let mut broken_pipe = None;
    let (text, completion) = complete(&model, &tokenizer, &request, |piece| {
        if !args.json && broken_pipe.is_none() {
            let mut out = std::io::stdout().lock();
            broken_pipe = out
                .write_all(piece.as_bytes())
                .and_then(|()| out.flush())
                .err();
        }
    })?;
    if let Some(error) = broken_pipe {
        return Err(CliError::io("standard output")(error));
    }
    if args.json {
        let seconds = completion.decode.as_secs_f64();
        return super::print_line(
            &json!({
                "text": text,
                "tokens": completion.tokens,
                "finish": completion.finish,
                "prefill_seconds": completion.prefill.as_secs_f64(),
                "decode_seconds": seconds,
                "tokens_per_second": completion.tokens.len() as f64 / seconds.max(1e-9),
            })
            .to_string(),
        );
    }
    // A prompt of the shell should not begin in the middle of a line; a file gets the text alone.
    if std::io::stdout().is_terminal() {
        super::print_line("")
    } else {
        Ok(())
    }
}

fn standard_input() -> Result<String, CliError> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .map_err(CliError::io("standard input"))?;
    Ok(text)
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
