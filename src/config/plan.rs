//! What will run: the configuration with every default filled in and every contradiction refused.
//!
//! [`Config`] is what the TOML says; [`Plan`] is what follows from it. A plan can only be made by
//! [`load`] or [`Plan::from_config`], both of which run the same checks and report everything that
//! is wrong at once. Its `config` is fully resolved: written out as TOML and read back, it gives
//! the same plan, which is what makes `resolved.toml` in a run folder a faithful record.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::adapter::AdapterPlan;
use super::check::check;
use super::document::Document;
use super::error::{ConfigError, Issue};
use super::gradient::CompressionPlan;
use super::keys::{
    AdapterInit, Config, DataConfig, QuantizationConfig, Sampling, Task, TokenizerConfig,
};
use super::length::Length;
use super::phase::PhasePlan;
use super::resolve::resolve;
use super::shape::ModelShape;
use super::source::{Origin, Sources};
use super::spec::DecoderSpec;

/// What will run.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The configuration with every default that applies filled in and the preset expanded.
    pub config: Config,
    /// The model's shape; the vocabulary size comes from the tokenizer.
    pub shape: ModelShape,
    /// What the config.json of `model.base_model` says; its shape is `shape`.
    pub base: Option<DecoderSpec>,
    /// What is trained in the place of the base model's weights.
    pub adapter: Option<AdapterPlan>,
    /// How long to train.
    pub length: Length,
    /// How the gradients of workers are compressed; None adds them in f32.
    pub compression: Option<CompressionPlan>,
    /// The phases of the run in order, at least one. Settings that may differ between phases are
    /// read from here and not from `config`.
    pub phases: Vec<PhasePlan>,
}

/// Reads a configuration file, applies `--set` arguments (`train.max_steps=100`) and resolves it.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("x.toml");
/// std::fs::write(&path, r#"
///     [model]
///     preset = "stories-260k"
///     [[data.datasets]]
///     path = "data/*.txt"
///     [train]
///     max_steps = 100
/// "#)?;
/// let plan = firebrick::config::load(&path, &["train.max_steps=7".to_string()])?;
/// assert_eq!(plan.length, firebrick::config::Length::Steps(7));
/// assert_eq!(plan.shape.head_dim, 8);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn load(path: &Path, sets: &[String]) -> Result<Plan, ConfigError> {
    let sources = Sources {
        path: path.to_path_buf(),
        text: read(path)?,
        sets: sets.to_vec(),
    };
    Plan::from_sources(sources)
}

/// The `[quantization]` of a configuration file, and nothing else of it: what a run in whose folder
/// `resolved.toml` lies made of its base model's weights, wherever its data and its base model are by
/// now.
///
/// # Errors
/// A file that cannot be read or is no TOML; a section that is not one.
pub(crate) fn load_quantization(path: &Path) -> Result<QuantizationConfig, ConfigError> {
    #[derive(Deserialize)]
    struct Section {
        #[serde(default)]
        quantization: QuantizationConfig,
    }
    let text = read(path)?;
    match toml::from_str::<Section>(&text) {
        Ok(section) => Ok(section.quantization),
        Err(error) => Err(ConfigError::Invalid {
            issues: vec![Issue {
                message: error.message().to_string(),
                origin: None,
                help: None,
            }],
            sources: Sources {
                path: path.to_path_buf(),
                text,
                sets: Vec::new(),
            },
        }),
    }
}

/// No configuration comes near this; /dev/zero does.
const MAX_BYTES: u64 = 1 << 20;

pub(super) fn read(path: &Path) -> Result<String, ConfigError> {
    let unreadable = |source| ConfigError::Read {
        path: path.to_path_buf(),
        source,
    };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(ConfigError::TooLarge {
            path: path.to_path_buf(),
            limit: MAX_BYTES,
        });
    }
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        let before = &error.as_bytes()[..offset];
        ConfigError::NotUtf8 {
            path: path.to_path_buf(),
            offset,
            line: before.iter().filter(|&&byte| byte == b'\n').count() + 1,
        }
    })
}

impl Plan {
    /// Resolves a configuration built in code. It passes through the same checks as a file;
    /// issues point into the TOML it would be.
    ///
    /// ```
    /// use firebrick::config::{Config, DatasetConfig, Plan, Preset};
    ///
    /// let mut config = Config::default();
    /// config.model.preset = Some(Preset::Stories260K);
    /// config.data.datasets.push(DatasetConfig::new("data/*.txt"));
    /// config.train.max_steps = Some(100);
    /// let plan = Plan::from_config(config)?;
    /// assert_eq!(plan.shape.hidden_size, 64);
    /// # Ok::<(), firebrick::config::ConfigError>(())
    /// ```
    pub fn from_config(mut config: Config) -> Result<Self, ConfigError> {
        // A file that names val_path leaves val_fraction out; a struct cannot.
        let untouched = config.data.val_fraction == DataConfig::default().val_fraction;
        if config.data.val_path.is_some() && untouched {
            config.data.val_fraction = 0.0;
        }
        // So with the order of rows.
        if config.task != Task::Pretrain && config.data.sampling == DataConfig::default().sampling {
            config.data.sampling = Sampling::Epoch;
        }
        // So with a base model's tokenizer.
        if let Some(base) = &config.model.base_model
            && config.tokenizer == TokenizerConfig::default()
        {
            config.tokenizer = TokenizerConfig::of_model(base);
        }
        let (text, unwritable) = match toml::to_string(&config) {
            Ok(text) => (text, None),
            Err(error) => (String::new(), Some(error)),
        };
        let sources = Sources {
            path: PathBuf::from("Config"),
            text,
            sets: Vec::new(),
        };
        match unwritable {
            None => Self::from_sources(sources),
            Some(error) => Err(ConfigError::Invalid {
                issues: vec![Issue {
                    message: format!("this configuration cannot be written as TOML: {error}"),
                    origin: None,
                    help: None,
                }],
                sources,
            }),
        }
    }

    /// Resolves a text that has been read already.
    pub fn from_sources(sources: Sources) -> Result<Self, ConfigError> {
        let parsed = Document::parse(sources);
        let checked = check(parsed.document);
        let mut issues = [parsed.issues, checked.issues].concat();
        let mut plan = None;
        // Past a syntax error it is unknown what is missing and what was meant.
        if !parsed.is_partial {
            let rejected = [parsed.rejected, checked.rejected].concat();
            match Config::deserialize(checked.document.to_toml()) {
                Ok(config) => match resolve(config, &checked.document, &rejected) {
                    Ok(resolved) => plan = Some(resolved),
                    Err(contradictions) => issues.extend(contradictions),
                },
                // What the check cut out may have been required; it has been reported then.
                Err(_) if !issues.is_empty() => {}
                Err(error) => issues.push(Issue {
                    message: error.message().to_string(),
                    origin: None,
                    help: None,
                }),
            }
        }
        match plan {
            Some(plan) if issues.is_empty() => Ok(plan),
            _ => {
                // What has no place of its own is about the file as a whole, and comes last.
                issues.sort_by_key(|issue| {
                    let rank = issue.origin.as_ref().map(Origin::rank);
                    (rank.is_none(), rank)
                });
                Err(ConfigError::Invalid {
                    sources: checked.document.sources,
                    issues,
                })
            }
        }
    }

    /// Whether the base model becomes another one before it is adapted: codes of what an adapter's
    /// beginning leaves of its weights.
    pub fn changes_base(&self) -> bool {
        let begins = |adapter: &AdapterPlan| adapter.init != AdapterInit::Default;
        self.shape.blockwise.is_some() && self.adapter.as_ref().is_some_and(begins)
    }

    /// The resolved configuration as TOML: the contents of `resolved.toml`.
    pub fn to_toml(&self) -> String {
        // Every plan was read from TOML, so all its numbers, strings and paths fit into it.
        toml::to_string(&self.config).expect("a resolved config is TOML")
    }
}
