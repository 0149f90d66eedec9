//! O1: every rule of our own against its torch reference, on matrices of odd sizes over twelve steps.
//! `benches/peers/optimizer_reference.py` has written the files.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use firebrick::config::{
    AdamWPlan, LionPlan, MuonPlan, NewtonSchulz, OptimizerPlan, Ramp, SoapPlan,
};
use firebrick::gradient::Gradient;
use firebrick::optimizer::Optimizer;
use safetensors::SafeTensors;

const SHAPES: [&str; 5] = ["wide", "tall", "row", "long", "square"];
const STEPS: usize = 12;

/// A matrix of a block, which is what the rules for matrices take.
#[derive(Module, Debug)]
struct Block {
    weight: Param<Tensor<2>>,
}

#[derive(Module, Debug)]
struct Net {
    layers: Vec<Block>,
}

/// Name -> shape and values.
type File = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn read(name: &str) -> File {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/reference/optimizers");
    let path: PathBuf = folder.join(format!("{name}.safetensors"));
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().map(|(name, view)| {
        let values = view.data().chunks_exact(4);
        let values = values.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
        (name.to_string(), (view.shape().to_vec(), values.collect()))
    });
    tensors.collect()
}

fn data((shape, values): &(Vec<usize>, Vec<f32>)) -> TensorData {
    TensorData::new(values.clone(), shape.clone())
}

fn rules() -> Vec<(&'static str, OptimizerPlan)> {
    let adamw = AdamWPlan::new([0.9, 0.95], 1e-8, 0.1);
    let cautious = AdamWPlan {
        cautious_weight_decay: true,
        ..adamw
    };
    let ramp = Some(Ramp {
        start: 0.5,
        steps: 5,
    });
    let lion = LionPlan::new([0.9, 0.99], 0.1);
    let muon = |adamw| MuonPlan::new(0.95, adamw);
    let normuon = |adamw| OptimizerPlan::NorMuon {
        neuron_beta: 0.95,
        muon: muon(adamw),
    };
    let soap = |adamw: AdamWPlan| SoapPlan {
        precondition_frequency: 3,
        ..SoapPlan::new(AdamWPlan {
            betas: [0.95, 0.95],
            ..adamw
        })
    };
    vec![
        ("adamw", OptimizerPlan::AdamW(adamw)),
        ("adamw-cautious", OptimizerPlan::AdamW(cautious)),
        (
            "adamw-ramp",
            OptimizerPlan::AdamW(AdamWPlan {
                beta2_warmup: ramp,
                ..adamw
            }),
        ),
        ("lion", OptimizerPlan::Lion(lion)),
        (
            "lion-cautious",
            OptimizerPlan::Lion(LionPlan {
                cautious_weight_decay: true,
                ..lion
            }),
        ),
        ("muon", OptimizerPlan::Muon(muon(adamw))),
        ("muon-cautious", OptimizerPlan::Muon(muon(cautious))),
        (
            "muon-ramp",
            OptimizerPlan::Muon(MuonPlan {
                momentum_warmup: ramp,
                ..muon(adamw)
            }),
        ),
        (
            "muon-polar-express",
            OptimizerPlan::Muon(MuonPlan {
                newton_schulz: NewtonSchulz::PolarExpress,
                ..muon(adamw)
            }),
        ),
        ("normuon", normuon(adamw)),
        ("normuon-cautious", normuon(cautious)),
        ("soap", OptimizerPlan::Soap(soap(adamw))),
        ("soap-cautious", OptimizerPlan::Soap(soap(cautious))),
        (
            "soap-short",
            OptimizerPlan::Soap(SoapPlan {
                max_precondition_dim: 5,
                ..soap(adamw)
            }),
        ),
    ]
}

/// Replaces our first bases by those of the reference. If the first gradient does not have full rank,
/// some directions of the bases are arbitrary, so the two may differ.
fn with_bases(optimizer: &mut Optimizer, net: &Net, expected: &File) {
    let mut state = optimizer.state(net);
    for (i, shape) in SHAPES.iter().enumerate() {
        for side in ["left_basis", "right_basis"] {
            let name = format!("layers.{i}.weight.{side}");
            let reference = expected.get(&format!("{shape}.{side}"));
            assert_eq!(reference.is_some(), state.tensors.contains_key(&name));
            if let Some(reference) = reference {
                state.tensors.insert(name, data(reference));
            }
        }
    }
    let fresh = optimizer.load_state(net, state, &Device::flex()).unwrap();
    assert!(fresh.is_empty());
}

#[test]
fn o1_every_rule_makes_the_weights_that_torch_makes() {
    let inputs = read("inputs");
    let device = Device::flex().autodiff();
    let mut worst = BTreeMap::new();
    for (rule, plan) in rules() {
        let expected = read(rule);
        let mut optimizer = Optimizer::new(&plan);
        let mut net = Net {
            layers: SHAPES
                .map(|shape| Block {
                    weight: Param::from_data(data(&inputs[&format!("{shape}.weight")]), &device),
                })
                .into(),
        };
        let mut compared = 0;
        for step in 0..STEPS {
            // The gradient of the sum of w g is g.
            let products = net.layers.iter().zip(SHAPES).map(|(block, shape)| {
                let all = &inputs[&format!("{shape}.gradients")];
                let all = Tensor::<3>::from_data(data(all), &device);
                let gradient = all.narrow(0, step, 1).squeeze_dim::<2>(0);
                (block.weight.val() * gradient).sum()
            });
            let loss = products.reduce(|a, b| a + b).unwrap();
            let gradient = Gradient::backward(&loss, &net);
            let learning_rate = 0.02 / (1.0 + 0.1 * step as f64);
            net = optimizer.step(net, gradient, learning_rate);
            if step == 0 && rule.starts_with("soap") {
                with_bases(&mut optimizer, &net, &expected);
            }
            for (block, shape) in net.layers.iter().zip(SHAPES) {
                let Some((dims, values)) = expected.get(&format!("{shape}.{step}")) else {
                    continue;
                };
                compared += 1;
                let found = block.weight.val().into_data();
                assert!(found.shape().iter().eq(dims), "{rule} {shape}");
                let differences = found.iter::<f32>().zip(values).map(|(a, b)| (a - b).abs());
                let largest = differences.fold(0.0, f32::max);
                let worst: &mut f32 = worst.entry(rule).or_default();
                *worst = worst.max(largest);
            }
        }
        assert_eq!(compared, 4 * SHAPES.len(), "{rule}");
    }
    println!("{worst:?}");
    // The weights are of size 1 and take steps of 0.02; the references are in f64.
    for (rule, worst) in worst {
        assert!(worst < 2e-5, "{rule}: {worst}");
    }
}
