//! `runner export`: packed ternary models.

use std::fs;

use super::bench::{Bench, json};

const TERNARY: [&str; 2] = ["--set", "quantization.weights=ternary"];

fn ternary(bench: &Bench, more: &[&str]) {
    bench.train(&[&TERNARY, more].concat());
}

fn export(bench: &Bench, code: i32, arguments: &[&str]) -> (String, String) {
    let common = ["export", "--model", "out", "--to", "packed"];
    bench.expect(code, &[&common, arguments].concat())
}

#[test]
fn t2_a_packed_model_says_what_the_run_says_in_fewer_bytes() {
    let bench = Bench::new();
    for (granularity, activation_bits) in [("tensor", 8), ("row", 0), ("16", 8)] {
        for name in ["out", "two", "less"] {
            let _ = fs::remove_dir_all(bench.path(name));
        }
        let granularity = format!("quantization.granularity={granularity}");
        let bits = format!("quantization.activation_bits={activation_bits}");
        ternary(&bench, &["--set", &granularity, "--set", &bits]);
        let (said, _) = export(&bench, 0, &["--out", "two"]);
        assert!(
            said.contains("(2.00 bits each, ternary-2bit-16x16)"),
            "{said}"
        );
        let (said, _) = export(&bench, 0, &["--out", "less", "--layout", "storage"]);
        assert!(said.contains("ternary-1.6bit)"), "{said}");
        let asked = |model: &str| {
            let prompt = [
                "--prompt",
                "the river",
                "--max-new-tokens",
                "24",
                "--temperature",
                "0",
            ];
            let (text, _) =
                bench.expect(0, &[&["generate", "--model", model][..], &prompt].concat());
            let data = ["--data", "text.txt", "--sequence-len", "16", "--json"];
            let (loss, _) = bench.expect(0, &[&["eval", "--model", model][..], &data].concat());
            let loss: serde_json::Value = serde_json::from_str(&loss).unwrap();
            (text, loss["val_loss"].as_f64().unwrap())
        };
        let latent = asked("out");
        for packed in ["two", "less"] {
            let found = asked(packed);
            assert_eq!(found.0, latent.0, "{granularity} {packed}");
            assert_eq!(found.1, latent.1, "{granularity} {packed}");
            let bytes = |run: &str| {
                fs::metadata(bench.path(run).join("model.safetensors"))
                    .unwrap()
                    .len()
            };
            assert!(bytes(packed) < bytes("out"));
            assert!(bench.path(packed).join("tokenizer.json").exists());
            let config = json(&bench.path(packed).join("config.json"));
            assert_eq!(config["quantization_config"]["quant_method"], "firebrick");
        }
    }
}

#[test]
fn t2_an_export_replaces_nothing_and_packs_ternary_weights_alone() {
    let bench = Bench::new();
    bench.train(&[]);
    let (_, said) = export(&bench, 2, &["--out", "packed"]);
    assert!(said.contains("not ternary"), "{said}");
    assert!(!bench.path("packed").exists());
    fs::remove_dir_all(bench.path("out")).unwrap();
    ternary(&bench, &[]);
    let before = fs::read(bench.path("out/model.safetensors")).unwrap();
    let (_, said) = export(&bench, 1, &["--out", "out"]);
    assert!(said.contains("not empty"), "{said}");
    assert_eq!(
        fs::read(bench.path("out/model.safetensors")).unwrap(),
        before
    );
}

#[test]
fn t2_packed_weights_are_not_trained_and_latent_ones_are() {
    let bench = Bench::new();
    ternary(&bench, &[]);
    export(&bench, 0, &["--out", "packed"]);
    let config = fs::read_to_string(bench.path("x.toml")).unwrap();
    let from = config.find("[model]").unwrap()..config.find("[data]").unwrap();
    for (base, code) in [("packed", 2), ("out", 0)] {
        let mut further = config.clone();
        further.replace_range(from.clone(), &format!("[model]\nbase_model = \"{base}\"\n"));
        fs::write(bench.path("further.toml"), further).unwrap();
        let arguments = [
            "train",
            "further.toml",
            "--quiet",
            "--output-dir",
            "further",
        ];
        let (_, said) = bench.expect(code, &arguments);
        assert_eq!(said.contains("packed weights"), code == 2, "{said}");
    }
    let resolved = fs::read_to_string(bench.path("further/resolved.toml")).unwrap();
    assert!(resolved.contains("weights = \"ternary\""), "{resolved}");
}

#[test]
fn t4_integer_products_train_to_the_same_loss() {
    let bench = Bench::new();
    ternary(&bench, &["--output-dir", "floats"]);
    ternary(
        &bench,
        &[
            "--output-dir",
            "integers",
            "--set",
            "quantization.int8_forward=true",
        ],
    );
    let losses = |run: &str| -> Vec<f64> {
        let rows = bench.metrics(run);
        rows.iter().filter_map(|row| row["loss"].as_f64()).collect()
    };
    let (floats, integers) = (losses("floats"), losses("integers"));
    assert_eq!(floats.len(), 6);
    for (a, b) in floats.iter().zip(&integers) {
        assert!((a - b).abs() < 1e-4, "{floats:?} {integers:?}");
    }
    // Other sums: the option reached the products.
    assert_ne!(
        bench.checkpoint("floats", 6),
        bench.checkpoint("integers", 6)
    );
}

#[test]
fn r10_a_ternary_run_goes_on_bit_for_bit() {
    let bench = Bench::new();
    ternary(&bench, &[]);
    let whole = bench.checkpoint("out", 6);
    ternary(&bench, &["--resume", "4"]);
    assert_eq!(bench.checkpoint("out", 6), whole);
}
