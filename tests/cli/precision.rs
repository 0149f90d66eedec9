//! R9 and devices, through the runner.

use serde_json::Value;

use super::bench::{Bench, json};

fn losses(bench: &Bench, run: &str) -> Vec<f64> {
    let rows = bench.metrics(run);
    rows.iter()
        .map(|row| row["loss"].as_f64().unwrap())
        .collect()
}

#[test]
fn r9_half_precision_and_checkpointing_train_like_f32() {
    let bench = Bench::new();
    bench.train(&["--output-dir", "f32"]);
    let full = losses(&bench, "f32");
    for (run, sets, tolerance) in [
        ("recomputed", "train.gradient_checkpointing=true", 1e-5),
        ("bf16", "model.dtype=bf16", 0.02),
        ("f16", "model.dtype=f16", 0.005),
    ] {
        bench.train(&["--output-dir", run, "--set", sets]);
        for (full, found) in full.iter().zip(losses(&bench, run)) {
            assert!(
                (full - found).abs() < tolerance,
                "{run}: {full} and {found}"
            );
        }
    }
    assert_ne!(losses(&bench, "bf16"), full);
}

#[test]
fn r9_r10_the_loss_scale_is_found_announced_and_resumed() {
    let bench = Bench::new();
    // Weights this large make gradients that overflow under the first scale.
    let sets = [
        "--set",
        "model.dtype=f16",
        "--set",
        "model.initializer_range=1.0",
        "--set",
        "train.max_steps=12",
        "--set",
        "eval.eval_steps=0",
    ];
    let (_, stderr) = bench.expect(
        0,
        &[&["train", "x.toml", "--output-dir", "whole"], &sets[..]].concat(),
    );
    assert!(
        stderr.contains("overflowed f16; loss scale lowered to 32768"),
        "{stderr}"
    );
    let state = |run: &str, step: u64| -> Value {
        json(
            &bench
                .path(run)
                .join(format!("checkpoints/step-{step:06}/state.json")),
        )["progress"]
            .clone()
    };
    let scale = &state("whole", 12)["loss_scale"];
    assert!(scale["scale"].as_f64().unwrap() < 65536.0, "{scale}");

    bench.train(&[&["--output-dir", "cut"], &sets[..]].concat());
    for step in [10, 12] {
        std::fs::remove_dir_all(bench.path(&format!("cut/checkpoints/step-{step:06}"))).unwrap();
    }
    bench.train(&[&["--output-dir", "cut"], &sets[..]].concat());
    assert_eq!(bench.checkpoint("cut", 12), bench.checkpoint("whole", 12));
    assert_eq!(bench.metrics("cut"), bench.metrics("whole"));
}

#[test]
fn the_device_is_announced_and_recorded() {
    let bench = Bench::new();
    let (_, stderr) = bench.expect(0, &["train", "x.toml", "--set", "device.backend=cpu"]);
    assert!(stderr.contains("device cpu: "), "{stderr}");
    assert!(stderr.contains("computing in f32"), "{stderr}");
    let resolved = std::fs::read_to_string(bench.path("out/resolved.toml")).unwrap();
    assert!(resolved.contains("dtype = \"f32\""), "{resolved}");
    assert!(resolved.contains("backend = \"cpu\""), "{resolved}");
    assert_eq!(
        json(&bench.path("out/run.json"))["device"]["backend"],
        "cpu"
    );
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_device_that_is_not_built_in_is_exit_2_and_says_how_to_build_it() {
    let bench = Bench::new();
    let (_, stderr) = bench.expect(2, &["train", "x.toml", "--set", "device.backend=cuda"]);
    assert!(stderr.contains("built without it"), "{stderr}");
    assert!(
        stderr.contains("cargo build --release --features cuda"),
        "{stderr}"
    );
    assert!(!bench.path("out").exists());
    bench.train(&[]);
    let (_, stderr) = bench.expect(
        2,
        &[
            "generate", "--model", "out", "--prompt", "a", "--device", "cuda",
        ],
    );
    assert!(stderr.contains("--features cuda"), "{stderr}");
}
