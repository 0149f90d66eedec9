//! A kill at every moment of a run: before, inside and after each save, of a new run, a resumed one
//! and one that goes back. After each change that a run makes to its folder the folder is copied as
//! a kill -9 would leave it, and once more with what was being written cut in half. Every copy is
//! resumed to its end, which must be that of the run that was never killed.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use burn::tensor::TensorData;
use serde_json::Value;

use super::{Options, Outcome, Resume, Run, TrainError};
use crate::checkpoint::{CheckpointStore, Snapshot};
use crate::config::{Plan, load};
use crate::durable::Change;
use crate::durable::watch::watching;
use crate::extra::{ExtraState, StateScalar};
use crate::gradient::{Gradient, PipelineError, Stage, StepContext};

const CONFIG: &str = r#"
seed = 3
[model]
architecture = "llama"
hidden_size = 8
intermediate_size = 16
num_hidden_layers = 1
num_attention_heads = 2
[tokenizer]
type = "char"
[data]
sequence_len = 8
val_fraction = 0.1
[train]
micro_batch_size = 2
max_steps = 5
[eval]
eval_steps = 2
sample_prompts = ["the "]
sample_tokens = 2
[checkpoint]
save_steps = 1
save_total_limit = 2
keyframe_every = 3
background = false
[logging]
logging_steps = 1
"#;

struct Bench {
    folder: tempfile::TempDir,
    /// The stages between backward pass and update, created again for each session.
    stages: fn() -> Vec<Box<dyn Stage>>,
}

impl Bench {
    fn new() -> Self {
        // In memory where there is such a place: nothing here depends on the disk.
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() {
            tempfile::tempdir_in(memory)
        } else {
            tempfile::tempdir()
        };
        let folder = folder.unwrap();
        let words = ["the ", "river ", "is ", "older ", "than ", "its ", "bed.\n"];
        let text: String = (0..200)
            .map(|i| words[(i * i + i / 3) % words.len()])
            .collect();
        let data = folder.path().join("text.txt");
        fs::write(&data, text).unwrap();
        let config = format!("{CONFIG}[[data.datasets]]\npath = {data:?}\n");
        fs::write(folder.path().join("x.toml"), config).unwrap();
        let stages = Vec::new;
        Self { folder, stages }
    }

    /// A run with a stage that keeps state, and an average of its weights.
    fn with_memory() -> Self {
        let bench = Self::new();
        let config = fs::read_to_string(bench.path("x.toml")).unwrap();
        let config = format!("{config}[average]\ndecay = 0.5\nstart = 1\n");
        fs::write(bench.path("x.toml"), config).unwrap();
        Self {
            stages: || vec![Box::new(Memory::default())],
            ..bench
        }
    }

    /// With checkpoints that are whole, each for itself.
    fn of_whole_checkpoints() -> Self {
        let bench = Self::new();
        let config = fs::read_to_string(bench.path("x.toml")).unwrap();
        let config = config.replace(
            "keyframe_every = 3\nbackground = false",
            "format = \"full\"",
        );
        fs::write(bench.path("x.toml"), config).unwrap();
        bench
    }

    /// A run with an adapter that keeps a base model of its own.
    fn with_own_base() -> Self {
        let bench = Self::new();
        let base = bench.path("base");
        bench.train(&base, Resume::Auto).unwrap();
        let config = fs::read_to_string(bench.path("x.toml")).unwrap();
        let of_model = config.find("[model]").unwrap()..config.find("[data]").unwrap();
        let adapted = format!(
            "[model]\nbase_model = {base:?}\n[quantization]\nweights = \"nf4\"\n\
             [adapter]\nr = 2\ninit = \"pissa\"\n"
        );
        let mut changed = config.clone();
        changed.replace_range(of_model, &adapted);
        fs::write(bench.path("x.toml"), changed).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn plan(&self, run: &Path) -> Plan {
        let folder = format!("output_dir={run:?}");
        load(&self.path("x.toml"), &[folder]).unwrap()
    }

    fn prepare(&self, run: &Path, resume: Resume) -> Result<Option<Run>, TrainError> {
        let options = Options {
            resume,
            config_text: Some("# what the user wrote\n".to_string()),
            stages: (self.stages)(),
            ..Options::default()
        };
        Run::prepare(&self.plan(run), options)
    }

    fn train(&self, run: &Path, resume: Resume) -> Result<Option<Outcome>, TrainError> {
        self.prepare(run, resume)?.map(Run::train).transpose()
    }

    /// Trains, and copies the run folder after every change.
    fn recorded(&self, run: &Path, resume: Resume, copies: &Path) -> Vec<PathBuf> {
        let recorder = Rc::new(RefCell::new(Recorder {
            run: run.to_path_buf(),
            copies: copies.to_path_buf(),
            made: Vec::new(),
        }));
        let watcher = recorder.clone();
        let trained = watching(
            move |change| watcher.borrow_mut().look(change),
            || self.train(run, resume),
        );
        assert!(trained.unwrap().is_some());
        recorder.take().made
    }
}

/// A stage whose effect depends on all earlier steps: it adds a share of the last gradient to each
/// new one, and counts steps.
#[derive(Default)]
struct Memory {
    steps: u64,
    last: BTreeMap<String, Vec<f32>>,
}

impl Stage for Memory {
    fn owner(&self) -> &str {
        "test-memory"
    }

    fn apply(
        &mut self,
        mut gradient: Gradient,
        context: &StepContext,
    ) -> Result<Gradient, PipelineError> {
        assert_eq!(
            context.step, self.steps,
            "no step is seen twice, and none is left out"
        );
        self.steps += 1;
        gradient.update(|parameter, values| {
            let last = self.last.entry(parameter.path.clone()).or_default();
            last.resize(values.len(), 0.0);
            for (value, last) in values.iter_mut().zip(last) {
                *value += 0.5 * *last;
                *last = *value;
            }
        });
        Ok(gradient)
    }

    fn state(&self) -> ExtraState {
        let tensor = |(path, values): (&String, &Vec<f32>)| {
            (
                path.clone(),
                TensorData::new(values.clone(), [values.len()]),
            )
        };
        ExtraState {
            tensors: self.last.iter().map(tensor).collect(),
            scalars: [("steps".to_string(), StateScalar::Uint(self.steps))].into(),
        }
    }

    fn load(&mut self, state: ExtraState) -> Result<(), PipelineError> {
        let wrong = || PipelineError::State {
            owner: self.owner().to_string(),
            reason: "it has no count".to_string(),
        };
        let Some(StateScalar::Uint(steps)) = state.scalars.get("steps") else {
            return Err(wrong());
        };
        self.steps = *steps;
        let values = |(path, data): (String, TensorData)| (path, data.try_into_vec().unwrap());
        self.last = state.tensors.into_iter().map(values).collect();
        Ok(())
    }
}

#[derive(Default)]
struct Recorder {
    run: PathBuf,
    copies: PathBuf,
    made: Vec<PathBuf>,
}

impl Recorder {
    fn look(&mut self, change: Change) {
        // Before the run folder is made there is nothing to look at.
        if !self.run.is_dir() {
            return;
        }
        let before = self.made.last().cloned();
        let copy = self.copy();
        let Change::Written(path) = change else {
            return;
        };
        let Ok(name) = path.strip_prefix(&self.run) else {
            return;
        };
        let length = |path: PathBuf| fs::metadata(path).map_or(0, |file| file.len());
        let old = before.map_or(0, |folder| length(folder.join(name)));
        let new = length(copy.join(name));
        let half = self.copy();
        let file = fs::OpenOptions::new().write(true).open(half.join(name));
        file.unwrap().set_len(old + (new - old) / 2).unwrap();
        // The whole one is the latest again, for the next comparison.
        let last = self.made.len() - 1;
        self.made.swap(last, last - 1);
    }

    fn copy(&mut self) -> PathBuf {
        let copy = self.copies.join(format!("{:05}", self.made.len()));
        copy_folder(&self.run, &copy);
        self.made.push(copy.clone());
        copy
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// Everything that a run leaves but times, speeds and the journal of its sessions.
fn end_of(run: &Path) -> BTreeMap<String, String> {
    let mut end = BTreeMap::from([("files".to_string(), format!("{:?}", names(run)))]);
    let mut hash = |path: PathBuf| {
        let bytes = fs::read(&path).unwrap();
        let name = path.strip_prefix(run).unwrap().display().to_string();
        end.insert(name, blake3::hash(&bytes).to_string());
    };
    // A model, or an adapter; its adapter_config.json has the path of the run in it.
    let is_adapter = run.join("adapter_config.json").exists();
    let model: &[&str] = match is_adapter {
        true => &[
            "adapter_model.safetensors",
            "base_model/model.safetensors",
            "base_model/config.json",
        ],
        false => &["model.safetensors", "config.json"],
    };
    for name in model.iter().chain(&["tokenizer.json"]) {
        hash(run.join(name));
    }
    let checkpoints = run.join("checkpoints");
    for name in ["best", "last"] {
        hash(checkpoints.join(name));
    }
    let all = names(&checkpoints);
    let store = CheckpointStore::new(run);
    for step in store.steps().unwrap() {
        let Snapshot {
            model,
            optimizer,
            extra,
            ..
        } = store.load(step).unwrap();
        let tensors = format!("{model:?} {optimizer:?} {extra:?}");
        end.insert(
            format!("tensors of {step}"),
            blake3::hash(tensors.as_bytes()).to_string(),
        );
    }
    end.insert("checkpoints".to_string(), format!("{all:?}"));
    if is_adapter {
        let of_base = names(&run.join("base_model"));
        end.insert("base model".to_string(), format!("{of_base:?}"));
    }
    for step in all.iter().filter(|name| name.starts_with("step-")) {
        let mut state = json(&checkpoints.join(step).join("state.json"));
        state["progress"]["seconds"] = Value::Null;
        state["progress"]["cost"]["train_seconds"] = Value::Null;
        state["blake3"]["state"] = Value::Null;
        end.insert(format!("state of {step}"), state.to_string());
    }
    let rows = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    for (number, line) in rows.lines().enumerate() {
        let mut row: Value = serde_json::from_str(line).unwrap();
        row["tokens_per_second"] = Value::Null;
        row["memory_bytes"] = Value::Null;
        row["train_seconds"] = Value::Null;
        end.insert(format!("metrics {number}"), row.to_string());
    }
    let table = fs::read_to_string(run.join("metrics.csv")).unwrap();
    for (number, line) in table.lines().enumerate() {
        // Without the speed, and the memory at the end.
        let cells: Vec<&str> = line.split(',').collect();
        let cells = [&cells[..5], &cells[6..8]].concat();
        end.insert(format!("table {number}"), cells.join(","));
    }
    let record = json(&run.join("run.json"));
    for key in ["step", "val_loss", "best_val_loss", "tokens"] {
        end.insert(key.to_string(), record["final"][key].to_string());
    }
    let journal = fs::read_to_string(run.join("logs/events.jsonl")).unwrap();
    let journal: Vec<Value> = journal
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let of = |name: &str| -> Vec<&Value> {
        let found = journal.iter().filter(|entry| entry["event"] == name);
        found.map(|entry| &entry["step"]).collect()
    };
    end.insert("steps".to_string(), format!("{:?}", of("step")));
    end.insert("evaluated".to_string(), format!("{:?}", of("evaluated")));
    let report = fs::read_to_string(run.join("report.html")).unwrap();
    assert!(report.contains("state finished\">finished</strong> step 5 of 5"));
    end
}

/// Resumes every copy and compares; returns how many had an unfinished save in them.
fn resume_all(bench: &Bench, copies: &[PathBuf], whole: &BTreeMap<String, String>) -> usize {
    let mut inside = 0;
    for (number, copy) in copies.iter().enumerate() {
        let checkpoints = copy.join("checkpoints");
        let names = if checkpoints.exists() {
            names(&checkpoints)
        } else {
            BTreeSet::new()
        };
        inside += usize::from(names.iter().any(|name| name.starts_with(".step-")));
        let resumed = bench.train(copy, Resume::Auto);
        if let Err(error) = resumed {
            panic!(
                "change {number} of {}, with {names:?}: {error}",
                copies.len()
            );
        }
        let end = end_of(copy);
        let keys: BTreeSet<&String> = whole.keys().chain(end.keys()).collect();
        let of = |key| (key, whole.get(key), end.get(key));
        let wrong: Vec<_> = keys
            .into_iter()
            .map(of)
            .filter(|(_, whole, end)| whole != end)
            .collect();
        let place = format!("change {number} of {}, with {names:?}", copies.len());
        assert!(wrong.is_empty(), "{place}: {wrong:#?}");
        fs::remove_dir_all(copy).unwrap();
    }
    inside
}

#[test]
fn d7_a_kill_at_any_change_of_a_run_with_extra_state_is_made_good() {
    let plain = Bench::new();
    plain.train(&plain.path("run"), Resume::Auto).unwrap();
    let bench = Bench::with_memory();
    let run = bench.path("run");
    let copies = bench.recorded(&run, Resume::Auto, &bench.path("copies"));
    let whole = end_of(&run);
    let model = "model.safetensors";
    assert_ne!(
        whole[model],
        end_of(&plain.path("run"))[model],
        "the stage has an effect"
    );
    let inside = resume_all(&bench, &copies, &whole);
    assert!(inside > 40, "{inside} of {}", copies.len());

    // A saved state that no stage takes is not dropped.
    let forgetful = Bench {
        stages: Vec::new,
        ..bench
    };
    let config = fs::read_to_string(forgetful.path("x.toml")).unwrap();
    let longer = config.replace("max_steps = 5", "max_steps = 6");
    fs::write(forgetful.path("x.toml"), longer).unwrap();
    let error = forgetful.train(&run, Resume::Auto).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("state of `test-memory`, and nothing in this run takes it"),
        "{error}"
    );
}

#[test]
fn d7_a_kill_at_any_change_of_a_new_run_is_made_good() {
    let bench = Bench::new();
    let run = bench.path("run");
    let copies = bench.recorded(&run, Resume::Auto, &bench.path("copies"));
    let inside = resume_all(&bench, &copies, &end_of(&run));
    println!("{} copies, {inside} inside a save", copies.len());
    assert!(inside > 40, "{inside} of {}", copies.len());
}

#[test]
fn r10_a_kill_at_any_change_of_a_run_with_whole_checkpoints_is_made_good() {
    let bench = Bench::of_whole_checkpoints();
    let run = bench.path("run");
    let copies = bench.recorded(&run, Resume::Auto, &bench.path("copies"));
    let inside = resume_all(&bench, &copies, &end_of(&run));
    assert!(inside > 40, "{inside} of {}", copies.len());
}

#[test]
fn r10_a_kill_at_any_change_of_a_run_that_keeps_its_base_model_is_made_good() {
    let bench = Bench::with_own_base();
    let run = bench.path("run");
    let copies = bench.recorded(&run, Resume::Auto, &bench.path("copies"));
    let of_base = |copy: &&PathBuf| copy.join("base_model").is_dir();
    let first = copies.iter().find(of_base).unwrap();
    assert!(first.join("resolved.toml").is_file() && !first.join("checkpoints").exists());
    resume_all(&bench, &copies, &end_of(&run));
}

/// The copy that a kill in the middle of the last save of step 4 leaves.
fn killed_in_a_save(bench: &Bench) -> PathBuf {
    let copies = bench.recorded(&bench.path("first"), Resume::Auto, &bench.path("firsts"));
    let unfinished = |copy: &&PathBuf| {
        let names = copy.join("checkpoints/.step-000004.tmp");
        names.join("delta.safetensors").exists()
    };
    copies.iter().rfind(unfinished).unwrap().clone()
}

#[test]
fn d7_a_kill_at_any_change_of_a_resumed_run_is_made_good() {
    let bench = Bench::new();
    let run = killed_in_a_save(&bench);
    let copies = bench.recorded(&run, Resume::Auto, &bench.path("copies"));
    let whole = end_of(&bench.path("first"));
    assert_eq!(end_of(&run), whole);
    let inside = resume_all(&bench, &copies, &whole);
    assert!(inside > 20, "{inside} of {}", copies.len());
}

#[test]
fn d7_a_kill_at_any_change_of_a_run_that_goes_back_is_made_good() {
    let bench = Bench::new();
    let run = bench.path("run");
    bench.train(&run, Resume::Auto).unwrap();
    let whole = end_of(&run);
    let copies = bench.recorded(&run, Resume::Step(3), &bench.path("copies"));
    assert_eq!(end_of(&run), whole);
    resume_all(&bench, &copies, &whole);
}

/// Room for everything, until there is a checkpoint of step 2 and then for next to nothing.
fn full_after_step_2(folder: &Path) -> std::io::Result<u64> {
    let full = folder.join("checkpoints/step-000002").is_dir();
    Ok(if full { 1 << 19 } else { 1 << 40 })
}

/// Not even for one checkpoint.
fn full(_folder: &Path) -> std::io::Result<u64> {
    Ok(1 << 19)
}

fn train_with(
    bench: &Bench,
    run: &Path,
    free_space: fn(&Path) -> std::io::Result<u64>,
) -> TrainError {
    let mut run = bench.prepare(run, Resume::Auto).unwrap().unwrap();
    run.session.free_space = free_space;
    run.train().unwrap_err()
}

#[test]
fn r11_a_disk_without_room_is_found_before_the_first_step_and_before_each_save() {
    let bench = Bench::new();
    let (whole, run) = (bench.path("whole"), bench.path("run"));
    bench.train(&whole, Resume::Auto).unwrap();

    let error = train_with(&bench, &run, full);
    assert_eq!((error.kind(), error.exit_code()), ("disk", 1));
    let text = error.to_string();
    assert!(
        text.contains("needs 7.1 MiB for up to 6 checkpoints of 1.0 MiB")
            && text.contains("512 KiB is free"),
        "{text}"
    );
    let help = error.help().unwrap();
    assert!(help.contains("--output-dir on a larger disk"), "{help}");
    assert!(!run.join("checkpoints").exists());
    assert_eq!(fs::read_to_string(run.join("metrics.jsonl")).unwrap(), "");

    // Step 3 is computed, and then there is no room to save it.
    let error = train_with(&bench, &run, full_after_step_2);
    let text = error.to_string();
    assert!(
        text.contains("for the checkpoint of step 3, and 512 KiB is free"),
        "{text}"
    );
    let help = error.help().unwrap();
    assert!(help.contains("checkpoints/step-000002, is whole"), "{help}");
    let report = fs::read_to_string(run.join("report.html")).unwrap();
    assert!(report.contains("for the checkpoint of step 3"), "{report}");
    let steps = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    assert_eq!(steps.lines().count(), 3);

    // Nor is there when it is asked again, which is said at once.
    let error = train_with(&bench, &run, full);
    assert!(error.to_string().contains("checkpoints of"), "{error}");
    bench.train(&run, Resume::Auto).unwrap();
    assert_eq!(end_of(&run), end_of(&whole));
}

#[test]
fn r11_a_base_model_that_is_kept_needs_room_too() {
    let bench = Bench::with_own_base();
    let (whole, run) = (bench.path("whole"), bench.path("run"));
    bench.train(&whole, Resume::Auto).unwrap();
    let error = train_with(&bench, &run, full);
    let text = error.to_string();
    assert!(
        text.contains("for a base model of 1.0 MiB, up to 6"),
        "{text}"
    );
    assert!(!run.join("base_model").exists());
    bench.train(&run, Resume::Auto).unwrap();
    assert_eq!(end_of(&run), end_of(&whole));
}

#[test]
fn r11_a_model_that_cannot_be_exported_for_lack_of_room_is_exported_later() {
    let bench = Bench::new();
    let (whole, run) = (bench.path("whole"), bench.path("run"));
    bench.train(&whole, Resume::Auto).unwrap();
    let error = train_with(&bench, &run, |folder| {
        let full = folder.join("checkpoints/step-000005").is_dir();
        Ok(if full { 1 << 19 } else { 1 << 40 })
    });
    assert!(
        error.to_string().contains("for the exported model"),
        "{error}"
    );
    bench.train(&run, Resume::Auto).unwrap();
    assert_eq!(end_of(&run), end_of(&whole));
}
