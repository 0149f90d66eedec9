//! The device a run computes on: chosen at run time among those compiled in and present.
//!
//! The CPU is always there. A GPU needs a Cargo feature (`cuda`, or `wgpu` for Vulkan, Metal and
//! DirectX) and a driver. What was asked for by name is used or is an error; [`Backend::Auto`] takes
//! the best that is there. An adapter that only emulates a GPU on the CPU is slower than the CPU
//! itself, so that `auto` passes it over.

use burn::tensor::{Device, FloatDType};

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
                "`vulkaninfo --summary` must list a GPU (on macOS Metal is built \
                 in); set device.backend = \"cpu\" to train without one"
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
            Backend::Wgpu => open_wgpu().map(|(device, _)| device),
            Backend::Auto => Ok(best_gpu().unwrap_or_else(Self::cpu)),
        }
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

fn best_gpu() -> Option<ComputeDevice> {
    open_cuda().ok().or_else(|| {
        let (device, is_emulated) = open_wgpu().ok()?;
        (!is_emulated).then_some(device)
    })
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
    })
}

#[cfg(not(feature = "cuda"))]
fn open_cuda() -> Result<ComputeDevice, DeviceError> {
    Err(DeviceError::NotCompiledIn {
        backend: Backend::Cuda,
    })
}

/// The device, and whether a GPU is only emulated there.
#[cfg(feature = "wgpu")]
fn open_wgpu() -> Result<(ComputeDevice, bool), DeviceError> {
    use std::sync::OnceLock;
    // A process sets up wgpu once; asking for it again is an error.
    static OPENED: OnceLock<Result<Device, String>> = OnceLock::new();
    let opened = OPENED.get_or_init(|| {
        let device = Device::wgpu_options().init();
        device.map_err(|error| error.to_string())
    });
    let device = opened.clone().map_err(|reason| DeviceError::Absent {
        backend: Backend::Wgpu,
        reason,
    })?;
    let identity = device.identity();
    let is_emulated = identity
        .as_ref()
        .is_none_or(|identity| identity.physical.is_none());
    let opened = ComputeDevice {
        backend: Backend::Wgpu,
        name: identity.map_or("unnamed GPU".to_string(), |identity| identity.name),
        device,
    };
    Ok((opened, is_emulated))
}

#[cfg(not(feature = "wgpu"))]
fn open_wgpu() -> Result<(ComputeDevice, bool), DeviceError> {
    Err(DeviceError::NotCompiledIn {
        backend: Backend::Wgpu,
    })
}
