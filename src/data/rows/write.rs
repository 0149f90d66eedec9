//! From an example to the text that the model sees, and which parts of it are trained.
//!
//! Conversations are written by the chat template. What the assistant wrote in the result is marked
//! by `{% generation %}` where the template has it. Where it has not, a turn is what the text with
//! the turn has more than the text before it, which ends with the generation prompt:
//!
//! ```text
//! render(messages[..i], generation prompt)      <|user|>Hi<|assistant|>
//! render(messages[..=i])                        <|user|>Hi<|assistant|>Hello<|end|>
//! trained                                                             Hello<|end|>
//! ```
//!
//! That holds only if both are how the text of the whole conversation begins, which is checked for
//! every turn. Templates that rewrite earlier turns, or that end every text with a generation
//! prompt, are refused.

use std::ops::Range;

use serde_json::{Value, json};

use super::example::{Example, Instruction};
use super::turns::{ASSISTANT, Conversation};
use super::{Place, RowError};
use crate::config::TrainOn;
use crate::data::chat::{ChatTemplate, Messages, TemplateError};

/// A row as text.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Written {
    pub(super) text: String,
    /// Byte ranges that are trained, in order.
    pub(super) trained: Vec<Range<usize>>,
    /// Whether a blank after a special token at the end of a range is the template's, not the
    /// assistant's.
    pub(super) ends_with_template: bool,
    /// Answers without text or calls.
    pub(super) empty_answers: u64,
    /// Whether the row has tools that the template does not write.
    pub(super) tools_left_out: bool,
    /// Why nothing is trained, where nothing is.
    pub(super) reason: &'static str,
}

/// How rows are written.
pub(super) struct Writer<'a> {
    /// For conversations; none if there are none.
    pub(super) template: Option<&'a ChatTemplate>,
    /// Whether other rows are written as conversations too.
    pub(super) always_chat: bool,
    /// What ends rows that are written without a template; empty if the tokenizer has no end token.
    pub(super) eos: &'a str,
    pub(super) train_on: TrainOn,
}

impl Writer<'_> {
    /// Writes a row. Pairs are written one answer at a time.
    pub(super) fn write(
        &self,
        example: Example,
        place: &dyn Fn() -> Place,
    ) -> Result<Written, RowError> {
        let example = if self.always_chat {
            example.into_chat()
        } else {
            example
        };
        match example {
            Example::Text(text) => {
                let mut segments = Segments::new(self);
                segments.push(&text, true);
                segments.end();
                Ok(segments.written)
            }
            Example::Completion {
                system,
                prompt,
                completion,
            } => {
                let mut segments = Segments::new(self);
                if let Some(system) = system {
                    segments.push(&system, false);
                    segments.push("\n\n", false);
                }
                segments.push(&prompt, false);
                segments.answer(&completion);
                Ok(segments.written)
            }
            Example::Instruction(row) => Ok(self.alpaca(&row)),
            Example::Chat(conversation) => self.chat(&conversation, place),
            // `Pairs` takes them apart.
            Example::Pair { chosen, .. } => self.write(*chosen, place),
        }
    }

    /// The prompt of Stanford Alpaca (Taori et al., 2023). A system message takes the place of its
    /// first paragraph.
    fn alpaca(&self, row: &Instruction) -> Written {
        let mut segments = Segments::new(self);
        let preamble = match (&row.system, &row.input) {
            (Some(system), _) => system,
            (None, Some(_)) => ALPACA_WITH_INPUT,
            (None, None) => ALPACA_WITHOUT_INPUT,
        };
        segments.push(preamble, false);
        for [instruction, answer] in &row.history {
            segments.push(
                &format!("\n\n### Instruction:\n{instruction}\n\n### Response:\n"),
                false,
            );
            segments.earlier(answer);
        }
        segments.push(&format!("\n\n### Instruction:\n{}", row.instruction), false);
        if let Some(input) = &row.input {
            segments.push(&format!("\n\n### Input:\n{input}"), false);
        }
        segments.push("\n\n### Response:\n", false);
        segments.answer(&row.output);
        segments.written
    }

    fn chat(
        &self,
        conversation: &Conversation,
        place: &dyn Fn() -> Place,
    ) -> Result<Written, RowError> {
        let at = |source: TemplateError| RowError::Template {
            place: place(),
            source,
        };
        // A dataset of conversations is refused before its rows when there is no template.
        let template = self
            .template
            .ok_or_else(|| at(TemplateError::NoneInTokenizer))?;
        let messages = Messages::new(&conversation.messages, conversation.tools.as_ref());
        if template.marks_generation()
            && let Some(character) = messages.marker()
        {
            return Err(at(TemplateError::Marker { character }));
        }
        let count = conversation.messages.len();
        let whole = template.render_some(&messages, count, false).map_err(at)?;
        let turns = Turns {
            template,
            messages,
            conversation,
            text: &whole.text,
            place,
        };
        turns.check_calls()?;
        let wanted = self.wanted(conversation);
        let trained = if self.train_on == TrainOn::All {
            std::iter::once(0..whole.text.len()).collect()
        } else if template.marks_generation() {
            turns.marked(&wanted, whole.generation)?
        } else {
            let spans = wanted.iter().map(|&message| turns.by_prefix(message));
            spans.collect::<Result<_, _>>()?
        };
        let is_empty = |&&message: &&usize| {
            let message = &conversation.messages[message];
            let content = message["content"].as_str().unwrap_or_default();
            content.trim().is_empty() && message.get("tool_calls").is_none()
        };
        Ok(Written {
            empty_answers: wanted.iter().filter(is_empty).count() as u64,
            tools_left_out: turns.leaves_out_tools(),
            ends_with_template: self.train_on != TrainOn::All && !template.marks_generation(),
            reason: self.reason(conversation, &wanted, template),
            trained: trained
                .into_iter()
                .filter(|span| !span.is_empty())
                .collect(),
            text: whole.text,
        })
    }

    /// The messages that are trained.
    fn wanted(&self, conversation: &Conversation) -> Vec<usize> {
        let all = 0..conversation.messages.len();
        let last = all
            .clone()
            .rfind(|&message| conversation.role(message) == ASSISTANT);
        let wanted = all.filter(|&message| {
            let is_last = self.train_on != TrainOn::Last || Some(message) == last;
            conversation.trainable[message] && is_last
        });
        wanted.collect()
    }

    fn reason(
        &self,
        conversation: &Conversation,
        wanted: &[usize],
        template: &ChatTemplate,
    ) -> &'static str {
        let mut messages = 0..conversation.messages.len();
        if !messages.any(|message| conversation.role(message) == ASSISTANT) {
            "no message is the assistant's"
        } else if wanted.is_empty() {
            "the assistant's messages are switched off by weight = 0 or train = false"
        } else if template.marks_generation() {
            "the template marks nothing with {% generation %}"
        } else {
            "the assistant's messages are empty"
        }
    }
}

const ALPACA_WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.";
const ALPACA_WITHOUT_INPUT: &str = "Below is an instruction that describes a task. Write a response that appropriately completes the request.";

/// A text put together from parts that are trained and parts that are not.
struct Segments<'a> {
    written: Written,
    eos: &'a str,
    train_on: TrainOn,
}

impl<'a> Segments<'a> {
    fn new(writer: &Writer<'a>) -> Self {
        Self {
            written: Written {
                reason: "there is no text",
                ..Written::default()
            },
            eos: writer.eos,
            train_on: writer.train_on,
        }
    }

    fn push(&mut self, text: &str, trained: bool) {
        let start = self.written.text.len();
        self.written.text.push_str(text);
        let span = start..self.written.text.len();
        if span.is_empty() || !(trained || self.train_on == TrainOn::All) {
            return;
        }
        match self.written.trained.last_mut() {
            Some(last) if last.end == span.start => last.end = span.end,
            _ => self.written.trained.push(span),
        }
    }

    /// An answer that more follows on.
    fn earlier(&mut self, text: &str) {
        let trained = self.train_on != TrainOn::Last;
        self.push(text, trained);
        self.push(self.eos, trained);
    }

    /// The last answer, and the end.
    fn answer(&mut self, text: &str) {
        self.written.empty_answers += u64::from(text.trim().is_empty());
        self.push(text, true);
        self.end();
    }

    fn end(&mut self) {
        if !self.eos.is_empty() && !self.written.text.ends_with(self.eos) {
            self.push(self.eos, true);
        }
    }
}

/// Finds the assistant's turns in the text of a conversation.
struct Turns<'a> {
    template: &'a ChatTemplate,
    messages: Messages,
    conversation: &'a Conversation,
    text: &'a str,
    place: &'a dyn Fn() -> Place,
}

impl Turns<'_> {
    fn render(&self, count: usize, prompt: bool) -> Option<String> {
        let rendered = self.template.render_some(&self.messages, count, prompt);
        Some(rendered.ok()?.text)
    }

    fn inconsistent(&self, message: usize) -> RowError {
        RowError::NotConsistent {
            place: (self.place)(),
            template: self.template.name().to_string(),
            message: message + 1,
        }
    }

    /// A turn by what the text has more with it than before it.
    fn by_prefix(&self, message: usize) -> Result<Range<usize>, RowError> {
        let start = self
            .start(message)
            .ok_or_else(|| self.inconsistent(message))?;
        let end = self
            .end(message)
            .ok_or_else(|| self.inconsistent(message))?;
        if start > end {
            return Err(self.inconsistent(message));
        }
        Ok(start..end)
    }

    /// Where what the model writes begins: behind what it is given to answer to.
    fn start(&self, message: usize) -> Option<usize> {
        let Some(given) = self.render(message, true) else {
            // Few templates render no messages at all.
            return if message == 0 {
                self.behind_first_prompt()
            } else {
                None
            };
        };
        if self.text.starts_with(&given) {
            return Some(given.len());
        }
        // A generation prompt may say more than the turn itself does, such as an empty thought; what
        // both have in common is given either way. Everything before it has to be the same.
        let before = self.render(message, false)?;
        let shared = common_prefix(self.text, &given);
        (self.text.starts_with(&before) && shared >= before.len()).then_some(shared)
    }

    /// Behind the first generation prompt in the text, for conversations that begin with the
    /// assistant.
    fn behind_first_prompt(&self) -> Option<usize> {
        let count = self.conversation.messages.len();
        let with = self.render(count, true)?;
        let prompt = with
            .strip_prefix(self.text)
            .filter(|prompt| !prompt.is_empty())?;
        Some(self.text.find(prompt)? + prompt.len())
    }

    /// Where the turn ends.
    fn end(&self, message: usize) -> Option<usize> {
        let count = self.conversation.messages.len();
        if message + 1 < count {
            let until = self.render(message + 1, false)?;
            return self.text.starts_with(&until).then_some(until.len());
        }
        // A template that takes no notice of the flag may end every text with a generation prompt.
        let ignores_flag = self
            .render(count, true)
            .is_none_or(|with| with == self.text);
        (!ignores_flag || self.goes_on()).then_some(self.text.len())
    }

    /// Whether the text stays as it is when another message follows. A template that refuses one
    /// has nothing to say against it.
    fn goes_on(&self) -> bool {
        let mut messages = self.conversation.messages.clone();
        messages.push(json!({"role": "user", "content": "?"}));
        let longer = Messages::new(&messages, self.conversation.tools.as_ref());
        let rendered = self.template.render_some(&longer, messages.len(), false);
        rendered.map_or(true, |rendered| rendered.text.starts_with(self.text))
    }

    /// The spans that the template marks, of the messages that are wanted.
    fn marked(
        &self,
        wanted: &[usize],
        spans: Vec<Range<usize>>,
    ) -> Result<Vec<Range<usize>>, RowError> {
        let mut all = 0..self.conversation.messages.len();
        let wants = |message: usize| {
            self.conversation.role(message) != ASSISTANT || wanted.contains(&message)
        };
        if all.all(wants) {
            return Ok(spans);
        }
        // Which message a span belongs to: the first one with which it is there.
        let mut kept = Vec::new();
        for &message in wanted {
            let marks = |count: usize| {
                if count == 0 {
                    return Some(0);
                }
                let rendered = self.template.render_some(&self.messages, count, false);
                Some(rendered.ok()?.generation.len())
            };
            let range = marks(message).zip(marks(message + 1));
            let (first, end) = range.ok_or_else(|| self.inconsistent(message))?;
            let own = spans
                .get(first..end)
                .ok_or_else(|| self.inconsistent(message))?;
            kept.extend(own.iter().cloned());
        }
        Ok(kept)
    }

    /// That every function called is named in the text.
    fn check_calls(&self) -> Result<(), RowError> {
        for message in &self.conversation.messages {
            let calls = message.get("tool_calls").and_then(Value::as_array);
            for call in calls.into_iter().flatten() {
                let name = call["function"]["name"].as_str().unwrap_or_default();
                if !self.text.contains(name) {
                    return Err(RowError::CallLeftOut {
                        place: (self.place)(),
                        template: self.template.name().to_string(),
                        function: name.to_string(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Whether none of the tools is named in the text before the first message that calls one.
    fn leaves_out_tools(&self) -> bool {
        let Some(tools) = self.conversation.tools.as_ref().and_then(Value::as_array) else {
            return false;
        };
        let named = |tool: &Value| {
            let function = tool.get("function").unwrap_or(tool);
            // A call names a function too; only the list of tools has its description.
            let shown = function.get("description").or(function.get("name"));
            let shown = shown.and_then(Value::as_str).unwrap_or_default();
            let escaped = json!(shown).to_string();
            self.text.contains(shown) || self.text.contains(escaped.trim_matches('"'))
        };
        !tools.iter().any(named)
    }
}

/// Bytes at the beginning that two texts share, up to a whole character.
fn common_prefix(a: &str, b: &str) -> usize {
    let pairs = a.chars().zip(b.chars());
    let same = pairs.take_while(|(a, b)| a == b);
    same.map(|(character, _)| character.len_utf8()).sum()
}
