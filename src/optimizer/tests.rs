//! Tests of every rule: its steps, its state, and which states it may continue from.

mod muon;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::rule::SavedState;
use super::*;
use crate::config::{
    AdamWPlan, LionPlan, MuonPlan, NewtonSchulz, Ramp, SoapPlan, VelvetPlan, VelvetSignal,
};
use crate::gradient::Gradient;
use crate::model::{Tensors, parameters};

#[derive(Module, Debug)]
struct Block {
    weight: Param<Tensor<2>>,
    bias: Param<Tensor<1>>,
}

/// The sides are not multiples of a block or vector size; some tensors have at least 4096 weights.
#[derive(Module, Debug)]
struct Net {
    layers: Vec<Block>,
    head: Param<Tensor<2>>,
    norm: Param<Tensor<1>>,
}

const FIRST: &str = "layers.0.weight";

fn param<const D: usize>(dims: [usize; D], phase: f32) -> Param<Tensor<D>> {
    let count: usize = dims.iter().product();
    let values: Vec<f32> = (0..count)
        .map(|i| (i as f32 * 0.37 + phase).sin())
        .collect();
    Param::from_data(TensorData::new(values, dims), &Device::flex().autodiff())
}

fn net() -> Net {
    let block = |[rows, columns]: [usize; 2]| Block {
        weight: param([rows, columns], 0.1),
        bias: param([columns], 0.2),
    };
    Net {
        layers: vec![block([61, 71]), block([5, 3])],
        head: param([7, 1], 0.3),
        norm: param([4099], 0.4),
    }
}

/// One step towards a target that differs for every step, except for elements that have arrived.
fn step(optimizer: &mut Optimizer, net: Net, time: usize) -> Net {
    step_at(1e-2, optimizer, net, time)
}

fn step_at(learning_rate: f64, optimizer: &mut Optimizer, net: Net, time: usize) -> Net {
    fn distance<const D: usize>(param: &Param<Tensor<D>>, target: f32) -> Tensor<1> {
        (param.val().clamp_min(-0.5) - target).square().sum()
    }
    let target = (time as f32).cos();
    let mut loss = distance(&net.head, target) + distance(&net.norm, target);
    for block in &net.layers {
        loss = loss + distance(&block.weight, target) + distance(&block.bias, target);
    }
    let gradient = Gradient::backward(&loss, &net);
    let facts = StepFacts {
        learning_rate,
        loss: Some(loss.into_scalar::<f32>().into()),
        grad_norm: Some(gradient.norm()),
    };
    optimizer.step(net, gradient, facts)
}

fn stepped(plan: &OptimizerPlan) -> (Optimizer, Net) {
    let (mut optimizer, mut net) = (Optimizer::new(plan), net());
    for time in 0..3 {
        net = step(&mut optimizer, net, time);
    }
    (optimizer, net)
}

fn plans() -> [OptimizerPlan; 12] {
    let (betas, eps, weight_decay) = ([0.9, 0.95], 1e-8, 0.1);
    let adamw = AdamWPlan::new(betas, eps, weight_decay);
    let ramp = Ramp {
        start: 0.5,
        steps: 4,
    };
    let cautious = AdamWPlan {
        cautious_weight_decay: true,
        beta2_warmup: Some(ramp),
        ..adamw
    };
    let muon = MuonPlan::new(0.95, adamw);
    let sgd = |momentum: f64| OptimizerPlan::Sgd {
        momentum,
        nesterov: momentum > 0.0,
        weight_decay,
    };
    [
        OptimizerPlan::AdamW(AdamWPlan::new(betas, eps, weight_decay)),
        OptimizerPlan::AdamW8bit(AdamWPlan::new(betas, eps, weight_decay)),
        OptimizerPlan::Adam {
            betas,
            eps,
            weight_decay,
        },
        sgd(0.9),
        sgd(0.0),
        OptimizerPlan::Lion(LionPlan::new(betas, weight_decay)),
        OptimizerPlan::Adafactor { weight_decay },
        OptimizerPlan::Muon(muon),
        OptimizerPlan::Muon(MuonPlan {
            momentum_warmup: Some(ramp),
            newton_schulz: NewtonSchulz::PolarExpress,
            adamw_lr_ratio: 0.25,
            adamw: cautious,
            ..muon
        }),
        OptimizerPlan::NorMuon {
            neuron_beta: 0.9,
            muon: MuonPlan {
                momentum_warmup: Some(ramp),
                ..muon
            },
        },
        OptimizerPlan::Soap(SoapPlan {
            // Some sides are longer, and the bases change within the tests' steps.
            precondition_frequency: 2,
            max_precondition_dim: 64,
            ..SoapPlan::new(adamw)
        }),
        OptimizerPlan::Velvet {
            velvet: VelvetPlan::default(),
            adamw: cautious,
        },
    ]
}

fn paths() -> Vec<(String, Vec<usize>)> {
    let dims = |data: &TensorData| data.shape().iter().copied().collect();
    let all = parameters(&net()).into_iter();
    all.map(|(path, data)| (path, dims(&data))).collect()
}

fn load(
    plan: &OptimizerPlan,
    net: &Net,
    state: OptimizerState,
) -> Result<(Optimizer, Vec<String>), OptimizerError> {
    let mut optimizer = Optimizer::new(plan);
    let fresh = optimizer.load_state(net, state, &Device::flex())?;
    Ok((optimizer, fresh))
}

fn refusal(plan: &OptimizerPlan, net: &Net, state: OptimizerState) -> OptimizerError {
    load(plan, net, state).expect_err("a state that must not be taken")
}

fn all_of(state: &OptimizerState) -> (&Tensors, &BTreeMap<String, StateScalar>) {
    (&state.tensors, &state.scalars)
}

#[test]
fn optimizers_go_from_thread_to_thread() {
    fn is_send<T: Send + Sync>() {}
    is_send::<Optimizer>();
    is_send::<OptimizerState>();
}

#[test]
fn every_rule_continues_from_its_saved_state_to_the_same_bits() {
    for plan in plans() {
        let (mut optimizer, mut net) = stepped(&plan);
        let state = optimizer.state(&net);
        let spare = optimizer.state(&net).tensors;
        let again = optimizer.state_into(&net, spare);
        assert_eq!(all_of(&again), all_of(&state), "{plan:?}");
        let (mut restored, fresh) = load(&plan, &net, again).unwrap();
        assert!(fresh.is_empty(), "{plan:?}: {fresh:?}");
        let restored_state = restored.state(&net);
        assert_eq!(all_of(&restored_state), all_of(&state), "{plan:?}");
        assert_eq!(restored_state.families, state.families, "{plan:?}");
        let mut other = net.clone();
        for time in 3..6 {
            net = step(&mut optimizer, net, time);
            other = step(&mut restored, other, time);
            assert_eq!(parameters(&net), parameters(&other), "{plan:?}");
        }
    }
}

#[test]
fn the_bytes_of_a_state_are_known_before_there_is_one() {
    for plan in plans() {
        let (optimizer, net) = stepped(&plan);
        let state = optimizer.state(&net);
        for (path, dims) in paths() {
            let prefix = format!("{path}.");
            let own = state.tensors.iter();
            let own = own.filter(|(name, _)| name.starts_with(&prefix));
            let found: usize = own.map(|(_, data)| data.as_bytes().len()).sum();
            let rule = optimizer.rules.rule_for(&path, dims.len());
            assert_eq!(rule.state_bytes(&dims), found as u64, "{plan:?} {path}");
        }
    }
}

/// The names of a state, without the values that Velvet adds.
fn names(state: &OptimizerState) -> Vec<&String> {
    let names = state.tensors.keys().chain(state.scalars.keys());
    names
        .filter(|name| !name.starts_with(velvet::VELVET))
        .collect()
}

fn is_velvet(plan: &OptimizerPlan) -> bool {
    matches!(plan, OptimizerPlan::Velvet { .. })
}

/// Checks that a state is taken as it is; Velvet's signals may begin without one.
fn is_taken(to: &OptimizerPlan, net: &Net, state: &dyn Fn() -> OptimizerState) {
    let (taken, fresh) = load(to, net, state()).unwrap();
    assert!(fresh.is_empty(), "{to:?}: {fresh:?}");
    let (taken, state) = (taken.state(net), state());
    assert_eq!(all_of(&taken), all_of(&state), "{to:?}");
}

#[test]
fn no_rule_takes_the_state_of_another_family() {
    for from in plans() {
        let (optimizer, net) = stepped(&from);
        let state = || optimizer.state(&net);
        for to in plans() {
            let family = |plan: &OptimizerPlan, path: &str, rank: usize| {
                Rules::new(plan).rule_for(path, rank).state_family()
            };
            // The parameters are listed in the order of the module.
            let first_other = [("layers.0.weight", 2), ("layers.0.bias", 1)]
                .into_iter()
                .find(|(path, rank)| family(&from, path, *rank) != family(&to, path, *rank));
            let other = stepped(&to).0.state(&net);
            let [own, new] = [names(&state()).len(), names(&other).len()];
            if own == 0 && new > 0 {
                let (_, fresh) = load(&to, &net, state()).unwrap();
                assert_eq!(fresh.len(), paths().len(), "{from:?} to {to:?}");
            } else if let Some((path, _)) = first_other.filter(|_| new > 0) {
                let error = refusal(&to, &net, state());
                let OptimizerError::OtherRule { path: found, .. } = &error else {
                    panic!("{from:?} to {to:?}: {error}");
                };
                assert_eq!(found, path, "{from:?} to {to:?}");
            } else if names(&state()) == names(&other) && (is_velvet(&to) || !is_velvet(&from)) {
                is_taken(&to, &net, &state);
            } else if names(&state()) == names(&other) {
                let error = refusal(&to, &net, state()).to_string();
                assert!(error.contains("velvet."), "{from:?} to {to:?}: {error}");
            } else {
                // A count is missing or too many, or the whole state.
                let error = refusal(&to, &net, state()).to_string();
                assert!(error.contains(FIRST), "{from:?} to {to:?}: {error}");
            }
        }
    }
}

/// A checkpoint from before families were saved: only the names of tensors tell the rule.
#[test]
fn a_state_that_does_not_say_whose_it_is_is_told_by_its_tensors() {
    for from in plans() {
        let (optimizer, net) = stepped(&from);
        let state = || OptimizerState {
            families: BTreeMap::new(),
            ..optimizer.state(&net)
        };
        if state().tensors.is_empty() {
            continue;
        }
        for to in plans() {
            let other = stepped(&to).0.state(&net);
            if names(&state()) == names(&other) && (is_velvet(&to) || !is_velvet(&from)) {
                is_taken(&to, &net, &state);
                continue;
            }
            let error = refusal(&to, &net, state());
            let is_named = match &error {
                OptimizerError::NotKept { name, .. } | OptimizerError::Incomplete { name, .. } => {
                    name.starts_with("layers.0.")
                }
                OptimizerError::Unexpected { name } => name.starts_with("velvet."),
                _ => false,
            };
            assert!(is_named, "{from:?} to {to:?}: {error}");
        }
    }
}

#[test]
fn a_parameter_without_any_state_starts_fresh_and_is_reported() {
    for plan in plans() {
        let (mut optimizer, net) = stepped(&plan);
        let mut state = optimizer.state(&net);
        let is_kept = !state.tensors.is_empty();
        state.tensors.retain(|name, _| !name.starts_with("norm."));
        state.scalars.retain(|name, _| !name.starts_with("norm."));
        state.families.remove("norm");
        let (mut restored, fresh) = load(&plan, &net, state).unwrap();
        let expected: &[&str] = if is_kept { &["norm"] } else { &[] };
        assert_eq!(fresh, expected, "{plan:?}");
        // The other parameters continue, and this one takes a first step.
        let going_on = parameters(&step(&mut optimizer, net.clone(), 3));
        let first = parameters(&step(&mut Optimizer::new(&plan), net.clone(), 3));
        let found = parameters(&step(&mut restored, net.clone(), 3));
        for (path, data) in found {
            let expected = if path == "norm" { &first } else { &going_on };
            // Velvet's factor goes on for all parameters.
            if path == "norm" && is_velvet(&plan) {
                continue;
            }
            assert_eq!(data, expected[&path], "{plan:?} {path}");
        }
        // An empty state: all parameters begin again, and the optimizer's own state is dropped.
        let device = Device::flex();
        let fresh = optimizer.load_state(&net, OptimizerState::default(), &device);
        assert_eq!(fresh.unwrap().len(), if is_kept { 6 } else { 0 });
        assert!(optimizer.state(&net).tensors.is_empty());
    }
}

#[test]
fn a_state_that_is_there_in_part_or_does_not_fit_is_refused_by_name() {
    for plan in plans() {
        let (optimizer, net) = stepped(&plan);
        let whole = optimizer.state(&net);
        let changed = |change: &dyn Fn(&mut OptimizerState)| {
            let mut state = optimizer.state(&net);
            change(&mut state);
            refusal(&plan, &net, state).to_string()
        };
        for (name, data) in &whole.tensors {
            let error = changed(&|state| drop(state.tensors.remove(name)));
            assert!(error.contains(name) && error.contains("in part"), "{error}");
            let put = |new: TensorData| {
                let error = changed(&|state| drop(state.tensors.insert(name.clone(), new.clone())));
                assert!(error.contains(name), "{plan:?}: {error}");
            };
            let dims: Vec<usize> = data.shape().iter().copied().collect();
            // Another rank, one element too many, another type.
            put(TensorData::from_bytes_vec(
                data.as_bytes().to_vec(),
                [&[1], &dims[..]].concat(),
                data.dtype(),
            ));
            let mut larger = dims.clone();
            larger[0] += 1;
            put(TensorData::zeros::<f32, _>(larger));
            put(TensorData::zeros::<i32, _>(dims));
        }
        for name in whole.scalars.keys() {
            let error = changed(&|state| {
                state.scalars.remove(name);
            });
            assert!(error.contains(name) && error.contains("in part"), "{error}");
            let flag = StateScalar::Bool(true);
            let error = changed(&|state| {
                state.scalars.insert(name.clone(), flag);
            });
            let path = name.split(".momentum").next().unwrap();
            let path = path.trim_end_matches(".time").trim_end_matches(".updates");
            assert!(error.contains(path), "{plan:?} {name}: {error}");
        }
        for path in whole.families.keys() {
            let error = changed(&|state| {
                state.tensors.retain(|name, _| !name.starts_with(path));
                state.scalars.retain(|name, _| !name.starts_with(path));
            });
            assert!(error.contains(path) && error.contains("in part"), "{error}");
        }
    }
}

#[test]
fn what_belongs_to_no_trained_parameter_is_refused() {
    for plan in plans() {
        let (mut optimizer, net) = stepped(&plan);
        let before = optimizer.state(&net);
        let mut refused = |net: &Net, change: &dyn Fn(&mut OptimizerState)| {
            let mut state = optimizer.state(net);
            change(&mut state);
            let error = optimizer.load_state(net, state, &Device::flex());
            error.unwrap_err().to_string()
        };
        let tensor = || TensorData::zeros::<f32, _>([1]);
        let name = || "elsewhere.momentum".to_string();
        for error in [
            refused(&net, &|state| drop(state.tensors.insert(name(), tensor()))),
            refused(&net, &|state| {
                state.scalars.insert(name(), StateScalar::Uint(1));
            }),
            refused(&net, &|state| {
                state.families.insert(name(), "adam".to_string());
            }),
        ] {
            assert!(error.contains("elsewhere"), "{plan:?}: {error}");
        }
        // Names that share only a prefix with a parameter's name.
        for name in ["norm2.momentum", "nor.momentum", "norm"] {
            let error = refused(&net, &|state| {
                state.tensors.insert(name.to_string(), tensor());
            });
            assert!(error.contains(name), "{plan:?}: {error}");
        }
        if !before.tensors.is_empty() {
            let mut frozen = net.clone();
            frozen.norm = frozen.norm.no_grad();
            let error = refused(&frozen, &|_| {});
            assert!(error.contains("norm"), "{plan:?}: {error}");
        }
        // A refused state leaves the optimizer unchanged.
        let after = optimizer.state(&net);
        assert_eq!(all_of(&before), all_of(&after));
    }
}

#[test]
fn what_is_not_trained_is_neither_kept_nor_missed() {
    for plan in plans() {
        let mut net = net();
        net.norm = net.norm.no_grad();
        let mut optimizer = Optimizer::new(&plan);
        net = step(&mut optimizer, net, 0);
        let state = optimizer.state(&net);
        assert!(!state.families.contains_key("norm"));
        let (_, fresh) = load(&plan, &net, state).unwrap();
        assert!(fresh.is_empty(), "{plan:?}: {fresh:?}");
    }
}

#[test]
fn steps_of_adam_are_those_of_the_rules_that_take_them() {
    for plan in plans() {
        let (optimizer, net) = stepped(&plan);
        let optimizer = optimizer.with_lora_plus(16.0);
        let applied = optimizer.applied(&net, &optimizer.state(&net), 1e-2);
        let has = |path: &str| applied.contains_key(path);
        let decay = |path: &str| applied[path].weight_decay;
        match plan {
            OptimizerPlan::AdamW(_) | OptimizerPlan::Velvet { .. } => {
                assert_eq!([FIRST, "head", "norm"].map(decay), [0.1, 0.1, 0.0]);
            }
            OptimizerPlan::Adam { .. } => {
                assert_eq!([FIRST, "head", "norm"].map(decay), [0.0; 3]);
            }
            OptimizerPlan::Muon(_) | OptimizerPlan::NorMuon { .. } | OptimizerPlan::Soap(_) => {
                assert!(!has(FIRST));
                let others = ["head", "layers.0.bias", "norm"];
                assert_eq!(others.map(decay), [0.1, 0.0, 0.0]);
            }
            _ => assert!(applied.is_empty(), "{plan:?}"),
        }
        assert!(applied.values().all(|applied| applied.time == 3));
    }
}

#[test]
fn moments_are_f32_or_codes_of_eight_bits() {
    for plan in plans() {
        let (optimizer, net) = stepped(&plan);
        for (name, data) in optimizer.state(&net).tensors {
            let expected = if name.ends_with("_codes") {
                DType::U8
            } else {
                DType::F32
            };
            assert_eq!(data.dtype(), expected, "{plan:?} {name}");
        }
    }
}

#[test]
fn o2_velvet_without_signals_is_adamw_bit_for_bit() {
    let adamw = AdamWPlan::new([0.9, 0.95], 1e-8, 0.1);
    let with = |signals: Vec<VelvetSignal>| OptimizerPlan::Velvet {
        velvet: VelvetPlan {
            signals,
            ..VelvetPlan::default()
        },
        adamw,
    };
    let after = |plan: &OptimizerPlan| {
        let (mut optimizer, mut net) = stepped(plan);
        for time in 3..12 {
            net = step(&mut optimizer, net, time);
        }
        (parameters(&net), optimizer.state(&net))
    };
    let (weights, state) = after(&OptimizerPlan::AdamW(adamw));
    let (found, found_state) = after(&with(Vec::new()));
    assert_eq!(found, weights);
    assert_eq!(all_of(&found_state), all_of(&state));
    let (other, _) = after(&with(vec![VelvetSignal::Loss]));
    assert_ne!(other, weights);
}

#[test]
fn o2_weights_that_begin_at_zero_move_under_every_rule() {
    for plan in plans() {
        let mut net = net();
        for block in &mut net.layers {
            let zeros = block.weight.val().zeros_like();
            block.weight = Param::from_tensor(zeros.detach().require_grad());
        }
        let mut optimizer = Optimizer::new(&plan);
        // SOAP's first gradient takes no step.
        for time in 0..2 {
            net = step(&mut optimizer, net, time);
        }
        for block in &net.layers {
            let largest = block.weight.val().abs().max().into_scalar::<f32>();
            assert!(largest > 1e-4, "{plan:?}: {largest}");
        }
    }
}
