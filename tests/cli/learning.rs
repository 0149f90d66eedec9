//! The configs learn what they are said to learn. Minutes each: run by CI, not by default.

use std::path::{Path, PathBuf};

use super::bench::{Bench, json};

fn final_record(bench: &Bench, config: &str, out: &str, sets: &[&str]) -> serde_json::Value {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = root.join("configs").join(config);
    let folder = bench.path(out);
    let mut arguments = vec!["train", config.to_str().unwrap(), "--quiet"];
    arguments.extend(["--output-dir", folder.to_str().unwrap()]);
    arguments.extend(sets.iter().flat_map(|set| ["--set", set]));
    // The quickstart trains on the repository it lies in.
    let output = bench
        .command(&arguments)
        .current_dir(root)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    json(&folder.join("run.json"))
}

#[test]
#[ignore = "needs FIREBRICK_DATA"]
fn nanogpt_char_reaches_the_published_settings_loss() {
    let data = PathBuf::from(std::env::var_os("FIREBRICK_DATA").expect("FIREBRICK_DATA is set"));
    let text = data.join("text/tinyshakespeare.txt");
    let path = format!("data.datasets.0.path={}", text.display());
    let bench = Bench::new();
    let record = final_record(
        &bench,
        "nanogpt-char.toml",
        "nano",
        &[&path, "eval.eval_steps=0"],
    );
    let val_loss = record["final"]["val_loss"].as_f64().unwrap();
    // PyTorch's mean is 1.909 to 1.917 (docs/performance.md); single seeds differ by up to 0.01.
    assert!((val_loss - 1.909).abs() < 0.025, "{val_loss}");
}

#[test]
#[ignore = "takes minutes"]
fn half_a_quickstart_is_well_below_a_bigram_model() {
    let bench = Bench::new();
    let record = final_record(&bench, "quickstart.toml", "quick", &["train.max_steps=300"]);
    let val_loss = record["final"]["best_val_loss"].as_f64().unwrap();
    let bigram = record["bigram_loss"].as_f64().unwrap();
    // The text is this repository's and changes with it; the gap was 0.297 and 0.306 on 2026-11-30.
    // A model that learns no more than which token follows which has none.
    assert!(val_loss < bigram - 0.2, "{val_loss} {bigram}");
}
