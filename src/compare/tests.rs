//! Comparisons of tiny models, from the library.

use super::*;
use crate::config::{Config, DatasetConfig, Length, Preset, TokenizerKind};
use crate::train::Signal;

fn plan(folder: &std::path::Path, change: impl Fn(&mut Config)) -> Plan {
    let text = folder.join("text.txt");
    std::fs::write(&text, "one two three four five six seven\n".repeat(40)).unwrap();
    let mut config = Config::default();
    config.model.preset = Some(Preset::Stories260K);
    config.tokenizer.kind = TokenizerKind::Char;
    config.data.sequence_len = 8;
    config
        .data
        .datasets
        .push(DatasetConfig::new(text.display().to_string()));
    config.train.max_steps = Some(6);
    config.train.micro_batch_size = 2;
    config.eval.eval_steps = 2;
    config.optimizer.learning_rate = 1e-3;
    change(&mut config);
    Plan::from_config(config).unwrap()
}

fn candidate(name: &str, plan: Plan) -> Candidate {
    Candidate {
        name: name.to_string(),
        config: format!("{name}.toml").into(),
        text: String::new(),
        sets: Vec::new(),
        plan,
    }
}

fn two(folder: &std::path::Path) -> Vec<Candidate> {
    let fast = plan(folder, |config| config.optimizer.learning_rate = 1e-2);
    vec![
        candidate("slow", plan(folder, |_| ())),
        candidate("fast", fast),
    ]
}

/// Candidate and step of each turn.
fn turns(notices: &[Notice]) -> Vec<(usize, u64)> {
    let turns = notices.iter().filter_map(|notice| match notice {
        Notice::Turn {
            candidate, step, ..
        } => Some((*candidate, *step)),
        _ => None,
    });
    turns.collect()
}

fn run(settings: &Settings, memory: Option<u64>) -> (Results, Vec<Notice>) {
    let mut notices = Vec::new();
    let interrupt = Interrupt::new();
    let results = compare_within(settings, memory, interrupt, &mut |notice| {
        notices.push(notice.clone());
    });
    (results.unwrap(), notices)
}

fn losses(results: &Results) -> Vec<Vec<Option<f64>>> {
    let candidates = results.candidates.iter();
    let of = |candidate: &CandidateResult| candidate.runs.iter().map(|run| run.val_loss).collect();
    candidates.map(of).collect()
}

#[test]
fn p3_runs_take_turns_and_end_as_they_would_alone() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings {
        slice: 0.0,
        ..Settings::new(two(folder.path()), vec![7], folder.path().join("turns"))
    };
    let (results, notices) = run(&settings, None);
    let expected: Vec<(usize, u64)> = (1..=6).flat_map(|step| [(0, step), (1, step)]).collect();
    assert_eq!(turns(&notices), expected);
    assert!(results.took_turns);

    // Too little memory for both: one after the other, which is said, and the same losses.
    let alone = Settings {
        folder: folder.path().join("alone"),
        ..settings.clone()
    };
    let (others, notices) = run(&alone, Some(1));
    let expected: Vec<(usize, u64)> = (0..2)
        .flat_map(|candidate| (1..=6).map(move |step| (candidate, step)))
        .collect();
    assert_eq!(turns(&notices), expected);
    assert!(!others.took_turns);
    let said = |notice: &Notice| matches!(notice, Notice::Note { text } if text.contains("they run one after another"));
    assert!(notices.iter().any(said), "{notices:?}");
    assert_eq!(losses(&results), losses(&others));
    // Each run is the run that `runner train` would have been.
    let mut plan = settings.candidates[0].plan.clone();
    plan.config.seed = 7;
    plan.config.output_dir = folder.path().join("by itself");
    let run = crate::train::Run::prepare(&plan, Default::default())
        .unwrap()
        .unwrap();
    let outcome = run.train().unwrap();
    let slow = results
        .candidates
        .iter()
        .find(|candidate| candidate.name == "slow")
        .unwrap();
    assert_eq!(slow.runs[0].val_loss, outcome.progress.val_loss);
    assert_eq!(slow.runs[0].costs.flops, outcome.progress.cost.flops);
}

#[test]
fn p3_the_memory_of_several_runs_is_that_of_one_that_trains_and_others_that_wait() {
    let folder = tempfile::tempdir().unwrap();
    let load = || Lengths::load(&plan(folder.path(), |_| ())).unwrap();
    let lengths = [load(), load()];
    let [a, b] = [&lengths[0], &lengths[1]].map(Lengths::forecast);
    assert!(a.waiting_bytes() > 0 && a.waiting_bytes() < a.peak_bytes);
    let needed = (a.peak_bytes + b.waiting_bytes()).max(b.peak_bytes + a.waiting_bytes());
    let mut said = Vec::new();
    let mut fits = |bytes: u64| {
        fit_together(&lengths, Some(bytes), &mut |text| {
            said.push(text.to_string());
        })
    };
    assert!(fits(needed));
    assert!(!fits(needed - 1));
    assert_eq!(said.len(), 1);
}

#[test]
fn p3_a_budget_becomes_the_steps_that_it_affords() {
    let folder = tempfile::tempdir().unwrap();
    let accumulating = plan(folder.path(), |config| {
        config.train.gradient_accumulation_steps = 3;
        config.train.max_steps = None;
        config.train.num_epochs = Some(1.0);
    });
    let candidates = vec![
        candidate("one", plan(folder.path(), |_| ())),
        candidate("three", accumulating),
    ];
    let lengths: Vec<Lengths> = candidates
        .iter()
        .map(|candidate| Lengths::load(&candidate.plan).unwrap())
        .collect();
    let flops = lengths[0].forecast().flops_per_token;
    let steps = |budget: &str| {
        let budget: Budget = budget.parse().unwrap();
        let allotted = allot(
            &candidates,
            &lengths,
            (Some(budget), true),
            folder.path(),
            &mut |_| (),
        );
        allotted.map(|allotment| allotment.steps)
    };
    // A step has 2 x 8 tokens, or three times as many.
    assert_eq!(steps("steps:50").unwrap(), [50, 50]);
    assert_eq!(steps("steps").unwrap(), [6, 6]);
    assert_eq!(steps("tokens:160").unwrap(), [10, 3]);
    assert_eq!(steps("tokens").unwrap(), [6, 2]);
    assert_eq!(steps("backward:31").unwrap(), [31, 10]);
    assert_eq!(
        steps(&format!("flops:{:e}", 16.0 * 12.0 * flops)).unwrap(),
        [12, 4]
    );
    assert_eq!(
        steps(&format!("flops:{:e}", 16.0 * 11.9 * flops)).unwrap(),
        [11, 3]
    );
    let error = steps("tokens:20").unwrap_err();
    assert!(
        matches!(&error, CompareError::BudgetTooSmall { name, .. } if name == "three"),
        "{error}"
    );
    assert_eq!(error.exit_code(), 2);
}

#[test]
fn p3_seconds_are_what_the_steps_were_timed_at_and_the_timing_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let candidates = two(folder.path());
    let lengths: Vec<Lengths> = candidates
        .iter()
        .map(|candidate| Lengths::load(&candidate.plan).unwrap())
        .collect();
    let hash = |number: usize| candidates[number].hash();
    let timings = serde_json::json!({
        hash(0): {"name": "slow", "seconds_per_step": [0.01]},
        hash(1): {"name": "fast", "seconds_per_step": [0.04]},
    });
    std::fs::write(folder.path().join("timings.json"), timings.to_string()).unwrap();
    let steps = |budget: &str| {
        let budget: Budget = budget.parse().unwrap();
        let found = allot(
            &candidates,
            &lengths,
            (Some(budget), true),
            folder.path(),
            &mut |_| (),
        );
        let found = found.unwrap();
        (found.steps, found.seconds.unwrap())
    };
    // With a twentieth to spare.
    assert_eq!(steps("wall:4.2s"), (vec![400, 100], 4.2));
    let (own, seconds) = steps("wall");
    assert_eq!(own, [6, 1]);
    assert!((seconds - 0.063).abs() < 1e-12);
}

#[test]
fn p3_a_run_that_uses_up_its_seconds_is_cut_there_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let long = |config: &mut Config| config.train.max_steps = Some(100_000);
    let candidates = vec![
        candidate("a", plan(folder.path(), long)),
        candidate(
            "b",
            plan(folder.path(), |config| {
                long(config);
                config.optimizer.learning_rate = 1e-2;
            }),
        ),
    ];
    // Timings that promise far more steps than the seconds afford.
    let lengths: BTreeSet<String> = candidates.iter().map(Candidate::hash).collect();
    let timings: serde_json::Map<String, serde_json::Value> = lengths
        .into_iter()
        .map(|hash| {
            (
                hash,
                serde_json::json!({"name": "x", "seconds_per_step": [1e-5]}),
            )
        })
        .collect();
    let to = folder.path().join("cut");
    std::fs::create_dir(&to).unwrap();
    std::fs::write(
        to.join("timings.json"),
        serde_json::json!(timings).to_string(),
    )
    .unwrap();
    let settings = Settings {
        budget: Some("wall:0.2s".parse().unwrap()),
        slice: 0.05,
        ..Settings::new(candidates, vec![1], to)
    };
    let (results, _) = run(&settings, None);
    for candidate in &results.candidates {
        let run = &candidate.runs[0];
        assert_eq!(run.state, RunState::Cut);
        assert!(
            run.reason
                .as_ref()
                .unwrap()
                .starts_with("cut at the budget of 0.2 s, after step")
        );
        assert!(
            run.costs.seconds >= 0.2 && run.costs.seconds < 2.0,
            "{}",
            run.costs.seconds
        );
        assert!(run.costs.steps < candidate.steps as f64);
        // It was evaluated where it was cut, and its model is there.
        assert_eq!(run.curve.last().unwrap().costs.steps, run.costs.steps);
        assert!(run.folder.join("model.safetensors").is_file());
        assert_eq!(candidate.remark(), "cut at the budget");
    }
    // A second start finds nothing to do.
    let (again, notices) = run(&settings, None);
    assert_eq!(turns(&notices), []);
    assert_eq!(again, results);
}

#[test]
fn o5_candidates_are_given_up_by_rank_and_can_go_on_later() {
    let folder = tempfile::tempdir().unwrap();
    let rates = [1e-5, 3e-2, 1e-3, 1e-2];
    let candidates: Vec<Candidate> = rates
        .iter()
        .map(|&rate| {
            let plan = plan(folder.path(), |config| {
                config.optimizer.learning_rate = rate;
                config.train.max_steps = Some(12);
            });
            candidate(&format!("{rate}"), plan)
        })
        .collect();
    let settings = Settings {
        early_stop: Some(EarlyStop {
            at: vec![0.25, 0.5],
            keep: 0.5,
        }),
        has_baseline: false,
        slice: 0.0,
        ..Settings::new(candidates, vec![1, 2], folder.path().join("sweep"))
    };
    let (results, notices) = run(&settings, None);
    let ranked: Vec<(f64, usize, usize)> = notices
        .iter()
        .filter_map(|notice| match notice {
            Notice::Ranked { at, kept, given_up } => Some((*at, kept.len(), given_up.len())),
            _ => None,
        })
        .collect();
    assert_eq!(ranked, [(0.25, 2, 2), (0.5, 1, 1)]);
    let shares: Vec<Option<f64>> = results
        .candidates
        .iter()
        .map(|one| one.given_up_at)
        .collect();
    assert_eq!(shares, [None, Some(0.5), Some(0.25), Some(0.25)]);
    // A quarter of 12 steps is 3, and the next evaluation is at 4.
    let last = |one: &CandidateResult| one.runs[1].curve.last().unwrap().costs.steps;
    let steps: Vec<f64> = results.candidates.iter().map(last).collect();
    assert_eq!(steps, [12.0, 6.0, 4.0, 4.0]);
    // Whoever goes on had the lower loss, as a mean over the seeds.
    let at = |one: &CandidateResult, step: f64| {
        let points = one.runs.iter().flat_map(|run| &run.curve);
        let points = points.filter(|point| point.costs.steps == step);
        points.map(|point| point.val_loss).sum::<f64>()
    };
    for (step, kept) in [(4.0, 2), (6.0, 1)] {
        let losses: Vec<f64> = results.candidates.iter().map(|one| at(one, step)).collect();
        let given_up = &losses[kept..if step == 4.0 { 4 } else { 2 }];
        let highest = losses[..kept].iter().copied().fold(0.0, f64::max);
        assert!(given_up.iter().all(|loss| *loss > highest), "{losses:?}");
    }
    // The losses of those that were given up are in no mean.
    assert_eq!(results.candidates[1].val_loss, None);
    assert_eq!(results.winner().unwrap().val_loss.unwrap().n, 2);

    // Without [early_stop] they go on from where they were.
    let all = Settings {
        early_stop: None,
        ..settings.clone()
    };
    let (results, notices) = run(&all, None);
    assert_eq!(turns(&notices).iter().map(|turn| turn.1).min(), Some(5));
    assert!(
        results
            .candidates
            .iter()
            .all(|one| one.runs.iter().all(|run| run.costs.steps == 12.0))
    );
    let fresh = Settings {
        folder: folder.path().join("fresh"),
        ..all
    };
    assert_eq!(losses(&run(&fresh, None).0), losses(&results));
}

#[test]
fn p3_a_run_that_diverges_is_a_result() {
    let folder = tempfile::tempdir().unwrap();
    let wild = plan(folder.path(), |config| {
        config.optimizer.learning_rate = 1e30;
        config.train.max_grad_norm = 0.0;
        config.train.max_steps = Some(20);
    });
    let calm = plan(folder.path(), |config| config.train.max_steps = Some(20));
    let candidates = vec![candidate("wild", wild), candidate("calm", calm)];
    let settings = Settings::new(candidates, vec![1], folder.path().join("diverged"));
    let (results, _) = run(&settings, None);
    assert_eq!(results.candidates[0].name, "calm");
    assert_eq!(results.candidates[1].runs[0].state, RunState::Diverged);
    assert_eq!(results.candidates[1].remark(), "diverged");
    assert_eq!(results.candidates[0].versus_first.unwrap().val_loss, None);
    let (again, notices) = run(&settings, None);
    assert_eq!((turns(&notices).len(), again), (0, results));
}

#[test]
fn p3_what_cannot_be_compared_is_refused_before_anything_runs() {
    let folder = tempfile::tempdir().unwrap();
    let base = candidate("base", plan(folder.path(), |_| ()));
    let refused = |change: fn(&mut Config), part: &str| {
        let other = candidate("other", plan(folder.path(), change));
        let to = folder.path().join("refused");
        let settings = Settings::new(vec![base.clone(), other], vec![1], to.clone());
        let error = compare(&settings, Interrupt::new(), &mut |_| ()).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(!to.exists());
    };
    refused(
        |config| config.data.sequence_len = 4,
        "data.sequence_len is 8 and 4",
    );
    refused(|config| config.data.val_fraction = 0.2, "data.val_fraction");
    refused(
        |config| config.tokenizer.kind = TokenizerKind::Byte,
        "the tokenizer",
    );
    refused(|config| config.train.threads = 1, "differ in train.threads");
    refused(|_| (), "are the same configuration");
    let none = candidate(
        "none",
        plan(folder.path(), |config| config.data.val_fraction = 0.0),
    );
    let settings = Settings::new(
        vec![none, base.clone()],
        vec![1],
        folder.path().join("refused"),
    );
    let error = compare(&settings, Interrupt::new(), &mut |_| ()).unwrap_err();
    assert!(
        matches!(error, CompareError::NoValidation { .. }),
        "{error}"
    );
}

#[test]
fn p3_an_interrupted_comparison_saves_all_its_runs_and_goes_on_from_there() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings {
        slice: 0.0,
        ..Settings::new(two(folder.path()), vec![3], folder.path().join("stopped"))
    };
    let interrupt = Interrupt::new();
    let raise = interrupt.clone();
    let error = compare(&settings, interrupt, &mut |notice| {
        if matches!(
            notice,
            Notice::Turn {
                candidate: 0,
                step: 3,
                ..
            }
        ) {
            raise.raise(Signal::Interrupt);
        }
    });
    assert_eq!(error.unwrap_err().exit_code(), 130);
    let (results, notices) = run(&settings, None);
    // The first had its third step before the signal, the second takes one more and sees it.
    assert_eq!(turns(&notices)[..2], [(0, 4), (1, 4)]);
    let fresh = Settings {
        folder: folder.path().join("fresh"),
        ..settings
    };
    assert_eq!(losses(&run(&fresh, None).0), losses(&results));
}

#[test]
fn p3_a_length_in_steps_keeps_the_plan() {
    let folder = tempfile::tempdir().unwrap();
    let own = candidate("own", plan(folder.path(), |_| ()));
    let same = own.run(own.plan.config.seed, 6, own.plan.config.output_dir.clone());
    assert_eq!(same, own.plan);
    let longer = own.run(5, 9, "x".into());
    assert_eq!(longer.length, Length::Steps(9));
    assert_eq!(Plan::from_config(longer.config.clone()).unwrap(), longer);
}
