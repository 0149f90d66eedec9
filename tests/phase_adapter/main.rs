//! Runs that merge their adapter into the weights between two phases, or begin a new one there.
#![allow(missing_docs)]

mod content;
mod refusals;
mod resume;
#[path = "../support/runs.rs"]
mod runs;
mod transition;

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType};
use firebrick::checkpoint::{CheckpointStore, Stored};
use firebrick::collective::SingleProcess;
use firebrick::config::{
    AdapterConfig, Config, DatasetConfig, ModelConfig, PhaseAdapter, PhaseLength, Plan, Task,
    TokenizerConfig, TokenizerKind,
};
use firebrick::data::{TokenCache, ViewSpec, load_training_data};
use firebrick::model::{Decoder, Tensors, folder, parameters, with_parameters};
use firebrick::objective::Objective;
use firebrick::optimizer::Optimizer;
use firebrick::train::{StepSettings, TrainState, train_step};
use runs::{Watch, run, text};
use serde_json::{Value, json};

/// The steps of all phases together.
const STEPS: u64 = 7;

/// A base model and training data.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("text.txt"), text()).unwrap();
        let pairs = (0..30).map(
            |n| json!({"prompt": format!("{n}?"), "chosen": "yes, of course", "rejected": "no"}),
        );
        let pairs: String = pairs.map(|row| format!("{row}\n")).collect();
        fs::write(folder.path().join("pairs.jsonl"), pairs).unwrap();
        let bench = Self { folder };
        bench.write_tokenizer();
        let mut config = bench.config("base");
        config.model.max_position_embeddings = Some(256);
        config.tokenizer = TokenizerConfig {
            kind: TokenizerKind::File,
            path: Some(bench.path("tokenizer.json")),
            ..TokenizerConfig::default()
        };
        config.train.max_steps = Some(3);
        run(&Plan::from_config(config).unwrap(), &Watch::default()).unwrap();
        bench
    }

    /// A tokenizer of bytes, with the special tokens that a conversation needs.
    fn write_tokenizer(&self) {
        let tokenizer = firebrick::data::Tokenizer::bytes().unwrap();
        let mut file: Value = serde_json::from_str(tokenizer.to_json()).unwrap();
        let added = file["added_tokens"].as_array_mut().unwrap();
        for token in ["<|im_start|>", "<|im_end|>"] {
            let mut next = added.last().unwrap().clone();
            next["id"] = json!(next["id"].as_u64().unwrap() + 1);
            next["content"] = json!(token);
            added.push(next);
        }
        fs::write(self.path("tokenizer.json"), file.to_string()).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn config(&self, run: &str) -> Config {
        let mut config = runs::config(self.folder.path(), run);
        config.data.sequence_len = 8;
        config.eval.eval_steps = 2;
        config.checkpoint.save_steps = 1;
        config
    }

    /// A config that trains an adapter of the base model.
    fn adapted(&self, run: &str) -> Config {
        let mut config = self.config(run);
        config.model = ModelConfig {
            base_model: Some(self.path("base")),
            ..ModelConfig::default()
        };
        config.tokenizer = TokenizerConfig::default();
        config.train.max_steps = Some(STEPS);
        config.adapter = Some(AdapterConfig {
            r: 2,
            lora_alpha: 8.0,
            modules_to_save: vec!["norm".to_string()],
            ..AdapterConfig::default()
        });
        config
    }

    /// A run whose phases have these adapter settings. The first phase has three steps, the others
    /// two, and the last the rest of seven.
    fn plan(&self, run: &str, adapters: &[PhaseAdapter]) -> Plan {
        self.plan_of(self.adapted(run), adapters)
    }

    fn plan_of(&self, config: Config, adapters: &[PhaseAdapter]) -> Plan {
        let mut plan = Plan::from_config(config).unwrap();
        let whole = plan.phases[0].clone();
        let phases = adapters.iter().enumerate().map(|(number, &adapter)| {
            let mut phase = whole.clone();
            phase.name = format!("phase-{number}");
            phase.length = match number {
                _ if number + 1 == adapters.len() => PhaseLength::Rest,
                0 => PhaseLength::Steps(3),
                _ => PhaseLength::Steps(2),
            };
            phase.adapter = adapter;
            phase
        });
        plan.phases = phases.collect();
        plan
    }

    fn store(&self, run: &str) -> CheckpointStore {
        CheckpointStore::new(&self.path(run))
    }

    /// The weights of a checkpoint.
    fn saved(&self, run: &str, step: u64) -> Tensors {
        self.store(run).load(step).unwrap().model.tensors()
    }

    /// The format in which a checkpoint is stored.
    fn stored(&self, run: &str, step: u64) -> Stored {
        let list = self.store(run).list().unwrap();
        let found = list.into_iter().find(|listed| listed.step == step);
        found.unwrap().details.unwrap().stored
    }

    fn base(&self, device: &Device) -> Decoder {
        folder::load(&self.path("base"), device).unwrap()
    }

    /// The base model with the adapter of a checkpoint that holds only an adapter.
    fn with_adapter_of(&self, plan: &Plan, run: &str, step: u64) -> Decoder {
        let device = Device::flex().autodiff();
        let adapter = plan.adapter.as_ref().unwrap();
        let model = self.base(&device).adapted(adapter, 0).unwrap();
        let mut tensors = parameters(&model);
        tensors.extend(self.saved(run, step));
        with_parameters(model, tensors, &device).unwrap()
    }

    fn preferences(&self) -> Plan {
        let mut config = self.adapted("unused");
        config.task = Task::Dpo;
        let pairs = self.path("pairs.jsonl").display().to_string();
        config.data.datasets = vec![DatasetConfig::new(pairs)];
        config.data.chat_template = Some("chatml".to_string());
        config.data.sequence_len = 64;
        Plan::from_config(config).unwrap()
    }
}

/// A trainable model with the same dense weights.
fn to_train(model: &Decoder) -> Decoder {
    let device = Device::flex().autodiff();
    folder::decoder_from_own(model.spec(), parameters(model), &device).unwrap()
}

/// The loss of `model` in the first step of a phase.
fn first_loss(plan: &Plan, number: usize, model: Decoder, objective: &dyn Objective) -> f64 {
    let phase = &plan.phases[number];
    let cache = TokenCache::from_environment();
    let now = std::time::SystemTime::now();
    let tokenizer = &plan.config.tokenizer;
    let data = load_training_data(phase.task, &phase.data, tokenizer, &cache, now).unwrap();
    let spec = ViewSpec::of_phase(phase, number, plan.config.seed);
    let batch = data.view(&spec).unwrap().batch(0, phase.micro_batch_size);
    let mut state = TrainState::new(model, Optimizer::new(&phase.optimizer));
    let settings = StepSettings {
        dtype: FloatDType::F32,
        ..StepSettings::default()
    };
    let report = train_step(&mut state, &[batch], objective, &settings, &SingleProcess);
    report.unwrap().loss
}

/// The weights of the exported model or adapter.
fn exported(run: &Path) -> Vec<u8> {
    let [model, adapter] =
        ["model.safetensors", "adapter_model.safetensors"].map(|name| run.join(name));
    assert!(model.exists() != adapter.exists(), "one or the other");
    fs::read(if model.exists() { model } else { adapter }).unwrap()
}

fn is_of_adapter(path: &str) -> bool {
    path.contains(".adapter.")
}
