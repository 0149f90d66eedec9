//! The average of a run whose phases train other parameters, or an adapter.

use PhaseAdapter::{Off, On, Restart};
use firebrick::adapter::Adapter;
use firebrick::config::{
    AdapterConfig, ModelConfig, PathSelector, PhaseAdapter, PhaseLength, TokenizerConfig,
};
use firebrick::train::TrainError;

use super::*;

/// Two phases of five and seven steps.
fn two_phases(plan: &mut Plan) {
    let mut second = plan.phases[0].clone();
    plan.phases[0].name = "first".to_string();
    plan.phases[0].length = PhaseLength::Steps(5);
    second.name = "second".to_string();
    second.length = PhaseLength::Rest;
    plan.phases.push(second);
}

impl Bench {
    /// Trains the base model of an adapter.
    fn with_base() -> Self {
        let bench = Self::new();
        let mut config = bench.config("base", None);
        config.model.max_position_embeddings = Some(64);
        trained(&Plan::from_config(config).unwrap());
        bench
    }

    fn adapted(&self, run: &str, average: Option<AverageConfig>) -> Plan {
        let mut config = self.config(run, average);
        config.model = ModelConfig {
            base_model: Some(self.path("base")),
            ..ModelConfig::default()
        };
        config.tokenizer = TokenizerConfig::default();
        config.adapter = Some(AdapterConfig {
            r: 2,
            lora_alpha: 8.0,
            modules_to_save: vec!["norm".to_string()],
            ..AdapterConfig::default()
        });
        Plan::from_config(config).unwrap()
    }
}

#[test]
fn the_average_goes_on_over_a_boundary_and_frozen_layers_keep_theirs() {
    let bench = Bench::new();
    let mut plan = bench.plan("run", averaged(1.0, 1, 0));
    two_phases(&mut plan);
    let frozen: PathSelector = "layers.0".parse().unwrap();
    plan.phases[1].freeze = vec![frozen.clone()];
    let (watch, _) = trained(&plan);
    let weights = |steps: std::ops::RangeInclusive<u64>| -> Vec<Tensors> {
        steps
            .map(|step| bench.weights(&plan, "run", step))
            .collect()
    };
    let (first, all) = (mean(1.0, &weights(1..=5)), mean(1.0, &weights(1..=STEPS)));
    let found = bench.average("run", STEPS).tensors;
    for (path, value) in &found {
        let expected = match frozen.matches(path) {
            true => &first[path],
            false => &all[path],
        };
        assert!(value == expected, "{path}");
    }
    assert_eq!(found.len(), all.len());
    assert_eq!(notes(&watch, "begins anew"), 0);
}

#[test]
fn the_average_begins_anew_with_other_parameters_and_the_run_says_so() {
    let bench = Bench::with_base();
    for (number, adapters) in [[On, Off], [On, Restart], [Off, On]]
        .into_iter()
        .enumerate()
    {
        let plan = |run: &str| {
            let mut plan = bench.adapted(run, averaged(1.0, 2, 0));
            two_phases(&mut plan);
            for (phase, adapter) in plan.phases.iter_mut().zip(adapters) {
                phase.adapter = adapter;
            }
            plan.config.eval.eval_steps = 1;
            plan
        };
        let whole = format!("whole-{number}");
        let (watch, outcome) = trained(&plan(&whole));
        assert_eq!(notes(&watch, "the average of the weights begins anew"), 1);
        assert_eq!(notes(&watch, "begins with those of step"), 2);
        // Updates after steps 2 and 4, then after 6, 8, 10 and 12.
        let counts: Vec<_> = [1, 4, 5, 6, 8, 12]
            .map(|step| bench.count(&whole, step))
            .to_vec();
        let expected = [None, Some(2), Some(2), Some(1), Some(2), Some(4)];
        assert_eq!(counts, expected, "{adapters:?}");
        // What has no average is not saved with one.
        let average = bench.average(&whole, STEPS).tensors;
        let is_adapter = |path: &String| path.contains(".adapter.") || path == NORM;
        let all = average.keys().all(is_adapter);
        assert_eq!(all, adapters[1] != Off, "{adapters:?}");
        let which: Vec<_> = evaluations(&watch).iter().map(|found| found.2).collect();
        assert_eq!(which[4], Some(EvaluatedWeights::Average));
        assert_eq!(which[0], Some(EvaluatedWeights::Current));
        assert!(outcome.exported_weights.is_some());

        // Before the boundary, at it, and after it.
        for after in [3, 5, 6, 9] {
            let name = format!("stopped-{number}-{after}");
            let plan = plan(&name);
            let stopped = Watch {
                stop_after: Some(after),
                ..Watch::default()
            };
            let error = run(&plan, &stopped).unwrap_err();
            assert!(matches!(error, TrainError::Interrupted { .. }), "{error}");
            trained(&plan);
            assert_eq!(
                metrics(&bench.path(&name)),
                metrics(&bench.path(&whole)),
                "{adapters:?} {after}"
            );
            let [once, resumed] = [&whole, &name].map(|run| bench.average(run, STEPS));
            assert_eq!(once, resumed, "{adapters:?} {after}");
        }
    }
}

#[test]
fn the_exported_adapter_is_the_average_of_its_matrices() {
    let bench = Bench::with_base();
    for format in [CheckpointFormat::Delta, CheckpointFormat::Full] {
        let name = format!("{format:?}");
        let mut plan = bench.adapted(&name, averaged(0.5, 1, 2));
        plan.config.checkpoint.format = format;
        let (_, outcome) = trained(&plan);
        assert_eq!(outcome.exported_weights, Some(EvaluatedWeights::Average));
        let step = outcome.exported_step;
        let saved = |step| bench.store(&name).load(step).unwrap().model.tensors();
        let expected = mean(0.5, &(3..=step).map(saved).collect::<Vec<_>>());
        assert_eq!(bench.average(&name, step).tensors, expected);
        let base = folder::load(&bench.path("base"), &Device::flex()).unwrap();
        let exported = Adapter::read(&bench.path(&name), base.spec()).unwrap();
        for (path, update) in &exported.layers {
            let of = |part: &str| &expected[&format!("{path}.adapter.{part}")];
            assert_eq!(update.a, *of("lora_a"), "{path}");
            assert_eq!(update.b, *of("lora_b"), "{path}");
        }
        assert_eq!(exported.saved[NORM], expected[NORM]);
    }
}

#[test]
fn an_adapter_beside_changed_weights_is_exported_as_their_sum() {
    let bench = Bench::with_base();
    for format in [CheckpointFormat::Delta, CheckpointFormat::Full] {
        let name = format!("{format:?}");
        let mut plan = bench.adapted(&name, averaged(0.5, 1, 0));
        two_phases(&mut plan);
        plan.phases[1].adapter = Restart;
        plan.config.checkpoint.format = format;
        let (_, outcome) = trained(&plan);
        let step = outcome.exported_step;
        assert!(step > 6, "{outcome:?}");
        let device = Device::flex();
        let exported = folder::load(&bench.path(&name), &device).unwrap();
        let weights = bench.store(&name).load(step).unwrap().model;
        let (weights, adapter) = weights.split_adapter();
        let mut adapter = adapter;
        let model = weights.decoder(exported.spec(), &device).unwrap();
        let model = model.adapted(plan.adapter.as_ref().unwrap(), 0).unwrap();
        let mut tensors = parameters(&model);
        tensors.append(&mut adapter);
        tensors.extend(bench.average(&name, step).tensors);
        let expected = firebrick::model::with_parameters(model, tensors, &device).unwrap();
        let expected = parameters(&expected.merged());
        assert!(parameters(&exported) == expected, "{format:?}");
    }
}

#[test]
fn the_average_of_ternary_weights_is_that_of_what_they_are_rounded_from() {
    let bench = Bench::new();
    let mut config = bench.config("run", averaged(0.5, 1, 0));
    config.quantization.weights = Some(firebrick::config::WeightFormat::Ternary);
    let mut plan = Plan::from_config(config).unwrap();
    two_phases(&mut plan);
    plan.phases[0].ternary_blend = [0.0, 1.0];
    let (watch, outcome) = trained(&plan);
    // A blend is evaluated and never the best.
    let found = evaluations(&watch);
    assert_eq!(found[0].2, Some(EvaluatedWeights::Average));
    let step = outcome.exported_step;
    assert!(step > 4);
    let weights = (1..=step).map(|step| bench.weights(&plan, "run", step));
    let expected = mean(0.5, &weights.collect::<Vec<_>>());
    let exported = folder::load(&bench.path("run"), &Device::flex()).unwrap();
    assert!(parameters(&exported) == expected);
}
