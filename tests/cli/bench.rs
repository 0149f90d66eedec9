//! A folder to run the runner in.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use firebrick::checkpoint::CheckpointStore;
use serde_json::Value;

/// A folder with a text and a config that trains a tiny model on it in well under a second.
pub struct Bench {
    pub folder: tempfile::TempDir,
}

const CONFIG: &str = r#"
output_dir = "out"
seed = 3

[model]
architecture = "llama"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 2

[tokenizer]
type = "byte"

[data]
sequence_len = 16
val_fraction = 0.1
[[data.datasets]]
path = "text.txt"

[train]
micro_batch_size = 4
max_steps = 6
threads = 2

[eval]
eval_steps = 3
sample_prompts = ["the "]
sample_tokens = 4

[checkpoint]
save_steps = 2

[logging]
logging_steps = 1
"#;

impl Bench {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let words = ["the ", "river ", "is ", "older ", "than ", "its ", "bed.\n"];
        let text: String = (0..400)
            .map(|i| words[(i * i + i / 3) % words.len()])
            .collect();
        fs::write(folder.path().join("text.txt"), text).unwrap();
        fs::write(folder.path().join("x.toml"), CONFIG).unwrap();
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_runner"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env("FIREBRICK_CACHE", self.path("cache"))
            .env_remove("CARGO")
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs and insists on an exit code; returns standard output and standard error.
    pub fn expect(&self, code: i32, arguments: &[&str]) -> (String, String) {
        let output = self.run(arguments);
        let stdout = String::from_utf8(output.stdout).unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            output.status.code(),
            Some(code),
            "{arguments:?}\n{stdout}\n{stderr}"
        );
        (stdout, stderr)
    }

    pub fn train(&self, extra: &[&str]) -> (String, String) {
        self.expect(0, &[&["train", "x.toml", "--quiet"], extra].concat())
    }

    /// Every tensor of a checkpoint, and its state.json but for the clock.
    pub fn checkpoint(&self, run: &str, step: u64) -> BTreeMap<String, String> {
        let folder = self.path(run).join(format!("checkpoints/step-{step:06}"));
        let snapshot = CheckpointStore::new(&self.path(run)).load(step).unwrap();
        let tensors = snapshot.model.tensors().into_iter();
        let tensors = tensors.chain(snapshot.optimizer.tensors);
        let mut files: BTreeMap<String, String> = tensors
            .map(|(name, data)| (name, blake3::hash(data.as_bytes()).to_string()))
            .collect();
        let mut state: Value = json(&folder.join("state.json"));
        // The clock, and the checksum that covers it.
        state["progress"]["seconds"] = Value::Null;
        state["progress"]["cost"]["train_seconds"] = Value::Null;
        state["blake3"]["state"] = Value::Null;
        files.insert("state.json".to_string(), state.to_string());
        files
    }

    /// metrics.jsonl without speed and memory, which no two runs share.
    pub fn metrics(&self, run: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        let mut rows: Vec<Value> = text
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect();
        for row in &mut rows {
            row["tokens_per_second"] = Value::Null;
            row["memory_bytes"] = Value::Null;
            row["train_seconds"] = Value::Null;
        }
        rows
    }

    pub fn spawn(&self, arguments: &[&str]) -> Child {
        self.command(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }
}

pub fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}
