//! Cross-entropy: the negative log-likelihood of every trained token.

use std::borrow::Cow;

use super::passes::forward_backward;
use super::{MetricSpec, Metrics, Objective, ObjectiveSpec, ShardPass, Sums};
use crate::data::Batch;
use crate::gradient::Gradient;
use crate::model::{Decoder, ModelError};

/// Mean nats per trained token, the objective of pretraining and supervised fine-tuning.
#[derive(Debug, Clone, Copy, Default)]
pub struct CrossEntropy;

static EVALUATION: [MetricSpec; 1] = [MetricSpec::lower("bits_per_byte", "bits per byte")];

impl CrossEntropy {
    /// The names and units of the numbers that the objective measures.
    pub const SPEC: ObjectiveSpec = ObjectiveSpec {
        name: Cow::Borrowed("cross-entropy"),
        loss_unit: Cow::Borrowed("nats per token"),
        step: Cow::Borrowed(&[]),
        evaluation: Cow::Borrowed(&EVALUATION),
    };
}

impl Objective for CrossEntropy {
    fn spec(&self) -> ObjectiveSpec {
        Self::SPEC
    }

    /// The number of trained tokens.
    fn weight(&self, batch: &Batch) -> f64 {
        batch.weight()
    }

    fn shard(
        &self,
        model: &Decoder,
        batch: &Batch,
        pass: &ShardPass,
    ) -> Result<(Sums, Gradient), ModelError> {
        let (nats, gradient) = forward_backward(model, batch, pass, None)?;
        Ok((sums(nats), gradient))
    }

    fn measure(&self, model: &Decoder, batch: &Batch) -> Result<Sums, ModelError> {
        let nats = model.evaluate(batch)?.into_scalar::<f32>();
        Ok(sums(f64::from(nats)))
    }

    fn step_metrics(&self, _sums: &Sums, _weight: f64) -> Metrics {
        Metrics::default()
    }

    /// Bits per UTF-8 byte of the text, which can be compared between tokenizers.
    fn evaluation_metrics(&self, sums: &Sums, _weight: f64, bytes: u64) -> Metrics {
        let bits_per_byte = sums.loss / std::f64::consts::LN_2 / bytes as f64;
        Metrics::of(&EVALUATION, [bits_per_byte])
    }
}

fn sums(nats: f64) -> Sums {
    Sums {
        loss: nats,
        others: Vec::new(),
    }
}
