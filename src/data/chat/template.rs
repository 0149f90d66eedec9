//! A compiled template, and rendering messages with it.

use std::fmt;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::Value as Json;

use super::{TemplateError, builtin, generation, json};
use crate::data::Tokenizer;

/// Instructions that rendering one chat may take: a loop over nothing but itself ends here.
const FUEL: u64 = 50_000_000;
/// No chat is longer than this.
const MAX_BYTES: usize = 1 << 28;
/// The template's name within its environment.
const NAME: &str = "chat";

/// A chat template, compiled. Cheap to clone.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    source: Arc<str>,
    /// What to call it in messages: "`chatml`", "of the tokenizer", "`x.jinja`".
    name: Arc<str>,
    marks: bool,
}

/// The texts of the special tokens that templates write.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTexts {
    /// `bos_token`; empty if there is none.
    pub bos: String,
    /// `eos_token`; empty if there is none.
    pub eos: String,
}

impl SpecialTexts {
    /// Those of a tokenizer.
    pub fn of(tokenizer: &Tokenizer) -> Self {
        let text = |token: Option<&crate::data::SpecialToken>| {
            token.map_or_else(String::new, |token| token.text.clone())
        };
        Self {
            bos: text(tokenizer.bos()),
            eos: text(tokenizer.eos()),
        }
    }
}

/// What is rendered.
#[derive(Debug, Clone, Copy)]
pub struct Chat<'a> {
    /// Objects with `role` and `content`.
    pub messages: &'a [Json],
    /// The functions that the assistant can call.
    pub tools: Option<&'a Json>,
    /// Whether to end with what makes the model answer.
    pub add_generation_prompt: bool,
}

impl<'a> Chat<'a> {
    /// Messages without tools, ending with the last of them.
    pub fn new(messages: &'a [Json]) -> Self {
        Self {
            messages,
            tools: None,
            add_generation_prompt: false,
        }
    }

    /// The same, ready to be answered.
    pub fn with_generation_prompt(self) -> Self {
        Self {
            add_generation_prompt: true,
            ..self
        }
    }
}

/// A rendered chat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Byte ranges within `{% generation %}`, in order.
    pub generation: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// The template that `data.chat_template` names: `tokenizer`, `tokenizer:NAME`, one of ours, or
    /// the path of a .jinja file.
    ///
    /// # Errors
    /// A template that is not there or does not compile.
    pub fn find(choice: &str, tokenizer: &Tokenizer) -> Result<Self, TemplateError> {
        let special = SpecialTexts::of(tokenizer);
        let named = choice.strip_prefix("tokenizer:");
        if choice == "tokenizer" || named.is_some() {
            let source = tokenizer.chat_template(named.unwrap_or("default"))?;
            return Self::compile("of the tokenizer", source, &special);
        }
        if is_path(choice) {
            Self::from_file(Path::new(choice), &special)
        } else {
            Self::named(choice, &special)
        }
    }

    /// One of the templates that come with the program: [`crate::config::CHAT_TEMPLATES`].
    ///
    /// # Errors
    /// Another name.
    pub fn named(name: &str, special: &SpecialTexts) -> Result<Self, TemplateError> {
        let source = builtin::source(name).ok_or_else(|| TemplateError::UnknownName {
            name: name.to_string(),
        })?;
        Self::compile(&format!("`{name}`"), source, special)
    }

    /// A template file.
    ///
    /// # Errors
    /// A file that cannot be read or does not compile.
    pub fn from_file(path: &Path, special: &SpecialTexts) -> Result<Self, TemplateError> {
        let source = fs::read_to_string(path).map_err(|error| TemplateError::Unreadable {
            path: path.to_path_buf(),
            reason: error.to_string(),
        })?;
        Self::compile(&format!("`{}`", path.display()), &source, special)
    }

    /// Compiles a template; `name` is for messages.
    ///
    /// # Errors
    /// Source that is not a template.
    pub fn compile(
        name: &str,
        source: &str,
        special: &SpecialTexts,
    ) -> Result<Self, TemplateError> {
        let rewritten = generation::rewrite(source);
        let marks = rewritten.is_some();
        let mut environment = environment(special);
        environment
            .add_template_owned(NAME, rewritten.unwrap_or_else(|| source.to_string()))
            .map_err(|error| TemplateError::Syntax {
                template: name.to_string(),
                line: error.line().unwrap_or(1),
                reason: reason(&error),
            })?;
        Ok(Self {
            environment: Arc::new(environment),
            source: source.into(),
            name: name.into(),
            marks,
        })
    }

    /// The same template with another time for `strftime_now`. A run keeps its start time, so that
    /// a resumed run renders the same texts.
    pub(in crate::data) fn at(mut self, time: jiff::Timestamp) -> Self {
        let mut environment = (*self.environment).clone();
        environment.add_function("strftime_now", move |format: String| at(time, &format));
        self.environment = Arc::new(environment);
        self
    }

    /// Whether the template writes the current date.
    pub fn writes_date(&self) -> bool {
        self.source.contains("strftime_now")
    }

    /// The template as it was written.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// What to call it in messages: "`chatml`", "of the tokenizer", "`x.jinja`".
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it marks what an assistant writes with `{% generation %}`.
    pub fn marks_generation(&self) -> bool {
        self.marks
    }

    /// What the template writes after an answer, such as `<|im_end|>`, without the blanks around it;
    /// none if it writes nothing, or does not say.
    pub fn turn_end(&self) -> Option<String> {
        const ANSWER: &str = "x";
        let user = serde_json::json!({"role": "user", "content": "?"});
        let answer = serde_json::json!({"role": "assistant", "content": ANSWER});
        let chat = [user, answer];
        let given = self.render(&Chat::new(&chat[..1]).with_generation_prompt());
        let whole = self.render(&Chat::new(&chat)).ok()?.text;
        let turn = whole.strip_prefix(&given.ok()?.text)?;
        let end = turn.trim_start().strip_prefix(ANSWER)?.trim();
        (!end.is_empty()).then(|| end.to_string())
    }

    /// The text of a chat.
    ///
    /// # Errors
    /// A template that refuses the messages, fails on them, or does not come to an end.
    pub fn render(&self, chat: &Chat) -> Result<Rendered, TemplateError> {
        let messages = Messages::new(chat.messages, chat.tools);
        if self.marks
            && let Some(character) = messages.marker()
        {
            return Err(TemplateError::Marker { character });
        }
        self.render_some(&messages, chat.messages.len(), chat.add_generation_prompt)
    }

    /// The text of the first `count` messages.
    pub(in crate::data) fn render_some(
        &self,
        messages: &Messages,
        count: usize,
        add_generation_prompt: bool,
    ) -> Result<Rendered, TemplateError> {
        // Tools and documents as `apply_chat_template` passes them: defined, and perhaps none.
        let none = || Value::from(());
        let context = context! {
            messages => messages.messages[..count].to_vec(),
            add_generation_prompt,
            tools => messages.tools.clone().unwrap_or_else(none),
            documents => none(),
        };
        let template = self.environment.get_template(NAME);
        let mut output = Bounded(Vec::new());
        let rendered =
            template.and_then(|template| template.render_captured_to(context, &mut output));
        if let Err(error) = rendered {
            return Err(self.failed(&error, output.0.len()));
        }
        let text = String::from_utf8(output.0).unwrap_or_default();
        if !self.marks {
            return Ok(Rendered {
                text,
                generation: Vec::new(),
            });
        }
        let (text, generation) =
            generation::take_marks(&text).ok_or_else(|| TemplateError::Nested {
                template: self.name.to_string(),
            })?;
        Ok(Rendered { text, generation })
    }

    fn failed(&self, error: &Error, written: usize) -> TemplateError {
        let template = self.name.to_string();
        if error.kind() == ErrorKind::OutOfFuel || written >= MAX_BYTES {
            return TemplateError::Endless { template };
        }
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(source) = cause {
            if let Some(Raised(message)) = source.downcast_ref() {
                let message = message.clone();
                return TemplateError::Raised { template, message };
            }
            cause = source.source();
        }
        TemplateError::Render {
            template,
            line: error.line().unwrap_or(1),
            reason: reason(error),
        }
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChatTemplate({})", self.name)
    }
}

/// Whether `data.chat_template` means a file.
fn is_path(choice: &str) -> bool {
    crate::config::is_chat_template_path(choice)
}

/// A chat's messages as the engine takes them, converted once however often they are rendered.
pub(in crate::data) struct Messages {
    messages: Vec<Value>,
    tools: Option<Value>,
    marker: Option<char>,
}

impl Messages {
    pub(in crate::data) fn new(messages: &[Json], tools: Option<&Json>) -> Self {
        Self {
            marker: messages.iter().chain(tools).find_map(marker_in),
            messages: messages
                .iter()
                .map(|message| Value::from(Serde(message)))
                .collect(),
            tools: tools.map(|tools| Value::from(Serde(tools))),
        }
    }

    /// A character in them that marks spans.
    pub(in crate::data) fn marker(&self) -> Option<char> {
        self.marker
    }
}

fn marker_in(value: &Json) -> Option<char> {
    match value {
        Json::String(text) => text.chars().find(|c| generation::MARKERS.contains(c)),
        Json::Array(items) => items.iter().find_map(marker_in),
        Json::Object(fields) => fields.values().find_map(marker_in),
        _ => None,
    }
}

/// What a template raised by itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// The engine with the settings of `transformers`.
fn environment(special: &SpecialTexts) -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        // The delimiters are the default ones.
        .expect("the default syntax is valid");
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.add_filter("tojson", json::to_json);
    environment.add_filter(generation::FILTER, |text: String| generation::mark(&text));
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<Value, Error> {
            let said = message.clone();
            Err(Error::new(ErrorKind::InvalidOperation, said).with_source(Raised(message)))
        },
    );
    let now = jiff::Timestamp::now();
    environment.add_function("strftime_now", move |format: String| at(now, &format));
    environment.add_global("bos_token", special.bos.clone());
    environment.add_global("eos_token", special.eos.clone());
    environment
}

/// Formats a time in UTC with a Python format string.
fn at(time: jiff::Timestamp, format: &str) -> Result<String, Error> {
    let time = time.to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(format, &time)
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// What went wrong, without the engine's own words for where.
fn reason(error: &Error) -> String {
    match error.detail() {
        Some(detail) => detail.to_string(),
        None => error.kind().to_string(),
    }
}

/// Takes up to [`MAX_BYTES`].
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_BYTES {
            self.0.resize(MAX_BYTES, 0);
            return Err(io::Error::other("the text is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
