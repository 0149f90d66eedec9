//! `runner init`: a commented configuration to start from.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::CliError;
use crate::config::{TemplateName, template};

/// Arguments of `runner init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// What to start from
    #[arg(long, value_enum, default_value = "llama")]
    template: TemplateName,
    /// Where to write it; an existing file is left alone
    #[arg(short, long, value_name = "FILE", default_value = "config.toml")]
    output: PathBuf,
}

/// Writes the template to a new file.
pub fn run(args: &InitArgs) -> Result<(), CliError> {
    let mut file = File::create_new(&args.output).map_err(CliError::io(&args.output))?;
    file.write_all(template(args.template).as_bytes())
        .map_err(CliError::io(&args.output))?;
    let file = args.output.display();
    super::print_line(&format!("wrote {file}\nnext    runner train {file}"))
}
