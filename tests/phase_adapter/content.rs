//! Tests of what checkpoints hold of a model and how they describe it.

use firebrick::config::{CheckpointFormat, Held, PhaseAdapter, PhaseModel, Plan};
use firebrick::model::parameters;
use firebrick::train::Run;

use super::*;
use PhaseAdapter::{Off, On, Restart};

/// The description of the model in a step's state.json.
fn model_config(bench: &Bench, run: &str, step: u64) -> Value {
    let path = bench.path(&format!("{run}/checkpoints/step-{step:06}/state.json"));
    let state: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    fn find(value: &Value) -> Option<&Value> {
        match value {
            Value::Object(fields) if fields.contains_key("result") => fields.get("config"),
            Value::Object(fields) => fields.values().find_map(find),
            _ => None,
        }
    }
    find(&state).unwrap().clone()
}

fn paths(tensors: &Tensors) -> Vec<&str> {
    tensors.keys().map(String::as_str).collect()
}

#[test]
fn a_run_of_one_phase_saves_its_adapter_and_what_is_trained_whole_and_no_config() {
    let bench = Bench::new();
    for format in [CheckpointFormat::Delta, CheckpointFormat::Full] {
        let name = format!("run-{format:?}");
        let mut config = bench.adapted(&name);
        config.checkpoint.format = format;
        let plan = Plan::from_config(config).unwrap();
        assert_eq!(PhaseModel::of_plan(&plan)[0].held(), Held::Adapter);
        run(&plan, &Watch::default()).unwrap();
        let saved = bench.saved(&name, STEPS);
        let mut expected = vec!["norm.weight".to_string()];
        for layer in plan.adapter.as_ref().unwrap().layers.keys() {
            expected.extend(["lora_a", "lora_b"].map(|part| format!("{layer}.adapter.{part}")));
        }
        expected.sort();
        assert_eq!(paths(&saved), expected);
        if format == CheckpointFormat::Delta {
            assert_eq!(model_config(&bench, &name, STEPS), Value::Null);
        }
        // A plan with the default adapter setting has the same record as before the setting
        // existed.
        let text = fs::read_to_string(bench.path(&name).join("run.json")).unwrap();
        assert!(!text.contains("\"adapter\""), "{text}");
    }
}

#[test]
fn p1_a_checkpoint_holds_what_its_phase_trains_and_what_is_nowhere_else() {
    let bench = Bench::new();
    let base = bench.base(&Device::flex());
    for format in [CheckpointFormat::Delta, CheckpointFormat::Full] {
        let name = format!("run-{format:?}");
        let mut plan = bench.plan(&name, &[On, Off, Restart]);
        plan.config.checkpoint.save_total_limit = 0;
        plan.config.checkpoint.format = format;
        run(&plan, &Watch::default()).unwrap();
        let of = |step| bench.saved(&name, step);
        let adapter: Vec<String> = of(3)
            .into_keys()
            .filter(|path| is_of_adapter(path))
            .collect();
        let rest: Vec<String> = of(3)
            .into_keys()
            .filter(|path| !is_of_adapter(path))
            .collect();
        assert_eq!(
            (adapter.len(), rest.join(" ").as_str()),
            (28, "norm.weight")
        );
        let weights = match format {
            CheckpointFormat::Delta => parameters(&base),
            CheckpointFormat::Full => folder::hf_tensors(&base),
        };
        assert_eq!(paths(&of(4)), paths(&weights));
        let mut both: Vec<&str> = paths(&weights);
        both.extend(adapter.iter().map(String::as_str));
        both.sort();
        assert_eq!(paths(&of(6)), both);
        for step in 1..=STEPS {
            bench.store(&name).verify(step).unwrap();
        }
        // A restored step is a full checkpoint wherever it is written.
        let out = bench.path(&format!("{name}-restored/checkpoints/step-000006"));
        fs::create_dir_all(out.parent().unwrap()).unwrap();
        bench.store(&name).restore(6, &out).unwrap();
        let restored = bench.saved(&format!("{name}-restored"), 6);
        let mut expected = folder::hf_tensors(&base);
        expected.extend(of(6).into_iter().filter(|(path, _)| is_of_adapter(path)));
        assert_eq!(paths(&restored), paths(&expected));
        assert!(adapter.iter().all(|path| restored[path] == expected[path]));
    }
    // All checkpoints of a chain belong to one model.
    let stored = |step| bench.stored("run-Delta", step);
    assert_eq!([1, 4, 6].map(stored), [Stored::Alone; 3]);
    assert_eq!([2, 5, 7].map(stored), [1, 4, 6].map(Stored::Beside));
    let [adapter, whole, both] = [3, 4, 6].map(|step| model_config(&bench, "run-Delta", step));
    assert_eq!(adapter, Value::Null);
    assert_eq!(whole["model_type"], "llama");
    assert!(
        both != whole && both["firebrick_adapter"]["since_phase"] == 2,
        "{both}"
    );
}

#[test]
fn p1_counts_and_forecasts_are_those_of_each_phase() {
    let bench = Bench::new();
    let plan = bench.plan("run", &[On, Off]);
    let base = bench.base(&Device::flex());
    let adapted = bench.base(&Device::flex());
    let adapted = adapted.adapted(plan.adapter.as_ref().unwrap(), 0).unwrap();
    let estimate = |plan: &Plan| Run::estimate(plan, true, |_| ()).unwrap().forecast;
    let forecast = estimate(&plan);
    assert_eq!(forecast.parameters, base.params());
    assert_eq!(forecast.trainable, base.params());
    let restart = estimate(&bench.plan("run", &[On, Restart]));
    assert_eq!(restart.trainable, adapted.trained_params() as u64);
    let only = estimate(&bench.plan("run", &[On]));
    let bytes = |forecast: &firebrick::forecast::Forecast, name: &str| {
        let mut terms = forecast.memory.terms.iter();
        terms
            .find(|term| term.name == name)
            .map_or(0, |term| term.bytes)
    };
    let copied = bytes(&restart, "copy being saved") - bytes(&only, "copy being saved");
    assert_eq!(copied, 4 * (adapted.params() - only.trainable));

    run(&plan, &Watch::default()).unwrap();
    let text = fs::read_to_string(bench.path("run/run.json")).unwrap();
    let record: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(record["parameters"], adapted.params());
    assert_eq!(record["trainable"], adapted.trained_params());
    assert_eq!(record["phases"][1]["adapter"], "off");
}
