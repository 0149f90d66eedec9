//! The products on a device that CubeCL compiles for: wgpu, CUDA, and what else burn has of them.

use burn_cubecl::CubeBackend;

use super::op::BlockwiseOps;

impl BlockwiseOps for CubeBackend {}
