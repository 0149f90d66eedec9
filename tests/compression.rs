//! Runs of several logical workers, whose gradients are compressed.
#![allow(missing_docs)]

#[path = "support/runs.rs"]
mod runs;

use std::fs;

use firebrick::checkpoint::CheckpointStore;
use firebrick::config::{
    CheckpointFormat, CompressionConfig, CompressionMethod, Config, ConfigError, GradientConfig,
    OptimizerName, Plan,
};
use firebrick::extra::ExtraState;
use firebrick::train::{Event, Run, TrainError};
use runs::{Bench, Watch, metrics, run, steps};
use serde_json::Value;

const STEPS: u64 = 8;
const WORKERS: usize = 3;

impl Bench {
    fn config(&self, run: &str, workers: usize, compression: Option<CompressionConfig>) -> Config {
        let mut config = runs::config(self.folder.path(), run);
        config.train.max_steps = Some(STEPS);
        config.eval.eval_steps = 4;
        config.checkpoint.save_steps = 2;
        config.checkpoint.save_total_limit = 0;
        if compression.as_ref().is_some_and(is_momentum) {
            config.optimizer.name = OptimizerName::Sign;
        }
        config.gradient = Some(GradientConfig {
            logical_workers: workers,
            compression,
            ..GradientConfig::default()
        });
        config
    }

    /// The residuals in a checkpoint.
    fn residuals(&self, run: &str, step: u64) -> ExtraState {
        let store = CheckpointStore::new(&self.path(run));
        let mut extra = store.load(step).unwrap().extra;
        extra.remove("gradient").unwrap_or_default()
    }

    fn model(&self, run: &str) -> Vec<u8> {
        fs::read(self.path(run).join("model.safetensors")).unwrap()
    }
}

/// Whether the method's own residual is a momentum.
fn is_momentum(compression: &CompressionConfig) -> bool {
    let by_default = matches!(
        compression.method,
        CompressionMethod::Demo | CompressionMethod::VsaRotate
    );
    match compression.residual_decay {
        Some(decay) => decay < 1.0,
        None => by_default && compression.error_feedback,
    }
}

fn compressed(method: CompressionMethod) -> Option<CompressionConfig> {
    Some(CompressionConfig {
        method,
        ratio: match method {
            CompressionMethod::Sign | CompressionMethod::None => None,
            // Rank one of such small matrices is not far from all.
            CompressionMethod::PowerSgd => Some(8.0),
            _ => Some(24.0),
        },
        ..CompressionConfig::default()
    })
}

fn trained(config: Config) -> Watch {
    let watch = Watch::default();
    run(&Plan::from_config(config).unwrap(), &watch)
        .unwrap()
        .unwrap();
    watch
}

fn stop(config: Config, after: u64) {
    let watch = Watch {
        stop_after: Some(after),
        ..Watch::default()
    };
    match run(&Plan::from_config(config).unwrap(), &watch) {
        Err(TrainError::Interrupted { step, .. }) => assert_eq!(step, after),
        other => panic!("{other:?}"),
    }
}

fn notes(watch: &Watch) -> Vec<String> {
    let events = watch.events.lock().unwrap();
    let notes = events.iter().filter_map(|event| match event {
        Event::Note { text } => Some(text.clone()),
        _ => None,
    });
    notes.collect()
}

const METHODS: [CompressionMethod; 8] = [
    CompressionMethod::TopK,
    CompressionMethod::RandomK,
    CompressionMethod::Ternary,
    CompressionMethod::Sign,
    CompressionMethod::PowerSgd,
    CompressionMethod::Demo,
    CompressionMethod::VsaRotate,
    CompressionMethod::VsaSketch,
];

#[test]
fn n1_workers_without_compression_are_accumulated_micro_batches() {
    let bench = Bench::new();
    trained(bench.config("workers", WORKERS, None));
    let mut config = bench.config("passes", 1, None);
    config.train.gradient_accumulation_steps = WORKERS;
    trained(config);
    trained(bench.config("none", WORKERS, compressed(CompressionMethod::None)));
    // Sums over micro-batches and threads are added in another order.
    let (workers, passes) = (
        metrics(&bench.path("workers")),
        metrics(&bench.path("passes")),
    );
    assert_eq!(workers.len(), passes.len());
    for (a, b) in workers.iter().zip(&passes) {
        for name in ["loss", "grad_norm", "val_loss"] {
            let [a, b] = [a, b].map(|row| row[name].as_f64());
            let is_near = match (a, b) {
                (Some(a), Some(b)) => (a - b).abs() <= 1e-5 * a.abs(),
                (a, b) => a == b,
            };
            assert!(is_near, "{name}: {a:?} and {b:?}");
        }
        for name in ["tokens", "backward_passes", "flops"] {
            assert_eq!(a[name], b[name], "{name}");
        }
    }
    assert_eq!(
        metrics(&bench.path("workers")),
        metrics(&bench.path("none"))
    );
    assert!(bench.model("workers") == bench.model("none"));
    trained(bench.config("again", WORKERS, None));
    assert_eq!(workers, metrics(&bench.path("again")));
}

#[test]
fn g1_a_run_of_every_method_goes_on_bit_for_bit() {
    for (place, method) in METHODS.into_iter().enumerate() {
        let bench = Bench::new();
        let config = |run: &str| {
            let mut config = bench.config(run, WORKERS, compressed(method));
            if place % 3 == 0 {
                config.checkpoint.format = CheckpointFormat::Full;
            }
            config
        };
        trained(config("once"));
        let residuals = bench.residuals("once", STEPS);
        assert!(!residuals.tensors.is_empty(), "{method:?}");
        for after in [1, 4, 7] {
            let name = format!("stopped-{after}");
            stop(config(&name), after);
            trained(config(&name));
            let case = format!("{method:?} {after}");
            assert_eq!(
                metrics(&bench.path(&name)),
                metrics(&bench.path("once")),
                "{case}"
            );
            assert!(bench.model(&name) == bench.model("once"), "{case}");
            assert_eq!(bench.residuals(&name, STEPS), residuals, "{case}");
        }
    }
}

#[test]
fn g1_metrics_and_records_have_the_traffic() {
    let bench = Bench::new();
    let watch = trained(bench.config("run", WORKERS, compressed(CompressionMethod::VsaRotate)));
    let records = steps(&watch);
    let (mut sent, mut received) = (0, 0);
    for record in &records {
        let exchange = record.exchange.unwrap();
        sent += exchange.sent_bytes;
        received += exchange.received_bytes;
        let others = exchange.sent_bytes * (WORKERS as u64 - 1);
        // Workers send nearly as much as each other.
        assert!(exchange.received_bytes.abs_diff(others) < others / 4);
        let ratio = exchange.gradient_bytes as f64 / exchange.sent_bytes as f64;
        assert!((ratio - 24.0).abs() < 3.0, "{ratio}");
        assert!(
            exchange.sent_energy > 0.3 && exchange.sent_energy < 1.0,
            "{exchange:?}"
        );
        assert!(
            exchange.cosine > 0.2 && exchange.cosine <= 1.0,
            "{exchange:?}"
        );
        assert!(exchange.residual_norm > 0.0);
        assert_eq!(
            (record.cost.sent_bytes, record.cost.received_bytes),
            (sent, received)
        );
    }
    let last = metrics(&bench.path("run")).pop().unwrap();
    assert_eq!(last["sent_bytes"], sent);
    assert_eq!(last["received_bytes"], received);
    assert!(last["sent_energy"].as_f64().unwrap() > 0.3);
    let header = fs::read_to_string(bench.path("run").join("metrics.csv")).unwrap();
    let header = header.lines().next().unwrap().to_string();
    assert!(
        header.ends_with("sent_energy,exchange_cosine,residual_norm,sent_bytes,received_bytes"),
        "{header}"
    );
    let record = fs::read_to_string(bench.path("run").join("run.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["final"]["sent_bytes"], sent);
    let notes = notes(&watch).join("\n");
    assert!(
        notes.contains("gradients by vsa-rotate: a worker sends about"),
        "{notes}"
    );
    assert!(!notes.contains("only costs"), "{notes}");
    let alone = trained(bench.config("alone", 1, compressed(CompressionMethod::VsaRotate)));
    assert!(has_note(&alone, "with one worker compression only costs"));
}

fn has_note(watch: &Watch, part: &str) -> bool {
    notes(watch).iter().any(|note| note.contains(part))
}

#[test]
fn n3_a_run_goes_on_with_other_workers_and_says_so() {
    let bench = Bench::new();
    let compression = compressed(CompressionMethod::TopK);
    stop(bench.config("run", 4, compression.clone()), 4);
    assert_eq!(workers_of(&bench.residuals("run", 4)), 4);
    let watch = trained(bench.config("run", 2, compression));
    assert!(has_note(
        &watch,
        "the residuals of 4 workers are shared out over 2"
    ));
    assert!(has_note(&watch, "2 logical workers in place of 4"));
    assert_eq!(workers_of(&bench.residuals("run", STEPS)), 2);
}

fn workers_of(state: &ExtraState) -> usize {
    let owners = state
        .tensors
        .keys()
        .filter_map(|name| name.split('.').next());
    owners.collect::<std::collections::BTreeSet<_>>().len()
}

#[test]
fn p1_phases_that_freeze_layers_go_on_bit_for_bit() {
    let bench = Bench::new();
    let plan = |run: &str| {
        let toml =
            toml::to_string(&bench.config(run, WORKERS, compressed(CompressionMethod::VsaRotate)));
        let phases = "[[phase]]\nlength = 3\n[[phase]]\nlength = \"rest\"\nfreeze = [\"embed_tokens\", \"layers.0\"]\n";
        let path = bench.path(&format!("{run}.toml"));
        fs::write(&path, format!("{}\n{phases}", toml.unwrap())).unwrap();
        firebrick::config::load(&path, &[]).unwrap()
    };
    let go = |run_name: &str, after: Option<u64>| {
        let watch = Watch {
            stop_after: after,
            ..Watch::default()
        };
        run(&plan(run_name), &watch)
    };
    go("once", None).unwrap();
    let residuals = bench.residuals("once", STEPS);
    assert!(
        !residuals
            .tensors
            .keys()
            .any(|name| name.contains("layers.0."))
    );
    assert!(
        residuals
            .tensors
            .keys()
            .any(|name| name.contains("layers.1."))
    );
    for after in [2, 3, 4, 6] {
        let name = format!("stopped-{after}");
        assert!(go(&name, Some(after)).is_err());
        go(&name, None).unwrap();
        assert_eq!(
            metrics(&bench.path(&name)),
            metrics(&bench.path("once")),
            "{after}"
        );
        assert!(bench.model(&name) == bench.model("once"), "{after}");
        assert_eq!(bench.residuals(&name, STEPS), residuals, "{after}");
    }
}

#[test]
fn g1_the_estimate_counts_residuals() {
    let bench = Bench::new();
    let term = |compression: Option<CompressionConfig>, name: &str| {
        let plan = Plan::from_config(bench.config("run", WORKERS, compression)).unwrap();
        let estimate = Run::estimate(&plan, false, |_| ()).unwrap();
        let terms = estimate.forecast.memory.terms.iter();
        let found = terms
            .filter(|term| term.name == name)
            .map(|term| term.bytes);
        found.sum::<u64>()
    };
    assert_eq!(term(None, "residuals"), 0);
    // Embedding and head of 256 bytes and more, two blocks.
    let residuals = term(compressed(CompressionMethod::TopK), "residuals");
    trained(bench.config("run", WORKERS, compressed(CompressionMethod::TopK)));
    let saved = bench.residuals("run", STEPS);
    let bytes: usize = saved
        .tensors
        .values()
        .map(|data| data.as_bytes().len())
        .sum();
    assert_eq!(residuals, bytes as u64);
}

#[test]
fn g1_a_ratio_out_of_reach_is_refused_before_the_first_step() {
    let bench = Bench::new();
    let mut compression = compressed(CompressionMethod::PowerSgd).unwrap();
    compression.ratio = Some(5000.0);
    let config = bench.config("run", WORKERS, Some(compression));
    let error = run(&Plan::from_config(config).unwrap(), &Watch::default()).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let text = error.to_string();
    assert!(text.contains("does not reach a ratio of 5000"), "{text}");
    assert!(!bench.path("run").join("metrics.csv").exists());
}

#[test]
fn g1_contradictions_are_errors_with_a_hint() {
    let bench = Bench::new();
    let issues = |change: &dyn Fn(&mut Config)| {
        let mut config = bench.config("run", 2, compressed(CompressionMethod::VsaRotate));
        change(&mut config);
        match Plan::from_config(config) {
            Err(ConfigError::Invalid { issues, .. }) => {
                let texts = issues.iter().map(|issue| {
                    let help = issue.help.clone().unwrap_or_default();
                    format!("{}\n{help}", issue.message)
                });
                texts.collect::<Vec<_>>().join("\n")
            }
            other => panic!("{other:?}"),
        }
    };
    let set = |config: &mut Config, change: &dyn Fn(&mut CompressionConfig)| {
        change(
            config
                .gradient
                .as_mut()
                .unwrap()
                .compression
                .as_mut()
                .unwrap(),
        );
    };
    let momentum = issues(&|config| config.optimizer.name = OptimizerName::Adamw);
    assert!(
        momentum.contains("keeps the momentum in the residual"),
        "{momentum}"
    );
    assert!(momentum.contains("optimizer.name = \"sign\""), "{momentum}");
    let nothing = issues(&|config| {
        set(config, &|compression| {
            compression.residual_decay = Some(1.0)
        });
    });
    assert!(nothing.contains("nothing keeps one"), "{nothing}");
    let without = issues(&|config| config.gradient = None);
    assert!(without.contains("nothing keeps one"), "{without}");
    let lost = issues(&|config| {
        config.optimizer.name = OptimizerName::Adamw;
        set(config, &|compression| {
            compression.error_feedback = false;
            compression.residual_decay = Some(0.9);
        });
    });
    assert!(lost.contains("there is no residual"), "{lost}");
    let mean = issues(&|config| {
        config.optimizer.name = OptimizerName::Adamw;
        set(config, &|compression| {
            compression.method = CompressionMethod::Demo;
            compression.residual_decay = Some(1.0);
        });
    });
    assert!(mean.contains("demo takes the mean"), "{mean}");
    let ratio = issues(&|config| {
        config.optimizer.name = OptimizerName::Adamw;
        set(config, &|compression| {
            compression.method = CompressionMethod::Sign;
            compression.residual_decay = None;
        });
    });
    assert!(ratio.contains("whose ratio is about 28"), "{ratio}");
    let none = issues(&|config| {
        config.optimizer.name = OptimizerName::Adamw;
        set(config, &|compression| {
            compression.method = CompressionMethod::None
        });
    });
    assert!(none.contains("method \"none\" ignores"), "{none}");
}

#[test]
fn g1_without_error_feedback_a_worker_keeps_nothing() {
    let bench = Bench::new();
    let mut compression = compressed(CompressionMethod::TopK).unwrap();
    compression.error_feedback = false;
    trained(bench.config("run", WORKERS, Some(compression)));
    assert!(bench.residuals("run", STEPS).tensors.is_empty());
}
