//! Merging: one model of dense weights in the place of a base model and an adapter.

use burn::tensor::Tensor;

use super::{Adapter, AdapterError};
use crate::data::Batch;
use crate::model::Decoder;

/// A merged model, and how far it is from what it was merged from.
#[derive(Debug)]
pub struct Merged {
    /// Dense weights, no adapter.
    pub model: Decoder,
    /// The largest difference of a logit from those of base and adapter, over the tokens that were
    /// tried.
    pub logit_error: f64,
    /// The largest change of a logit that the adapter makes, over the same tokens.
    pub logit_change: f64,
}

/// Merges `adapter` into the base model `base` (on a plain device), in f32, and compares both on
/// `tokens`.
///
/// # Errors
/// An adapter that does not fit; [`AdapterError::Untrained`] for one that changes nothing.
pub fn merge(base: &Decoder, adapter: &Adapter, tokens: &[u32]) -> Result<Merged, AdapterError> {
    if adapter.is_untrained() {
        return Err(AdapterError::Untrained);
    }
    let adapted = adapter.attach(base.clone())?;
    let model = adapted.clone().merged();
    let text = Batch::of_prompt(tokens);
    let [plain, with_adapter, merged] = [base, &adapted, &model].map(|model| model.forward(&text));
    let (plain, with_adapter, merged) = (plain?, with_adapter?, merged?);
    Ok(Merged {
        logit_error: largest_difference(&with_adapter, &merged),
        logit_change: largest_difference(&with_adapter, &plain),
        model,
    })
}

fn largest_difference(a: &Tensor<2>, b: &Tensor<2>) -> f64 {
    let difference = (a.clone() - b.clone()).abs().max();
    f64::from(difference.into_scalar::<f32>())
}
