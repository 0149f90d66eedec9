//! Behaviours between backward and update, named by the rows of the design they hold up.
#![allow(missing_docs)]

mod support;

use burn::tensor::Device;
use firebrick::config::{
    AdamWPlan, Architecture, LionPlan, MuonPlan, OptimizerPlan, PathSelector, SoapPlan, VelvetPlan,
};
use firebrick::data::Batch;
use firebrick::gradient::{Gradient, ParameterOrder};
use firebrick::model::{Decoder, parameters};
use firebrick::objective::{CrossEntropy, Precision, backward, backward_with};
use firebrick::optimizer::Optimizer;
use support::{batch, distance, tiny};

const ARCHITECTURES: [Architecture; 2] = [Architecture::Llama, Architecture::Gpt2];

fn trainable(architecture: Architecture) -> Decoder {
    Decoder::new(&tiny(architecture), 5, &Device::flex().autodiff()).unwrap()
}

/// All elements, in parameter order.
fn elements(gradient: &Gradient, model: &Decoder) -> Vec<f32> {
    let tensors = gradient.to_tensors();
    // Every parameter has a gradient, and in the order of the model's modules.
    let order = ParameterOrder::of(model);
    let paths: Vec<&str> = gradient.paths().collect();
    let all: Vec<&str> = order.parameters().iter().map(|p| p.path.as_str()).collect();
    assert_eq!(paths, all);
    paths
        .iter()
        .flat_map(|path| tensors[*path].iter::<f32>().collect::<Vec<_>>())
        .collect()
}

/// Sixteen sequences of which each trains a different number of tokens, some none.
fn ragged() -> Batch {
    let mut batch = batch(16, 8, 13);
    for (row, weights) in batch.weights.chunks_mut(8).enumerate() {
        weights[row % 9..].fill(0.0);
    }
    batch
}

#[test]
fn p1_frozen_parameters_have_no_gradient_and_checkpointing_gives_the_same() {
    let frozen: [&[&str]; 6] = [
        &["embed_tokens"],
        &["embed_tokens", "layers.0"],
        &["embed_tokens", "layers"],
        &["layers.1"],
        &["layers"],
        &["embed_tokens", "embed_positions", "layers.0-1", "norm"],
    ];
    for architecture in ARCHITECTURES {
        for tied in [false, true] {
            for selectors in frozen {
                // Only the GPT-2 form has learned positions, and something has to be trained.
                let has_positions = architecture == Architecture::Gpt2;
                if selectors.contains(&"embed_positions") && (!has_positions || tied) {
                    continue;
                }
                let mut spec = tiny(architecture);
                spec.shape.tie_word_embeddings = tied;
                let model = Decoder::new(&spec, 5, &Device::flex().autodiff()).unwrap();
                let parsed: Vec<PathSelector> =
                    selectors.iter().map(|text| text.parse().unwrap()).collect();
                let model = model.with_frozen(&parsed).unwrap();
                let of = |gradient_checkpointing| {
                    let precision = Precision {
                        gradient_checkpointing,
                        ..Precision::default()
                    };
                    backward_with(&model, &[ragged()], &CrossEntropy, precision).unwrap()
                };
                let (whole, by_block) = (of(false), of(true));
                let name = format!("{architecture:?}, tied {tied}, frozen {selectors:?}");
                assert!((whole.loss() - by_block.loss()).abs() < 1e-5, "{name}");
                let order = ParameterOrder::of(&model);
                let is_frozen = |path: &&str| parsed.iter().any(|frozen| frozen.matches(path));
                let all = order.parameters().iter().map(|p| p.path.as_str());
                let trained: Vec<&str> = all.filter(|path| !is_frozen(path)).collect();
                let [whole, by_block] = [whole, by_block].map(|backward| backward.gradient);
                assert_eq!(whole.paths().collect::<Vec<_>>(), trained, "{name}");
                assert_eq!(by_block.paths().collect::<Vec<_>>(), trained, "{name}");
                let [whole, by_block] = [whole, by_block].map(|gradient| gradient.to_tensors());
                for (path, data) in &whole {
                    let [a, b] =
                        [data, &by_block[path]].map(|data| data.iter::<f32>().collect::<Vec<_>>());
                    assert!(distance(&a, &b) < 1e-5, "{name}, {path}");
                }
            }
        }
    }
}

#[test]
fn r6_one_micro_batch_of_16_equals_16_of_one_on_ragged_data() {
    for architecture in ARCHITECTURES {
        let model = trainable(architecture);
        let whole = ragged();
        let singles: Vec<Batch> = (0..16).map(|row| whole.rows(row..row + 1)).collect();
        let uneven = [whole.rows(0..3), whole.rows(3..4), whole.rows(4..16)];
        let one = backward(&model, &[whole]).unwrap();
        let reference = elements(&one.gradient, &model);
        for batches in [&singles[..], &uneven] {
            let many = backward(&model, batches).unwrap();
            assert_eq!(one.weight, many.weight);
            assert!((one.loss() - many.loss()).abs() < 1e-5);
            assert!(distance(&reference, &elements(&many.gradient, &model)) < 1e-5);
        }
    }
}

#[test]
fn r6_the_loss_is_the_mean_over_trained_tokens() {
    let model = trainable(Architecture::Llama);
    let whole = ragged();
    let result = backward(&model, std::slice::from_ref(&whole)).unwrap();
    // Sixteen rows training row % 9 tokens each.
    assert_eq!(
        result.weight,
        f64::from((0..9).sum::<i32>() + (0..7).sum::<i32>())
    );
    let mut nats = 0.0;
    for row in 0..16 {
        for col in 0..row % 9 {
            let mut alone = whole.rows(row..row + 1);
            alone.weights.fill(0.0);
            alone.weights[col] = 1.0;
            nats += backward(&model, &[alone]).unwrap().sums.loss;
        }
    }
    assert!((result.loss() - nats / result.weight).abs() < 1e-5);
}

#[test]
fn gradients_do_not_depend_on_how_many_cores_share_a_batch() {
    let model = trainable(Architecture::Llama);
    let with_threads = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| elements(&backward(&model, &[ragged()]).unwrap().gradient, &model))
    };
    let one = with_threads(1);
    assert!(distance(&one, &with_threads(5)) < 1e-5);
    // Bit for bit where the number is the same.
    assert_eq!(with_threads(3), with_threads(3));
}

#[test]
fn r7_the_norm_and_the_clip_are_over_all_parameters_at_once() {
    for architecture in ARCHITECTURES {
        let model = trainable(architecture);
        let gradient = || backward(&model, &[batch(4, 8, 13)]).unwrap().gradient;
        let before = elements(&gradient(), &model);
        let norm = gradient().norm();
        let expected = before
            .iter()
            .map(|&g| f64::from(g).powi(2))
            .sum::<f64>()
            .sqrt();
        assert!(
            (norm - expected).abs() < 1e-5 * expected,
            "{norm} {expected}"
        );

        let clipped = gradient().clip(norm, norm / 4.0);
        assert!((clipped.norm() - norm / 4.0).abs() < 1e-5 * norm);
        // Every element by the same factor: the direction is kept.
        let quarter: Vec<f32> = before.iter().map(|g| g / 4.0).collect();
        assert!(distance(&elements(&clipped, &model), &quarter) < 1e-6);

        let untouched = gradient().clip(norm, 2.0 * norm);
        assert_eq!(elements(&untouched, &model), before);
        let off = gradient().clip(norm, 0.0);
        assert_eq!(elements(&off, &model), before);
    }
}

#[test]
fn r7_a_single_bad_number_anywhere_makes_the_norm_not_finite() {
    let model = trainable(Architecture::Gpt2);
    for bad in [f64::NAN, f64::INFINITY] {
        let mut poisoned = batch(2, 4, 13);
        poisoned.weights[5] = bad as f32;
        let result = backward(&model, &[poisoned]).unwrap();
        assert!(!result.gradient.norm().is_finite());
        assert!(!result.loss().is_finite());
    }
}

fn plans() -> Vec<OptimizerPlan> {
    let (betas, eps, weight_decay) = ([0.9, 0.95], 1e-8, 0.1);
    let adamw = AdamWPlan::new(betas, eps, weight_decay);
    let muon = MuonPlan::new(0.95, adamw);
    vec![
        OptimizerPlan::AdamW(AdamWPlan::new(betas, eps, weight_decay)),
        OptimizerPlan::Adam {
            betas,
            eps,
            weight_decay,
        },
        OptimizerPlan::Sgd {
            momentum: 0.9,
            nesterov: true,
            weight_decay,
        },
        OptimizerPlan::Sgd {
            momentum: 0.0,
            nesterov: false,
            weight_decay,
        },
        OptimizerPlan::Lion(LionPlan::new(betas, weight_decay)),
        OptimizerPlan::Adafactor { weight_decay },
        OptimizerPlan::Muon(muon),
        OptimizerPlan::NorMuon {
            neuron_beta: 0.95,
            muon,
        },
        OptimizerPlan::Soap(SoapPlan::new(adamw)),
        OptimizerPlan::Velvet {
            velvet: VelvetPlan::default(),
            adamw,
        },
    ]
}

fn learning_rate(plan: &OptimizerPlan) -> f64 {
    match plan {
        OptimizerPlan::Sgd { momentum, .. } if *momentum > 0.0 => 0.05,
        OptimizerPlan::Sgd { .. } => 0.3,
        OptimizerPlan::Lion { .. } => 1e-3,
        _ => 1e-2,
    }
}

#[test]
fn o1_every_optimizer_lowers_the_loss() {
    for plan in plans() {
        let mut model = trainable(Architecture::Llama);
        let mut optimizer = Optimizer::new(&plan);
        let mut losses = Vec::new();
        for _ in 0..20 {
            let result = backward(&model, &[batch(4, 8, 13)]).unwrap();
            losses.push(result.loss());
            model = optimizer.step(model, result.gradient, learning_rate(&plan));
        }
        assert!(losses[19] < 0.8 * losses[0], "{plan:?}: {losses:?}");
    }
}

#[test]
fn o1_a_restored_optimizer_takes_the_same_next_step() {
    let device = Device::flex();
    for plan in plans() {
        let mut model = trainable(Architecture::Gpt2);
        let mut optimizer = Optimizer::new(&plan);
        for _ in 0..3 {
            let gradient = backward(&model, &[batch(4, 8, 13)]).unwrap().gradient;
            model = optimizer.step(model, gradient, learning_rate(&plan));
        }
        let tensors = optimizer.state(&model).tensors;
        let bytes: usize = tensors.values().map(|data| data.as_bytes().len()).sum();
        // Known before the first update, which is what a new optimizer stands before.
        assert_eq!(
            Optimizer::new(&plan).state_bytes(&model),
            bytes as u64,
            "{plan:?}"
        );
        let mut restored = Optimizer::new(&plan);
        restored
            .load_state(&model, optimizer.state(&model), &device)
            .unwrap();
        let next = |optimizer: &mut Optimizer| {
            let gradient = backward(&model, &[batch(4, 8, 13)]).unwrap().gradient;
            parameters(&optimizer.step(model.clone(), gradient, 1e-2))
        };
        assert_eq!(next(&mut optimizer), next(&mut restored), "{plan:?}");
    }
}

#[test]
fn a_state_that_does_not_fit_is_an_error() {
    let plan = OptimizerPlan::AdamW(AdamWPlan::new([0.9, 0.95], 1e-8, 0.1));
    let mut model = trainable(Architecture::Llama);
    let mut optimizer = Optimizer::new(&plan);
    let gradient = backward(&model, &[batch(4, 8, 13)]).unwrap().gradient;
    model = optimizer.step(model, gradient, 1e-2);
    let device = Device::flex();
    let load = |change: &dyn Fn(&mut firebrick::optimizer::OptimizerState)| {
        let mut state = optimizer.state(&model);
        change(&mut state);
        Optimizer::new(&plan)
            .load_state(&model, state, &device)
            .map_err(|e| e.to_string())
    };
    assert_eq!(load(&|_| {}), Ok(Vec::new()));
    let name = "norm.weight.momentum.moment_1".to_string();
    let missing = load(&|state| drop(state.tensors.remove(&name)));
    assert!(missing.unwrap_err().contains("norm.weight"));
    let reshaped = load(&|state| {
        let data = burn::tensor::TensorData::new(vec![0.0f32; 3], [3]);
        state.tensors.insert(name.clone(), data);
    });
    assert!(reshaped.unwrap_err().contains("norm.weight"));
    let foreign = load(&|state| {
        let data = burn::tensor::TensorData::new(vec![0.0f32; 3], [3]);
        state.tensors.insert("elsewhere.moment_1".to_string(), data);
    });
    assert!(foreign.unwrap_err().contains("elsewhere"));
}

#[test]
fn weight_decay_shrinks_matrices_and_spares_norms() {
    let plan = OptimizerPlan::AdamW(AdamWPlan::new([0.9, 0.95], 1e-8, 0.5));
    let without = OptimizerPlan::AdamW(AdamWPlan::new([0.9, 0.95], 1e-8, 0.0));
    let model = trainable(Architecture::Llama);
    let stepped = |plan: &OptimizerPlan| {
        let gradient = backward(&model, &[batch(4, 8, 13)]).unwrap().gradient;
        parameters(&Optimizer::new(plan).step(model.clone(), gradient, 0.1))
    };
    let (before, decayed, plain) = (parameters(&model), stepped(&plan), stepped(&without));
    for (path, data) in &before {
        let values =
            |tensors: &firebrick::model::Tensors| tensors[path].iter::<f32>().collect::<Vec<_>>();
        let old: Vec<f32> = data.iter::<f32>().collect();
        let (decayed, plain) = (values(&decayed), values(&plain));
        // Decoupled: lr x decay x weight on top of the plain step, for matrices alone.
        let share = if data.shape().num_dims() == 2 {
            0.05
        } else {
            0.0
        };
        let expected: Vec<f32> = plain.iter().zip(&old).map(|(p, o)| p - share * o).collect();
        assert!(distance(&decayed, &expected) < 1e-6, "{path}");
    }
}
