//! A folder with a tokenizer and files of rows.

use std::path::PathBuf;

use firebrick::config::{DataConfig, DatasetConfig, TokenizerConfig, TokenizerKind};
use firebrick::data::{DataError, Pairs, RowCorpus, RowError, RowSet, TokenCache, Tokenizer};
use serde_json::{Value, json};

pub struct Bench {
    folder: tempfile::TempDir,
    pub data: DataConfig,
    pub tokenizer: TokenizerConfig,
}

impl Bench {
    /// Bytes as tokens, and `<|im_start|>`, `<|im_end|>`, `<s>`; no chat template.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let mut json: Value = serde_json::from_str(Tokenizer::bytes().unwrap().to_json()).unwrap();
        let added = json["added_tokens"].as_array_mut().unwrap();
        for token in ["<|im_start|>", "<|im_end|>", "<s>"] {
            let mut next = added.last().unwrap().clone();
            next["id"] = json!(next["id"].as_u64().unwrap() + 1);
            next["content"] = json!(token);
            added.push(next);
        }
        std::fs::write(&path, json.to_string()).unwrap();
        let data = DataConfig {
            sequence_len: 256,
            val_fraction: 0.0,
            ..DataConfig::default()
        };
        let tokenizer = TokenizerConfig {
            kind: TokenizerKind::File,
            path: Some(path),
            ..TokenizerConfig::default()
        };
        Self {
            folder,
            data,
            tokenizer,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Adds a dataset with these contents.
    pub fn file(&mut self, name: &str, contents: &str) -> &mut DatasetConfig {
        let path = self.path(name);
        std::fs::write(&path, contents).unwrap();
        let dataset = DatasetConfig::new(path.display().to_string());
        self.data.datasets.push(dataset);
        self.data.datasets.last_mut().unwrap()
    }

    /// Adds a dataset of these records, one a line.
    pub fn rows(&mut self, rows: &[Value]) -> &mut DatasetConfig {
        let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
        let name = format!("rows-{}.jsonl", self.data.datasets.len());
        self.file(&name, &lines)
    }

    pub fn template(&mut self, choice: &str) -> &mut Self {
        self.data.chat_template = Some(choice.to_string());
        self
    }

    pub fn cache(&self) -> TokenCache {
        TokenCache::at(&self.path("cache"))
    }

    pub fn try_load(&self) -> Result<RowCorpus, DataError> {
        RowCorpus::load(&self.data, &self.tokenizer, &self.cache())
    }

    pub fn load(&self) -> RowCorpus {
        self.try_load().unwrap()
    }

    pub fn pairs(&self) -> Result<Pairs, DataError> {
        Pairs::load(&self.data, &self.tokenizer, &self.cache())
    }

    /// What is wrong, on one line, without the folder's name.
    pub fn error(&self) -> String {
        self.said(&self.try_load().unwrap_err())
    }

    pub fn said(&self, error: &DataError) -> String {
        let folder = format!("{}/", self.folder.path().display());
        let help = error.help().unwrap_or_default();
        format!("{error} | {help}").replace(&folder, "")
    }

    pub fn row_error(&self) -> RowError {
        match self.try_load().unwrap_err() {
            DataError::Rows(error) => *error,
            other => panic!("{other}"),
        }
    }

    /// The rows' texts, the parts that are trained in brackets.
    pub fn marked(&self) -> Vec<String> {
        let corpus = self.load();
        let rows = corpus.train.iter().map(|set| &set.rows);
        rows.flat_map(|rows| marked(&corpus.tokenizer, rows))
            .collect()
    }
}

/// Texts of rows, the parts that are trained in brackets.
pub fn marked(tokenizer: &Tokenizer, rows: &RowSet) -> Vec<String> {
    let row = |row: usize| {
        let ids = rows.tokens(row);
        let mut text = String::new();
        let mut at = 0;
        for span in rows.trained(row) {
            text += &tokenizer.decode(&ids[at..span.start]).unwrap();
            text += &format!("[{}]", tokenizer.decode(&ids[span.clone()]).unwrap());
            at = span.end;
        }
        text + &tokenizer.decode(&ids[at..]).unwrap()
    };
    (0..rows.len()).map(row).collect()
}

pub fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

pub fn messages(turns: &[(&str, &str)]) -> Value {
    let turns = turns.iter().map(|(role, content)| message(role, content));
    json!({"messages": turns.collect::<Vec<_>>()})
}
