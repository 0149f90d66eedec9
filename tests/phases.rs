//! Runs of several phases, made in code. Their phases differ in sequence length, batch, clipping,
//! schedule, trained parameters and optimizer. The runs are also resumed at and across boundaries.
#![allow(missing_docs)]

#[path = "support/runs.rs"]
mod runs;

use std::fs;
use std::path::Path;

use burn::tensor::{Device, FloatDType};
use firebrick::collective::SingleProcess;
use firebrick::config::{
    Config, Decay, DpoConfig, Length, LionPlan, OptimizerPlan, PathSelector, PhaseLength,
    PhasePlan, Plan, SchedulePlan, ScheduleSpan, Task, TrainOn, Warmup,
};
use firebrick::data::{TokenCache, ViewSpec, load_training_data};
use firebrick::model::{Decoder, DecoderSpec, parameters};
use firebrick::objective::CrossEntropy;
use firebrick::optimizer::{Optimizer, Schedule};
use firebrick::train::{
    Event, Options, Resume, Run, StepLimits, StepSettings, TrainError, TrainState, train_step,
};
use runs::{Bench, Watch, metrics, run, steps};
use serde_json::Value;

/// The steps of the first and the second phase.
const STEPS: [u64; 2] = [3, 4];

impl Bench {
    fn config(&self, run: &str) -> Config {
        let mut config = runs::config(self.folder.path(), run);
        config.model.max_position_embeddings = Some(32);
        config.data.sequence_len = 8;
        config.train.max_steps = Some(STEPS.iter().sum());
        config.eval.eval_steps = 2;
        config.checkpoint.save_steps = 1;
        config
    }

    /// Two phases that differ in every setting that the loop reads from a phase.
    fn plan(&self, run: &str) -> Plan {
        let mut plan = Plan::from_config(self.config(run)).unwrap();
        let mut first = plan.phases[0].clone();
        first.name = "short".to_string();
        first.length = PhaseLength::Steps(STEPS[0]);
        first.freeze = selectors(&["embed_tokens", "layers.0"]);
        let mut second = first.clone();
        second.name = "long".to_string();
        second.length = PhaseLength::Rest;
        second.data.sequence_len = 16;
        second.micro_batch_size = 3;
        second.gradient_accumulation_steps = 2;
        second.max_grad_norm = 0.25;
        second.freeze = selectors(&["layers.1.mlp"]);
        second.learning_rate = 2e-3;
        second.schedule = SchedulePlan {
            decay: Decay::Linear,
            warmup: Warmup::Steps(2),
            min_lr_ratio: 0.5,
        };
        second.schedule_span = ScheduleSpan::Phase;
        second.optimizer = OptimizerPlan::Lion(LionPlan::new([0.9, 0.99], 0.1));
        plan.phases = vec![first, second];
        plan
    }
}

fn selectors(texts: &[&str]) -> Vec<PathSelector> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// The metrics that do not depend on the machine, and the exported weights.
fn end_of(run: &Path) -> (Vec<Value>, Vec<u8>) {
    let weights = fs::read(run.join("model.safetensors")).unwrap();
    (metrics(run), weights)
}

/// Trains the same run step by step, with the public parts of the library.
fn by_hand(plan: &Plan) -> (Vec<f64>, Vec<f64>, Decoder) {
    let seed = plan.config.seed;
    let (mut losses, mut rates) = (Vec::new(), Vec::new());
    let tokenizer = &plan.config.tokenizer;
    let cache = TokenCache::from_environment();
    let now = std::time::SystemTime::now();
    let data = |number: usize| {
        let phase = &plan.phases[number];
        load_training_data(phase.task, &phase.data, tokenizer, &cache, now).unwrap()
    };
    let spec = DecoderSpec {
        shape: plan.shape.clone(),
        vocab_size: data(0).tokenizer().vocab_size(),
        eos_token_id: data(0).end_token(),
        bos_token_id: None,
    };
    let model = Decoder::new(&spec, seed, &Device::flex().autodiff()).unwrap();
    let optimizer = Optimizer::new(&plan.phases[0].optimizer);
    let mut state = TrainState::new(model, optimizer);
    let mut first_step = 0;
    for (number, phase) in plan.phases.iter().enumerate() {
        let model = state.into_model().with_frozen(&phase.freeze).unwrap();
        let step = first_step;
        state = TrainState::new(model, Optimizer::new(&phase.optimizer));
        state.progress.step = step;
        let source = data(number);
        let view = source
            .view(&ViewSpec::of_phase(phase, number, seed))
            .unwrap();
        let span = match phase.schedule_span {
            ScheduleSpan::Run => STEPS.iter().sum(),
            ScheduleSpan::Phase => STEPS[number],
        };
        let schedule = Schedule::new(
            phase.learning_rate,
            &phase.schedule.decay,
            &phase.schedule.warmup,
            phase.schedule.min_lr_ratio,
            span,
        );
        let rows = phase.micro_batch_size;
        for step in 0..STEPS[number] {
            let first = step * phase.sequences_per_step();
            let batches: Vec<_> = (0..phase.gradient_accumulation_steps as u64)
                .map(|pass| view.batch(first + pass * rows as u64, rows))
                .collect();
            let at = match phase.schedule_span {
                ScheduleSpan::Run => first_step + step,
                ScheduleSpan::Phase => step,
            };
            let settings = StepSettings {
                dtype: FloatDType::F32,
                gradient_checkpointing: false,
                int8_forward: false,
                ternary_blend: 1.0,
                limits: StepLimits::default(),
                max_grad_norm: phase.max_grad_norm,
                learning_rate: schedule.learning_rate(at),
                seed,
                workers: 1,
            };
            let report = train_step(
                &mut state,
                &batches,
                &CrossEntropy,
                &settings,
                &SingleProcess,
            );
            losses.push(report.unwrap().loss);
            rates.push(settings.learning_rate);
        }
        first_step += STEPS[number];
    }
    (losses, rates, state.into_model())
}

#[test]
fn p1_each_phase_has_its_own_data_batch_clip_schedule_trained_set_and_optimizer() {
    let bench = Bench::new();
    let plan = bench.plan("run");
    let watch = Watch::default();
    let outcome = run(&plan, &watch).unwrap().unwrap();
    let (losses, rates, model) = by_hand(&plan);
    let records = steps(&watch);
    let found: Vec<f64> = records.iter().map(|record| record.loss).collect();
    assert_eq!(found, losses);
    let found: Vec<f64> = records.iter().map(|record| record.lr).collect();
    assert_eq!(found, rates);
    // The first phase has two sequences of 8 tokens per step, the second has six of 16.
    let tokens: Vec<u64> = records.iter().map(|record| record.tokens).collect();
    assert_eq!(tokens, [16, 32, 48, 144, 240, 336, 432]);
    let progress = &outcome.progress;
    assert_eq!((progress.phase, progress.sequences), (1, 24));

    // The weights of the last step, which may not be the exported one.
    let store = firebrick::checkpoint::CheckpointStore::new(&bench.path("run"));
    let last = store.load(7).unwrap().model.tensors();
    assert_eq!(last, parameters(&model));

    let events = watch.events.lock().unwrap();
    let entered = events.iter().filter_map(|event| match event {
        Event::PhaseStarted { step, phase, name } => Some((*step, *phase, name.as_str())),
        _ => None,
    });
    assert_eq!(entered.collect::<Vec<_>>(), [(3, 1, "long")]);
    let is_said = |part: &str| {
        events
            .iter()
            .any(|event| matches!(event, Event::Note { text } if text.contains(part)))
    };
    assert!(is_said("the optimizer's state of"), "{events:?}");
    assert!(is_said("phase short: steps 1 to 3, 2 x 8 tokens each"));
    assert!(is_said("phase long: steps 4 to 7, 6 x 16 tokens each"));
}

#[test]
fn p1_a_frozen_parameter_stays_as_it_is_and_an_unfrozen_one_moves() {
    let bench = Bench::new();
    let mut plan = bench.plan("run");
    plan.config.checkpoint.save_total_limit = 0;
    run(&plan, &Watch::default()).unwrap();
    let store = firebrick::checkpoint::CheckpointStore::new(&bench.path("run"));
    let of = |step: u64| store.load(step).unwrap().model.tensors();
    for (phase, [from, to]) in plan.phases.iter().zip([[1, 3], [3, 7]]) {
        let (before, after) = (of(from), of(to));
        for (path, tensor) in &before {
            let mut selectors = phase.freeze.iter();
            let is_frozen = selectors.any(|selector| selector.matches(path));
            assert_eq!(
                *tensor == after[path],
                is_frozen,
                "{path} in {}",
                phase.name
            );
        }
    }
}

#[test]
fn r10_a_run_goes_on_at_and_across_the_boundary_of_its_phases_bit_for_bit() {
    let bench = Bench::new();
    run(&bench.plan("whole"), &Watch::default()).unwrap();
    let whole = end_of(&bench.path("whole"));
    for stop_after in 1..STEPS.iter().sum() {
        let name = format!("run-{stop_after}");
        let plan = bench.plan(&name);
        let watch = Watch {
            stop_after: Some(stop_after),
            ..Watch::default()
        };
        let stopped = run(&plan, &watch).unwrap_err();
        assert!(
            matches!(stopped, TrainError::Interrupted { step, .. } if step == stop_after),
            "{stopped}"
        );
        let again = Watch::default();
        run(&plan, &again).unwrap().unwrap();
        assert_eq!(steps(&again)[0].step, stop_after + 1);
        assert_eq!(end_of(&bench.path(&name)), whole, "after {stop_after}");
    }
}

#[test]
fn r10_going_back_into_the_first_phase_gives_the_same_run() {
    let bench = Bench::new();
    let mut plan = bench.plan("run");
    plan.config.checkpoint.save_total_limit = 0;
    run(&plan, &Watch::default()).unwrap();
    let whole = end_of(&bench.path("run"));
    for step in [2, 3, 4] {
        let options = Options {
            resume: Resume::Step(step),
            ..Options::default()
        };
        let again = Run::prepare(&plan, options).unwrap().unwrap();
        again.train().unwrap();
        assert_eq!(end_of(&bench.path("run")), whole, "from {step}");
    }
}

#[test]
fn p1_moments_go_on_where_they_mean_the_same() {
    let bench = Bench::new();
    let mut plan = bench.plan("run");
    let adam = OptimizerPlan::Adam {
        betas: [0.8, 0.9],
        eps: 1e-8,
        weight_decay: 0.0,
    };
    plan.phases[1].optimizer = adam;
    plan.phases[1].freeze = plan.phases[0].freeze.clone();
    let watch = Watch::default();
    run(&plan, &watch).unwrap();
    let store = firebrick::checkpoint::CheckpointStore::new(&bench.path("run"));
    let state = store.load(7).unwrap().optimizer;
    let updates = &state.scalars["norm.weight.momentum.time"];
    let expected = firebrick::extra::StateScalar::Uint(7);
    assert_eq!(*updates, expected, "AdamW's three and Adam's four");
    let fresh = watch.events.lock().unwrap().iter().any(
        |event| matches!(event, Event::Note { text } if text.contains("the optimizer's state")),
    );
    assert!(!fresh);
}

#[test]
fn p1_phases_that_cannot_be_are_refused_before_anything_is_written() {
    let bench = Bench::new();
    let refused = |change: &dyn Fn(&mut Plan)| {
        let mut plan = bench.plan("refused");
        change(&mut plan);
        let Err(error) = run(&plan, &Watch::default()) else {
            panic!("the plan is refused")
        };
        assert!(!bench.path("refused").exists(), "{error}");
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    };
    let unknown = refused(&|plan| plan.phases[1].freeze = selectors(&["layers.7"]));
    assert!(
        unknown.contains("phase `long` freezes `layers.7`, which matches no parameter"),
        "{unknown}"
    );
    let all = ["embed_tokens", "layers.0-1", "norm"];
    let nothing = refused(&|plan| plan.phases[1].freeze = selectors(&all));
    assert!(
        nothing.contains("phase `long` freezes every parameter"),
        "{nothing}"
    );
    let empty = refused(&|plan| plan.phases[0].length = PhaseLength::Steps(7));
    assert!(empty.contains("phase `long` has no steps"), "{empty}");
    let short = refused(&|plan| plan.phases[1].length = PhaseLength::Steps(2));
    assert!(
        short.contains("phase `long` ends the phases at 5 of the run's 7 steps"),
        "{short}"
    );
    let none = refused(&|plan| plan.phases.clear());
    assert!(none.contains("no phases"), "{none}");

    let pairs = refused(&|plan| {
        plan.phases[1].task = Task::Dpo;
        plan.phases[1].dpo = Some(DpoConfig::default());
    });
    assert!(pairs.contains("the run has no base model"), "{pairs}");
    let torn = refused(&|plan| plan.phases[1].task = Task::Dpo);
    assert!(torn.contains("has task = dpo and no `dpo`"), "{torn}");
    let long = refused(&|plan| plan.phases[1].data.sequence_len = 33);
    assert!(long.contains("33 tokens, and the model has 32"), "{long}");
    let idle = refused(&|plan| plan.phases[1].gradient_accumulation_steps = 0);
    assert!(
        idle.contains("a gradient_accumulation_steps of 0"),
        "{idle}"
    );
    let rate = refused(&|plan| plan.phases[0].learning_rate = f64::NAN);
    assert!(rate.contains("a learning_rate of NaN"), "{rate}");
    let warm = refused(&|plan| plan.phases[1].schedule.warmup = Warmup::Steps(5));
    assert!(
        warm.contains("a warm-up of 5 steps in a schedule over 4 steps"),
        "{warm}"
    );
    let endless = refused(&|plan| plan.phases[1].length = PhaseLength::Steps(u64::MAX));
    assert!(endless.contains("of the run's 7 steps"), "{endless}");
    let seed = refused(&|plan| plan.config.seed = u64::MAX);
    assert!(seed.contains("`seed` must be from 0 to"), "{seed}");
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStringExt;
        let name = std::ffi::OsString::from_vec(vec![b'x', 0xff]);
        let path = refused(&|plan| plan.config.data.val_path = Some(name.clone().into()));
        assert!(
            path.contains("the configuration cannot be written"),
            "{path}"
        );
    }
}

#[test]
fn p1_a_rule_that_keeps_nothing_drops_what_the_rule_before_kept() {
    let bench = Bench::new();
    let mut plan = bench.plan("run");
    let sgd = |momentum| OptimizerPlan::Sgd {
        momentum,
        nesterov: false,
        weight_decay: 0.0,
    };
    plan.phases[0].optimizer = sgd(0.9);
    plan.phases[1].optimizer = sgd(0.0);
    run(&plan, &Watch::default()).unwrap();
    let store = firebrick::checkpoint::CheckpointStore::new(&bench.path("run"));
    let of = |step: u64| store.load(step).unwrap().optimizer;
    assert!(of(7).tensors.is_empty());
    plan.config.output_dir = bench.path("back");
    plan.phases.reverse();
    plan.phases[0].length = PhaseLength::Steps(3);
    plan.phases[1].length = PhaseLength::Rest;
    run(&plan, &Watch::default()).unwrap();
}

#[test]
fn p1_the_best_begins_anew_where_losses_cannot_be_compared() {
    let bench = Bench::new();
    let phase = bench.plan("run").phases[0].clone();
    let comparable = |change: &dyn Fn(&mut PhasePlan)| {
        let mut other = phase.clone();
        change(&mut other);
        other.is_evaluated_as(&phase)
    };
    assert!(comparable(&|phase| phase.micro_batch_size = 7));
    assert!(comparable(&|phase| phase.data.datasets[0].weight = 2.0));
    assert!(!comparable(&|phase| phase.data.sequence_len = 16));
    assert!(!comparable(&|phase| phase.data.val_fraction = 0.2));
    assert!(!comparable(
        &|phase| phase.data.train_on = Some(TrainOn::All)
    ));
    assert!(!comparable(&|phase| phase.task = Task::Sft));

    // With this learning rate the second phase improves nothing.
    let mut plan = bench.plan("run");
    plan.phases[1].learning_rate = 0.0;
    let outcome = run(&plan, &Watch::default()).unwrap().unwrap();
    assert!(outcome.progress.best.unwrap().step > STEPS[0]);
    let best = fs::read_to_string(bench.path("run/checkpoints/best")).unwrap();
    let expected = format!("step-{:06}", outcome.progress.best.unwrap().step);
    assert_eq!(best.trim(), expected);
    let card = fs::read_to_string(bench.path("run/README.md")).unwrap();
    assert!(card.contains("the phases in `run.json`"), "{card}");
}

#[test]
fn r10_a_run_with_other_phases_is_not_continued() {
    let bench = Bench::new();
    let plan = bench.plan("run");
    let watch = Watch {
        stop_after: Some(2),
        ..Watch::default()
    };
    run(&plan, &watch).unwrap_err();
    let mut other = plan.clone();
    other.phases[1].max_grad_norm = 1.0;
    let error = run(&other, &Watch::default()).unwrap_err();
    assert!(matches!(error, TrainError::OtherPhases { .. }), "{error}");
    let one = Plan::from_config(bench.config("run")).unwrap();
    let error = run(&one, &Watch::default()).unwrap_err();
    assert!(matches!(error, TrainError::OtherPhases { .. }), "{error}");

    // A finished run is complete, but not for a plan with other phases.
    run(&plan, &Watch::default()).unwrap().unwrap();
    assert!(run(&plan, &Watch::default()).unwrap().is_none());
    let error = run(&other, &Watch::default()).unwrap_err();
    assert!(matches!(error, TrainError::OtherPhases { .. }), "{error}");
}

#[test]
fn r10_a_phase_that_has_begun_does_not_move() {
    let bench = Bench::new();
    let in_halves = |steps: u64| {
        let mut config = bench.config("run");
        config.train.max_steps = Some(steps);
        let mut plan = bench.plan("run");
        plan.config = Plan::from_config(config).unwrap().config;
        plan.length = Length::Steps(steps);
        for phase in &mut plan.phases {
            phase.length = PhaseLength::Share(0.5);
        }
        plan
    };
    let stopped = |stop_after| Watch {
        stop_after: Some(stop_after),
        ..Watch::default()
    };
    run(&in_halves(8), &stopped(2)).unwrap_err();
    // The boundary has not been reached yet.
    run(&in_halves(10), &stopped(6)).unwrap_err();
    let error = run(&in_halves(12), &Watch::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("phase `long` began at step 5") && error.contains("begun at step 6"),
        "{error}"
    );
    run(&in_halves(10), &Watch::default()).unwrap().unwrap();
}

#[test]
fn p1_lengths_in_shares_tokens_and_epochs_are_turned_into_steps() {
    use firebrick::data::EpochSize;
    use firebrick::phase::Timeline;

    let bench = Bench::new();
    let epochs = [8, 16].map(|sequence_len| EpochSize {
        sequences: 1600 / sequence_len,
        targets: 1600,
    });
    let lengths = |length: Length, first: PhaseLength| {
        let mut plan = bench.plan("run");
        plan.length = length;
        plan.phases[0].length = first;
        let timeline = Timeline::new(&plan, &epochs).unwrap();
        let phases = timeline.phases().iter();
        phases.map(|phase| phase.steps).collect::<Vec<_>>()
    };
    // Steps have 16 tokens in the first phase and 96 in the second.
    assert_eq!(lengths(Length::Steps(10), PhaseLength::Share(0.25)), [3, 7]);
    assert_eq!(
        lengths(Length::Tokens(960), PhaseLength::Share(0.5)),
        [30, 5]
    );
    assert_eq!(
        lengths(Length::Epochs(1.0), PhaseLength::Share(0.1)),
        [10, 15]
    );
    assert_eq!(lengths(Length::Tokens(992), PhaseLength::Steps(2)), [2, 10]);
    let shares = |steps: u64, shares: &[f64]| {
        let mut plan = bench.plan("run");
        plan.length = Length::Steps(steps);
        let phases = shares.iter().map(|&share| PhasePlan {
            length: PhaseLength::Share(share),
            ..plan.phases[0].clone()
        });
        plan.phases = phases.collect();
        let timeline = Timeline::new(&plan, &vec![epochs[0]; shares.len()]).unwrap();
        let phases = timeline.phases().iter();
        phases.map(|phase| phase.steps).sum::<u64>()
    };
    // In floating point these shares do not sum to exactly one.
    for steps in (15..200).step_by(5) {
        for parts in [&[0.1, 0.9][..], &[0.1, 0.8, 0.1], &[0.3, 0.6, 0.1]] {
            assert_eq!(shares(steps, parts), steps, "{parts:?}");
        }
    }
    // The rest is computed from the other phases, wherever it is in the list.
    let mut anneal = bench.plan("run");
    anneal.length = Length::Steps(100);
    anneal.phases[0].length = PhaseLength::Rest;
    anneal.phases[1].length = PhaseLength::Steps(10);
    let timeline = Timeline::new(&anneal, &epochs).unwrap();
    assert_eq!(timeline.starts(), [0, 90]);
    // For a step before the phase, the learning rate is that of the phase's first step.
    let second = &timeline.phases()[1];
    assert_eq!(second.learning_rate(0), second.learning_rate(90));
    let mut thirds = bench.plan("run");
    thirds.length = Length::Steps(100);
    let third = thirds.phases[0].clone();
    thirds.phases = vec![third; 3];
    for phase in &mut thirds.phases {
        phase.length = PhaseLength::Share(1.0 / 3.0);
    }
    let epochs = [epochs[0]; 3];
    let timeline = Timeline::new(&thirds, &epochs).unwrap();
    let steps: Vec<u64> = timeline.phases().iter().map(|phase| phase.steps).collect();
    assert_eq!(steps, [33, 34, 33]);
    assert_eq!(timeline.at(32).unwrap().number, 0);
    assert_eq!(timeline.at(33).unwrap().number, 1);
    assert_eq!(timeline.of_completed(33).number, 0);
    assert_eq!(timeline.of_completed(34).number, 1);
    assert!(timeline.at(100).is_none());
}

#[test]
fn a_run_can_be_sent_to_another_thread() {
    let bench = Bench::new();
    let run = Run::prepare(&bench.plan("run"), Options::default());
    let run = run.unwrap().unwrap();
    let outcome = std::thread::spawn(move || run.train()).join().unwrap();
    assert_eq!(outcome.unwrap().progress.step, 7);
    let log = fs::read_to_string(bench.path("run/logs/train.log")).unwrap();
    assert!(log.contains("finished"), "{log}");
}
