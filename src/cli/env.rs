//! `runner env`: what this build runs on.

use clap::Args;

use super::CliError;
use crate::config::Backend;
use crate::device::{self, ComputeDevice, DeviceError};
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
    let devices = devices();
    if args.json {
        let mut object = serde_json::json!(environment);
        object["devices"] = devices
            .iter()
            .map(|(backend, device)| match device {
                Ok(name) => serde_json::json!({"backend": backend, "name": name}),
                Err(reason) => serde_json::json!({"backend": backend, "absent": reason}),
            })
            .collect();
        return super::print_line(&format!("{object:#}"));
    }
    let devices: Vec<String> = devices
        .into_iter()
        .map(|(backend, device)| match device {
            Ok(name) => format!("{} ({name})", backend.name()),
            Err(reason) => format!("{} (absent: {reason})", backend.name()),
        })
        .collect();
    let memory = environment
        .memory_bytes
        .map_or("unknown".to_string(), |bytes| {
            format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
        });
    super::print_line(&format!(
        "firebrick  {}\nburn       {}\ndevices    {}\nplatform   {}\ncpu        {}\nfeatures   {}\nthreads    {}\nmemory     {memory}",
        environment.firebrick,
        environment.burn,
        devices.join("\n           "),
        environment.platform,
        environment.cpu,
        environment.cpu_features.join(" "),
        environment.threads,
    ))
}

/// What each backend of this build finds on this machine.
fn devices() -> Vec<(Backend, Result<String, String>)> {
    let found = |backend| match ComputeDevice::open(backend) {
        Ok(device) => Ok(device.name),
        Err(DeviceError::Absent { reason, .. }) => Err(reason),
        Err(error) => Err(error.to_string()),
    };
    device::compiled_in()
        .into_iter()
        .map(|backend| (backend, found(backend)))
        .collect()
}
