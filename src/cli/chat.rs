//! `runner chat`: a conversation with a model, by the chat template that it was trained with.

use std::io::{BufRead, IsTerminal, Write};

use clap::Args;
use serde_json::{Value, json};

use super::model::ModelArgs;
use super::sampling::SamplingArgs;
use super::{CliError, DeviceArgs};
use crate::data::{Chat, ChatTemplate, DataError, Tokenizer};
use crate::generate::{TextRequest, complete};
use crate::model::Decoder;

/// Arguments of `runner chat`.
#[derive(Debug, Args)]
pub(super) struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    /// How messages become text: tokenizer, a name such as chatml, or the path of a .jinja file
    #[arg(long, default_value = "tokenizer", value_name = "TEMPLATE")]
    chat_template: String,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 512, value_name = "N")]
    max_new_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &ChatArgs) -> Result<(), CliError> {
    let place = args.model.find()?;
    let tokenizer = place.tokenizer()?;
    let template = ChatTemplate::find(&args.chat_template, &tokenizer).map_err(DataError::from)?;
    let mut talk = Talk {
        stop: template.turn_end().into_iter().collect(),
        messages: first_messages(args),
        model: place.load(&args.device.open()?)?,
        tokenizer,
        template,
        args,
    };
    let is_watched = std::io::stdin().is_terminal();
    if is_watched {
        super::remark("/reset begins anew, /quit ends");
    }
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if is_watched {
            let mut stderr = std::io::stderr().lock();
            let _ = stderr.write_all(b"> ").and_then(|()| stderr.flush());
        }
        let Some(line) = lines.next() else {
            return Ok(());
        };
        match line.map_err(CliError::io("standard input"))?.trim() {
            "" => {}
            "/quit" => return Ok(()),
            "/reset" => talk.messages = first_messages(args),
            said => match talk.answer(said) {
                Ok(()) => {}
                // A person can ask something else; a script cannot.
                Err(error @ (CliError::Generate(_) | CliError::Data(_))) if is_watched => {
                    talk.messages.pop();
                    error.print();
                }
                Err(error) => return Err(error),
            },
        }
    }
}

fn first_messages(args: &ChatArgs) -> Vec<Value> {
    let system = args.system.iter();
    system
        .map(|text| json!({"role": "system", "content": text}))
        .collect()
}

/// A conversation.
struct Talk<'a> {
    model: Decoder,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    /// What ends an answer, besides the model's end token.
    stop: Vec<String>,
    messages: Vec<Value>,
    args: &'a ChatArgs,
}

impl Talk<'_> {
    /// Adds what was said and the model's answer, which is printed as it comes.
    fn answer(&mut self, said: &str) -> Result<(), CliError> {
        self.messages.push(json!({"role": "user", "content": said}));
        let chat = Chat::new(&self.messages).with_generation_prompt();
        let prompt = self.template.render(&chat).map_err(DataError::from)?.text;
        let request = TextRequest {
            prompt: &prompt,
            max_new_tokens: self.args.max_new_tokens,
            sampling: self.args.sampling.sampling(),
            // Another for each answer, and the same in the same conversation.
            seed: self
                .args
                .sampling
                .seed
                .wrapping_add(self.messages.len() as u64),
            stop: &self.stop,
        };
        let mut broken_pipe = None;
        let (text, _) = complete(&self.model, &self.tokenizer, &request, |piece| {
            if broken_pipe.is_none() {
                let mut out = std::io::stdout().lock();
                let written = out.write_all(piece.as_bytes());
                broken_pipe = written.and_then(|()| out.flush()).err();
            }
        })?;
        if let Some(error) = broken_pipe {
            return Err(CliError::io("standard output")(error));
        }
        self.messages
            .push(json!({"role": "assistant", "content": text}));
        super::print_line("")
    }
}
