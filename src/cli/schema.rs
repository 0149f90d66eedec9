//! `runner schema`: the JSON Schema of configuration files, for editors.

use clap::Args;

use super::CliError;
use crate::config::json_schema;

/// Arguments of `runner schema`.
#[derive(Debug, Args)]
pub struct SchemaArgs {}

/// Prints the schema on standard output.
pub fn run(_: &SchemaArgs) -> Result<(), CliError> {
    super::print_line(&format!("{:#}", json_schema()))
}
