//! From files to rows of token ids: read, split, write, tokenise, count; or find the result of all
//! that in the cache.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use rayon::prelude::*;
use serde_json::{Map, Value};

use super::encode::{Encoder, Outcome};
use super::example::Example;
use super::faults::Faults;
use super::findings::{Counts, Findings, RowSummary};
use super::record::Record;
use super::set::{RowSetBuilder, file_paths};
use super::write::Writer;
use super::{Place, RowError, RowFormat};
use crate::config::{DatasetConfig, FieldNames, Overlong};
use crate::data::cache::{Lookup, TokenCache};
use crate::data::chat::{ChatTemplate, TemplateError};
use crate::data::files::FileRecord;
use crate::data::notes::{self, counted};
use crate::data::source::{Key, Source};
use crate::data::split::train_share;
use crate::data::token_stream::TokenStream;
use crate::data::{DataError, Tokenizer, records};

/// Part of every cache key. Raise it when the same files and config give other rows.
const CACHE_VERSION: &str = "firebrick rows 1";

/// The validation rows' name among the streams.
pub(super) const VAL: &str = "val";

/// The name of a dataset's training rows among the streams.
pub(super) fn train_name(index: usize) -> String {
    format!("train.{index}")
}

/// A record that has been read.
pub(super) struct Row {
    pub(super) example: Example,
    /// Number of its file among all files.
    pub(super) file: usize,
    pub(super) line: usize,
}

/// What it takes to make rows of a source.
pub(super) struct Preparation<'a> {
    pub(super) source: &'a Source<'a>,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) template: Result<&'a ChatTemplate, TemplateError>,
    /// The current time as chat templates see it.
    pub(super) time: Timestamp,
}

impl<'a> Preparation<'a> {
    /// All files: those of the datasets in order, and the validation file.
    pub(super) fn files(&self) -> impl Iterator<Item = &'a FileRecord> {
        let datasets = self
            .source
            .datasets
            .iter()
            .flat_map(|dataset| &dataset.files);
        datasets.chain(&self.source.val_file)
    }

    /// Everything that decides the rows.
    fn key(&self) -> String {
        let data = self.source.config;
        let mut key = Key::new(CACHE_VERSION);
        key.add(self.source.fingerprint().to_hex().as_str());
        for dataset in &self.source.datasets {
            key.add(dataset.config.kind.name());
            for (name, field) in dataset.config.fields.all() {
                key.add(name);
                key.add(field);
            }
        }
        for file in self.files() {
            let ending = file.path.extension().unwrap_or_default();
            key.add(&ending.to_string_lossy().to_lowercase());
        }
        key.add(&data.sequence_len.to_string());
        key.add(data.overlong.unwrap_or_default().name());
        key.add(data.train_on.unwrap_or_default().name());
        key.add(if data.chat_template.is_some() {
            "chat"
        } else {
            ""
        });
        let template = self
            .template
            .as_ref()
            .map_or("", |template| template.source());
        key.add(template);
        if template.contains("strftime_now") {
            // Such a template writes another text every day.
            key.add(&self.time.strftime("%F").to_string());
        }
        key.add(self.tokenizer.to_json());
        for token in [self.tokenizer.bos(), self.tokenizer.eos()] {
            key.add(token.map_or("", |token| &token.text));
        }
        key.finish().to_hex().to_string()
    }

    /// The rows as streams by name, what is known about them, and where they came from.
    pub(super) fn rows(
        &self,
        cache: &TokenCache,
        notes: &mut Vec<String>,
    ) -> Result<(HashMap<String, TokenStream>, RowSummary, &'static str), DataError> {
        let key = self.key();
        match cache.tokens(&key) {
            Lookup::Hit(file) => match serde_json::from_str(&file.summary) {
                Ok(summary) => return Ok((file.streams, summary, "cache hit")),
                Err(error) => notes.push(format!(
                    "warning: token cache: the summary of {key}: {error}; made anew"
                )),
            },
            Lookup::Miss => {}
            Lookup::Damaged(error) => notes.push(format!("warning: {error}; made anew")),
        }
        let (streams, summary) = self.make()?;
        // Numbers, names and places in structs, which always serialise.
        let json = serde_json::to_string(&summary).expect("a summary is valid JSON");
        match cache.store_tokens(&key, &json, &streams) {
            Ok(file) => Ok((file.streams, summary, "cache miss, now cached")),
            Err(error) => {
                notes.push(format!("warning: {error}; the rows stay in memory"));
                Ok((streams.into_iter().collect(), summary, "not cached"))
            }
        }
    }

    fn make(&self) -> Result<(Vec<(String, TokenStream)>, RowSummary), DataError> {
        let data = self.source.config;
        let mut summary = RowSummary::default();
        let mut faults = Faults::default();
        let mut val = RowSetBuilder::default();
        let mut streams = Vec::new();
        let mut first_file = 0;
        let vocab_size = self.tokenizer.vocab_size();
        let val_fraction = match self.source.val_file {
            Some(_) => 0.0,
            None => data.val_fraction,
        };
        for (index, dataset) in self.source.datasets.iter().enumerate() {
            let name = notes::dataset_name(index, &dataset.paths());
            let (mut rows, findings) =
                self.read(&name, dataset.config, &dataset.files, first_file)?;
            self.check_format(&name, &dataset.config.fields, findings.format)?;
            summary.datasets.push(findings);
            let tail = rows.split_off(train_share(rows.len(), val_fraction));
            let mut train = RowSetBuilder::default();
            self.encode(rows, &mut train, &mut summary.rows, &mut faults)?;
            summary.val_bytes += self.encode(tail, &mut val, &mut summary.rows, &mut faults)?;
            streams.extend(train.streams(&train_name(index), vocab_size));
            first_file += dataset.files.len();
        }
        if let Some(file) = &self.source.val_file {
            let config = self.source.datasets[0].config;
            let name = format!("the validation file `{}`", file.path.display());
            let (rows, findings) =
                self.read(&name, config, std::slice::from_ref(file), first_file)?;
            self.check_format(&name, &config.fields, findings.format)?;
            summary.val = Some(findings);
            summary.val_bytes = self.encode(rows, &mut val, &mut summary.rows, &mut faults)?;
        }
        streams.extend(val.streams(VAL, vocab_size));
        let datasets = summary.datasets.iter().chain(&summary.val);
        let rows = datasets.map(|findings| findings.rows).sum();
        faults.check(rows, data.sequence_len)?;
        summary.turn_end = summary.rows.turn_end();
        Ok((streams, summary))
    }

    fn check_format(
        &self,
        what: &str,
        names: &FieldNames,
        format: RowFormat,
    ) -> Result<(), RowError> {
        match (&self.template, format) {
            (_, RowFormat::Preference) => Err(RowError::Preference {
                what: what.to_string(),
                chosen: names.chosen.clone(),
            }),
            (Err(source), format) if format.is_conversation() => Err(RowError::NoTemplate {
                what: what.to_string(),
                source: source.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// Reads a dataset's records.
    pub(super) fn read(
        &self,
        what: &str,
        config: &DatasetConfig,
        files: &[FileRecord],
        first_file: usize,
    ) -> Result<(Vec<Row>, Findings), DataError> {
        let mut reader = Reader {
            names: &config.fields,
            format: RowFormat::of_kind(config.kind),
            unused: BTreeSet::new(),
            bad_labels: 0,
            rows: Vec::new(),
        };
        for (index, file) in files.iter().enumerate() {
            let number = first_file + index;
            if records::holds_records(&file.path) {
                records::read(file, &mut |fields, line| {
                    Ok(reader.take(fields, &file.path, number, line)?)
                })?;
            } else {
                let example = Example::Text(file.read_text()?.text);
                let (file, line) = (number, 1);
                reader.rows.push(Row {
                    example,
                    file,
                    line,
                });
            }
        }
        if reader.rows.is_empty() {
            let what = what.to_string();
            return Err(DataError::Empty { what });
        }
        let findings = Findings {
            format: reader.format.unwrap_or(RowFormat::Text),
            rows: reader.rows.len() as u64,
            unused: reader.unused,
            bad_labels: reader.bad_labels,
        };
        Ok((reader.rows, findings))
    }

    pub(super) fn writer(&self) -> Writer<'a> {
        let data = self.source.config;
        Writer {
            template: self.template.as_ref().ok().copied(),
            always_chat: data.chat_template.is_some(),
            eos: self.tokenizer.eos().map_or("", |eos| &eos.text),
            train_on: data.train_on.unwrap_or_default(),
        }
    }

    pub(super) fn encoder(&self) -> Encoder<'a> {
        Encoder {
            tokenizer: self.tokenizer,
            sequence_len: self.source.config.sequence_len,
            overlong: self.source.config.overlong.unwrap_or_default(),
        }
    }

    /// Writes and tokenises rows on all cores. Returns the bytes of their trained text.
    fn encode(
        &self,
        rows: Vec<Row>,
        set: &mut RowSetBuilder,
        counts: &mut Counts,
        faults: &mut Faults,
    ) -> Result<u64, DataError> {
        let paths: Arc<[PathBuf]> = file_paths(self.files().map(|file| file.path.as_path()));
        let (writer, encoder) = (self.writer(), self.encoder());
        let mut bytes = 0;
        let mut rows = rows.into_iter().peekable();
        while rows.peek().is_some() {
            let group: Vec<Row> = rows.by_ref().take(GROUP).collect();
            // Collected before the first error is looked for, so that it is always the same one.
            let encoded: Vec<Result<_, DataError>> = group
                .into_par_iter()
                .map(|row| {
                    let place = place_of(&paths, &row);
                    let written = writer.write(row.example, &|| place.clone())?;
                    let noticed = (written.empty_answers, written.tools_left_out);
                    Ok((place, row.file, noticed, encoder.encode(written)?))
                })
                .collect();
            for row in encoded {
                let (place, file, (empty_answers, tools_left_out), outcome) = row?;
                let at = || place.clone();
                counts.empty_answers.add(empty_answers, &at);
                counts.tools_left_out.add(u64::from(tools_left_out), &at);
                match outcome {
                    Outcome::Row(row) => {
                        bytes += row.trained_bytes;
                        counts.add(&row, &at);
                        set.push(&row, file, place.line);
                    }
                    Outcome::TooLong { .. } if encoder.overlong == Overlong::Drop => {
                        counts.dropped.add(1, &at);
                    }
                    Outcome::TooLong { tokens, is_bound } => {
                        faults.too_long(place, (tokens, is_bound));
                    }
                    Outcome::Untrainable { reason, is_cut } => {
                        faults.untrainable(place, reason, is_cut);
                    }
                }
            }
        }
        Ok(bytes)
    }

    /// Whether any rows are written with the chat template.
    pub(super) fn uses_template(&self, summary: &RowSummary) -> bool {
        let mut formats = summary.datasets.iter().map(|findings| findings.format);
        let always = self.source.config.chat_template.is_some();
        formats.any(|format| format.is_conversation() || (always && format != RowFormat::Text))
    }

    /// A line per dataset, and one for the validation file.
    pub(super) fn describe(&self, summary: &RowSummary) -> Vec<String> {
        let mut lines = Vec::new();
        for (index, (dataset, findings)) in self
            .source
            .datasets
            .iter()
            .zip(&summary.datasets)
            .enumerate()
        {
            let files = counted(dataset.files.len() as u64, "file");
            let said = describe(dataset.config, findings);
            lines.push(format!("data.datasets[{index}]: {files} ({said}"));
            lines.extend(warn_of_labels(findings));
        }
        if let Some(findings) = &summary.val {
            let said = describe(self.source.datasets[0].config, findings);
            lines.push(format!("data.val_path: 1 file ({said}"));
        }
        lines
    }
}

/// Reads the records of a dataset, which all are of one format.
struct Reader<'a> {
    names: &'a FieldNames,
    /// As the config says, or the first record.
    format: Option<RowFormat>,
    /// Fields that nothing is made of.
    unused: BTreeSet<String>,
    bad_labels: u64,
    rows: Vec<Row>,
}

impl Reader<'_> {
    fn take(
        &mut self,
        fields: Map<String, Value>,
        path: &Path,
        file: usize,
        line: usize,
    ) -> Result<(), RowError> {
        let detected = || RowFormat::detect(&fields, self.names);
        let format = self.format.or_else(detected);
        let format = format.ok_or_else(|| RowError::UnknownFormat {
            place: Place {
                path: path.to_path_buf(),
                line,
            },
            fields: fields.keys().cloned().collect(),
        })?;
        self.format = Some(format);
        let used = format.fields(self.names);
        for field in fields.keys() {
            if !used.contains(&field.as_str()) && !self.unused.contains(field) {
                self.unused.insert(field.clone());
            }
        }
        self.bad_labels += u64::from(fields.get("label") == Some(&false.into()));
        let mut record = Record {
            fields,
            path,
            line,
            format,
        };
        let example = Example::read(&mut record, self.names)?;
        self.rows.push(Row {
            example,
            file,
            line,
        });
        Ok(())
    }
}

/// "auto: completion rows of `question`, `answer`): 7,473 rows, fields not used: id"
fn describe(config: &DatasetConfig, findings: &Findings) -> String {
    let auto = match RowFormat::of_kind(config.kind) {
        None => "auto: ",
        Some(_) => "",
    };
    let mut said = format!(
        "{auto}{}, from {}): {}",
        findings.format,
        findings.format.required(&config.fields).join(", "),
        counted(findings.rows, "row"),
    );
    if !findings.unused.is_empty() {
        let unused: Vec<&str> = findings
            .unused
            .iter()
            .map(String::as_str)
            .take(10)
            .collect();
        said.push_str(&format!(", fields not used: {}", unused.join(", ")));
    }
    said
}

fn warn_of_labels(findings: &Findings) -> Option<String> {
    (findings.bad_labels > 0 && findings.unused.contains("label")).then(|| {
        format!(
            "warning: {} have label = false, which marks a bad answer; they are trained like the others",
            counted(findings.bad_labels, "row")
        )
    })
}

/// Rows that are in the works at one time.
const GROUP: usize = 4096;

pub(super) fn place_of(paths: &[PathBuf], row: &Row) -> Place {
    Place {
        path: paths
            .get(row.file)
            .map_or_else(PathBuf::new, |path| Path::new(path).to_path_buf()),
        line: row.line,
    }
}
