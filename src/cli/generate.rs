//! `runner generate`: complete a prompt. Standard output is the completion alone.

use std::io::{IsTerminal, Read, Write};

use clap::Args;
use serde_json::json;

use super::model::ModelArgs;
use super::sampling::SamplingArgs;
use super::{CliError, DeviceArgs};
use crate::generate::{TextRequest, complete};

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
    #[command(flatten)]
    sampling: SamplingArgs,
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
        sampling: args.sampling.sampling(),
        seed: args.sampling.seed,
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
