//! Conversations: lists of messages in the two forms that data sets have, made into one.
//!
//! A turn is `{role, content}` as OpenAI's, or `{from, value}` as ShareGPT's. What comes out is what
//! templates expect of `messages`: roles system, developer, user, assistant and tool; content as
//! text; calls of functions as `tool_calls` with their arguments as objects. Everything else that a
//! message carries (a name, an id, a chain of thought) stays, for templates that know it.

use serde_json::{Map, Value, json};

use super::RowError;
use super::record::Record;
use crate::config::FieldNames;

/// A conversation.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Conversation {
    pub(super) messages: Vec<Value>,
    /// Per message: whether it may be trained. Only the assistant's are.
    pub(super) trainable: Vec<bool>,
    pub(super) tools: Option<Value>,
}

impl Conversation {
    pub(super) fn push(&mut self, role: &str, content: &str) {
        self.messages
            .push(json!({"role": role, "content": content}));
        self.trainable.push(role == ASSISTANT);
    }

    pub(super) fn extend(&mut self, other: Conversation) {
        self.messages.extend(other.messages);
        self.trainable.extend(other.trainable);
    }

    /// The role of a message.
    pub(super) fn role(&self, message: usize) -> &str {
        self.messages[message]["role"].as_str().unwrap_or_default()
    }
}

pub(super) const ASSISTANT: &str = "assistant";

/// Who says a message.
enum Role {
    /// By the name that templates know.
    Named(&'static str),
    /// The assistant, whose text is a call of functions.
    Call,
}

fn role(name: &str) -> Option<Role> {
    Some(match name {
        "system" => Role::Named("system"),
        "developer" => Role::Named("developer"),
        "user" | "human" | "prompter" => Role::Named("user"),
        "assistant" | "gpt" | "model" | "bot" | "chatgpt" | "bard" | "bing" | "claude" => {
            Role::Named(ASSISTANT)
        }
        "tool" | "function" | "observation" | "ipython" | "tool_response" | "function_response"
        | "tool_results" => Role::Named("tool"),
        "function_call" | "tool_call" | "tool_calls" => Role::Call,
        _ => return None,
    })
}

const KNOWN_ROLES: [&str; 10] = [
    "system",
    "developer",
    "user",
    "human",
    "assistant",
    "gpt",
    "tool",
    "observation",
    "function",
    "function_call",
];

/// The conversation in the field `field`.
pub(super) fn conversation(
    record: &mut Record,
    field: &str,
    names: &FieldNames,
) -> Result<Conversation, RowError> {
    let value = record.take(field)?;
    let turns = record.list(value, || format!("field `{field}`"))?;
    if turns.is_empty() {
        return Err(RowError::NoMessages {
            place: record.place(),
            field: field.to_string(),
        });
    }
    messages(record, turns, names)
}

/// A list of turns as messages.
pub(super) fn messages(
    record: &Record,
    turns: Vec<Value>,
    names: &FieldNames,
) -> Result<Conversation, RowError> {
    let mut conversation = Conversation::default();
    for (index, turn) in turns.into_iter().enumerate() {
        let number = index + 1;
        let fields = record.object(turn, || format!("message {number}"))?;
        let reader = Turn {
            record,
            names,
            number,
        };
        let (message, trainable) = reader.read(fields)?;
        conversation.messages.push(message);
        conversation.trainable.push(trainable);
    }
    Ok(conversation)
}

/// Reads one turn.
struct Turn<'r, 'p> {
    record: &'r Record<'p>,
    names: &'r FieldNames,
    /// Counted from 1.
    number: usize,
}

impl Turn<'_, '_> {
    /// The message, and whether it may be trained.
    fn read(&self, mut turn: Map<String, Value>) -> Result<(Value, bool), RowError> {
        let names = self.names;
        let is_sharegpt = !turn.contains_key(&names.role) && turn.contains_key(&names.from);
        let (role_key, content_key) = if is_sharegpt {
            (&names.from, &names.value)
        } else {
            (&names.role, &names.content)
        };
        let said = turn.shift_remove(role_key);
        let name = match said {
            Some(Value::String(name)) => name,
            other => {
                let found = other.unwrap_or_default();
                let what = format!("`{role_key}` of message {}", self.number);
                return Err(self.record.wrong(what, &found, "a string"));
            }
        };
        let Some(role) = role(&name.to_lowercase()) else {
            return Err(RowError::UnknownRole {
                place: self.record.place(),
                message: self.number,
                role: name,
                known: KNOWN_ROLES.to_vec(),
            });
        };
        let content = turn.shift_remove(content_key).unwrap_or_default();
        let trainable = !is_switched_off(&mut turn);
        let mut message = Map::new();
        match role {
            Role::Call => {
                let text = self.text(content, "assistant")?;
                message.insert("role".to_string(), ASSISTANT.into());
                message.insert("content".to_string(), "".into());
                message.insert("tool_calls".to_string(), self.calls_in(&text)?);
            }
            Role::Named(role) => {
                let calls = self.tool_calls(&mut turn)?;
                let content = match content {
                    Value::Null if calls.is_some() => String::new(),
                    content => self.text(content, role)?,
                };
                message.insert("role".to_string(), role.into());
                message.insert("content".to_string(), content.into());
                if let Some(calls) = calls {
                    message.insert("tool_calls".to_string(), calls);
                }
            }
        }
        let is_assistant = message["role"] == ASSISTANT;
        message.extend(turn);
        Ok((Value::Object(message), is_assistant && trainable))
    }

    /// Content as text: a string, or a list of parts that are text.
    fn text(&self, content: Value, role: &str) -> Result<String, RowError> {
        let what = || format!("the content of message {}", self.number);
        match content {
            Value::String(text) => Ok(text),
            // What a function gave back, not yet written as JSON.
            Value::Object(_) if role == "tool" => Ok(content.to_string()),
            Value::Array(parts) => parts.into_iter().map(|part| self.part(part)).collect(),
            other => Err(self.record.wrong(what(), &other, "a string")),
        }
    }

    fn part(&self, part: Value) -> Result<String, RowError> {
        let kind = match part {
            Value::String(text) => return Ok(text),
            Value::Object(mut part) => match (part.shift_remove("text"), part.get("type")) {
                (Some(Value::String(text)), _) => return Ok(text),
                (_, Some(Value::String(kind))) => format!("a part of type `{kind}`"),
                _ => "a part that is no text".to_string(),
            },
            _ => "a part that is no text".to_string(),
        };
        Err(RowError::NotText {
            place: self.record.place(),
            message: self.number,
            what: kind,
        })
    }

    /// `tool_calls`, or the older `function_call`, in the form that templates expect.
    fn tool_calls(&self, turn: &mut Map<String, Value>) -> Result<Option<Value>, RowError> {
        let calls = turn.shift_remove("tool_calls").unwrap_or_default();
        let call = turn.shift_remove("function_call").unwrap_or_default();
        match (calls, call) {
            (Value::Null, Value::Null) => Ok(None),
            (Value::Array(calls), _) if calls.is_empty() => Ok(None),
            (Value::Null, call) => self.calls(call).map(Some),
            (calls, _) => self.calls(calls).map(Some),
        }
    }

    /// Calls written as JSON.
    fn calls_in(&self, text: &str) -> Result<Value, RowError> {
        match serde_json::from_str(text) {
            Ok(calls) => self.calls(calls),
            Err(error) => Err(self.bad_call(format!("its text is not JSON: {error}"))),
        }
    }

    fn calls(&self, calls: Value) -> Result<Value, RowError> {
        let calls = match calls {
            Value::Array(calls) => calls,
            call => vec![call],
        };
        let calls = calls.into_iter().map(|call| self.call(call));
        Ok(Value::Array(calls.collect::<Result<_, _>>()?))
    }

    /// `{id, type, function: {name, arguments}}` of that or of a bare `{name, arguments}`.
    fn call(&self, call: Value) -> Result<Value, RowError> {
        let Value::Object(mut outer) = call else {
            return Err(self.bad_call("a call is not an object".to_string()));
        };
        let mut function = match outer.shift_remove("function") {
            Some(Value::Object(function)) => function,
            _ => std::mem::take(&mut outer),
        };
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(self.bad_call("it has no name".to_string()));
        }
        let arguments = match function.shift_remove("arguments") {
            // OpenAI writes them as a string of JSON; templates write JSON themselves.
            Some(Value::String(text)) if text.trim().is_empty() => json!({}),
            Some(Value::String(text)) => serde_json::from_str(&text)
                .map_err(|error| self.bad_call(format!("its arguments are not JSON: {error}")))?,
            Some(arguments) => arguments,
            None => json!({}),
        };
        function.insert("arguments".to_string(), arguments);
        outer.insert("type".to_string(), "function".into());
        outer.insert("function".to_string(), Value::Object(function));
        Ok(Value::Object(outer))
    }

    fn bad_call(&self, reason: String) -> RowError {
        RowError::BadCall {
            place: self.record.place(),
            message: self.number,
            reason,
        }
    }
}

/// OpenAI's `"weight": 0`, axolotl's `"train": false`: a turn to show and not to train.
fn is_switched_off(turn: &mut Map<String, Value>) -> bool {
    let weight = turn.shift_remove("weight");
    let train = turn.shift_remove("train");
    weight.is_some_and(|weight| weight.as_f64() == Some(0.0)) || train == Some(false.into())
}

/// The functions in the field `field`, each as `{type, function}`.
pub(super) fn tools(record: &mut Record, field: &str) -> Result<Option<Value>, RowError> {
    let bad = |record: &Record, reason: &str| RowError::BadTools {
        place: record.place(),
        field: field.to_string(),
        reason: reason.to_string(),
    };
    let value = match record.take_if_there(field) {
        None => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(Value::String(text)) => serde_json::from_str(&text)
            .map_err(|error| bad(record, &format!("not JSON: {error}")))?,
        Some(value) => value,
    };
    let tools = match value {
        Value::Null => return Ok(None),
        Value::Array(tools) => tools,
        tool @ Value::Object(_) => vec![tool],
        _ => return Err(bad(record, "neither a list nor an object")),
    };
    if tools.is_empty() {
        return Ok(None);
    }
    let wrap = |tool: Value| match tool {
        Value::Object(tool) if tool.contains_key("function") => Ok(Value::Object(tool)),
        Value::Object(tool) if tool.contains_key("name") => {
            Ok(json!({"type": "function", "function": tool}))
        }
        _ => Err(bad(record, "a function without a name")),
    };
    let tools = tools.into_iter().map(wrap).collect::<Result<_, _>>()?;
    Ok(Some(Value::Array(tools)))
}
