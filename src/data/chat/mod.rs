//! Chat templates: a list of messages becomes the text that the model sees.
//!
//! Templates are Jinja, as Hugging Face tokenizers carry them, rendered with the settings of
//! `apply_chat_template`: `trim_blocks`, `lstrip_blocks`, `loopcontrols`, the functions
//! `raise_exception` and `strftime_now`, Python's methods on strings and dictionaries, `tojson` as
//! Python's `json.dumps` writes it ([`json`](self)), and `{% generation %}`, which marks what an
//! assistant writes (`generation`). Training, sample completions and chats use the same
//! [`ChatTemplate`], so that a model meets the text it was trained on.
//!
//! ```
//! use firebrick::data::{Chat, ChatTemplate, SpecialTexts};
//! use serde_json::json;
//!
//! let template = ChatTemplate::named("chatml", &SpecialTexts::default())?;
//! let messages = [json!({"role": "user", "content": "Hi"})];
//! let text = template.render(&Chat::new(&messages).with_generation_prompt())?.text;
//! assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
//! # Ok::<(), firebrick::data::TemplateError>(())
//! ```

mod builtin;
mod error;
mod generation;
mod json;
mod template;

pub use error::TemplateError;
pub(in crate::data) use template::Messages;
pub use template::{Chat, ChatTemplate, Rendered, SpecialTexts};
