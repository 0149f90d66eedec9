//! Tests of what Muon and NorMuon share: AdamW's half, and the momentum.

use super::*;

/// The matrices of the blocks as with one rate for all, the rest as with a quarter of it.
#[test]
fn the_adamw_half_has_a_learning_rate_of_its_own() {
    let adamw = AdamWPlan::new([0.9, 0.95], 1e-8, 0.1);
    let muon = MuonPlan::new(0.95, adamw);
    let slower = MuonPlan {
        adamw_lr_ratio: 0.25,
        ..muon
    };
    let plan_of = |muon, is_normuon| match is_normuon {
        true => OptimizerPlan::NorMuon {
            neuron_beta: 0.95,
            muon,
        },
        false => OptimizerPlan::Muon(muon),
    };
    for is_normuon in [false, true] {
        let trained = |muon, rate| {
            let (mut optimizer, mut net) = (Optimizer::new(&plan_of(muon, is_normuon)), net());
            for time in 0..3 {
                net = step_at(rate, &mut optimizer, net, time);
            }
            parameters(&net)
        };
        let (own, fast, slow) = (
            trained(slower, 1e-2),
            trained(muon, 1e-2),
            trained(muon, 2.5e-3),
        );
        for (path, value) in &own {
            let is_block = path.starts_with("layers.") && path.ends_with("weight");
            let expected = if is_block { &fast } else { &slow };
            assert_eq!(value, &expected[path], "{path}");
            assert_ne!(fast[path], slow[path], "{path}");
        }
    }
}

#[test]
fn muon_and_normuon_go_on_with_each_others_momentum() {
    let adamw = AdamWPlan::new([0.9, 0.95], 1e-8, 0.1);
    let muon = MuonPlan::new(0.95, adamw);
    let ramp = Some(Ramp {
        start: 0.5,
        steps: 9,
    });
    let warmed = MuonPlan {
        momentum_warmup: ramp,
        ..muon
    };
    let neuron_beta = 0.95;
    let plans = [
        OptimizerPlan::Muon(muon),
        OptimizerPlan::Muon(warmed),
        OptimizerPlan::NorMuon { neuron_beta, muon },
        OptimizerPlan::NorMuon {
            neuron_beta,
            muon: warmed,
        },
    ];
    let velocity = format!("{FIRST}.momentum.velocity");
    for from in &plans {
        let (optimizer, net) = stepped(from);
        for to in &plans {
            let mut state = optimizer.state(&net);
            let expected = state.tensors[&velocity].clone();
            let rules = Rules::new(to);
            let rule = rules.rule_for(FIRST, 2);
            let saved = SavedState::take(FIRST, &mut state).unwrap();
            let kept = rule.adopt(&[61, 71], saved).unwrap();
            let mut all = OptimizerState::default();
            kept.put_back(FIRST, rule.state_family(), &mut all);
            assert_eq!(all.tensors[&velocity], expected, "{from:?} to {to:?}");
            let kept = SavedState::take(FIRST, &mut all).unwrap();
            let loaded = kept.load(FIRST, &[61, 71], rule, &Device::flex());
            assert!(loaded.is_ok(), "{from:?} to {to:?}");
        }
        // AdamW keeps other means.
        let mut state = optimizer.state(&net);
        let saved = SavedState::take(FIRST, &mut state).unwrap();
        let rules = Rules::new(&OptimizerPlan::AdamW(adamw));
        assert!(rules.rule_for(FIRST, 2).adopt(&[61, 71], saved).is_none());
    }
}
