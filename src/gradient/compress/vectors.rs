//! How vectors (norms, biases) travel beside coded matrices.

use half::bf16;

use super::CompressError;

/// How vectors travel. They are few numbers, but at high ratios they would be most of what is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Vectors {
    /// In f32, in every step.
    #[default]
    Whole,
    /// In bf16, in one step of so many. Until then their gradients are added up; in between the sum
    /// over all workers is zero.
    Seldom {
        /// Steps from one message to the next.
        every: u64,
    },
}

impl Vectors {
    /// Whether something stays for later steps.
    pub(super) fn leave_something(self) -> bool {
        self != Self::Whole
    }

    /// The bytes that an element takes in a step, on average.
    pub(super) fn bytes_per_element(self) -> f64 {
        match self {
            Self::Whole => 4.0,
            Self::Seldom { every } => 2.0 / every as f64,
        }
    }

    fn are_sent(self, step: u64) -> bool {
        match self {
            Self::Whole => true,
            Self::Seldom { every } => (step + 1).is_multiple_of(every),
        }
    }

    /// Appends what a step sends of a vector, and subtracts it.
    pub(super) fn encode(self, step: u64, values: &mut [f32], code: &mut Vec<u8>) {
        if !self.are_sent(step) {
            return;
        }
        for value in values {
            match self {
                Self::Whole => {
                    code.extend(value.to_le_bytes());
                    *value = 0.0;
                }
                Self::Seldom { .. } => {
                    // The largest f32 would be rounded to infinity.
                    let largest = f32::from(bf16::MAX);
                    let rounded = bf16::from_f32(value.clamp(-largest, largest));
                    code.extend(rounded.to_le_bytes());
                    *value -= f32::from(rounded);
                }
            }
        }
    }

    /// Adds up the codes of all workers.
    pub(super) fn decode(
        self,
        step: u64,
        codes: &[&[u8]],
        sum: &mut [f32],
    ) -> Result<(), (usize, CompressError)> {
        let size = match self {
            Self::Whole => 4,
            Self::Seldom { .. } => 2,
        };
        let expected = match self.are_sent(step) {
            true => size * sum.len(),
            false => 0,
        };
        for (worker, code) in codes.iter().enumerate() {
            if code.len() != expected {
                let reason = format!("{} bytes for a vector of {expected}", code.len());
                return Err((worker, CompressError::Damaged(reason)));
            }
            for (sum, code) in sum.iter_mut().zip(code.chunks_exact(size)) {
                *sum += match *code {
                    [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
                    [a, b] => f32::from(bf16::from_le_bytes([a, b])),
                    _ => unreachable!("an element has {size} bytes"),
                };
            }
        }
        Ok(())
    }
}
