//! From a record to what it says: a text, a completion, an instruction, a conversation, a pair.

use serde_json::Value;

use super::record::Record;
use super::turns::{self, Conversation};
use super::{RowError, RowFormat};
use crate::config::FieldNames;

/// What a record says.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Example {
    /// Every token is trained.
    Text(String),
    /// A prompt and what follows it.
    Completion {
        system: Option<String>,
        prompt: String,
        completion: String,
    },
    /// An instruction in alpaca's form.
    Instruction(Instruction),
    /// Messages.
    Chat(Conversation),
    /// A better and a worse answer.
    Pair {
        chosen: Box<Example>,
        rejected: Box<Example>,
    },
}

/// An instruction in alpaca's form.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Instruction {
    pub(super) system: Option<String>,
    /// Earlier instructions and answers.
    pub(super) history: Vec<[String; 2]>,
    pub(super) instruction: String,
    pub(super) input: Option<String>,
    pub(super) output: String,
}

impl Example {
    /// Reads a record of the given format.
    pub(super) fn read(record: &mut Record, names: &FieldNames) -> Result<Self, RowError> {
        match record.format {
            RowFormat::Text => Ok(Self::Text(record.text(&names.text)?)),
            RowFormat::Completion => completion(record, names),
            RowFormat::Alpaca => Ok(Self::Instruction(instruction(record, names)?)),
            RowFormat::Sharegpt => {
                let mut conversation = turns::conversation(record, &names.conversations, names)?;
                if let Some(system) = record.text_if_there(&names.system)? {
                    conversation = with_system(&system, conversation);
                }
                conversation.tools = turns::tools(record, &names.tools)?;
                Ok(Self::Chat(conversation))
            }
            RowFormat::Messages => {
                let mut conversation = turns::conversation(record, &names.messages, names)?;
                conversation.tools = turns::tools(record, &names.tools)?;
                Ok(Self::Chat(conversation))
            }
            RowFormat::Preference => pair(record, names),
        }
    }

    /// The same as a conversation, for a chat template. A text has no turns and stays.
    pub(super) fn into_chat(self) -> Self {
        let mut conversation = Conversation::default();
        let system = |conversation: &mut Conversation, text: Option<String>| {
            if let Some(text) = text {
                conversation.push("system", &text);
            }
        };
        match self {
            Self::Completion {
                system: text,
                prompt,
                completion,
            } => {
                system(&mut conversation, text);
                conversation.push("user", &prompt);
                conversation.push(turns::ASSISTANT, &completion);
            }
            Self::Instruction(row) => {
                system(&mut conversation, row.system);
                for [instruction, answer] in row.history {
                    conversation.push("user", &instruction);
                    conversation.push(turns::ASSISTANT, &answer);
                }
                let asked = match row.input {
                    Some(input) => format!("{}\n{input}", row.instruction),
                    None => row.instruction,
                };
                conversation.push("user", &asked);
                conversation.push(turns::ASSISTANT, &row.output);
            }
            Self::Pair { chosen, rejected } => {
                return Self::Pair {
                    chosen: Box::new(chosen.into_chat()),
                    rejected: Box::new(rejected.into_chat()),
                };
            }
            other => return other,
        }
        Self::Chat(conversation)
    }
}

fn with_system(system: &str, conversation: Conversation) -> Conversation {
    let mut whole = Conversation::default();
    whole.push("system", system);
    whole.extend(conversation);
    whole
}

/// Prompt and completion as texts, or both as lists of messages.
fn completion(record: &mut Record, names: &FieldNames) -> Result<Example, RowError> {
    let system = record.text_if_there(&names.system)?;
    let prompt = record.take(&names.prompt)?;
    let completion = record.take(&names.completion)?;
    let (prompt, completion) = match (prompt, completion) {
        (Value::Array(prompt), Value::Array(completion)) => {
            let mut conversation = turns::messages(record, prompt, names)?;
            conversation.trainable.fill(false);
            conversation.extend(turns::messages(record, completion, names)?);
            if let Some(system) = system {
                conversation = with_system(&system, conversation);
            }
            conversation.tools = turns::tools(record, &names.tools)?;
            return Ok(Example::Chat(conversation));
        }
        texts => texts,
    };
    Ok(Example::Completion {
        system,
        prompt: record.string(prompt, || format!("field `{}`", names.prompt))?,
        completion: record.string(completion, || format!("field `{}`", names.completion))?,
    })
}

fn instruction(record: &mut Record, names: &FieldNames) -> Result<Instruction, RowError> {
    let mut history = Vec::new();
    if let Some(earlier) = record.take_if_there(&names.history) {
        let what = || format!("field `{}`", names.history);
        for pair in record.list(earlier, what)? {
            let texts: Vec<String> = record
                .list(pair, || format!("an entry of `{}`", names.history))?
                .into_iter()
                .map(|text| record.string(text, || format!("a text in `{}`", names.history)))
                .collect::<Result<_, _>>()?;
            let pair: [String; 2] = texts.try_into().map_err(|texts: Vec<String>| {
                let what = format!("an entry of `{}`", names.history);
                let found = Value::from(texts);
                record.wrong(what, &found, "a pair of texts")
            })?;
            history.push(pair);
        }
    }
    Ok(Instruction {
        system: record.text_if_there(&names.system)?,
        history,
        instruction: record.text(&names.instruction)?,
        input: record.text_if_there(&names.input)?,
        output: record.text(&names.output)?,
    })
}

/// A better and a worse answer to the same prompt.
///
/// The prompt is a text or messages in `prompt`, or a conversation; the answers are texts, single
/// messages or lists of messages. Lists may begin with the prompt; then nothing else need name it.
fn pair(record: &mut Record, names: &FieldNames) -> Result<Example, RowError> {
    let [chosen, rejected] = [record.take(&names.chosen)?, record.take(&names.rejected)?];
    if let (Value::String(chosen), Value::String(rejected)) = (&chosen, &rejected)
        && record
            .fields
            .get(&names.prompt)
            .is_some_and(Value::is_string)
    {
        let system = record.text_if_there(&names.system)?;
        let prompt = record.text(&names.prompt)?;
        let completion = |completion: &str| {
            Box::new(Example::Completion {
                system: system.clone(),
                prompt: prompt.clone(),
                completion: completion.to_string(),
            })
        };
        return Ok(Example::Pair {
            chosen: completion(chosen),
            rejected: completion(rejected),
        });
    }
    let context = context(record, names)?;
    let chosen = answer(record, &context, chosen, &names.chosen, names)?;
    let rejected = answer(record, &context, rejected, &names.rejected, names)?;
    let shared = chosen
        .messages
        .iter()
        .zip(&rejected.messages)
        .take_while(|(a, b)| a == b)
        .count();
    // Two answers that are the same from beginning to end still are answers.
    let shared = shared
        .min(chosen.messages.len() - 1)
        .min(rejected.messages.len() - 1);
    let mask = |mut conversation: Conversation| {
        conversation.trainable[..shared].fill(false);
        Box::new(Example::Chat(conversation))
    };
    Ok(Example::Pair {
        chosen: mask(chosen),
        rejected: mask(rejected),
    })
}

/// The messages that both answers follow, where the record names them.
fn context(record: &mut Record, names: &FieldNames) -> Result<Conversation, RowError> {
    let mut context = Conversation::default();
    if let Some(system) = record.text_if_there(&names.system)? {
        context.push("system", &system);
    }
    for field in [&names.conversations, &names.messages, &names.prompt] {
        match record.take_if_there(field) {
            None => continue,
            Some(Value::String(prompt)) => context.push("user", &prompt),
            Some(value) => {
                let turns = record.list(value, || format!("field `{field}`"))?;
                context.extend(turns::messages(record, turns, names)?);
            }
        }
        break;
    }
    context.tools = turns::tools(record, &names.tools)?;
    Ok(context)
}

/// The whole conversation with one of the answers.
fn answer(
    record: &Record,
    context: &Conversation,
    answer: Value,
    field: &str,
    names: &FieldNames,
) -> Result<Conversation, RowError> {
    let mut answered = Conversation::default();
    match answer {
        Value::String(text) => answered.push(turns::ASSISTANT, &text),
        Value::Object(turn) => {
            answered = turns::messages(record, vec![Value::Object(turn)], names)?;
        }
        list => {
            let turns = record.list(list, || format!("field `{field}`"))?;
            answered = turns::messages(record, turns, names)?;
        }
    }
    if answered.messages.is_empty() {
        return Err(RowError::NoMessages {
            place: record.place(),
            field: field.to_string(),
        });
    }
    let mut whole = context.clone();
    if answered.role(0) != turns::ASSISTANT {
        // The list begins with the prompt; of what the record says of it besides, only a system
        // message is news.
        let has_system = !whole.messages.is_empty() && whole.role(0) == "system";
        let kept = usize::from(has_system && answered.role(0) != "system");
        whole.messages.truncate(kept);
        whole.trainable.truncate(kept);
    }
    whole.extend(answered);
    Ok(whole)
}
