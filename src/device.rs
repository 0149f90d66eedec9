//! The device a run computes on: chosen at run time among those compiled in and present.
//!
//! The CPU is always there. A GPU needs a Cargo feature (`cuda`, or `wgpu` for Vulkan, Metal and
//! DirectX) and a driver. What was asked for by name is used or is an error; [`Backend::Auto`] takes
//! the best that is there. An adapter that only emulates a GPU on the CPU is slower than the CPU
//! itself, so that `auto` passes it over.

use burn::tensor::{Device, FloatDType, TensorData};

use crate::config::{Backend, Dtype};

/// An opened device.
#[derive(Debug, Clone)]
pub struct ComputeDevice {
    /// What computes; never [`Backend::Auto`].
    pub backend: Backend,
    /// What the hardware calls itself.
    pub name: String,
    /// burn's handle, without autodiff.
    pub device: Device,
    /// What [`Backend::Auto`] would have liked better, and why each was not taken; empty for a
    /// device that was asked for by name.
    pub passed_over: Vec<String>,
}

/// A device that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The binary does not contain the backend.
    #[error("device.backend = \"{}\", and this runner was built without it", backend.name())]
    NotCompiledIn {
        /// The backend asked for.
        backend: Backend,
    },
    /// The machine has no such device, or its driver does not answer.
    #[error("device.backend = \"{}\", and there is no such device: {reason}", backend.name())]
    Absent {
        /// The backend asked for.
        backend: Backend,
        /// What the driver or loader said.
        reason: String,
    },
    /// The device cannot compute in a dtype.
    #[error("model.dtype = \"{}\", and {device} does not compute in it", dtype.name())]
    Dtype {
        /// The dtype asked for.
        dtype: Dtype,
        /// The device's name.
        device: String,
    },
}

impl DeviceError {
    /// What to do about it.
    pub fn help(&self) -> String {
        match self {
            Self::NotCompiledIn { backend } => format!(
                "build it in with `cargo build --release --features {}`, or set device.backend = \"cpu\"",
                backend.name()
            ),
            Self::Absent {
                backend: Backend::Cuda,
                ..
            } => "`nvidia-smi` must list a GPU; set device.backend = \"cpu\" to train without one"
                .to_string(),
            Self::Absent { .. } => {
                "install the GPU's Vulkan driver, so that `vulkaninfo --summary` lists it (macOS \
                 and Windows bring their own), or set device.backend = \"cpu\""
                    .to_string()
            }
            Self::Dtype { .. } => "set model.dtype = \"f32\", or \"auto\"".to_string(),
        }
    }
}

impl ComputeDevice {
    /// The CPU: burn's flex backend.
    pub fn cpu() -> Self {
        Self {
            backend: Backend::Cpu,
            name: crate::environment::cpu_name(),
            device: Device::flex(),
            passed_over: Vec::new(),
        }
    }

    /// Opens what `wanted` names; with [`Backend::Auto`] the first of cuda, wgpu and cpu that works.
    ///
    /// # Errors
    /// A backend asked for by name that was not compiled in or finds no device.
    pub fn open(wanted: Backend) -> Result<Self, DeviceError> {
        match wanted {
            Backend::Cpu => Ok(Self::cpu()),
            Backend::Cuda => open_cuda(),
            Backend::Wgpu => open_wgpu().map(|found| found.device),
            Backend::Auto => Ok(best()),
        }
    }

    /// The device in one line, as `cpu: AMD EPYC`, and with `auto` what was passed over for it.
    pub fn describe(&self) -> String {
        let chosen = format!("{}: {}", self.backend.name(), self.name);
        if self.passed_over.is_empty() {
            return chosen;
        }
        format!(
            "{chosen} (auto passed over {})",
            self.passed_over.join(", ")
        )
    }

    /// The dtype to compute in: `auto` is bf16 on a GPU that computes in it and f32 elsewhere. On
    /// the CPU half precision saves memory and costs time: each product goes through f32.
    ///
    /// # Errors
    /// A dtype asked for by name that the device does not compute in.
    pub fn dtype(&self, wanted: Dtype) -> Result<(Dtype, FloatDType), DeviceError> {
        let has_bf16 = || !is_cpu(&self.device) && self.device.supports_dtype(FloatDType::BF16);
        let chosen = match wanted {
            Dtype::Auto if has_bf16() => Dtype::Bf16,
            Dtype::Auto => Dtype::F32,
            named => named,
        };
        let float = match chosen {
            Dtype::Bf16 => FloatDType::BF16,
            Dtype::F16 => FloatDType::F16,
            Dtype::F32 | Dtype::Auto => FloatDType::F32,
        };
        if self.device.supports_dtype(float) {
            return Ok((chosen, float));
        }
        Err(DeviceError::Dtype {
            dtype: chosen,
            device: self.name.clone(),
        })
    }
}

/// Whether a device (autodiff or not) is the CPU.
pub fn is_cpu(device: &Device) -> bool {
    device.clone().without_autodiff() == Device::flex()
}

/// What a tensor's `into_data` has returned, with its values as they are now. On a GPU the bytes are read
/// from the device at the first access to them (cubecl 0.11.3, `LazyDeviceController`), and a step
/// that updates the tensor in place before that would change them. Data that is kept while training goes
/// on has to pass through here.
pub(crate) fn read_now(data: TensorData) -> TensorData {
    std::hint::black_box(data.as_bytes());
    data
}

/// How many shares of a batch are worth computing at the same time: one per core, and one on a GPU,
/// which its own operations keep busy.
pub fn lanes(device: &Device) -> usize {
    if is_cpu(device) {
        rayon::current_num_threads()
    } else {
        1
    }
}

/// The backends in this binary.
pub fn compiled_in() -> Vec<Backend> {
    let gpus = [
        (Backend::Cuda, cfg!(feature = "cuda")),
        (Backend::Wgpu, cfg!(feature = "wgpu")),
    ];
    std::iter::once(Backend::Cpu)
        .chain(
            gpus.into_iter()
                .filter(|(_, built)| *built)
                .map(|(backend, _)| backend),
        )
        .collect()
}

/// The first of cuda, wgpu and cpu that works, with what was compiled in and passed over for it.
fn best() -> ComputeDevice {
    let mut passed_over = Vec::new();
    let gpu = open_cuda()
        .map_err(|error| passed_over.extend(reason(error)))
        .or_else(|()| {
            let found = open_wgpu().map_err(|error| passed_over.extend(reason(error)))?;
            if found.is_emulated {
                let name = &found.device.name;
                passed_over.push(format!("wgpu: {name} only emulates a GPU, on the CPU"));
                return Err(());
            }
            Ok(found.device)
        });
    ComputeDevice {
        passed_over,
        ..gpu.unwrap_or_else(|()| ComputeDevice::cpu())
    }
}

/// Why a backend that was compiled in is not used; none for one that was not.
fn reason(error: DeviceError) -> Option<String> {
    match error {
        DeviceError::NotCompiledIn { .. } => None,
        DeviceError::Absent { backend, reason } => Some(format!("{}: {reason}", backend.name())),
        DeviceError::Dtype { .. } => Some(error.to_string()),
    }
}

#[cfg(feature = "cuda")]
fn open_cuda() -> Result<ComputeDevice, DeviceError> {
    use burn::tensor::DeviceType;
    let mut found = Device::enumerate(DeviceType::Cuda).into_iter();
    let device = found.next().ok_or_else(|| DeviceError::Absent {
        backend: Backend::Cuda,
        reason: "the NVIDIA driver lists none".to_string(),
    })?;
    let name = device
        .identity()
        .map_or("unnamed NVIDIA GPU".to_string(), |identity| identity.name);
    Ok(ComputeDevice {
        backend: Backend::Cuda,
        name,
        device,
        passed_over: Vec::new(),
    })
}

#[cfg(not(feature = "cuda"))]
fn open_cuda() -> Result<ComputeDevice, DeviceError> {
    Err(DeviceError::NotCompiledIn {
        backend: Backend::Cuda,
    })
}

/// What wgpu found.
struct WgpuAdapter {
    device: ComputeDevice,
    /// Whether it is a program that stands in for a GPU.
    is_emulated: bool,
}

/// The adapter that wgpu likes best, or that `CUBECL_WGPU_DEFAULT_DEVICE` names.
#[cfg(feature = "wgpu")]
fn open_wgpu() -> Result<WgpuAdapter, DeviceError> {
    use burn::tensor::wgpu::{WgpuSetup, wgpu};
    use std::sync::OnceLock;
    // A process sets up wgpu once; asking for it again is an error.
    static OPENED: OnceLock<Result<(Device, WgpuSetup), String>> = OnceLock::new();
    let opened = OPENED.get_or_init(|| {
        let opened = Device::wgpu_options().init_with_setup();
        opened.map_err(|error| error.to_string())
    });
    let absent = |reason| DeviceError::Absent {
        backend: Backend::Wgpu,
        reason,
    };
    let (device, setup) = opened.as_ref().map_err(|reason| absent(reason.clone()))?;
    let adapter = setup.adapter.get_info();
    if setup.backend == wgpu::Backend::Gl {
        // What wgpu falls back to where there is no Vulkan: a first step did not end in minutes.
        return Err(absent(format!(
            "{} is there through OpenGL alone, on which training hangs",
            adapter.name
        )));
    }
    let device = ComputeDevice {
        backend: Backend::Wgpu,
        name: format!("{} through {:?}", adapter.name, setup.backend),
        device: device.clone(),
        passed_over: Vec::new(),
    };
    Ok(WgpuAdapter {
        device,
        is_emulated: adapter.device_type == wgpu::DeviceType::Cpu,
    })
}

#[cfg(not(feature = "wgpu"))]
fn open_wgpu() -> Result<WgpuAdapter, DeviceError> {
    Err(DeviceError::NotCompiledIn {
        backend: Backend::Wgpu,
    })
}
