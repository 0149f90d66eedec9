//! Arbitrary and mutated files: whatever is in them, a model or an error, in bounded memory.

use firebrick::config::Architecture;
use proptest::prelude::*;
use serde_json::Value;

use super::Model;

fn family() -> impl Strategy<Value = Architecture> {
    prop::sample::select(Architecture::ALL.to_vec())
}

/// What can happen to a file.
#[derive(Debug, Clone)]
enum Damage {
    Set(prop::sample::Index, u8),
    Flip(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, byte)| Damage::Set(at, byte)),
        (at(), 0..8u8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        at().prop_map(Damage::Cut),
        (at(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, b)| Damage::Insert(at, b)),
        (at(), 1..9usize).prop_map(|(at, count)| Damage::Remove(at, count)),
    ]
}

/// `reach`: damage is done to the first bytes only, where a header is.
fn damaged(mut bytes: Vec<u8>, all: &[Damage], reach: usize) -> Vec<u8> {
    for one in all {
        let end = bytes.len().min(reach);
        if end == 0 {
            break;
        }
        match one {
            Damage::Set(at, byte) => bytes[at.index(end)] = *byte,
            Damage::Flip(at, bit) => bytes[at.index(end)] ^= 1 << bit,
            Damage::Cut(at) => bytes.truncate(at.index(end)),
            Damage::Insert(at, more) => {
                let at = at.index(end);
                bytes.splice(at..at, more.iter().copied());
            }
            Damage::Remove(at, count) => {
                let at = at.index(end);
                bytes.drain(at..(at + count).min(bytes.len()));
            }
        }
    }
    bytes
}

/// Any JSON, small.
fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0..70u64).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z_]{0,12}".prop_map(Value::from),
        prop::sample::select(vec![
            "llama",
            "default",
            "linear",
            "llama3",
            "full_attention"
        ])
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        let names = prop::sample::select(vec!["rope_type", "type", "factor", "rope_theta", "x"]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((names, inner), 0..4).prop_map(|fields| {
                let fields = fields.into_iter().map(|(name, v)| (name.to_string(), v));
                Value::Object(fields.collect())
            }),
        ]
    })
}

proptest! {
    #[test]
    fn any_bytes_as_weights(bytes in prop::collection::vec(any::<u8>(), 0..600), headed in any::<bool>()) {
        let model = Model::new(Architecture::Llama);
        let mut file = Vec::new();
        if headed {
            let header = bytes.len() / 2;
            file.extend((header as u64).to_le_bytes());
        }
        file.extend(&bytes);
        model.write("model.safetensors", file);
        prop_assert!(model.load("any bytes").is_err());
    }

    #[test]
    fn damaged_weights(family in family(), all in prop::collection::vec(damage(), 1..4), reach in prop::sample::select(vec![8, 64, 3000, usize::MAX])) {
        let model = Model::new(family);
        model.write("model.safetensors", damaged(model.read("model.safetensors"), &all, reach));
        // Other values are another model; other structure is an error.
        let _ = model.load("damaged weights");
    }

    #[test]
    fn damaged_index(all in prop::collection::vec(damage(), 1..4)) {
        let model = Model::sharded(Architecture::Phi3, 8_000);
        let name = "model.safetensors.index.json";
        model.write(name, damaged(model.read(name), &all, usize::MAX));
        let _ = model.load("damaged index");
    }

    #[test]
    fn any_bytes_as_config(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let model = Model::new(Architecture::Llama);
        model.write("config.json", bytes);
        prop_assert!(model.load("any bytes").is_err());
    }

    #[test]
    fn damaged_config(family in family(), all in prop::collection::vec(damage(), 1..4)) {
        let model = Model::new(family);
        model.write("config.json", damaged(model.read("config.json"), &all, usize::MAX));
        let _ = model.load("damaged config");
    }

    #[test]
    fn config_with_other_values(family in family(), at in any::<prop::sample::Index>(), second in any::<prop::sample::Index>(), value in json(), other in json()) {
        let model = Model::new(family);
        let mut config: Value = serde_json::from_slice(&model.read("config.json")).unwrap();
        let fields: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        config[&fields[at.index(fields.len())]] = value;
        config[&fields[second.index(fields.len())]] = other;
        model.write("config.json", config.to_string());
        let _ = model.load("other values");
    }
}
