//! O3: runs of models with activations of our own, from the file to the verbs.

use std::fs;

use super::bench::{Bench, json};

#[test]
fn o3_a_run_with_era_tells_its_floor_and_is_loaded_by_every_verb() {
    let bench = Bench::new();
    let sets = [
        "--set",
        "model.output_activation={type=\"era\", min_entropy=1.5}",
        "--set",
        "model.hidden_act=gelu_era",
    ];
    let (_, stderr) = bench.train(&sets);
    let floor = "the loss cannot fall below 0.";
    assert!(stderr.contains(floor), "{stderr}");
    let only = "only Firebrick can load a model with output_activation";
    assert!(stderr.contains(only), "{stderr}");
    let run = bench.path("out");
    let config = json(&run.join("config.json"));
    assert_eq!(config["model_type"], "era_llama");
    assert_eq!(config["hidden_act"], "gelu_era");
    let card = fs::read_to_string(run.join("README.md")).unwrap();
    assert!(card.contains("library_name: firebrick"), "{card}");

    let said = bench.expect(
        0,
        &[
            "generate",
            "--model",
            "out",
            "--prompt",
            "the ",
            "--max-new-tokens",
            "4",
        ],
    );
    assert!(!said.0.is_empty());
    let measured = bench
        .expect(
            0,
            &["eval", "--model", "out", "--data", "text.txt", "--json"],
        )
        .0;
    let measured: serde_json::Value = serde_json::from_str(&measured).unwrap();
    assert!(measured["val_loss"].as_f64().unwrap() > 0.597, "{measured}");

    // The same command goes on, and another bound is another run.
    bench.train(&[&sets[..], &["--set", "train.max_steps=8"]].concat());
    let other = "model.output_activation.min_entropy=1.0";
    let again = [&["train", "x.toml"][..], &sets, &["--set", other]].concat();
    let (_, stderr) = bench.expect(2, &again);
    assert!(stderr.contains("output_activation"), "{stderr}");
}

#[test]
fn o3_a_bound_that_the_vocabulary_cannot_have_is_refused() {
    let bench = Bench::new();
    let set = "model.output_activation={type=\"era\", min_entropy=20.0}";
    let (_, stderr) = bench.expect(2, &["train", "x.toml", "--set", set]);
    assert!(
        stderr.contains("min_entropy = 20 is not between -0.060 and"),
        "{stderr}"
    );
    assert!(!bench.path("out").exists());
}
