//! Running text as training data, cut into windows in a defined order.

use super::{
    Batch, Corpus, DataError, DataView, EpochSize, FileRecord, Sampler, Segment, TokenStream,
    Tokenizer, TrainingData, ViewSpec, eval_batches,
};

impl TrainingData for Corpus {
    fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn files(&self) -> &[FileRecord] {
        &self.files
    }

    fn train_tokens(&self) -> u64 {
        Self::train_tokens(self)
    }

    fn val_tokens(&self) -> Option<u64> {
        Some(self.val.as_ref()?.len() as u64)
    }

    fn val_bytes(&self) -> u64 {
        self.val_bytes
    }

    fn token_bytes(&self) -> u64 {
        Self::token_bytes(self)
    }

    fn text(&self) -> Option<&Corpus> {
        Some(self)
    }

    fn view(&self, spec: &ViewSpec) -> Result<Box<dyn DataView>, DataError> {
        let sampler = Sampler::mixed(
            self,
            &spec.weights,
            spec.sampling,
            spec.sequence_len,
            spec.seed,
        )?;
        Ok(Box::new(WindowView {
            sampler,
            val: self.val.clone(),
            sequence_len: spec.sequence_len,
        }))
    }
}

/// Windows of one length in a defined order.
#[derive(Debug)]
struct WindowView {
    sampler: Sampler,
    val: Option<TokenStream>,
    sequence_len: usize,
}

impl DataView for WindowView {
    fn batch(&self, first: u64, count: usize) -> Batch {
        self.sampler.batch(first, count)
    }

    fn sequence(&self, number: u64) -> Vec<Segment> {
        let batch = self.sampler.batch(number, 1);
        let first = batch.tokens.first().copied();
        let tokens: Vec<u32> = first.into_iter().chain(batch.targets).collect();
        vec![Segment {
            place: None,
            trained: (0..tokens.len()).map(|at| at > 0).collect(),
            tokens,
        }]
    }

    fn epoch(&self) -> EpochSize {
        EpochSize {
            sequences: self.sampler.windows_per_epoch(),
            targets: self.sampler.tokens_per_epoch(),
        }
    }

    fn eval_batches(&self, count: usize) -> Option<Box<dyn Iterator<Item = Batch> + '_>> {
        let val = self.val.as_ref()?;
        Some(Box::new(eval_batches(val, self.sequence_len, count)))
    }

    fn widest(&self) -> usize {
        self.sequence_len
    }
}
