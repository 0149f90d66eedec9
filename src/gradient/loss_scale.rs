//! Dynamic loss scaling for f16 (Micikevicius et al., 2018, section 3.2), with PyTorch's constants.
//!
//! f16 cannot hold gradients below 6e-8. So the loss, and with it every gradient, is multiplied by
//! a scale that is as large as the gradients allow: halved when one overflows, doubled after a long
//! time without. Powers of two change the exponent of a number and nothing else.

use serde::{Deserialize, Serialize};

/// The scale and how long it has held.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScale {
    /// What the loss is multiplied by.
    pub scale: f64,
    /// Steps in a row without an overflow.
    pub good_steps: u32,
}

/// Steps without an overflow after which the scale is doubled.
const PATIENCE: u32 = 2000;
/// Beyond it, gradients that small no longer matter.
const LARGEST: f64 = (1u64 << 24) as f64;

impl Default for LossScale {
    fn default() -> Self {
        Self {
            scale: 65536.0,
            good_steps: 0,
        }
    }
}

impl LossScale {
    /// After a step whose gradient was finite.
    pub fn held(&mut self) {
        self.good_steps += 1;
        if self.good_steps == PATIENCE {
            self.scale = (self.scale * 2.0).min(LARGEST);
            self.good_steps = 0;
        }
    }

    /// After a step whose gradient was not finite. False when the scale cannot be lowered any
    /// more, so that it is not the scale's fault.
    pub fn overflowed(&mut self) -> bool {
        self.good_steps = 0;
        let can_be_lowered = self.scale > 1.0;
        self.scale = (self.scale / 2.0).max(1.0);
        can_be_lowered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r9_the_scale_halves_on_overflow_and_doubles_after_a_long_time_without() {
        let mut scale = LossScale::default();
        assert!(scale.overflowed());
        assert_eq!(scale.scale, 32768.0);
        for _ in 0..PATIENCE - 1 {
            scale.held();
        }
        assert_eq!(scale.scale, 32768.0);
        scale.held();
        assert_eq!(scale.scale, 65536.0);
        (0..16).for_each(|_| assert!(scale.overflowed()));
        assert_eq!(scale.scale, 1.0);
        assert!(!scale.overflowed());
        (0..100 * PATIENCE).for_each(|_| scale.held());
        assert_eq!(scale.scale, LARGEST);
    }
}
