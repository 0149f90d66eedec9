//! `runner env`: what this build runs on.

use clap::Args;

use super::CliError;
use crate::environment::Environment;

/// Arguments of `runner env`.
#[derive(Debug, Args)]
pub(super) struct EnvArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &EnvArgs) -> Result<(), CliError> {
    let environment = Environment::detect();
    if args.json {
        return super::print_line(&format!("{:#}", serde_json::json!(environment)));
    }
    let memory = environment
        .memory_bytes
        .map_or("unknown".to_string(), |bytes| {
            format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
        });
    super::print_line(&format!(
        "firebrick  {}\nburn       {}\nbackends   {}\nplatform   {}\ncpu        {}\nfeatures   {}\nthreads    {}\nmemory     {memory}",
        environment.firebrick,
        environment.burn,
        environment.backends.join(", "),
        environment.platform,
        environment.cpu,
        environment.cpu_features.join(" "),
        environment.threads,
    ))
}
