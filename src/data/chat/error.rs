//! What can be wrong with a chat template.

use std::path::PathBuf;

use crate::config::CHAT_TEMPLATES;

/// A chat template that is not there, does not compile, or does not render some messages.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TemplateError {
    /// A template file that cannot be read.
    #[error("chat template `{}`: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A tokenizer without a chat template.
    #[error("the tokenizer has no chat template")]
    NoneInTokenizer,
    /// A tokenizer with several templates, none of which is the one asked for.
    #[error("the tokenizer has no chat template `{name}` (it has: {})", known.join(", "))]
    NotInTokenizer {
        /// The template asked for.
        name: String,
        /// Those there are.
        known: Vec<String>,
    },
    /// A name that is not one of ours.
    #[error("there is no chat template `{name}`")]
    UnknownName {
        /// The name.
        name: String,
    },
    /// A template that does not compile.
    #[error("chat template {template}, line {line}: {reason}")]
    Syntax {
        /// The template, in words.
        template: String,
        /// Line in the template, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// The template itself refuses the messages.
    #[error("chat template {template} refuses these messages: {message}")]
    Raised {
        /// The template, in words.
        template: String,
        /// What it says.
        message: String,
    },
    /// The template fails on the messages.
    #[error("chat template {template}, line {line}: {reason}")]
    Render {
        /// The template, in words.
        template: String,
        /// Line in the template, from 1.
        line: usize,
        /// What happened.
        reason: String,
    },
    /// The template goes on and on.
    #[error("chat template {template} does not come to an end")]
    Endless {
        /// The template, in words.
        template: String,
    },
    /// A message with one of the characters that mark spans.
    #[error("a message contains U+{:04X}, which no text has", u32::from(*character))]
    Marker {
        /// The character.
        character: char,
    },
    /// `{% generation %}` inside `{% generation %}`.
    #[error("chat template {template}: {{% generation %}} within {{% generation %}}")]
    Nested {
        /// The template, in words.
        template: String,
    },
}

impl TemplateError {
    /// What the user can do about it.
    pub fn help(&self) -> Option<String> {
        let named = CHAT_TEMPLATES.join("\", \"");
        match self {
            Self::Unreadable { .. } => Some("check data.chat_template".to_string()),
            Self::NoneInTokenizer => Some(format!(
                "set data.chat_template to one of \"{named}\", or to the path of a .jinja file"
            )),
            Self::NotInTokenizer { known, .. } => {
                let first = known.first().map_or("default", String::as_str);
                Some(format!(
                    "name one: data.chat_template = \"tokenizer:{first}\""
                ))
            }
            Self::UnknownName { .. } => Some(format!(
                "\"tokenizer\", the path of a .jinja file, or one of \"{named}\""
            )),
            Self::Syntax { .. } | Self::Nested { .. } | Self::Endless { .. } => {
                Some("correct the template, or name another: data.chat_template".to_string())
            }
            Self::Raised { .. } | Self::Render { .. } => Some(
                "change the row, or use a template that takes such messages: data.chat_template"
                    .to_string(),
            ),
            Self::Marker { .. } => Some("take the character out".to_string()),
        }
    }

    /// Whether it is the template that is at fault, whatever the messages.
    pub(in crate::data) fn is_about_template(&self) -> bool {
        !matches!(
            self,
            Self::Raised { .. } | Self::Render { .. } | Self::Marker { .. } | Self::Endless { .. }
        )
    }
}
