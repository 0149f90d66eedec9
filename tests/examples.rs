//! The examples do what they say.
#![allow(missing_docs)]

#[allow(dead_code)]
#[path = "../examples/custom_loop.rs"]
mod custom_loop;

#[test]
fn custom_loop_learns() {
    let (_, losses) = custom_loop::train(40, 20).unwrap();
    assert_eq!(losses.len(), 3);
    assert!(losses[2] < losses[0] - 1.0, "{losses:?}");
}

#[allow(dead_code)]
#[path = "../examples/custom_adapter.rs"]
mod custom_adapter;

#[test]
fn a11_custom_adapter_learns_mixes_and_merges() {
    let losses = custom_adapter::run(30).unwrap();
    let [base, river, read, merged, clock, mixed] = losses[..] else {
        panic!("{losses:?}");
    };
    assert!(river.1 < base.1 - 0.5, "{losses:?}");
    assert!(
        (river.1 - read.1).abs() < 1e-4 && (river.1 - merged.1).abs() < 1e-4,
        "{losses:?}"
    );
    assert!(river.1 < mixed.1 && mixed.1 < clock.1, "{losses:?}");
}

#[allow(dead_code)]
#[path = "../examples/custom_optimizer.rs"]
mod custom_optimizer;

#[test]
fn o1_custom_optimizer_learns_and_goes_on_to_the_same_bits() {
    let (losses, whole, resumed) = custom_optimizer::run(40).unwrap();
    assert!(losses[1] < losses[0] - 1.0, "{losses:?}");
    assert_eq!(whole.len(), resumed.len());
    for (path, values) in &whole {
        assert_eq!(values.as_bytes(), resumed[path].as_bytes(), "{path}");
    }
}

#[test]
fn o1_a_custom_rule_cannot_take_the_state_of_a_rule_of_ours() {
    use burn::tensor::Tensor;
    use firebrick::optimizer::{CustomRule, Optimizer, OptimizerError, TensorState};

    struct Impostor;

    impl CustomRule for Impostor {
        fn family(&self) -> &'static str {
            "lion"
        }

        fn state_tensors(&self, dims: &[usize]) -> Vec<(&'static str, Vec<usize>)> {
            vec![("momentum", dims.to_vec())]
        }

        fn update<const D: usize>(
            &self,
            _: f64,
            value: Tensor<D>,
            _: Tensor<D>,
            _: &mut TensorState,
        ) -> Tensor<D> {
            value
        }
    }
    let error = Optimizer::custom(Impostor, Impostor).unwrap_err();
    assert!(
        matches!(error, OptimizerError::Family { family: "lion" }),
        "{error}"
    );
}

#[allow(dead_code)]
#[path = "../examples/custom_phase.rs"]
mod custom_phase;

#[test]
fn p1_custom_phase_trains_a_block_more_in_each_phase() {
    let folder = tempfile::tempdir().unwrap();
    let (plan, outcome) = custom_phase::run(folder.path(), 320).unwrap();
    assert_eq!(plan.phases.len(), 4);
    assert_eq!(plan.phases[3].name, "from-block-0");
    assert!(plan.phases[3].freeze.is_empty());
    assert_eq!(outcome.progress.phase, 3);
    // Bytes at random have ln 257 = 5.5 nats.
    assert!(outcome.evaluation.unwrap().val_loss < 3.0);
}

#[allow(dead_code)]
#[path = "../examples/vsa.rs"]
mod vsa;

#[test]
fn t8_records_answer_and_sentences_are_told_apart() {
    let answers: Vec<&str> = vsa::analogies()
        .iter()
        .map(|(_, answer, _)| *answer)
        .collect();
    assert_eq!(answers, ["Mexico City", "dollar", "peso", "Washington"]);
    let languages: Vec<&str> = vsa::languages().iter().map(|(_, name, _)| *name).collect();
    assert_eq!(languages, ["English", "German", "Spanish"]);
}

#[allow(dead_code)]
#[path = "../examples/custom_compressor.rs"]
mod custom_compressor;

#[test]
fn g1_a_custom_compressor_trains_four_ranks_alike_on_a_sixteenth_of_the_bytes() {
    let ranks = custom_compressor::run(60).unwrap();
    assert_eq!(ranks.len(), 4);
    for (weights, reports) in &ranks {
        assert_eq!(*weights, ranks[0].0, "the same bits on every rank");
        assert!(reports[59].loss < reports[0].loss - 0.5);
        let exchange = reports[59].exchange.unwrap();
        assert!(exchange.gradient_bytes > 12 * exchange.sent_bytes);
        assert_eq!(exchange.received_bytes, 3 * exchange.sent_bytes);
    }
}
