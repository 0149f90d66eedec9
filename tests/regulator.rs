//! P4: the regulator, tested by injected faults: noise in the data, and gradients that explode.
#![allow(missing_docs)]

#[path = "support/runs.rs"]
mod runs;

use std::fs;
use std::path::PathBuf;

use firebrick::config::{Plan, RegulatorConfig, Sampling, SpikeAction};
use firebrick::gradient::{Gradient, PipelineError, Stage, StepContext};
use firebrick::train::{Event, Irregular, Options, Outcome, Resume, Run, StepRecord, TrainError};
use runs::{Watch, metrics, run, steps, text};
use serde_json::Value;

const STEPS: u64 = 40;

struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    /// Text with stretches of noise in it.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = text().repeat(2).into_bytes();
        for third in 1..3 {
            let first = third * bytes.len() / 3;
            for place in 0..40 {
                bytes[first + place] = b'!' + (place * place * 7 % 90) as u8;
            }
        }
        fs::write(folder.path().join("text.txt"), bytes).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn plan(&self, run: &str, action: SpikeAction) -> Plan {
        let mut config = runs::config(self.folder.path(), run);
        config.data.sequence_len = 32;
        config.data.sampling = Sampling::Epoch;
        config.train.max_steps = Some(STEPS);
        // A run that goes back always comes to a step that was evaluated.
        config.eval.eval_steps = 3;
        config.checkpoint.save_steps = 3;
        config.regulator = Some(RegulatorConfig {
            window: 8,
            spike_sigma: 4.0,
            norm_factor: 50.0,
            on_spike: action,
        });
        Plan::from_config(config).unwrap()
    }
}

/// The decisions of a run, without those that a rollback made void.
fn decisions(watch: &Watch) -> Vec<Event> {
    let events = watch.events.lock().unwrap();
    let found = events
        .iter()
        .filter(|event| matches!(event, Event::Regulated { .. }));
    found.cloned().collect()
}

fn end_of(bench: &Bench, run: &str) -> (Vec<Value>, Vec<u8>) {
    let weights = fs::read(bench.path(run).join("model.safetensors")).unwrap();
    (metrics(&bench.path(run)), weights)
}

fn trained(plan: &Plan) -> Watch {
    let watch = Watch::default();
    run(plan, &watch).unwrap();
    watch
}

#[test]
fn p4_a_spike_of_the_loss_is_skipped_with_one_event_and_one_metric() {
    let bench = Bench::new();
    let watch = trained(&bench.plan("run", SpikeAction::Skip));
    let decisions = decisions(&watch);
    assert!(!decisions.is_empty());
    let records = steps(&watch);
    for (count, decision) in decisions.iter().enumerate() {
        let Event::Regulated {
            step,
            cause,
            value,
            limit,
            back_to,
            ..
        } = decision
        else {
            unreachable!()
        };
        assert_eq!((*cause, *back_to), (Irregular::Loss, None));
        assert!(value > limit);
        // The step has no row of its own; the next one counts the decision.
        assert!(records.iter().all(|record| record.step != *step));
        if let Some(next) = records.iter().find(|record| record.step > *step) {
            assert!(next.regulated.unwrap() > count as u64);
        }
    }
    let before_last =
        |decision: &&Event| decision.completed_steps() < records.last().map(|record| record.step);
    let counted = decisions.iter().filter(before_last).count() as u64;
    assert!(counted > 0);
    assert_eq!(records.last().unwrap().regulated, Some(counted));
    // A skipped step trains no tokens.
    let missing = STEPS - records.len() as u64;
    assert_eq!(missing, decisions.len() as u64);
    let events = fs::read_to_string(bench.path("run/logs/events.jsonl")).unwrap();
    assert_eq!(events.matches("\"regulated\",").count(), decisions.len());
    let report = fs::read_to_string(bench.path("run/report.html")).unwrap();
    assert!(report.contains("is above its limit of"));
}

#[test]
fn p4_each_decision_gives_the_same_bits_twice_and_across_a_resume() {
    for action in [SpikeAction::Skip, SpikeAction::CutLr, SpikeAction::Rollback] {
        let bench = Bench::new();
        let watch = trained(&bench.plan("once", action));
        assert!(!decisions(&watch).is_empty(), "{action:?}");
        let once = end_of(&bench, "once");
        trained(&bench.plan("twice", action));
        assert!(end_of(&bench, "twice") == once, "{action:?}");
        for stop_after in [6, 13, 20, 27, 33] {
            let name = format!("stopped-{stop_after}");
            let plan = bench.plan(&name, action);
            let stopped = Watch {
                stop_after: Some(stop_after),
                ..Watch::default()
            };
            match run(&plan, &stopped) {
                Err(TrainError::Interrupted { .. }) => {
                    trained(&plan);
                }
                // The step was skipped in this run.
                Ok(_) => {}
                Err(error) => panic!("{error}"),
            }
            let resumed = end_of(&bench, &name);
            assert_eq!(resumed.0, once.0, "{action:?} stopped after {stop_after}");
            assert!(resumed.1 == once.1, "{action:?} stopped after {stop_after}");
        }
    }
}

#[test]
fn p4_a_cut_halves_the_learning_rate_for_a_window() {
    let bench = Bench::new();
    let mut plan = bench.plan("plain", SpikeAction::Skip);
    plan.config.regulator = None;
    let plain = steps(&trained(&plan));
    let watch = trained(&bench.plan("cut", SpikeAction::CutLr));
    let cuts: Vec<u64> = decisions(&watch)
        .iter()
        .filter_map(Event::completed_steps)
        .collect();
    assert!(!cuts.is_empty());
    for record in steps(&watch) {
        let rate = plain[record.step as usize - 1].lr;
        let first = cuts[0];
        if record.step < first {
            assert_eq!(record.lr, rate);
        } else if record.step <= first + 8 {
            let count = cuts.iter().filter(|cut| **cut < record.step).count();
            assert_eq!(
                record.lr,
                rate * 0.5f64.powi(count as i32),
                "{}",
                record.step
            );
        }
    }
}

#[test]
fn p4_a_rollback_goes_on_from_the_last_checkpoint_with_later_sequences() {
    let bench = Bench::new();
    let watch = trained(&bench.plan("run", SpikeAction::Rollback));
    let Event::Regulated {
        step,
        back_to: Some(back_to),
        ..
    } = &decisions(&watch)[0]
    else {
        panic!("nothing was rolled back")
    };
    assert!(back_to < step);
    let events = watch.events.lock().unwrap();
    let place = events.iter().position(|event| event.back_to().is_some());
    let next = events[place.unwrap()..]
        .iter()
        .find_map(|event| match event {
            Event::Step(record) => Some(record.step),
            _ => None,
        });
    assert_eq!(next, Some(back_to + 1));
    drop(events);
    // Each step has one row, in order.
    let rows = metrics(&bench.path("run"));
    let numbers: Vec<u64> = rows
        .iter()
        .map(|row| row["step"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, (1..=STEPS).collect::<Vec<_>>());
    let csv = fs::read_to_string(bench.path("run/metrics.csv")).unwrap();
    assert_eq!(csv.lines().count() as u64, STEPS + 1);
}

/// Multiplies the gradient of one step, whenever it is computed.
struct Explode {
    step: u64,
}

impl Stage for Explode {
    fn owner(&self) -> &str {
        "explode"
    }

    fn apply(
        &mut self,
        gradient: Gradient,
        context: &StepContext,
    ) -> Result<Gradient, PipelineError> {
        match context.step + 1 == self.step {
            true => Ok(gradient.scale(1e4)),
            false => Ok(gradient),
        }
    }
}

fn exploding(plan: &Plan, step: u64) -> (Watch, Result<Option<Outcome>, TrainError>) {
    let watch = Watch::default();
    let options = Options {
        resume: Resume::Auto,
        observers: vec![Box::new(watch.clone())],
        stages: vec![Box::new(Explode { step })],
        ..Options::default()
    };
    let run = Run::prepare(plan, options).and_then(|run| run.map(Run::train).transpose());
    (watch, run)
}

#[test]
fn p4_an_exploding_norm_is_skipped_before_it_reaches_the_weights() {
    let bench = Bench::new();
    let (watch, outcome) = exploding(&bench.plan("run", SpikeAction::Skip), 12);
    outcome.unwrap();
    let norms: Vec<u64> = decisions(&watch)
        .iter()
        .filter_map(|event| match event {
            Event::Regulated {
                step,
                cause: Irregular::GradNorm,
                ..
            } => Some(*step),
            _ => None,
        })
        .collect();
    assert_eq!(norms, [12]);
    let largest =
        |steps: &[StepRecord]| steps.iter().map(|step| step.grad_norm).fold(0.0, f64::max);
    assert!(largest(&steps(&watch)) < 1e3);
}

#[test]
fn p4_a_run_that_comes_back_to_one_checkpoint_again_and_again_has_diverged() {
    let bench = Bench::new();
    let (_, outcome) = exploding(&bench.plan("run", SpikeAction::Rollback), 12);
    let Err(error) = outcome else {
        panic!("the run went on")
    };
    assert!(
        matches!(
            &error,
            TrainError::Unstable {
                step: 12,
                checkpoint: 9,
                rollbacks: 3
            }
        ),
        "{error}"
    );
    assert_eq!((error.exit_code(), error.kind()), (5, "diverged"));
}

#[test]
fn p4_a_stage_cannot_take_the_regulators_place() {
    struct Impostor;
    impl Stage for Impostor {
        fn owner(&self) -> &str {
            "regulator"
        }

        fn apply(
            &mut self,
            gradient: Gradient,
            _: &StepContext,
        ) -> Result<Gradient, PipelineError> {
            Ok(gradient)
        }
    }
    let bench = Bench::new();
    let options = Options {
        stages: vec![Box::new(Impostor)],
        ..Options::default()
    };
    let error = Run::prepare(&bench.plan("run", SpikeAction::Skip), options)
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("a part of the training loop"),
        "{error}"
    );
}
