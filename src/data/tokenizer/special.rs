//! Which token ends a document, which begins one, and which stands for what has no token.
//!
//! A tokenizer.json lists special tokens but not what they are for. tokenizer_config.json says
//! it; without one, the names that published models use are tried.

use serde_json::{Map, Value};

use super::{SpecialToken, Unknown};

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

/// What becomes of text that has no token, by the model in the tokenizer.json.
pub(super) fn unknown(json: &str, tokenizer: &tokenizers::Tokenizer, is_char: bool) -> Unknown {
    let file: Value = serde_json::from_str(json).unwrap_or_default();
    let model = &file["model"];
    // A byte-level vocabulary has all 256 bytes; byte fallback has <0x00> to <0xFF>.
    let knows_bytes = is_char
        || tokenizer.token_to_id("<0xFF>").is_some()
        || ["pre_tokenizer", "normalizer"]
            .iter()
            .any(|part| file[part].to_string().contains("\"ByteLevel\""));
    if knows_bytes {
        return Unknown::Never;
    }
    // Unigram names the token by its id, the others by its text.
    let by_text = model["unk_token"]
        .as_str()
        .and_then(|token| tokenizer.token_to_id(token));
    let by_id = model["unk_id"]
        .as_u64()
        .and_then(|id| u32::try_from(id).ok());
    by_text.or(by_id).map_or(Unknown::Dropped, Unknown::Token)
}

/// The chat templates of a tokenizer_config.json by name: one text, or a list of
/// `{"name", "template"}`.
pub(super) fn chat_templates(config: &Map<String, Value>) -> Vec<(String, String)> {
    let named = |entry: &Value| {
        let text = |key: &str| Some(entry.get(key)?.as_str()?.to_string());
        Some((text("name")?, text("template")?))
    };
    match config.get("chat_template") {
        Some(Value::String(template)) => vec![("default".to_string(), template.clone())],
        Some(Value::Array(entries)) => entries.iter().filter_map(named).collect(),
        _ => Vec::new(),
    }
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
