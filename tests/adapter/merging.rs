//! Adapters folded into their base, and mixed.

use burn::module::Module;
use burn::tensor::TensorData;
use firebrick::adapter::{Adapter, AdapterError, Registry, merge};
use firebrick::config::{Architecture, LoraShape};
use firebrick::model::{DecoderSpec, parameters};

use super::{DORA, LORA, bases, floats, logits, plan, trainable, trained};
use crate::support::{batch, distance, tiny};

#[test]
fn a1_a2_a11_merged_is_adapted_and_the_base_comes_back() {
    for shape in [LORA, DORA] {
        for (name, base) in bases() {
            let (spec, batch) = (base.spec().clone(), batch(2, 8, 13));
            let model = base.clone().adapted(&plan(&spec, shape), 9).unwrap();
            let adapter = Adapter::of(&trained(model, &batch, 4));
            let mut registry = Registry::new(base.valid());
            registry.insert("one", adapter.clone()).unwrap();
            let (with, merged) = (
                registry.with("one").unwrap(),
                registry.merged("one").unwrap(),
            );
            assert!(!merged.is_adapted() && with.is_adapted());
            let rounds = spec
                .shape
                .ternary
                .is_some_and(|ternary| ternary.rounds_activations);
            let error = distance(&logits(&with, &batch), &logits(&merged, &batch));
            // Merged weights are dense: what goes into them is not rounded to eight bits.
            let limit = if rounds { 1.0 } else { 1e-5 };
            assert!(error < limit, "{name} {shape:?}: {error}");
            assert!(merged.spec().shape.ternary.is_none(), "{name}");
            assert_eq!(
                parameters(registry.base()),
                parameters(&base.valid()),
                "{name}"
            );
            let (plain, without) = (logits(&base, &batch), with.without_adapters());
            assert_eq!(plain, logits(&without, &batch), "{name}");
        }
    }
}

#[test]
fn a11_a_weighted_mix_is_the_weighted_sum_of_updates() {
    let spec = tiny(Architecture::Llama);
    let base = trainable(&spec);
    let learn = |seed: u64, shape: LoraShape, layers: &str| {
        let mut plan = plan(&spec, shape);
        plan.layers.retain(|path, _| path.contains(layers));
        let batch = batch(2, 5 + seed as usize, 13);
        Adapter::of(&trained(
            base.clone().adapted(&plan, seed).unwrap(),
            &batch,
            3,
        ))
    };
    let wide = LoraShape {
        rank: 5,
        scale: 0.7,
        ..LORA
    };
    let mut registry = Registry::new(base.valid());
    registry.insert("a", learn(1, LORA, "")).unwrap();
    registry.insert("b", learn(2, wide, "self_attn")).unwrap();
    let mixed = registry.mixed(&[("a", 0.25), ("b", -1.5)]).unwrap();

    let weights = parameters(&base.valid());
    let [a, b] = ["a", "b"].map(|name| parameters(&registry.merged(name).unwrap()));
    let found = parameters(&mixed.merged());
    for (path, weight) in &weights {
        let parts = [weight, &a[path], &b[path]].map(floats);
        let sum: Vec<f32> = (0..parts[0].len())
            .map(|i| {
                let [w, a, b] = [&parts[0][i], &parts[1][i], &parts[2][i]];
                w + 0.25 * (a - w) - 1.5 * (b - w)
            })
            .collect();
        let error = distance(&sum, &floats(&found[path]));
        assert!(error < 1e-5, "{path}: {error}");
    }

    assert!(matches!(registry.with("c"), Err(AdapterError::Name { .. })));
    assert!(matches!(
        registry.mixed(&[]),
        Err(AdapterError::NotMixable { .. })
    ));
    let again = registry.insert("a", Adapter::default());
    assert!(matches!(again, Err(AdapterError::Name { .. })));
    let lengths = learn(3, DORA, "");
    assert!(matches!(
        Adapter::mix(&[(&lengths, 1.0)]),
        Err(AdapterError::NotMixable { .. })
    ));
    registry.remove("a").unwrap();
    assert_eq!(registry.names().collect::<Vec<_>>(), ["b"]);
}

#[test]
fn a11_an_untrained_adapter_is_not_merged() {
    let spec = tiny(Architecture::Llama);
    let base = trainable(&spec);
    let adapter = Adapter::of(&base.clone().adapted(&plan(&spec, LORA), 1).unwrap());
    let refused = merge(&base.valid(), &adapter, &[1, 2, 3]);
    assert!(matches!(refused, Err(AdapterError::Untrained)));
}

#[test]
fn a11_adapters_without_a_sum_are_not_mixed() {
    let of = |spec: &DecoderSpec| {
        let model = trainable(spec).adapted(&plan(spec, LORA), 1).unwrap();
        Adapter::of(&model)
    };
    let adapter = of(&tiny(Architecture::Llama));
    let mut wide = tiny(Architecture::Llama);
    wide.shape.intermediate_size *= 2;
    let mut torn = adapter.clone();
    let update = torn.layers.values_mut().next().unwrap();
    update.b = TensorData::new(vec![0f32; 8], [1, 8]);
    let cases: [(&[(&Adapter, f64)], &str); 5] = [
        (&[(&adapter, f64::NAN)], "a weight of NaN"),
        (
            &[(&adapter, 1.0), (&adapter, f64::INFINITY)],
            "a weight of inf",
        ),
        (&[(&adapter, 1.0), (&of(&wide), 1.0)], "in another"),
        (&[(&torn, 1.0)], "has A"),
        (&[], "there is none"),
    ];
    for (parts, reason) in cases {
        match Adapter::mix(parts) {
            Err(AdapterError::NotMixable { reason: found }) => {
                assert!(found.contains(reason), "{found}");
            }
            other => panic!("{reason}: {other:?}"),
        }
    }
}
