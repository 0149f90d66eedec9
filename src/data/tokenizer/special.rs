//! Which token ends a document, and which begins one.
//!
//! A tokenizer.json lists special tokens but not what they are for. tokenizer_config.json says
//! it; without one, the names that published models use are tried.

use serde_json::{Map, Value};

use super::SpecialToken;

/// Names of the end token, the more specific first.
const EOS_NAMES: [&str; 8] = [
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|im_end|>",
    "<|end▁of▁sentence|>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
];

/// Names of the begin token.
const BOS_NAMES: [&str; 6] = [
    "<s>",
    "<|begin_of_text|>",
    "<bos>",
    "<|startoftext|>",
    "<｜begin▁of▁sentence｜>",
    "[BOS]",
];

/// The two, where found.
pub(super) struct Special {
    pub(super) eos: Option<SpecialToken>,
    pub(super) bos: Option<SpecialToken>,
}

/// Looks them up in the config, then by name. A config that names a token the vocabulary does not
/// have is an error, in words.
pub(super) fn find(
    tokenizer: &tokenizers::Tokenizer,
    config: &Map<String, Value>,
) -> Result<Special, String> {
    let by_name = |names: &[&str]| {
        names.iter().find_map(|name| {
            let id = tokenizer.token_to_id(name)?;
            Some(SpecialToken {
                text: name.to_string(),
                id,
            })
        })
    };
    let eos = match configured(tokenizer, config, "eos_token")? {
        Configured::Said(token) => token,
        Configured::Silent => by_name(&EOS_NAMES),
    };
    let bos = match configured(tokenizer, config, "bos_token")? {
        Configured::Said(token) => token,
        // GPT-2's one special token separates documents: it ends one and begins the next.
        Configured::Silent => by_name(&BOS_NAMES).or_else(|| by_name(&["<|endoftext|>"])),
    };
    Ok(Special { eos, bos })
}

enum Configured {
    /// The config has the key; null says that there is no such token.
    Said(Option<SpecialToken>),
    Silent,
}

fn configured(
    tokenizer: &tokenizers::Tokenizer,
    config: &Map<String, Value>,
    key: &str,
) -> Result<Configured, String> {
    // transformers writes either the text or {"content": text, ...}.
    let text = match config.get(key) {
        None => return Ok(Configured::Silent),
        Some(Value::Null) => return Ok(Configured::Said(None)),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Object(token)) => match token.get("content") {
            Some(Value::String(text)) => text.clone(),
            _ => return Err(format!("tokenizer_config.json: {key} has no content")),
        },
        Some(_) => {
            return Err(format!(
                "tokenizer_config.json: {key} is neither a string nor an object"
            ));
        }
    };
    match tokenizer.token_to_id(&text) {
        Some(id) => Ok(Configured::Said(Some(SpecialToken { text, id }))),
        None => Err(format!(
            "tokenizer_config.json: {key} {text:?} is not in the vocabulary"
        )),
    }
}
