//! The model that a verb runs: a folder, and an adapter for it.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use clap::Args;

use super::CliError;
use crate::adapter::{self, Adapter, AdapterError};
use crate::config::{self, DecoderSpec, ModelShape};
use crate::data::Tokenizer;
use crate::model::folder::{self, quantiser};
use crate::model::{Decoder, ModelError, check_vocabulary};

/// `--model` and `--adapter`.
#[derive(Debug, Args)]
pub(super) struct ModelArgs {
    /// A run folder or a Hugging Face model folder; of an adapter alone, the base model is found by
    /// what it says
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// An adapter for it: the folder of a run with [adapter], or one that PEFT wrote
    #[arg(long, value_name = "DIR")]
    pub(super) adapter: Option<PathBuf>,
}

/// Where its parts are.
pub(super) struct ModelPlace {
    pub(super) base: PathBuf,
    pub(super) adapter: Option<PathBuf>,
    /// What is built: the base model as it is, or as the run had it that trained the adapter.
    pub(super) spec: DecoderSpec,
    /// Whether dense weights become codes.
    quantises: bool,
}

impl ModelArgs {
    /// Finds the parts and reads what kind of model it is.
    pub(super) fn find(&self) -> Result<ModelPlace, CliError> {
        let (base, adapter) = match &self.adapter {
            Some(adapter) => (self.model.clone(), Some(adapter.clone())),
            None if is_adapter(&self.model) => {
                let base = adapter::base_model(&self.model)?;
                let base = base.ok_or_else(|| CliError::NoBaseModel {
                    path: self.model.clone(),
                })?;
                (base, Some(self.model.clone()))
            }
            None => (self.model.clone(), None),
        };
        let mut spec = match folder::read_config(&base) {
            Err(ModelError::NotAModel { .. }) if base != self.model => {
                let path = self.model.clone();
                return Err(CliError::BaseModelGone { path, base });
            }
            spec => spec?,
        };
        let is_alone = self.adapter.is_none();
        let quantises = match &adapter {
            Some(adapter) => as_trained(&mut spec.shape, adapter, is_alone)?,
            None => false,
        };
        // A model that an adapter has taught to answer ends as the adapter's tokenizer says.
        let own = adapter.as_ref().map(|folder| folder.join("tokenizer.json"));
        if let Some(own) = own.filter(|file| file.exists()) {
            let eos = Tokenizer::from_file(&own)?.eos().map(|eos| eos.id);
            spec.eos_token_id = eos.or(spec.eos_token_id);
        }
        Ok(ModelPlace {
            base,
            adapter,
            spec,
            quantises,
        })
    }
}

/// Puts into `shape`, a base model's, what the run that trained an adapter had made of its weights.
/// Trits always: what they were rounded from is another model. Codes of four or eight bits where the
/// adapter is named alone; an adapter that is named with a base model is put beside its weights as
/// they are. Says whether dense weights become codes.
fn as_trained(shape: &mut ModelShape, adapter: &Path, is_alone: bool) -> Result<bool, CliError> {
    let resolved = adapter.join("resolved.toml");
    let is_dense = shape.ternary.is_none() && shape.blockwise.is_none();
    if !is_dense || !resolved.is_file() {
        return Ok(false);
    }
    let mut trained = shape.clone();
    config::load_quantization(&resolved)?.put_into(&mut trained);
    shape.ternary = trained.ternary;
    shape.blockwise = trained.blockwise.filter(|_| is_alone);
    Ok(shape.blockwise.is_some())
}

/// A folder that has an adapter and no model.
pub(super) fn is_adapter(folder: &Path) -> bool {
    folder.join(adapter::CONFIG).is_file() && !folder.join(folder::CONFIG).exists()
}

impl ModelPlace {
    /// The tokenizer that goes with the model: the adapter's, where it brings one.
    pub(super) fn tokenizer(&self) -> Result<Tokenizer, CliError> {
        let file = |folder: &Path| folder.join("tokenizer.json");
        let own = self
            .adapter
            .as_deref()
            .map(file)
            .filter(|file| file.exists());
        let tokenizer = Tokenizer::from_file(&own.unwrap_or_else(|| file(&self.base)))?;
        check_vocabulary(&self.spec, &tokenizer)?;
        Ok(tokenizer)
    }

    /// The base model, and the adapter read for it.
    pub(super) fn parts(&self, device: &Device) -> Result<(Decoder, Option<Adapter>), CliError> {
        let adapter = self.adapter.as_ref();
        // An adapter that does not fit is found before the weights are read.
        let adapter = adapter.map(|folder| Adapter::read(folder, &self.spec));
        let adapter = adapter.transpose()?;
        let base = match self.spec.shape.blockwise.filter(|_| self.quantises) {
            Some(blockwise) => {
                let mut quantiser = quantiser(blockwise);
                folder::load_quantising(&self.spec, &self.base, device, &mut quantiser)?
            }
            None => folder::load_as(&self.spec, &self.base, device)?,
        };
        Ok((base, adapter))
    }

    /// Both together, as inference computes them.
    pub(super) fn load(&self, device: &Device) -> Result<Decoder, CliError> {
        let (base, adapter) = self.parts(device)?;
        let model = match adapter {
            Some(adapter) => adapter.attach(base)?,
            None => base,
        };
        Ok(model.for_inference())
    }
}

impl From<AdapterError> for CliError {
    fn from(error: AdapterError) -> Self {
        match error {
            AdapterError::Model(error) => Self::Model(error),
            error => Self::Adapter(error),
        }
    }
}
