//! The texts behind a corpus: files found and hashed at once, read only when they are needed.
//!
//! The hashes are enough to know which cached tokens belong to a config. Only on a cache miss are
//! the files read as text, split, and kept until everything is tokenised.

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use super::DataError;
use super::documents::{self, Documents, Format};
use super::files::{FileRecord, existing_file, expand};
use super::notes::{self, Findings, Summary};
use super::split::{Split, split};
use crate::config::{DataConfig, DatasetConfig, DatasetKind};

/// Part of every cache key. Raise it when the same files and config give other tokens, or the
/// files of the cache other contents.
const CACHE_VERSION: &str = "firebrick tokens 1";

/// The files of a config, hashed, and their texts once they are needed.
pub(super) struct Source<'a> {
    pub(super) config: &'a DataConfig,
    pub(super) datasets: Vec<Dataset<'a>>,
    pub(super) val_file: Option<FileRecord>,
    texts: OnceCell<Texts>,
}

/// One dataset's files.
pub(super) struct Dataset<'a> {
    pub(super) config: &'a DatasetConfig,
    pub(super) files: Vec<FileRecord>,
}

impl Dataset<'_> {
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.files.iter().map(|file| file.path.clone()).collect()
    }
}

/// The documents on either side of the cut.
pub(super) struct Texts {
    /// Training documents per dataset.
    pub(super) train: Vec<Vec<String>>,
    /// Validation documents of all datasets.
    pub(super) val: Vec<String>,
    /// What was found while reading them.
    pub(super) summary: Summary,
}

impl<'a> Source<'a> {
    /// Finds and hashes the files.
    pub(super) fn survey(config: &'a DataConfig) -> Result<Self, DataError> {
        if config.datasets.is_empty() {
            return Err(DataError::NoDatasets);
        }
        let mut datasets = Vec::with_capacity(config.datasets.len());
        for dataset in &config.datasets {
            let paths = expand(dataset.path.as_slice())?;
            let files = paths
                .iter()
                .map(|path| FileRecord::survey(path))
                .collect::<Result<_, _>>()?;
            datasets.push(Dataset {
                config: dataset,
                files,
            });
        }
        let val_file = match &config.val_path {
            Some(path) => Some(FileRecord::survey(&existing_file(path)?)?),
            None => None,
        };
        Ok(Self {
            config,
            datasets,
            val_file,
            texts: OnceCell::new(),
        })
    }

    /// Whether the config asks for a validation part.
    pub(super) fn validates(&self) -> bool {
        self.val_file.is_some() || self.config.val_fraction > 0.0
    }

    /// The text field of the validation file's records: the first dataset's.
    fn val_field(&self) -> &str {
        &self.datasets[0].config.fields.text
    }

    /// Every file once, for run.json.
    pub(super) fn files(&self) -> Vec<FileRecord> {
        let mut seen = HashSet::new();
        let datasets = self.datasets.iter().flat_map(|dataset| &dataset.files);
        datasets
            .chain(&self.val_file)
            .filter(|file| seen.insert(&file.path))
            .cloned()
            .collect()
    }

    /// Hash of everything that decides the documents and the split. Paths and weights do not.
    pub(super) fn fingerprint(&self) -> blake3::Hash {
        let mut key = Key::new(CACHE_VERSION);
        let mut add_file = |file: &FileRecord, field: &str| {
            key.add("file");
            key.add(&file.blake3);
            if Format::of(&file.path) == Format::Records {
                key.add(field);
            }
        };
        for dataset in &self.datasets {
            for file in &dataset.files {
                add_file(file, &dataset.config.fields.text);
            }
        }
        if let Some(file) = &self.val_file {
            add_file(file, self.val_field());
        }
        for dataset in &self.datasets {
            key.add(&dataset.files.len().to_string());
        }
        match self.val_file {
            Some(_) => key.add("val_path"),
            None => key.add(&format!(
                "val_fraction {:016x}",
                self.config.val_fraction.to_bits()
            )),
        }
        key.finish()
    }

    /// Reads and splits the documents, the first time it is called.
    pub(super) fn texts(&self) -> Result<&Texts, DataError> {
        if let Some(texts) = self.texts.get() {
            return Ok(texts);
        }
        let texts = self.read_texts()?;
        Ok(self.texts.get_or_init(|| texts))
    }

    fn read_texts(&self) -> Result<Texts, DataError> {
        let mut texts = Texts {
            train: Vec::with_capacity(self.datasets.len()),
            val: Vec::new(),
            summary: Summary::default(),
        };
        let val_fraction = if self.val_file.is_some() {
            0.0
        } else {
            self.config.val_fraction
        };
        for (index, dataset) in self.datasets.iter().enumerate() {
            let files = read_files(&dataset.files, &dataset.config.fields.text)?;
            if files
                .iter()
                .all(|(_, documents)| documents.texts.is_empty())
            {
                return Err(DataError::Empty {
                    what: notes::dataset_name(index, &dataset.paths()),
                });
            }
            texts.summary.datasets.push(Findings::of(&files));
            let Split { train, val } = split(files, val_fraction);
            texts.train.push(train);
            texts.val.extend(val);
        }
        if let Some(file) = &self.val_file {
            let files = read_files(std::slice::from_ref(file), self.val_field())?;
            texts.summary.val = Some(Findings::of(&files));
            texts.val = files
                .into_iter()
                .flat_map(|(_, documents)| documents.texts)
                .collect();
            if texts.val.is_empty() {
                return Err(DataError::Empty {
                    what: format!("the validation file `{}`", file.path.display()),
                });
            }
        }
        // The end tokens that will be added are not bytes of the text.
        texts.summary.val_bytes = texts.val.iter().map(|text| text.len() as u64).sum();
        Ok(texts)
    }

    /// Files that are in the data twice, which the user may or may not mean.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut first: HashMap<&str, (usize, &FileRecord)> = HashMap::new();
        let mut warnings = Vec::new();
        for (index, dataset) in self.datasets.iter().enumerate() {
            for file in &dataset.files {
                match first.get(file.blake3.as_str()) {
                    Some((other, same)) if file.bytes > 0 => warnings.push(format!(
                        "warning: `{}` in data.datasets[{index}] has the same contents as `{}` in data.datasets[{other}]",
                        file.path.display(),
                        same.path.display(),
                    )),
                    _ => {
                        first.insert(&file.blake3, (index, file));
                    }
                }
            }
        }
        if let Some(val) = &self.val_file
            && let Some((index, _)) = first.get(val.blake3.as_str())
        {
            warnings.push(format!(
                "warning: the validation file `{}` is also trained on, in data.datasets[{index}]: its loss will say nothing",
                val.path.display(),
            ));
        }
        warnings
    }

    /// A line per dataset, and one for the validation file.
    pub(super) fn describe(&self, summary: &Summary) -> Vec<String> {
        let mut lines = Vec::new();
        for (index, (dataset, findings)) in self.datasets.iter().zip(&summary.datasets).enumerate()
        {
            let formats = notes::formats(
                &dataset.paths(),
                dataset.config.kind,
                &dataset.config.fields.text,
            );
            lines.push(format!(
                "data.datasets[{index}]: {formats}: {}",
                findings.describe()
            ));
        }
        if let (Some(file), Some(findings)) = (&self.val_file, &summary.val) {
            let paths = [file.path.clone()];
            let formats = notes::formats(&paths, DatasetKind::Auto, self.val_field());
            lines.push(format!("data.val_path: {formats}: {}", findings.describe()));
        }
        lines
    }
}

fn read_files(files: &[FileRecord], field: &str) -> Result<Vec<(Format, Documents)>, DataError> {
    files
        .iter()
        .map(|file| Ok((Format::of(&file.path), documents::read(file, field)?)))
        .collect()
}

/// A hash over several strings that keeps them apart.
pub(super) struct Key(blake3::Hasher);

impl Key {
    pub(super) fn new(purpose: &str) -> Self {
        let mut key = Self(blake3::Hasher::new());
        key.add(purpose);
        key
    }

    pub(super) fn add(&mut self, part: &str) {
        self.0.update(&(part.len() as u64).to_le_bytes());
        self.0.update(part.as_bytes());
    }

    pub(super) fn finish(self) -> blake3::Hash {
        self.0.finalize()
    }
}
