//! What this process runs on: for `runner env` and for run.json, so that a figure can be traced to
//! a machine.

use serde::Serialize;

/// Facts about the build and the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Environment {
    /// Version of this crate.
    pub firebrick: &'static str,
    /// Version of burn.
    pub burn: &'static str,
    /// Operating system and architecture.
    pub platform: String,
    /// The CPU's model name.
    pub cpu: String,
    /// Vector instruction sets found at run time, of those our kernels use.
    pub cpu_features: Vec<&'static str>,
    /// Worker threads of this process.
    pub threads: usize,
    /// Physical memory in bytes; none where the system does not say.
    pub memory_bytes: Option<u64>,
}

impl Environment {
    /// Looks around. Call it after the thread pool is set up.
    pub fn detect() -> Self {
        Self {
            firebrick: env!("CARGO_PKG_VERSION"),
            burn: "0.22.1",
            platform: format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH),
            cpu: cpu_name(),
            cpu_features: cpu_features(),
            threads: rayon::current_num_threads(),
            memory_bytes: proc_kilobytes("/proc/meminfo", "MemTotal:"),
        }
    }
}

/// The CPU's model name.
pub fn cpu_name() -> String {
    cpu_model().unwrap_or_else(|| "unknown".to_string())
}

/// The most memory this process has held at once, in bytes; none where the system does not say.
pub fn peak_memory_bytes() -> Option<u64> {
    proc_kilobytes("/proc/self/status", "VmHWM:")
}

/// The memory this process holds now, in bytes; none where the system does not say.
pub fn resident_memory_bytes() -> Option<u64> {
    proc_kilobytes("/proc/self/status", "VmRSS:")
}

/// Memory that this process can still take: what the system has available, within what the limit of
/// the control group leaves. None where the system does not say.
pub fn memory_limit_bytes() -> Option<u64> {
    let free = proc_kilobytes("/proc/meminfo", "MemAvailable:")?;
    let number = |file: &str| -> Option<u64> {
        let text = std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?;
        // "max" where there is no limit.
        text.trim().parse().ok()
    };
    // A container sees its own group at the top. Pages of files that were read count as used there
    // and are given up when memory is needed.
    let left = number("memory.max").zip(number("memory.current"));
    let cached = labelled("/sys/fs/cgroup/memory.stat", "inactive_file ").unwrap_or(0);
    let left = left.map(|(limit, used)| limit.saturating_sub(used.saturating_sub(cached)));
    Some(left.map_or(free, |left| free.min(left)))
}

fn proc_kilobytes(file: &str, label: &str) -> Option<u64> {
    Some(labelled(file, label)? * 1024)
}

/// The number behind a label at the beginning of a line.
fn labelled(file: &str, label: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(label))?;
    let number = line.trim().trim_end_matches("kB");
    number.trim().parse().ok()
}

#[cfg(target_os = "macos")]
fn cpu_model() -> Option<String> {
    let output = std::process::Command::new("sysctl")
        .args(["-n", "machdep.cpu.brand_string"])
        .output()
        .ok()?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_string())
}

#[cfg(not(target_os = "macos"))]
fn cpu_model() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let value = |label: &str| {
        let line = text.lines().find(|line| line.starts_with(label))?;
        line.split_once(':')
            .map(|(_, value)| value.trim().to_string())
    };
    // Virtual machines often hide the model's name; family and model still identify the core.
    match (value("model name"), value("cpu family"), value("model\t")) {
        (Some(name), Some(family), Some(model)) => {
            Some(format!("{name} (family {family}, model {model})"))
        }
        (name, ..) => name,
    }
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<&'static str> {
    let mut found = Vec::new();
    macro_rules! probe {
        ($($feature:tt),*) => {
            $(if std::arch::is_x86_feature_detected!($feature) { found.push($feature); })*
        };
    }
    probe!(
        "avx2",
        "fma",
        "avx512f",
        "avx512bw",
        "avx512vnni",
        "avx512bf16"
    );
    found
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Vec<&'static str> {
    Vec::new()
}
