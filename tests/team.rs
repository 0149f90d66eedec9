//! Runs whose ranks are threads of one process: what they agree on, share out and save together.
#![allow(missing_docs)]

#[path = "support/runs.rs"]
mod runs;

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use firebrick::checkpoint::CheckpointStore;
use firebrick::collective::{Collective, ThreadRank};
use firebrick::config::{
    AverageConfig, CompressionConfig, CompressionMethod, Config, DatasetConfig, GradientConfig,
    OptimizerName, Plan, PredictConfig, PredictMethod, RegulatorConfig, SpikeAction, Task,
};
use firebrick::train::{Event, Options, Outcome, Resume, Run, TrainError};
use runs::{Bench, Watch, metrics};
use serde_json::Value;

const STEPS: u64 = 8;
const RANKS: usize = 4;

impl Bench {
    fn config(&self, run: &str) -> Config {
        let mut config = runs::config(self.folder.path(), run);
        config.train.max_steps = Some(STEPS);
        config.eval.eval_steps = 4;
        config.eval.sample_prompts = vec!["the ".to_string()];
        config.checkpoint.save_steps = 2;
        config.checkpoint.save_total_limit = 0;
        config
    }

    fn compressed(&self, run: &str, workers: usize) -> Config {
        let mut config = self.config(run);
        config.optimizer.name = OptimizerName::Sign;
        config.gradient = Some(GradientConfig {
            logical_workers: workers,
            compression: Some(CompressionConfig {
                method: CompressionMethod::VsaRotate,
                ratio: Some(24.0),
                ..CompressionConfig::default()
            }),
            ..GradientConfig::default()
        });
        config
    }

    fn model(&self, run: &str) -> Vec<u8> {
        fs::read(self.path(run).join("model.safetensors")).unwrap()
    }

    /// Tensors of the residuals in a checkpoint, by rank.
    fn residuals(&self, run: &str, step: u64) -> Vec<String> {
        let store = CheckpointStore::new(&self.path(run));
        let mut extra = store.load(step).unwrap().extra;
        let state = extra.remove("gradient").unwrap_or_default();
        let ranks = state.tensors.into_keys();
        let mut ranks: Vec<String> = ranks
            .map(|name| name.split_once('.').unwrap().0.to_string())
            .collect();
        ranks.dedup();
        ranks
    }
}

type End = Result<Option<Outcome>, TrainError>;

/// Runs a config on several ranks. `of_rank` may change the config and the observer of a rank.
fn on_ranks(
    ranks: usize,
    config: &Config,
    of_rank: impl Fn(usize, &mut Config, &mut Watch) + Sync,
) -> Vec<(End, Watch)> {
    plans_on_ranks(ranks, |rank, watch| {
        let mut config = config.clone();
        of_rank(rank, &mut config, watch);
        Plan::from_config(config).unwrap()
    })
}

/// Runs the plan of each rank.
fn plans_on_ranks(
    ranks: usize,
    of_rank: impl Fn(usize, &mut Watch) -> Plan + Sync,
) -> Vec<(End, Watch)> {
    let group = ThreadRank::group(ranks, Duration::from_secs(120));
    std::thread::scope(|scope| {
        let of_rank = &of_rank;
        let threads: Vec<_> = group
            .into_iter()
            .map(|rank| {
                scope.spawn(move || {
                    let mut watch = Watch::default();
                    let plan = of_rank(rank.rank(), &mut watch);
                    let collective: Arc<dyn Collective> = Arc::new(rank);
                    let options = Options {
                        resume: Resume::Auto,
                        interrupt: watch.interrupt.clone(),
                        observers: vec![Box::new(watch.clone())],
                        collective: Some(collective),
                        ..Options::default()
                    };
                    let run = Run::prepare(&plan, options);
                    let end = run.and_then(|run| run.map(Run::train).transpose());
                    (end, watch)
                })
            })
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|end| end.expect("no panic")).collect()
    })
}

fn trained(ranks: usize, config: &Config) -> Vec<(Outcome, Watch)> {
    let ends = on_ranks(ranks, config, |_, _, _| {});
    let ends = ends
        .into_iter()
        .map(|(end, watch)| (end.unwrap().expect("a new run"), watch));
    ends.collect()
}

fn alone(config: Config) -> Watch {
    let watch = Watch::default();
    runs::run(&Plan::from_config(config).unwrap(), &watch)
        .unwrap()
        .unwrap();
    watch
}

fn close(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => (a - b).abs() <= 1e-5 * a.abs().max(b.abs()),
        _ => a == b,
    }
}

#[test]
fn n1_four_ranks_are_one_process_with_four_times_the_accumulation() {
    let bench = Bench::new();
    let config = bench.config("ranks");
    let ends = trained(RANKS, &config);
    trained(RANKS, &bench.config("again"));
    let mut accumulated = bench.config("alone");
    accumulated.train.gradient_accumulation_steps = RANKS;
    alone(accumulated);
    let [ranks, again, single] = ["ranks", "again", "alone"].map(|run| metrics(&bench.path(run)));
    assert_eq!(ranks, again);
    assert_eq!(bench.model("ranks"), bench.model("again"));
    assert_eq!(ranks.len(), single.len());
    for (ranks, single) in ranks.iter().zip(&single) {
        for (key, value) in ranks.as_object().unwrap() {
            assert!(
                close(value, &single[key]),
                "{key}: {value} and {}",
                single[key]
            );
        }
    }
    // All ranks tell the same, and rank 0 alone has written.
    let first = &ends[0].0;
    for (outcome, watch) in &ends {
        assert_eq!(outcome.exported_step, first.exported_step);
        assert_eq!(outcome.progress.best, first.progress.best);
        assert_eq!(outcome.bigram, first.bigram);
        assert_eq!(runs::steps(watch).len() as u64, STEPS);
    }
    let record = fs::read_to_string(bench.path("ranks/run.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["ranks"], 4);
    assert_eq!(record["final"]["backward_passes"], 4 * STEPS);
    let again = on_ranks(RANKS, &config, |_, _, _| {});
    assert!(again.iter().all(|(end, _)| matches!(end, Ok(None))));
}

#[test]
fn n1_compressed_ranks_are_logical_workers_and_go_on_bit_for_bit() {
    let bench = Bench::new();
    alone(bench.compressed("workers", RANKS));
    trained(RANKS, &bench.compressed("whole", 1));
    // A signal to one rank stops all of them after the same step.
    let parts = bench.compressed("parts", 1);
    let ends = on_ranks(RANKS, &parts, |rank, _, watch| {
        watch.stop_after = (rank == 2).then_some(3);
    });
    for (end, _) in ends {
        assert!(matches!(end, Err(TrainError::Interrupted { step: 3, .. })));
    }
    assert_eq!(
        bench.residuals("parts", 3),
        ["rank0", "rank1", "rank2", "rank3"]
    );
    trained(RANKS, &parts);
    assert_eq!(bench.model("whole"), bench.model("parts"));
    assert_eq!(bench.model("whole"), bench.model("workers"));
    assert_eq!(metrics(&bench.path("whole")), metrics(&bench.path("parts")));
}

#[test]
fn n3_a_run_goes_on_with_another_number_of_ranks_and_says_so() {
    let bench = Bench::new();
    let config = bench.compressed("run", 1);
    let ends = on_ranks(RANKS, &config, |rank, _, watch| {
        watch.stop_after = (rank == 0).then_some(4);
    });
    assert!(ends.iter().all(|(end, _)| end.is_err()));
    let ends = trained(2, &config);
    let events = ends[0].1.events.lock().unwrap();
    let said = |part: &str| {
        events
            .iter()
            .any(|event| matches!(event, Event::Note { text } if text.contains(part)))
    };
    assert!(said(
        "with 2 ranks in place of 4: a step has 4 sequences in place of 8"
    ));
    assert!(said("the residuals of 4 workers are shared out over 2"));
    assert_eq!(bench.residuals("run", STEPS), ["rank0", "rank1"]);

    // One process goes on with what several began, and the other way round.
    let mut longer = config.clone();
    longer.train.max_steps = Some(STEPS + 2);
    alone(longer.clone());
    assert_eq!(bench.residuals("run", STEPS + 2), ["rank0"]);
    longer.train.max_steps = Some(STEPS + 4);
    trained(2, &longer);
    assert_eq!(bench.residuals("run", STEPS + 4), ["rank0", "rank1"]);
}

#[test]
fn n3_a_length_in_tokens_with_other_ranks_is_warned_of() {
    let bench = Bench::new();
    let mut config = bench.config("run");
    config.train.max_steps = None;
    // A step has 32 tokens for each rank.
    config.train.max_tokens = Some(1024);
    let ends = on_ranks(RANKS, &config, |rank, _, watch| {
        watch.stop_after = (rank == 0).then_some(4);
    });
    assert!(ends.iter().all(|(end, _)| end.is_err()));
    let ends = trained(2, &config);
    let events = ends[0].1.events.lock().unwrap();
    let mut notes = events.iter().filter_map(|event| match event {
        Event::Note { text } => Some(text),
        _ => None,
    });
    let note = notes.find(|text| text.contains("2 ranks in place of 4"));
    assert!(
        note.unwrap().contains("another number of steps"),
        "{note:?}"
    );
    assert_eq!(ends[0].0.progress.step, 16);
}

#[test]
fn n1_packed_answers_on_three_ranks_are_those_of_one_process() {
    let bench = Bench::new();
    let row = |n: usize| {
        let (prompt, completion) = (format!("{n} and {n}?"), "yes ".repeat(1 + n % 7));
        serde_json::json!({ "prompt": prompt, "completion": completion }).to_string() + "\n"
    };
    fs::write(
        bench.path("rows.jsonl"),
        (0..80).map(row).collect::<String>(),
    )
    .unwrap();
    let config = |run: &str| {
        let mut config = bench.config(run);
        config.task = Task::Sft;
        config.data.sequence_len = 64;
        config.data.datasets = vec![DatasetConfig::new(
            bench.path("rows.jsonl").display().to_string(),
        )];
        config
    };
    trained(3, &config("ranks"));
    let mut accumulated = config("alone");
    accumulated.train.gradient_accumulation_steps = 3;
    alone(accumulated);
    let [ranks, single] = ["ranks", "alone"].map(|run| metrics(&bench.path(run)));
    assert_eq!(ranks.len(), single.len());
    for (ranks, single) in ranks.iter().zip(&single) {
        for (key, value) in ranks.as_object().unwrap() {
            assert!(
                close(value, &single[key]),
                "{key}: {value} and {}",
                single[key]
            );
        }
    }
}

#[test]
fn n1_ranks_that_disagree_are_told_before_the_first_step() {
    let bench = Bench::new();
    let ends = on_ranks(3, &bench.config("run"), |rank, config, _| {
        if rank == 2 {
            config.optimizer.learning_rate = 0.5;
        }
    });
    for (end, _) in ends {
        let error = end.unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert_eq!(
            error.to_string(),
            "the configuration of rank 2 is not that of rank 0:\n  \
             optimizer.learning_rate: 0.01 on rank 0, 0.5 on rank 2"
        );
    }
    assert!(!bench.path("run").exists());
}

#[test]
fn n3_a_rank_that_fails_is_named_by_the_others_and_the_run_goes_on_later() {
    let bench = Bench::new();
    let config = bench.config("run");
    let ends = on_ranks(RANKS, &config, |rank, _, watch| {
        watch.fail_after = (rank == 1).then_some(5);
    });
    for (rank, (end, _)) in ends.into_iter().enumerate() {
        let error = end.unwrap_err();
        match rank {
            1 => assert!(!error.is_of_all_ranks(), "{error}"),
            _ => {
                assert!(error.is_of_all_ranks(), "{error}");
                assert!(error.to_string().contains("rank 1 has left"), "{error}");
                assert_eq!(error.exit_code(), 1);
            }
        }
    }
    trained(RANKS, &config);
    trained(RANKS, &bench.config("whole"));
    assert_eq!(bench.model("run"), bench.model("whole"));
}

#[test]
fn n1_what_depends_on_the_loss_is_decided_alike() {
    let bench = Bench::new();
    let mut config = bench.config("run");
    config.train.max_steps = Some(24);
    config.train.micro_batch_size = 3;
    config.optimizer.learning_rate = 3e-2;
    config.average = Some(AverageConfig {
        decay: 0.9,
        ..AverageConfig::default()
    });
    config.regulator = Some(RegulatorConfig {
        spike_sigma: 0.5,
        window: 5,
        on_spike: SpikeAction::Rollback,
        ..RegulatorConfig::default()
    });
    config.eval.early_stopping_patience = 3;
    let mut plan = Plan::from_config(config).unwrap();
    plan.phases[0].predict = Some(PredictConfig {
        method: PredictMethod::Weights,
        every: 3,
        min_cosine: -1.0,
        max_rejections: 1000,
    });
    let ends = plans_on_ranks(3, |_, _| plan.clone());
    let what_happened = |watch: &Watch| {
        let events = watch.events.lock().unwrap();
        let decisions = events.iter().filter_map(|event| match event {
            Event::Regulated {
                step,
                action,
                back_to,
                ..
            } => Some(format!("{step} {action:?} {back_to:?}")),
            Event::Predicted {
                step,
                is_kept,
                loss_after,
                ..
            } => Some(format!("{step} {is_kept} {loss_after}")),
            Event::Evaluated {
                step, evaluation, ..
            } => Some(format!("{step} {evaluation:?}")),
            _ => None,
        });
        decisions.collect::<Vec<String>>()
    };
    let first = what_happened(&ends[0].1);
    assert!(
        first.iter().any(|what| what.contains("Rollback")),
        "{first:?}"
    );
    assert!(first.iter().any(|what| what.contains("true")), "{first:?}");
    for (_, watch) in &ends {
        assert_eq!(what_happened(watch), first);
    }
}
