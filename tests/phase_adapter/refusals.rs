//! Tests of phases whose adapter setting is not possible.

use firebrick::config::{AdapterInit, PhaseAdapter, WeightFormat};
use firebrick::phase::TimelineError;
use firebrick::train::{Event, Observer, Options, Run, TrainError};

use super::*;
use PhaseAdapter::{Off, On, Restart};

/// Checks that the plan is refused before anything is written.
fn refused(bench: &Bench, plan: &Plan) -> TrainError {
    let Err(error) = run(plan, &Watch::default()) else {
        panic!("the plan is refused")
    };
    assert!(!bench.path("refused").exists(), "{error}");
    assert_eq!((error.exit_code(), error.kind()), (2, "config"), "{error}");
    error
}

#[test]
fn p1_a_run_without_an_adapter_has_none_to_turn_off() {
    let bench = Bench::new();
    for adapter in [Off, Restart] {
        let mut config = bench.adapted("refused");
        config.adapter = None;
        let plan = bench.plan_of(config, &[On, adapter]);
        let error = refused(&bench, &plan);
        let TrainError::Timeline(TimelineError::Phase { name, reason }) = error else {
            panic!("{error}")
        };
        assert_eq!(name, "phase-1");
        assert!(reason.contains("no adapter"), "{reason}");
    }
}

#[test]
fn p1_an_adapter_is_not_begun_anew_where_its_base_would_have_to_be_made_again() {
    let bench = Bench::new();
    let nf4 = |config: &mut Config| config.quantization.weights = Some(WeightFormat::Nf4);
    let ternary = |config: &mut Config| config.quantization.weights = Some(WeightFormat::Ternary);
    let pissa = |config: &mut Config| config.adapter.as_mut().unwrap().init = AdapterInit::Pissa;
    type Change = fn(&mut Config);
    let changes: [(Change, &str); 3] = [
        (nf4, "quantized again"),
        (ternary, "rounded again"),
        (pissa, "taken out of them again"),
    ];
    for (change, reason) in changes {
        for (adapters, phase) in [
            (&[On, Restart][..], "phase-1"),
            (&[On, Off, On], "phase-2"),
            (&[Off, On], "phase-1"),
        ] {
            let mut config = bench.adapted("refused");
            change(&mut config);
            let error = refused(&bench, &bench.plan_of(config, adapters));
            assert!(
                matches!(&error, TrainError::Timeline(TimelineError::Phase { name, .. }) if name == phase),
                "{error}"
            );
            assert!(error.to_string().contains(reason), "{error}");
        }
    }
}

#[test]
fn p1_selectors_are_of_the_model_that_the_phase_has() {
    let bench = Bench::new();
    let mut plan = bench.plan("refused", &[On, Off]);
    let selector = "layers.0.self_attn.q_proj.adapter";
    plan.phases[1].freeze = vec![selector.parse().unwrap()];
    let Err(error) = run(&plan, &Watch::default()) else {
        panic!("the plan is refused")
    };
    let message = format!("this model has no parameter `{selector}`");
    assert_eq!((error.exit_code(), error.to_string()), (2, message));
}

#[test]
fn v6_a_reference_is_not_read_from_a_base_model_that_has_changed_since_the_run_began() {
    /// Changes the base model's files during the first phase.
    struct Meddler(PathBuf);
    impl Observer for Meddler {
        fn observe(&mut self, event: &Event) -> Result<(), TrainError> {
            if matches!(event, Event::Step(record) if record.step == 2) {
                let mut bytes = fs::read(&self.0).unwrap();
                *bytes.last_mut().unwrap() ^= 1;
                fs::write(&self.0, bytes).unwrap();
            }
            Ok(())
        }
    }
    let bench = Bench::new();
    let mut plan = bench.plan("run", &[On, On]);
    plan.phases[1] = bench.preferences().phases[0].clone();
    let options = Options {
        observers: vec![Box::new(Meddler(bench.path("base/model.safetensors")))],
        ..Options::default()
    };
    let run = Run::prepare(&plan, options).unwrap().unwrap();
    let error = run.train().unwrap_err();
    assert!(
        matches!(&error, TrainError::OtherBaseModel { file, .. } if file.ends_with("model.safetensors")),
        "{error}"
    );
}
