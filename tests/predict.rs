//! P2: phases that predict some of their steps.
#![allow(missing_docs)]

#[path = "support/runs.rs"]
mod runs;

use std::fs;

use firebrick::config::{Plan, PredictConfig, PredictMethod};
use firebrick::train::{Event, TrainError};
use runs::{Bench, Watch, metrics, run, steps};
use serde_json::Value;

const STEPS: u64 = 24;

impl Bench {
    fn plan(&self, run: &str, predict: Option<PredictConfig>) -> Plan {
        let mut config = runs::config(self.folder.path(), run);
        config.train.max_steps = Some(STEPS);
        config.train.micro_batch_size = 3;
        config.train.gradient_accumulation_steps = 2;
        config.optimizer.learning_rate = 3e-3;
        config.eval.eval_steps = 10;
        config.checkpoint.save_steps = 5;
        let mut plan = Plan::from_config(config).unwrap();
        plan.phases[0].predict = predict;
        plan
    }
}

fn predicting(method: PredictMethod) -> PredictConfig {
    PredictConfig {
        method,
        every: 3,
        min_cosine: -1.0,
        max_rejections: 1000,
    }
}

const METHODS: [PredictMethod; 3] = [
    PredictMethod::Momentum,
    PredictMethod::LeastSquares,
    PredictMethod::Weights,
];

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
fn p2_a_predicted_step_costs_a_forward_pass_and_is_recorded() {
    for method in METHODS {
        let bench = Bench::new();
        let watch = trained(&bench.plan("run", Some(predicting(method))));
        let events = watch.events.lock().unwrap();
        let tried: Vec<bool> = events
            .iter()
            .filter_map(|event| match event {
                Event::Predicted { is_kept, .. } => Some(*is_kept),
                _ => None,
            })
            .collect();
        drop(events);
        let kept = tried.iter().filter(|kept| **kept).count() as u64;
        assert!(kept > 0, "{method:?}: {tried:?}");
        let records = steps(&watch);
        assert_eq!(records.len() as u64, STEPS);
        let last = records.last().unwrap();
        let prediction = last.prediction.as_ref().unwrap();
        assert_eq!(prediction.predicted, kept);
        assert_eq!(prediction.rejected, tried.len() as u64 - kept);
        // Two micro-batches for each computed step.
        assert_eq!(last.cost.backward_passes, 2 * (STEPS - kept));
        let modes: Vec<&str> = records
            .iter()
            .map(|record| record.prediction.as_ref().unwrap().mode.as_str())
            .collect();
        assert_eq!(
            modes.iter().filter(|mode| **mode == "predict").count() as u64,
            kept
        );
        assert!(modes.contains(&"correct"));
        assert!(prediction.cosine.is_some());
        // A predicted step draws no sequences and trains no tokens.
        let predicted = modes.iter().position(|mode| *mode == "predict").unwrap();
        assert_eq!(records[predicted].tokens, records[predicted - 1].tokens);
        let plain = trained(&bench.plan("plain", None));
        let plain = steps(&plain).last().unwrap().cost;
        assert_eq!(plain.backward_passes, 2 * STEPS);
        assert!(last.cost.flops < plain.flops);
        let csv = fs::read_to_string(bench.path("run/metrics.csv")).unwrap();
        assert!(
            csv.lines()
                .next()
                .unwrap()
                .ends_with("mode,predicted,rejected,cosine")
        );
    }
}

#[test]
fn p2_a_run_resumes_bit_for_bit_at_every_place_in_a_cycle() {
    for method in METHODS {
        let bench = Bench::new();
        let predict = Some(predicting(method));
        trained(&bench.plan("once", predict));
        let once = end_of(&bench, "once");
        for stop_after in 8..15 {
            let name = format!("stopped-{stop_after}");
            let plan = bench.plan(&name, predict);
            let stopped = Watch {
                stop_after: Some(stop_after),
                ..Watch::default()
            };
            let Err(TrainError::Interrupted { .. }) = run(&plan, &stopped) else {
                panic!("{method:?} was not stopped after {stop_after}")
            };
            trained(&plan);
            let resumed = end_of(&bench, &name);
            assert_eq!(resumed.0, once.0, "{method:?} stopped after {stop_after}");
            assert!(resumed.1 == once.1, "{method:?} stopped after {stop_after}");
        }
    }
}

#[test]
fn p2_prediction_that_turns_itself_off_leaves_the_run_as_it_would_have_been() {
    for method in METHODS {
        let bench = Bench::new();
        // No prediction is this good.
        let predict = PredictConfig {
            min_cosine: 1.0,
            ..predicting(method)
        };
        let watch = trained(&bench.plan("off", Some(predict)));
        let events = watch.events.lock().unwrap();
        let notes: Vec<&String> = events
            .iter()
            .filter_map(|event| match event {
                Event::Note { text } if text.starts_with("prediction is off") => Some(text),
                _ => None,
            })
            .collect();
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(notes[0].contains("the cosine between prediction and truth was"));
        assert!(
            !events
                .iter()
                .any(|event| matches!(event, Event::Predicted { .. }))
        );
        trained(&bench.plan("plain", None));
        assert!(
            end_of(&bench, "off").1 == end_of(&bench, "plain").1,
            "{method:?}"
        );
    }
}

#[test]
fn p2_rejected_predictions_leave_no_trace_in_the_weights() {
    let bench = Bench::new();
    // The weights jump at this rate, so that hardly a prediction lowers the loss.
    let plan = |name: &str, predict: Option<PredictConfig>| {
        let mut plan = bench.plan(name, predict);
        plan.phases[0].learning_rate = 0.5;
        plan
    };
    let predict = PredictConfig {
        max_rejections: 2,
        ..predicting(PredictMethod::Momentum)
    };
    let watch = trained(&plan("run", Some(predict)));
    let events = watch.events.lock().unwrap();
    let kept: Vec<bool> = events
        .iter()
        .filter_map(|event| match event {
            Event::Predicted { is_kept, .. } => Some(*is_kept),
            _ => None,
        })
        .collect();
    assert!(kept.contains(&false), "{kept:?}");
    if !kept.contains(&true) {
        drop(events);
        trained(&plan("plain", None));
        assert!(end_of(&bench, "run").1 == end_of(&bench, "plain").1);
    }
}
