//! A model folder that a verb writes.

use std::fs;
use std::path::Path;

use super::CliError;
use crate::durable;

/// What lies beside the weights and belongs to the model too.
const BESIDE: [&str; 5] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// An export replaces nothing.
pub(super) fn check_empty(path: &Path) -> Result<(), CliError> {
    match fs::read_dir(path).map(|mut entries| entries.next().is_some()) {
        Ok(true) => Err(CliError::NotEmpty {
            path: path.to_path_buf(),
        }),
        Ok(false) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(CliError::io(path)(error)),
    }
}

/// Copies the tokenizer and the like, each from the first folder that has it.
pub(super) fn copy_beside(from: &[&Path], to: &Path) -> Result<(), CliError> {
    for name in BESIDE {
        let mut sources = from.iter().map(|folder| folder.join(name));
        if let Some(source) = sources.find(|source| source.exists()) {
            let copy = fs::read(&source).map_err(CliError::io(&source))?;
            let path = to.join(name);
            durable::replace_with(&path, copy).map_err(CliError::io(path))?;
        }
    }
    Ok(())
}
