//! Resuming a run at or across a phase boundary does not change its result, bit for bit.

use firebrick::config::{AdapterInit, AdapterKind, CheckpointFormat, PhaseAdapter, WeightFormat};
use firebrick::train::TrainError;

use super::runs::{metrics, steps};
use super::*;
use PhaseAdapter::{Off, On, Restart};

/// Stops a run after each of its steps and resumes it. The result always has to equal that of the
/// uninterrupted run.
fn check(bench: &Bench, name: &str, plan: &dyn Fn(&str) -> Plan) {
    let end_of = |run: &str| {
        let path = bench.path(run);
        (metrics(&path), exported(&path), bench.saved(run, STEPS))
    };
    let whole = format!("{name}-whole");
    run(&plan(&whole), &Watch::default()).unwrap();
    let (rows, weights, last) = end_of(&whole);
    for stop_after in 1..STEPS {
        let name = format!("{name}-{stop_after}");
        let plan = plan(&name);
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
        let end = end_of(&name);
        assert_eq!(end.0, rows, "{name}");
        assert!(end.1 == weights && end.2 == last, "{name}");
        for step in bench.store(&name).steps().unwrap() {
            bench.store(&name).verify(step).unwrap();
        }
    }
}

#[test]
fn r10_a_run_goes_on_across_every_change_of_its_adapter() {
    let bench = Bench::new();
    for (name, adapters) in [
        ("off", &[On, Off][..]),
        ("restart", &[On, Restart]),
        ("off-on", &[Off, On]),
        ("all", &[On, Restart, Off]),
        ("twice", &[Restart, Restart, On]),
    ] {
        check(&bench, name, &|run| bench.plan(run, adapters));
    }
}

#[test]
fn r10_whole_checkpoints_and_those_that_are_waited_for_do_as_well() {
    let bench = Bench::new();
    for adapter in [Off, Restart] {
        check(&bench, &format!("full-{adapter:?}"), &|run| {
            let mut plan = bench.plan(run, &[On, adapter]);
            plan.config.checkpoint.format = CheckpointFormat::Full;
            plan
        });
        check(&bench, &format!("waited-{adapter:?}"), &|run| {
            let mut plan = bench.plan(run, &[On, adapter]);
            plan.config.checkpoint.background = false;
            plan
        });
    }
}

#[test]
fn r10_so_do_other_kinds_of_adapters_and_of_base_weights() {
    let bench = Bench::new();
    let changed = |run: &str, change: &dyn Fn(&mut Config), adapters: &[PhaseAdapter]| {
        let mut config = bench.adapted(run);
        change(&mut config);
        bench.plan_of(config, adapters)
    };
    let init = |config: &mut Config, init| config.adapter.as_mut().unwrap().init = init;
    check(&bench, "dora", &|run| {
        let dora = |config: &mut Config| {
            let adapter = config.adapter.as_mut().unwrap();
            adapter.kind = AdapterKind::Dora;
            adapter.lora_dropout = 0.2;
            adapter.lora_plus_ratio = 4.0;
        };
        changed(run, &dora, &[On, Restart])
    });
    check(&bench, "pissa", &|run| {
        changed(run, &|config| init(config, AdapterInit::Pissa), &[On, Off])
    });
    check(&bench, "nf4", &|run| {
        let nf4 = |config: &mut Config| config.quantization.weights = Some(WeightFormat::Nf4);
        changed(run, &nf4, &[On, Off])
    });
    check(&bench, "nf4-pissa", &|run| {
        let both = |config: &mut Config| {
            config.quantization.weights = Some(WeightFormat::Nf4);
            init(config, AdapterInit::Pissa);
        };
        changed(run, &both, &[On, Off])
    });
    check(&bench, "ternary", &|run| {
        let ternary =
            |config: &mut Config| config.quantization.weights = Some(WeightFormat::Ternary);
        changed(run, &ternary, &[On, Off])
    });
    let exported = folder::load(&bench.path("nf4-whole"), &Device::flex()).unwrap();
    let shape = &exported.spec().shape;
    assert!(shape.blockwise.is_none() && shape.ternary.is_none());
}

#[test]
fn r10_so_do_pairs_of_answers() {
    let bench = Bench::new();
    let preferences = bench.preferences();
    // The reference model is already in memory if only an adapter is trained; otherwise it is
    // loaded.
    for (adapter, whole) in [(On, false), (On, true), (Off, true), (Restart, true)] {
        check(&bench, &format!("pairs-{adapter:?}-{whole}"), &|run| {
            let mut config = bench.adapted(run);
            if !whole {
                config.adapter.as_mut().unwrap().modules_to_save.clear();
            }
            let mut plan = bench.plan_of(config, &[On, adapter]);
            let mut second = preferences.phases[0].clone();
            second.name = "pairs".to_string();
            second.adapter = adapter;
            plan.phases[1] = second;
            plan
        });
    }
}
