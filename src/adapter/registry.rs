//! Several adapters over one base model.

use std::collections::BTreeMap;

use super::{Adapter, AdapterError};
use crate::model::Decoder;

/// Adapters by name, and the base model they are for. The base model is never changed: a model with
/// an adapter shares its weights, and taking an adapter off, or a merge back, is taking the base
/// model again, bit for bit.
///
/// ```
/// use burn::tensor::Device;
/// use firebrick::adapter::{Adapter, Registry};
/// use firebrick::config::Preset;
/// use firebrick::model::{Decoder, DecoderSpec};
///
/// let spec = DecoderSpec {
///     shape: Preset::Stories260K.shape(),
///     vocab_size: 16,
///     eos_token_id: None,
///     bos_token_id: None,
/// };
/// let mut registry = Registry::new(Decoder::new(&spec, 1, &Device::flex())?);
/// registry.insert("empty", Adapter::default())?;
/// let model = registry.with("empty")?;
/// assert_eq!(registry.names().collect::<Vec<_>>(), ["empty"]);
/// assert!(!model.is_adapted());
/// # Ok::<(), firebrick::adapter::AdapterError>(())
/// ```
#[derive(Debug)]
pub struct Registry {
    base: Decoder,
    adapters: BTreeMap<String, Adapter>,
}

impl Registry {
    /// No adapters yet.
    pub fn new(base: Decoder) -> Self {
        Self {
            base,
            adapters: BTreeMap::new(),
        }
    }

    /// The base model as it came.
    pub fn base(&self) -> &Decoder {
        &self.base
    }

    /// The names of the adapters, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.keys().map(String::as_str)
    }

    /// Adds an adapter.
    ///
    /// # Errors
    /// A name that is taken; an adapter that does not fit the base model.
    pub fn insert(&mut self, name: &str, adapter: Adapter) -> Result<(), AdapterError> {
        if self.adapters.contains_key(name) {
            return Err(self.name("already an", name));
        }
        adapter.attach(self.base.clone())?;
        self.adapters.insert(name.to_string(), adapter);
        Ok(())
    }

    /// Takes an adapter out.
    ///
    /// # Errors
    /// An unknown name.
    pub fn remove(&mut self, name: &str) -> Result<Adapter, AdapterError> {
        let removed = self.adapters.remove(name);
        removed.ok_or_else(|| self.name("no", name))
    }

    /// An adapter by name.
    ///
    /// # Errors
    /// An unknown name.
    pub fn get(&self, name: &str) -> Result<&Adapter, AdapterError> {
        self.adapters.get(name).ok_or_else(|| self.name("no", name))
    }

    /// The base model with one adapter.
    ///
    /// # Errors
    /// An unknown name.
    pub fn with(&self, name: &str) -> Result<Decoder, AdapterError> {
        self.get(name)?.attach(self.base.clone())
    }

    /// The base model with a weighted sum of adapters.
    ///
    /// # Errors
    /// An unknown name; as [`Adapter::mix`].
    pub fn mixed(&self, parts: &[(&str, f64)]) -> Result<Decoder, AdapterError> {
        let parts = parts
            .iter()
            .map(|(name, weight)| Ok((self.get(name)?, *weight)));
        let parts: Vec<(&Adapter, f64)> = parts.collect::<Result<_, AdapterError>>()?;
        Adapter::mix(&parts)?.attach(self.base.clone())
    }

    /// Dense weights that compute what the base model and an adapter do.
    ///
    /// # Errors
    /// An unknown name; [`AdapterError::Untrained`].
    pub fn merged(&self, name: &str) -> Result<Decoder, AdapterError> {
        let adapter = self.get(name)?;
        if adapter.is_untrained() {
            return Err(AdapterError::Untrained);
        }
        Ok(adapter.attach(self.base.clone())?.merged())
    }

    fn name(&self, problem: &'static str, name: &str) -> AdapterError {
        let known: Vec<&str> = self.names().collect();
        AdapterError::Name {
            problem,
            name: name.to_string(),
            known: if known.is_empty() {
                "none".to_string()
            } else {
                known.join(", ")
            },
        }
    }
}
