//! Tests of the transition between phases, and of the export.

use firebrick::config::{AdapterInit, DpoConfig, PhaseAdapter};
use firebrick::extra::StateScalar;
use firebrick::model::parameters;
use firebrick::objective::{CrossEntropy, PairLoss, Preference};
use firebrick::train::Event;

use super::runs::steps;
use super::*;
use PhaseAdapter::{Off, On, Restart};

fn is_said(watch: &Watch, part: &str) -> bool {
    let events = watch.events.lock().unwrap();
    let mut notes = events.iter();
    notes.any(|event| matches!(event, Event::Note { text } if text.contains(part)))
}

/// The number of updates of a parameter, according to a checkpoint's optimizer state.
fn updates(bench: &Bench, step: u64, path: &str) -> Option<StateScalar> {
    let state = bench.store("run").load(step).unwrap().optimizer;
    let name = format!("{path}.momentum.time");
    state.scalars.get(&name).cloned()
}

fn card(bench: &Bench) -> String {
    fs::read_to_string(bench.path("run/README.md")).unwrap()
}

const LAYER: &str = "layers.0.self_attn.q_proj";

#[test]
fn p1_an_adapter_that_is_turned_off_goes_on_as_all_weights() {
    let bench = Bench::new();
    let mut plan = bench.plan("run", &[On, Off]);
    plan.config.checkpoint.save_total_limit = 0;
    plan.phases[1].freeze = vec!["embed_tokens".parse().unwrap()];
    let watch = Watch::default();
    let outcome = run(&plan, &watch).unwrap().unwrap();

    let found = steps(&watch)[3].loss;
    let adapted = bench.with_adapter_of(&plan, "run", 3);
    let merged = adapted.clone().merged();
    let of_base = first_loss(
        &plan,
        1,
        bench.base(&Device::flex().autodiff()),
        &CrossEntropy,
    );
    let of_adapted = first_loss(&plan, 1, adapted, &CrossEntropy);
    let of_merged = first_loss(&plan, 1, to_train(&merged), &CrossEntropy);
    assert!((of_adapted - found).abs() < 1e-4, "{of_adapted} {found}");
    assert!((of_merged - found).abs() < 1e-6, "{of_merged} {found}");
    assert!((of_base - found).abs() > 1e-3, "{of_base} {found}");

    // All weights change, except the frozen ones.
    let (merged, after) = (parameters(&merged), bench.saved("run", 4));
    for (path, tensor) in &merged {
        assert_eq!(
            *tensor == after[path],
            path.starts_with("embed_tokens"),
            "{path}"
        );
    }
    let count = |time| Some(StateScalar::Uint(time));
    assert_eq!(updates(&bench, 4, &format!("{LAYER}.weight")), count(1));
    assert_eq!(updates(&bench, 4, "norm.weight"), count(4));
    assert_eq!(updates(&bench, 4, &format!("{LAYER}.adapter.lora_a")), None);
    assert!(is_said(&watch, "merged into the weights"));
    assert!(is_said(&watch, "the optimizer's state of"));

    assert!(outcome.exported_step > 3, "{outcome:?}");
    let exported = folder::load(&bench.path("run"), &Device::flex()).unwrap();
    assert!(!exported.is_adapted() && !bench.path("run/adapter_config.json").exists());
    assert_eq!(
        parameters(&exported),
        bench.saved("run", outcome.exported_step)
    );
    assert!(card(&bench).contains("library_name: transformers"));
}

#[test]
fn p1_an_adapter_that_is_restarted_is_new_beside_the_merged_weights() {
    let bench = Bench::new();
    let mut plan = bench.plan("run", &[On, Restart]);
    plan.config.checkpoint.save_total_limit = 0;
    let watch = Watch::default();
    let outcome = run(&plan, &watch).unwrap().unwrap();

    let adapted = bench.with_adapter_of(&plan, "run", 3);
    let merged = adapted.merged();
    let of_merged = first_loss(&plan, 1, to_train(&merged), &CrossEntropy);
    let found = steps(&watch)[3].loss;
    assert!((of_merged - found).abs() < 1e-6, "{of_merged} {found}");

    let (merged, after) = (parameters(&merged), bench.saved("run", 4));
    for (path, tensor) in &merged {
        assert_eq!(*tensor == after[path], path != "norm.weight", "{path}");
    }
    let [first, before] = [1, 3].map(|step| bench.saved("run", step));
    let a = format!("{LAYER}.adapter.lora_a");
    let b = format!("{LAYER}.adapter.lora_b");
    // In a step, A changes by about the learning rate and its decay, and B begins at zero.
    let distance = |x: &Tensors, y: &Tensors| {
        let pairs = x[&a].iter::<f32>().zip(y[&a].iter::<f32>());
        pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
    };
    assert!(distance(&after, &before) > 0.1 && distance(&after, &first) > 0.1);
    assert!(after[&b].iter::<f32>().all(|value| value.abs() < 0.0101));
    assert!(before[&b].iter::<f32>().any(|value| value.abs() > 0.0101));
    let count = |time| Some(StateScalar::Uint(time));
    assert_eq!(updates(&bench, 4, &a), count(1));
    assert_eq!(updates(&bench, 4, &b), count(1));
    assert_eq!(updates(&bench, 4, "norm.weight"), count(4));
    assert!(is_said(&watch, "a new adapter begins"));

    // The export needs neither the base model nor an adapter.
    assert!(outcome.exported_step > 3, "{outcome:?}");
    let exported = folder::load(&bench.path("run"), &Device::flex()).unwrap();
    let device = Device::flex();
    let (adapter, weights): (Tensors, Tensors) = bench
        .saved("run", outcome.exported_step)
        .into_iter()
        .partition(|(path, _)| is_of_adapter(path));
    let model = folder::decoder_from_own(exported.spec(), weights, &device).unwrap();
    let model = model.adapted(plan.adapter.as_ref().unwrap(), 0).unwrap();
    let mut tensors = parameters(&model);
    tensors.extend(adapter);
    let expected = with_parameters(model, tensors, &device).unwrap().merged();
    assert_eq!(parameters(&exported), parameters(&expected));
    assert!(card(&bench).contains("library_name: transformers"));
}

#[test]
fn p1_what_is_exported_has_the_form_of_the_phase_that_it_is_of() {
    let bench = Bench::new();
    let mut first = None;
    for (name, stop_after) in [("whole", None), ("run", Some(5))] {
        let mut config = bench.adapted(name);
        config.adapter.as_mut().unwrap().init = AdapterInit::Pissa;
        let mut plan = bench.plan_of(config, &[On, Off]);
        // The second phase makes every validation loss worse.
        plan.config.eval.eval_steps = 3;
        plan.phases[1].learning_rate = 5.0;
        if stop_after.is_some() {
            let watch = Watch {
                stop_after,
                ..Watch::default()
            };
            run(&plan, &watch).unwrap_err();
        }
        // The folder looks like that of a run that has exported another step before.
        let folder = bench.path(name);
        fs::create_dir_all(&folder).unwrap();
        if stop_after.is_some() {
            fs::write(folder.join("config.json"), "{}").unwrap();
            fs::write(folder.join("model.safetensors"), "").unwrap();
        }
        let outcome = run(&plan, &Watch::default()).unwrap().unwrap();
        assert!(outcome.exported_step <= 3, "{outcome:?}");
        assert!(folder.join("adapter_config.json").exists());
        assert!(!folder.join("config.json").exists());
        let exported = exported(&folder);
        assert_eq!(*first.get_or_insert_with(|| exported.clone()), exported);
    }
    assert!(card(&bench).contains("library_name: peft"));
    // The same with the phases in the other order.
    let plan = bench.plan("other", &[On, Off]);
    let watch = Watch {
        stop_after: Some(5),
        ..Watch::default()
    };
    run(&plan, &watch).unwrap_err();
    for stale in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::write(bench.path("other").join(stale), "{}").unwrap();
    }
    run(&plan, &Watch::default()).unwrap().unwrap();
    exported(&bench.path("other"));
    assert!(!bench.path("other/adapter_config.json").exists());
}

#[test]
fn p1_answers_are_held_against_the_base_model_whatever_has_become_of_it() {
    let bench = Bench::new();
    let preferences = bench.preferences();
    for (name, adapter) in [("run", Off), ("restarted", Restart)] {
        let mut plan = bench.plan(name, &[On, adapter]);
        let mut second = preferences.phases[0].clone();
        second.name = "pairs".to_string();
        second.adapter = adapter;
        plan.phases[1] = second;
        plan.config.checkpoint.save_total_limit = 0;
        let watch = Watch::default();
        run(&plan, &watch).unwrap();
        let found = steps(&watch)[3].loss;
        let merged = bench.with_adapter_of(&plan, name, 3).merged();
        let DpoConfig {
            beta,
            label_smoothing,
        } = plan.phases[1].dpo.clone().unwrap();
        let objective = Preference {
            loss: PairLoss {
                beta,
                label_smoothing,
            },
            reference: bench.base(&Device::flex()),
        };
        let expected = first_loss(&plan, 1, to_train(&merged), &objective);
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        // A model that is its own reference would have this loss.
        assert!((found - std::f64::consts::LN_2).abs() > 1e-5, "{found}");
    }
}
