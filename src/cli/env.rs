//! `runner env`: what this build runs on.

use clap::Args;

use super::CliError;
use crate::config::Backend;
use crate::device::{self, ComputeDevice, DeviceError};
use crate::environment::Environment;
use firebrick_kernels::{Way, attention, blockwise, layers, ternary};

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
    let operations = operations(&devices);
    if args.json {
        let mut object = serde_json::json!(environment);
        object["devices"] = devices
            .iter()
            .map(|(backend, device)| match device {
                Ok(device) => serde_json::json!({"backend": backend, "name": device.name}),
                Err(reason) => serde_json::json!({"backend": backend, "absent": reason}),
            })
            .collect();
        object["operations"] = operations.iter().flat_map(Operation::json).collect();
        return super::print_line(&format!("{object:#}"));
    }
    let devices: Vec<String> = devices
        .into_iter()
        .map(|(backend, device)| match device {
            Ok(device) => format!("{} ({})", backend.name(), device.name),
            Err(reason) => format!("{} (absent: {reason})", backend.name()),
        })
        .collect();
    let memory = environment
        .memory_bytes
        .map_or("unknown".to_string(), |bytes| {
            format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
        });
    super::print_line(&format!(
        "firebrick  {}\nburn       {}\ndevices    {}\nplatform   {}\ncpu        {}\nfeatures   {}\nthreads    {}\nmemory     {memory}\noperations {}",
        environment.firebrick,
        environment.burn,
        lines(devices.into_iter()),
        environment.platform,
        environment.cpu,
        environment.cpu_features.join(" "),
        environment.threads,
        lines(operations.iter().map(Operation::line)),
    ))
}

fn lines(lines: impl Iterator<Item = String>) -> String {
    lines.collect::<Vec<_>>().join("\n           ")
}

/// An operation of this project's own, and how each device runs it.
struct Operation {
    name: &'static str,
    ways: Vec<(Backend, Way)>,
}

impl Operation {
    fn line(&self) -> String {
        let ways = self.ways.iter();
        let ways: Vec<String> = ways
            .map(|(backend, way)| format!("{}: {way}", backend.name()))
            .collect();
        format!("{:<34} {}", self.name, ways.join(", "))
    }

    fn json(&self) -> Vec<serde_json::Value> {
        let way = |(backend, way): &(Backend, Way)| {
            let (way, instructions) = match way {
                Way::Simd(name) => ("simd", Some(*name)),
                Way::CubeCl => ("cubecl", None),
                Way::Composed => ("composed", None),
            };
            serde_json::json!({
                "operation": self.name,
                "backend": backend,
                "way": way,
                "instructions": instructions,
            })
        };
        self.ways.iter().map(way).collect()
    }
}

fn operations(devices: &[(Backend, Result<ComputeDevice, String>)]) -> Vec<Operation> {
    let mut operations: Vec<Operation> = Vec::new();
    for (backend, device) in devices {
        let Ok(device) = device else { continue };
        let all = [
            ternary::ways(&device.device),
            blockwise::ways(&device.device),
            attention::ways(&device.device),
            layers::ways(&device.device),
        ];
        for (name, way) in all.into_iter().flatten() {
            let way = (*backend, way);
            match operations.iter_mut().find(|found| found.name == name) {
                Some(found) => found.ways.push(way),
                None => operations.push(Operation {
                    name,
                    ways: vec![way],
                }),
            }
        }
    }
    operations
}

/// What each backend of this build finds on this machine.
fn devices() -> Vec<(Backend, Result<ComputeDevice, String>)> {
    let found = |backend| {
        ComputeDevice::open(backend).map_err(|error| match error {
            DeviceError::Absent { reason, .. } => reason,
            error => error.to_string(),
        })
    };
    device::compiled_in()
        .into_iter()
        .map(|backend| (backend, found(backend)))
        .collect()
}
