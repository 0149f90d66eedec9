//! An interrupted run that averages its weights ends as an uninterrupted one, bit for bit.

use firebrick::config::{PredictConfig, PredictMethod, RegulatorConfig, Sampling, SpikeAction};
use firebrick::train::{Options, Resume, Run, TrainError};

use super::*;

/// The metrics, the exported model, and the average in the last checkpoint.
fn end_of(bench: &Bench, run: &str) -> (Vec<Value>, Vec<u8>, ExtraState) {
    let model = fs::read(bench.path(run).join("model.safetensors")).unwrap();
    let average = bench.average(run, STEPS);
    (metrics(&bench.path(run)), model, average)
}

fn stop(plan: &Plan, after: u64) {
    let watch = Watch {
        stop_after: Some(after),
        ..Watch::default()
    };
    match run(plan, &watch) {
        Err(TrainError::Interrupted { step, .. }) => assert_eq!(step, after),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_run_goes_on_with_its_average_bit_for_bit() {
    // Background saves of differences are the default; whole checkpoints name weights otherwise.
    for (format, save_steps) in [
        (CheckpointFormat::Delta, 1),
        (CheckpointFormat::Delta, 5),
        (CheckpointFormat::Full, 5),
    ] {
        let bench = Bench::new();
        let plan = |run: &str| {
            let mut config = bench.config(run, averaged(0.8, 2, 3));
            config.checkpoint.format = format;
            config.checkpoint.save_steps = save_steps;
            Plan::from_config(config).unwrap()
        };
        trained(&plan("once"));
        let once = end_of(&bench, "once");
        assert!(!once.2.tensors.is_empty());
        // Before the average begins, at its first update, between updates, and after some.
        for after in [2, 3, 5, 6, 9, 11] {
            let name = format!("stopped-{after}");
            let plan = plan(&name);
            stop(&plan, after);
            trained(&plan);
            let resumed = end_of(&bench, &name);
            assert_eq!(resumed.0, once.0, "{format:?} {after}");
            assert!(resumed.1 == once.1, "{format:?} {after}");
            assert_eq!(resumed.2, once.2, "{format:?} {after}");
        }
    }
}

#[test]
fn a_resumed_run_keeps_its_average_or_is_refused() {
    let bench = Bench::new();
    let average = averaged(0.8, 1, 0);
    stop(&bench.plan("run", average.clone()), 4);
    let refused = |average: Option<AverageConfig>| {
        let error = run(&bench.plan("run", average), &Watch::default()).unwrap_err();
        assert!(
            matches!(error, TrainError::OtherConfig { .. }) && error.exit_code() == 2,
            "{error}"
        );
        error.to_string()
    };
    let removed = refused(None);
    assert!(removed.contains("average.decay: 0.8 there, (absent) here"));
    assert!(refused(averaged(0.9, 1, 0)).contains("average.decay: 0.8 there, 0.9 here"));
    assert!(refused(averaged(0.8, 2, 0)).contains("average.every"));
    let moved = run(&bench.plan("run", averaged(0.8, 1, 9)), &Watch::default()).unwrap_err();
    assert!(
        matches!(moved, TrainError::MovedAverage { before: 0, now: 9 }),
        "{moved}"
    );
    stop(&bench.plan("plain", None), 4);
    let added = run(&bench.plan("plain", average), &Watch::default()).unwrap_err();
    assert!(
        added.to_string().contains("(absent) there, 0.8 here"),
        "{added}"
    );
}

#[test]
fn a_longer_run_cannot_move_an_average_that_has_begun() {
    let bench = Bench::new();
    let starting = |start, steps| {
        let average = AverageConfig {
            start,
            ..AverageConfig::default()
        };
        let mut config = bench.config("run", Some(average));
        config.train.max_steps = Some(steps);
        Plan::from_config(config).unwrap()
    };
    let plan = |steps| starting(AverageStartKey::Text("50%".to_string()), steps);
    // It has not begun, so it may begin later.
    stop(&plan(8), 3);
    stop(&plan(12), 8);
    assert_eq!(bench.count("run", 8), Some(2));
    let error = run(&plan(14), &Watch::default()).unwrap_err();
    let (before, now) = (6, 7);
    assert!(
        matches!(error, TrainError::MovedAverage { before: a, now: b } if (a, b) == (before, now)),
        "{error}"
    );
    assert_eq!((error.kind(), error.exit_code()), ("config", 2));
    assert_eq!(
        error.help().unwrap(),
        "start = 6 in [average], or give this run its own --output-dir"
    );
    stop(&starting(AverageStartKey::Steps(6), 14), 10);
    assert_eq!(bench.count("run", 10), Some(4));
    // Back from a checkpoint before it, it may.
    let options = Options {
        resume: Resume::Step(6),
        ..Options::default()
    };
    let resumed = Run::prepare(&plan(14), options).unwrap().unwrap();
    resumed.train().unwrap();
    assert_eq!(bench.count("run", 14), Some(7));
}

#[test]
fn a_finished_run_that_is_lengthened_goes_on_with_its_average() {
    let bench = Bench::new();
    let plan = |run: &str, steps| {
        let mut config = bench.config(run, averaged(0.9, 1, 0));
        config.train.max_steps = Some(steps);
        // The schedule does not depend on the length.
        config.lr_scheduler.name = firebrick::config::SchedulerName::Constant;
        Plan::from_config(config).unwrap()
    };
    trained(&plan("run", 7));
    assert!(run(&plan("run", 7), &Watch::default()).unwrap().is_none());
    trained(&plan("run", STEPS));
    trained(&plan("once", STEPS));
    assert_eq!(bench.average("run", STEPS), bench.average("once", STEPS));
}

#[test]
fn a_rollback_takes_the_average_back() {
    let bench = Bench::new();
    let mut bytes = runs::text().repeat(2).into_bytes();
    for third in 1..3 {
        let first = third * bytes.len() / 3;
        for place in 0..40 {
            bytes[first + place] = b'!' + (place * place * 7 % 90) as u8;
        }
    }
    fs::write(bench.path("text.txt"), bytes).unwrap();
    let mut config = bench.config("run", averaged(1.0, 1, 0));
    let last = 40;
    config.data.sequence_len = 32;
    config.data.sampling = Sampling::Epoch;
    config.train.max_steps = Some(last);
    config.eval.eval_steps = 0;
    config.checkpoint.save_steps = 5;
    config.regulator = Some(RegulatorConfig {
        window: 8,
        spike_sigma: 4.0,
        norm_factor: 50.0,
        on_spike: SpikeAction::Rollback,
    });
    let (watch, _) = trained(&Plan::from_config(config).unwrap());
    let events = watch.events.lock().unwrap();
    // Steps that were taken, averaged, and taken back.
    let void: u64 = events
        .iter()
        .filter_map(|event| match event {
            Event::Regulated {
                step,
                back_to: Some(to),
                ..
            } => Some(step - 1 - to),
            _ => None,
        })
        .sum();
    assert!(void > 0);
    assert_eq!(bench.count("run", last), Some(last));
}

#[test]
fn a_predicted_step_is_averaged_as_any_other_and_a_rejected_one_is_not() {
    // At the second rate the weights jump, so that hardly a prediction lowers the loss.
    for (learning_rate, is_kept) in [(3e-3, true), (0.5, false)] {
        let bench = Bench::new();
        let mut config = bench.config("run", averaged(1.0, 1, 0));
        let last = 24;
        config.train.max_steps = Some(last);
        config.train.micro_batch_size = 3;
        config.train.gradient_accumulation_steps = 2;
        let mut plan = Plan::from_config(config).unwrap();
        plan.phases[0].learning_rate = learning_rate;
        plan.phases[0].predict = Some(PredictConfig {
            method: PredictMethod::Momentum,
            every: 3,
            min_cosine: -1.0,
            max_rejections: 1000,
        });
        let (watch, outcome) = trained(&plan);
        let events = watch.events.lock().unwrap();
        let mut tried = events.iter().filter_map(|event| match event {
            Event::Predicted { is_kept, .. } => Some(*is_kept),
            _ => None,
        });
        assert!(tried.any(|kept| kept == is_kept), "{learning_rate}");
        assert_eq!(bench.count("run", last), Some(last));
        let step = outcome.exported_step;
        let weights = (1..=step).map(|step| bench.weights(&plan, "run", step));
        let expected = mean(1.0, &weights.collect::<Vec<_>>());
        assert_eq!(bench.average("run", step).tensors, expected);
    }
}

#[test]
fn a_lossy_checkpoint_has_an_exact_average() {
    let bench = Bench::new();
    let plan = |run: &str, lossy| {
        let mut config = bench.config(run, averaged(1.0, 1, 0));
        config.eval.eval_steps = 0;
        config.checkpoint.lossy = lossy;
        Plan::from_config(config).unwrap()
    };
    trained(&plan("exact", None));
    trained(&plan("lossy", Some(firebrick::delta::Method::Int8)));
    assert!(bench.store("lossy").lossy(5).unwrap().is_some());
    let model = |run| bench.store(run).load(5).unwrap().model;
    assert_ne!(model("exact"), model("lossy"));
    assert_eq!(bench.average("exact", 5), bench.average("lossy", 5));
}
