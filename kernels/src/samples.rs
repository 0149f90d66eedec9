//! What tests of several families draw from.

use crate::panel::Path;

/// Numbers that are the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> usize {
        let state = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = state.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize
    }

    /// Between minus and plus `scale`.
    pub fn values(&mut self, count: usize, scale: f32) -> Vec<f32> {
        let value = |_| (self.bits() as f32 / (1u64 << 30) as f32 - 1.0) * scale;
        (0..count).map(value).collect()
    }
}

/// The paths that this processor can take.
pub fn paths() -> impl Iterator<Item = Path> {
    Path::ALL.into_iter().filter(|path| path.available())
}
