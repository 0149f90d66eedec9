//! Runs that average their weights: what the average is, what uses it, and that training does not.
#![allow(missing_docs)]

mod phases;
mod resume;
#[path = "../support/runs.rs"]
mod runs;

use std::fs;

use burn::tensor::{Device, TensorData};
use firebrick::checkpoint::CheckpointStore;
use firebrick::config::{AverageConfig, AverageStartKey, CheckpointFormat, Config, Plan};
use firebrick::data::{TokenCache, ViewSpec, load_training_data};
use firebrick::extra::{ExtraState, StateScalar};
use firebrick::model::{Tensors, folder, parameters};
use firebrick::objective::{CrossEntropy, evaluate};
use firebrick::train::{EvaluatedWeights, Event, Outcome};
use runs::{Bench, Watch, metrics, run, steps};
use serde_json::Value;

const STEPS: u64 = 12;

const NORM: &str = "norm.weight";

impl Bench {
    /// A run whose checkpoints are all kept.
    fn config(&self, run: &str, average: Option<AverageConfig>) -> Config {
        let mut config = runs::config(self.folder.path(), run);
        config.train.max_steps = Some(STEPS);
        config.eval.eval_steps = 4;
        config.checkpoint.save_steps = 1;
        config.checkpoint.save_total_limit = 0;
        config.average = average;
        config
    }

    fn plan(&self, run: &str, average: Option<AverageConfig>) -> Plan {
        Plan::from_config(self.config(run, average)).unwrap()
    }

    fn store(&self, run: &str) -> CheckpointStore {
        CheckpointStore::new(&self.path(run))
    }

    /// The weights of a checkpoint by the parameters' paths.
    fn weights(&self, plan: &Plan, run: &str, step: u64) -> Tensors {
        let weights = self.store(run).load(step).unwrap().model;
        match plan.config.checkpoint.format {
            CheckpointFormat::Delta => weights.tensors(),
            CheckpointFormat::Full => {
                let spec = folder::load(&self.path(run), &Device::flex()).unwrap();
                let spec = spec.spec().clone();
                parameters(&weights.decoder(&spec, &Device::flex()).unwrap())
            }
        }
    }

    /// The average that a checkpoint holds.
    fn average(&self, run: &str, step: u64) -> ExtraState {
        let mut extra = self.store(run).load(step).unwrap().extra;
        extra.remove("average").unwrap()
    }

    /// The number of weights of the last norm in the average of a checkpoint.
    fn count(&self, run: &str, step: u64) -> Option<u64> {
        match self.average(run, step).scalars.get(NORM) {
            Some(StateScalar::Uint(count)) => Some(*count),
            _ => None,
        }
    }
}

fn averaged(decay: f64, every: u64, start: u64) -> Option<AverageConfig> {
    Some(AverageConfig {
        decay,
        every,
        start: AverageStartKey::Steps(start),
    })
}

fn trained(plan: &Plan) -> (Watch, Outcome) {
    let watch = Watch::default();
    let outcome = run(plan, &watch).unwrap().unwrap();
    (watch, outcome)
}

/// The step and the result of each evaluation, and the weights that it measured.
fn evaluations(watch: &Watch) -> Vec<(u64, f64, Option<EvaluatedWeights>)> {
    let events = watch.events.lock().unwrap();
    let found = events.iter().filter_map(|event| match event {
        Event::Evaluated {
            step,
            evaluation,
            weights,
            ..
        } => Some((*step, evaluation.val_loss, *weights)),
        _ => None,
    });
    found.collect()
}

fn notes(watch: &Watch, part: &str) -> usize {
    let events = watch.events.lock().unwrap();
    let found = events
        .iter()
        .filter(|event| matches!(event, Event::Note { text } if text.contains(part)));
    found.count()
}

/// The average of these weights in f32: a + (w - a) s, with the share s = max(1 - decay, 1 / n).
fn mean(decay: f64, weights: &[Tensors]) -> Tensors {
    let mut mean = weights[0].clone();
    for (earlier, weights) in weights.iter().enumerate().skip(1) {
        let share = (1.0 - decay).max(1.0 / (earlier as f64 + 1.0)) as f32;
        for (path, mean) in &mut mean {
            let pairs = mean.iter::<f32>().zip(weights[path].iter::<f32>());
            let values: Vec<f32> = pairs.map(|(a, w)| a + (w - a) * share).collect();
            *mean = TensorData::new(values, mean.shape().clone());
        }
    }
    mean
}

#[test]
fn training_computes_the_same_bits_with_an_average() {
    let bench = Bench::new();
    let (plain, outcome) = trained(&bench.plan("plain", None));
    assert_eq!(outcome.exported_weights, None);
    let (average, _) = trained(&bench.plan("average", averaged(0.9, 1, 0)));
    let of = |watch: &Watch| -> Vec<[u64; 4]> {
        let records = steps(watch).into_iter();
        let bits = |record: &firebrick::train::StepRecord| {
            let floats = [record.loss, record.grad_norm, record.lr].map(f64::to_bits);
            [record.step, floats[0], floats[1], floats[2]]
        };
        records.map(|record| bits(&record)).collect()
    };
    assert_eq!(of(&plain), of(&average));
    for step in 1..=STEPS {
        let [plain, average] = ["plain", "average"].map(|run| bench.store(run).load(step).unwrap());
        assert_eq!(plain.model, average.model, "{step}");
        assert_eq!(plain.optimizer.tensors, average.optimizer.tensors, "{step}");
        assert!(plain.extra.is_empty());
    }
    // What is measured is another model.
    let (plain, average) = (evaluations(&plain), evaluations(&average));
    assert!(plain.iter().all(|found| found.2.is_none()));
    for (plain, average) in plain.iter().zip(&average) {
        assert_eq!(average.2, Some(EvaluatedWeights::Average));
        assert_ne!(plain.1, average.1);
    }
    // Nothing of a run without an average says anything about one.
    for file in ["metrics.csv", "metrics.jsonl", "run.json", "README.md"] {
        let text = fs::read_to_string(bench.path("plain").join(file)).unwrap();
        assert!(
            !text.contains("weights\"") && !text.contains("average"),
            "{text}"
        );
    }
}

#[test]
fn the_exported_model_is_the_average_and_so_is_what_was_evaluated() {
    for (format, decay) in [
        (CheckpointFormat::Delta, 1.0),
        (CheckpointFormat::Delta, 0.5),
        (CheckpointFormat::Full, 0.5),
    ] {
        let bench = Bench::new();
        let mut config = bench.config("run", averaged(decay, 2, 3));
        config.checkpoint.format = format;
        let plan = Plan::from_config(config).unwrap();
        let (watch, outcome) = trained(&plan);
        let step = outcome.exported_step;
        assert!(step > 5, "{outcome:?}");
        assert_eq!(outcome.exported_weights, Some(EvaluatedWeights::Average));
        let due = (5..=step).step_by(2);
        let weights: Vec<Tensors> = due.map(|step| bench.weights(&plan, "run", step)).collect();
        let expected = mean(decay, &weights);
        let exported = folder::load(&bench.path("run"), &Device::flex()).unwrap();
        assert!(parameters(&exported) == expected, "{format:?} {decay}");
        assert_eq!(bench.average("run", step).tensors, expected);

        // The first evaluation comes before the average.
        let found = evaluations(&watch);
        let which: Vec<_> = found.iter().map(|found| found.2.unwrap()).collect();
        let (current, average) = (EvaluatedWeights::Current, EvaluatedWeights::Average);
        assert_eq!(which, [current, average, average]);
        let said = found.iter().find(|found| found.0 == step).unwrap().1;
        let measured = val_loss(&plan, &exported);
        assert!((said - measured).abs() < 1e-5, "{said} {measured}");
        assert_eq!(notes(&watch, "begins with those of step 5"), 1);
    }
}

/// The loss of a model on the validation split of a run.
fn val_loss(plan: &Plan, model: &firebrick::model::Decoder) -> f64 {
    let phase = &plan.phases[0];
    let cache = TokenCache::from_environment();
    let now = std::time::SystemTime::now();
    let tokenizer = &plan.config.tokenizer;
    let data = load_training_data(phase.task, &phase.data, tokenizer, &cache, now).unwrap();
    let view = data.view(&ViewSpec::of_phase(phase, 0, plan.config.seed));
    let view = view.unwrap();
    let batches = view.eval_batches(2).unwrap();
    let evaluation = evaluate(model, &CrossEntropy, batches, data.val_bytes());
    evaluation.unwrap().val_loss
}

#[test]
fn every_record_of_a_run_says_which_weights_it_is_about() {
    let bench = Bench::new();
    trained(&bench.plan("run", averaged(0.9, 1, 6)));
    let read = |name: &str| fs::read_to_string(bench.path("run").join(name)).unwrap();
    let rows = metrics(&bench.path("run"));
    for row in &rows {
        let expected = match row["step"].as_u64().unwrap() {
            4 => Value::from("current"),
            8 | 12 => Value::from("average"),
            _ => Value::Null,
        };
        assert_eq!(row["weights"], expected, "{row}");
    }
    let csv = read("metrics.csv");
    let mut lines = csv.lines();
    assert!(lines.next().unwrap().ends_with(",weights"), "{csv}");
    let cells: Vec<&str> = lines
        .map(|line| line.rsplit(',').next().unwrap())
        .filter(|cell| !cell.is_empty())
        .collect();
    assert_eq!(cells, ["\"current\"", "\"average\"", "\"average\""]);
    let record: Value = serde_json::from_str(&read("run.json")).unwrap();
    assert_eq!(record["exported_weights"], "average");
    assert_eq!(record["final"]["weights"], "average");
    let step = record["exported_step"].as_u64().unwrap();
    assert!(read("README.md").contains(&format!("an average over the steps up to step {step}.")));
    let report = read("report.html");
    for part in [
        format!("step {step} of the average</dd>"),
        format!("the average of step {step} is exported"),
    ] {
        assert!(report.contains(&part), "{part}");
    }
    let log = read("logs/train.log");
    assert!(log.contains("evaluated of the current weights"), "{log}");
    assert!(log.contains("evaluated of the average"), "{log}");
}

#[test]
fn a_run_that_ends_before_its_average_begins_exports_its_weights_and_says_so() {
    let bench = Bench::new();
    let mut config = bench.config("run", averaged(0.9, 1, 8));
    // Nothing improves, so the run stops after its third evaluation.
    config.optimizer.learning_rate = 1e-30;
    config.eval.eval_steps = 1;
    config.eval.early_stopping_patience = 2;
    let plan = Plan::from_config(config).unwrap();
    let (watch, outcome) = trained(&plan);
    assert!(outcome.stopped_early && outcome.progress.step == 3);
    assert_eq!(outcome.exported_weights, Some(EvaluatedWeights::Current));
    assert_eq!(notes(&watch, "had not begun at step 1"), 1);
    assert_eq!(bench.average("run", 3).tensors, Tensors::new());
    let exported = folder::load(&bench.path("run"), &Device::flex()).unwrap();
    assert_eq!(parameters(&exported), bench.weights(&plan, "run", 1));
    let card = fs::read_to_string(bench.path("run/README.md")).unwrap();
    assert!(card.contains("step 1, at which their average had not begun."));
    let record = fs::read_to_string(bench.path("run/run.json")).unwrap();
    assert!(record.contains("\"exported_weights\": \"current\""));
}

#[test]
fn early_stopping_follows_the_average() {
    let bench = Bench::new();
    // The weights get worse from the third step on, and their average lags behind.
    let mut config = bench.config("run", averaged(1.0, 1, 0));
    config.optimizer.learning_rate = 0.3;
    config.eval.eval_steps = 1;
    config.eval.early_stopping_patience = 3;
    let (watch, outcome) = trained(&Plan::from_config(config.clone()).unwrap());
    let found = evaluations(&watch);
    let best = |found: &[(u64, f64, Option<EvaluatedWeights>)]| {
        let lowest = found.iter().map(|found| found.1).fold(f64::MAX, f64::min);
        found.iter().find(|found| found.1 == lowest).unwrap().0
    };
    assert_eq!(outcome.progress.best.unwrap().step, best(&found));
    assert_eq!(outcome.exported_step, best(&found));
    let last = found.last().unwrap().0;
    assert!(last == STEPS || last == best(&found) + 3, "{found:?}");
}
