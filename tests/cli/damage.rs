//! Tests of checkpoints that are damaged while the run goes on, and of those that are always exact.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use firebrick::checkpoint::CheckpointStore;
use firebrick::config::load;
use firebrick::train::{Event, Interrupt, Observer, Options, Outcome, Run, Signal, TrainError};

use super::bench::{Bench, json};

/// Saves every step in a chain, and keeps few of them.
const CHAIN: [&str; 4] = [
    "checkpoint.save_steps=1",
    "checkpoint.save_total_limit=2",
    "checkpoint.keyframe_every=9",
    "checkpoint.background=false",
];

/// Calls a function after each save, and records the warnings.
struct Saboteur<F> {
    act: F,
    warnings: Arc<Mutex<Vec<String>>>,
}

impl<F: FnMut(u64) + Send> Observer for Saboteur<F> {
    fn observe(&mut self, event: &Event) -> Result<(), TrainError> {
        match event {
            Event::Saved { step, .. } => (self.act)(*step),
            // Ignores notes about the model and the machine.
            Event::Note { text } if text.starts_with("warning: the checkpoint") => {
                self.warnings.lock().unwrap().push(text.clone());
            }
            _ => {}
        }
        Ok(())
    }
}

/// Trains and calls `act` after each save. Returns the result and the warnings about checkpoints.
fn train(
    bench: &Bench,
    run: &str,
    settings: &[&str],
    interrupt: &Interrupt,
    act: impl FnMut(u64) + Send + 'static,
) -> (Result<Outcome, TrainError>, Vec<String>) {
    let text = fs::read_to_string(bench.path("x.toml")).unwrap();
    let data = format!("path = {:?}", bench.path("text.txt"));
    let config = bench.path("absolute.toml");
    fs::write(&config, text.replace("path = \"text.txt\"", &data)).unwrap();
    let folder = format!("output_dir={:?}", bench.path(run));
    let settings: Vec<String> = CHAIN
        .iter()
        .chain(settings)
        .map(ToString::to_string)
        .chain([folder])
        .collect();
    let warnings = Arc::default();
    let observer = Saboteur {
        act,
        warnings: Arc::clone(&warnings),
    };
    let options = Options {
        interrupt: interrupt.clone(),
        observers: vec![Box::new(observer)],
        ..Options::default()
    };
    let plan = load(&config, &settings).unwrap();
    let trained = Run::prepare(&plan, options).unwrap().unwrap().train();
    let warnings = std::mem::take(&mut *warnings.lock().unwrap());
    (trained, warnings)
}

fn undisturbed(bench: &Bench, run: &str, settings: &[&str]) {
    let (trained, warnings) = train(bench, run, settings, &Interrupt::new(), |_| ());
    trained.unwrap();
    assert_eq!(warnings, Vec::<String>::new());
}

fn step_folder(bench: &Bench, run: &str, step: u64) -> PathBuf {
    bench.path(run).join(format!("checkpoints/step-{step:06}"))
}

/// Damages a step's folder.
type Damage = fn(&Path);

fn flip(folder: &Path) {
    let path = folder.join("delta.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_run_goes_on_when_an_older_checkpoint_is_damaged_or_gone() {
    let bench = Bench::new();
    undisturbed(&bench, "whole", &[]);
    let model = fs::read(bench.path("whole/model.safetensors")).unwrap();
    let damages: [(&str, Damage); 4] = [
        ("flipped", flip),
        ("emptied", |step| {
            fs::remove_dir_all(step).unwrap();
            fs::create_dir(step).unwrap();
        }),
        ("stateless", |step| {
            fs::write(step.join("state.json"), "{").unwrap()
        }),
        ("swapped", |step| {
            fs::remove_file(step.join("delta.safetensors")).unwrap()
        }),
    ];
    for (name, damage) in damages {
        for background in ["true", "false"] {
            let run = format!("{name}-{background}");
            let folder = step_folder(&bench, &run, 2);
            let setting = format!("checkpoint.background={background}");
            let act = move |step| {
                if step == 2 && folder.is_dir() {
                    damage(&folder);
                }
            };
            let interrupt = Interrupt::new();
            let (trained, warnings) = train(&bench, &run, &[&setting], &interrupt, act);
            trained.unwrap();
            if background == "false" {
                assert_eq!(warnings.len(), 1, "{run}: {warnings:?}");
                let start = "warning: the checkpoint of step 2 cannot be read: that of step 3";
                assert!(warnings[0].starts_with(start), "{run}: {warnings:?}");
            }
            assert_eq!(
                bench.checkpoint(&run, 6),
                bench.checkpoint("whole", 6),
                "{run}"
            );
            let exported = fs::read(bench.path(&run).join("model.safetensors")).unwrap();
            assert!(exported == model, "{run}");
            bench.expect(0, &["ckpt", "verify", &run]);
            // The run can also be resumed, bit for bit.
            let every = "checkpoint.save_steps=1";
            bench.expect(
                0,
                &[
                    "train",
                    "absolute.toml",
                    "--resume",
                    "5",
                    "--set",
                    every,
                    "--output-dir",
                    &run,
                ],
            );
            assert_eq!(
                bench.checkpoint(&run, 6),
                bench.checkpoint("whole", 6),
                "{run}"
            );
        }
    }
}

#[test]
fn a_best_checkpoint_that_cannot_be_read_is_kept_with_what_it_needs_and_the_last_is_exported() {
    let bench = Bench::new();
    let stalled = ["optimizer.learning_rate=1e-30", "train.max_steps=8"];
    let folder = step_folder(&bench, "out", 2);
    let act = move |step| {
        // Step 3, the best, has already been saved as a delta.
        if step == 3 {
            flip(&folder);
        }
    };
    let (trained, warnings) = train(&bench, "out", &stalled, &Interrupt::new(), act);
    let outcome = trained.unwrap();
    assert_eq!(
        (outcome.progress.best.unwrap().step, outcome.exported_step),
        (3, 8)
    );
    let said = [
        "warning: the checkpoint of step 3 cannot be read: that of step 4 is stored without it",
        "warning: the checkpoint of step 2 cannot be read; step 1 is kept with it",
        "warning: the checkpoint of step 3, the best, cannot be read: the last is exported",
    ];
    assert_eq!(warnings.len(), said.len(), "{warnings:?}");
    for (warning, said) in warnings.iter().zip(said) {
        assert!(warning.starts_with(said), "{warnings:?}");
    }
    let steps = CheckpointStore::new(&bench.path("out")).steps().unwrap();
    assert_eq!(steps, [1, 2, 3, 6, 7, 8]);
    let (table, _) = bench.expect(0, &["ckpt", "ls", "out"]);
    assert!(table.contains("6 checkpoints"), "{table}");
    fs::write(step_folder(&bench, "out", 2).join("state.json"), "{").unwrap();
    let (table, _) = bench.expect(0, &["ckpt", "ls", "out"]);
    assert!(
        table.contains("2  unreadable") && table.contains("8  beside 7"),
        "{table}"
    );
    let (said, stderr) = bench.expect(0, &["ckpt", "gc", "out"]);
    assert!(said.starts_with("nothing to delete"), "{said}");
    assert!(
        stderr.contains("warning: the checkpoint of step 3"),
        "{stderr}"
    );
}

#[test]
fn what_is_best_or_last_is_exact_whatever_may_be_lost() {
    let bench = Bench::new();
    let few = ["eval.eval_steps=4", "checkpoint.save_total_limit=0"];
    let lossy = [&few[..], &["checkpoint.lossy=int4"]].concat();
    undisturbed(&bench, "exact", &few);
    undisturbed(&bench, "lossy", &lossy);
    let store = CheckpointStore::new(&bench.path("lossy"));
    let is_lossy = |step: u64| store.lossy(step).unwrap().is_some();
    assert_eq!(
        [1, 2, 3, 4, 5, 6].map(is_lossy),
        [false, true, true, false, true, false]
    );
    for step in [4, 6] {
        assert_eq!(
            bench.checkpoint("lossy", step).len(),
            bench.checkpoint("exact", step).len()
        );
        let weights = |run: &str| {
            let store = CheckpointStore::new(&bench.path(run));
            store.load_model(step).unwrap()
        };
        assert_eq!(weights("lossy"), weights("exact"), "step {step}");
    }
    let file = |run: &str| fs::read(bench.path(run).join("model.safetensors")).unwrap();
    assert!(file("lossy") == file("exact"));
    let end = |run: &str| json(&bench.path(run).join("run.json"))["final"]["val_loss"].clone();
    assert_eq!(end("lossy"), end("exact"));
}

#[test]
fn an_interrupted_run_goes_on_bit_for_bit_whatever_may_be_lost() {
    let bench = Bench::new();
    let settings = ["checkpoint.lossy=int4", "eval.eval_steps=0"];
    undisturbed(&bench, "whole", &settings);
    // The signal comes after step 3 was saved with loss.
    let interrupt = Interrupt::new();
    let flag = interrupt.clone();
    let raise = move |step| {
        if step == 3 {
            flag.raise(Signal::Interrupt);
        }
    };
    let (stopped, _) = train(&bench, "out", &settings, &interrupt, raise);
    let error = stopped.unwrap_err();
    assert!(
        matches!(error, TrainError::Interrupted { step: 3, .. }),
        "{error}"
    );
    let store = CheckpointStore::new(&bench.path("out"));
    assert_eq!(store.lossy(3).unwrap(), None);
    undisturbed(&bench, "out", &settings);
    for name in ["model.safetensors", "checkpoints/last"] {
        let file = |run: &str| fs::read(bench.path(run).join(name)).unwrap();
        assert!(file("out") == file("whole"), "{name}");
    }
}
