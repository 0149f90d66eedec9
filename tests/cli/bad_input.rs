//! What is wrong is said, nothing is lost.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use super::bench::{Bench, json};

#[test]
fn generate_refuses_what_it_cannot_do() {
    let bench = Bench::new();
    bench.train(&["--set", "model.architecture=gpt2"]);
    let (_, stderr) = bench.expect(1, &["generate", "--model", "nowhere", "--prompt", "a"]);
    assert!(stderr.contains("not a model folder"), "{stderr}");
    let (_, stderr) = bench.expect(
        2,
        &[
            "generate",
            "--model",
            "out",
            "--prompt",
            &"a".repeat(17),
            "--max-new-tokens",
            "1",
        ],
    );
    assert!(
        stderr.contains("17 tokens do not fit a model with 16 positions"),
        "{stderr}"
    );
    bench.expect(
        2,
        &[
            "generate",
            "--model",
            "out",
            "--prompt",
            "a",
            "--temperature",
            "-1",
        ],
    );
    bench.expect(
        2,
        &[
            "generate", "--model", "out", "--prompt", "a", "--top-p", "2",
        ],
    );
    // Sixteen positions, one in the prompt: the rest is written, then the model is full.
    let (text, _) = bench.expect(
        0,
        &[
            "generate",
            "--model",
            "out",
            "--prompt",
            "a",
            "--max-new-tokens",
            "18446744073709551615",
            "--json",
        ],
    );
    let completion: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(completion["finish"], "context_full");
    assert_eq!(completion["tokens"].as_array().unwrap().len(), 16);
}

#[test]
fn r7_a_run_that_diverges_says_so_and_keeps_the_evidence() {
    let bench = Bench::new();
    let wild = [
        "train",
        "x.toml",
        "-q",
        "--set",
        "optimizer.learning_rate=1e38",
        "--set",
        "train.max_grad_norm=0",
    ];
    let wild = [
        &wild[..],
        &["--set", "optimizer.name=sgd", "--set", "train.max_steps=50"],
    ]
    .concat();
    let (_, stderr) = bench.expect(5, &wild);
    assert!(
        stderr.contains("error[diverged]") && stderr.contains("3 times in a row"),
        "{stderr}"
    );
    assert!(stderr.contains("optimizer.learning_rate"), "{stderr}");
    let dumps = fs::read_dir(bench.path("out/logs"))
        .unwrap()
        .filter_map(Result::ok);
    let dumps: Vec<PathBuf> = dumps
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "json"))
        .collect();
    assert_eq!(dumps.len(), 3);
    let dump = json(&dumps[0]);
    assert_eq!(dump["tokens"].as_array().unwrap().len(), 4 * 16);
    let stop = [
        &wild[..],
        &["--set", "train.on_nonfinite=stop", "--output-dir", "stop"],
    ]
    .concat();
    let (_, stderr) = bench.expect(5, &stop);
    assert!(stderr.contains("once"), "{stderr}");
}

#[test]
fn r1_a_bad_config_writes_nothing() {
    let bench = Bench::new();
    let (_, stderr) = bench.expect(2, &["train", "x.toml", "--set", "train.max_step=5"]);
    assert!(stderr.contains("did you mean `max_steps`?"), "{stderr}");
    bench.expect(2, &["train", "absent.toml"]);
    let (_, stderr) = bench.expect(2, &["train", "x.toml", "--set", "device.backend=cuda"]);
    assert!(stderr.contains("cuda"), "{stderr}");
    assert!(!bench.path("out").exists());
    bench.expect(2, &["train"]);
    bench.expect(2, &["trian", "x.toml"]);
    bench.expect(2, &["train", "x.toml", "--resume", "sometimes"]);
}

#[test]
fn r3_bad_data_is_exit_3_and_says_which_file() {
    let bench = Bench::new();
    let with = |name: &str, content: &[u8]| {
        fs::write(bench.path(name), content).unwrap();
        let path = format!("data.datasets.0.path={name}");
        bench.expect(3, &["train", "x.toml", "--set", &path]).1
    };
    assert!(with("empty.txt", b"").contains("empty.txt"));
    assert!(with("binary.txt", b"good\nbad \xff\xfe").contains("binary.txt"));
    assert!(with("short.txt", b"too short").contains("17"));
    assert!(with("broken.jsonl", b"{\"text\": \"a\"}\n{\"text\": ").contains("broken.jsonl:2"));
    assert!(with("wrong.jsonl", b"{\"content\": \"a\"}\n").contains("content"));
    let (_, stderr) = bench.expect(
        3,
        &["train", "x.toml", "--set", "data.datasets.0.path=no/*.txt"],
    );
    assert!(stderr.contains("no/*.txt"), "{stderr}");
    // Not even an empty folder.
    assert!(!bench.path("out").exists());
}

#[test]
fn a_live_run_holds_its_folder() {
    let bench = Bench::new();
    let _lock = firebrick::train::RunFolder::open(&bench.path("out")).unwrap();
    let (_, stderr) = bench.expect(1, &["train", "x.toml"]);
    assert!(stderr.contains("in use by another run"), "{stderr}");
}

#[test]
fn a_folder_that_cannot_be_written_is_exit_1() {
    let bench = Bench::new();
    // Not even root can create these.
    for folder in ["text.txt/out", "/proc/firebrick"] {
        let (_, stderr) = bench.expect(1, &["train", "x.toml", "--output-dir", folder]);
        assert!(
            stderr.contains("error[io]") && stderr.contains(folder),
            "{stderr}"
        );
    }
}

#[test]
#[cfg(unix)]
fn a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint() {
    let bench = Bench::new();
    bench.train(&["--set", "train.max_steps=2"]);
    let good = bench.checkpoint("out", 2);
    // The largest file a shell lets its children write stands in for the disk: 8 KiB, less than a
    // checkpoint, and less than a report. The signal that comes with it is ignored, as the error code
    // is what is tested.
    let limited = format!(
        "trap '' XFSZ; ulimit -f 16; exec '{}' train x.toml --quiet --set 'logging.report_to=[\"jsonl\"]'",
        env!("CARGO_BIN_EXE_runner")
    );
    let output = Command::new("sh")
        .args(["-c", &limited])
        .current_dir(bench.folder.path())
        .env("FIREBRICK_CACHE", bench.path("cache"))
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("delta.safetensors"), "{stderr}");
    assert_eq!(bench.checkpoint("out", 2), good);
    let names = fs::read_dir(bench.path("out/checkpoints")).unwrap();
    let names: Vec<String> = names
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.starts_with("step-") || n.starts_with('.'))
        .collect();
    assert_eq!(names, ["step-000002"]);
    bench.train(&[]);
    assert_eq!(bench.metrics("out").len(), 6);
}

#[test]
fn a_damaged_checkpoint_is_refused_by_name() {
    for (format, file) in [
        ("full", "model.safetensors"),
        ("delta", "delta.safetensors"),
    ] {
        let bench = Bench::new();
        let format = format!("checkpoint.format={format}");
        bench.train(&["--set", "train.max_steps=4", "--set", &format]);
        let file = bench.path(&format!("out/checkpoints/step-000004/{file}"));
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
        fs::write(&file, bytes).unwrap();
        let (_, stderr) = bench.expect(1, &["train", "x.toml"]);
        assert!(
            stderr.contains("step-000004") && stderr.contains("damaged"),
            "{stderr}"
        );
        assert!(stderr.contains("--resume STEP"), "{stderr}");
        bench.train(&["--resume", "2"]);
    }
}

#[test]
fn a_sample_prompt_the_tokenizer_cannot_read_is_found_before_the_first_step() {
    let bench = Bench::new();
    let chars = ["train", "x.toml", "--set", "tokenizer.type=char"];
    let prompt = ["--set", "eval.sample_prompts=[\"ROMEO\"]"];
    let (_, stderr) = bench.expect(2, &[&chars[..], &prompt].concat());
    assert!(stderr.contains('R'), "{stderr}");
    let empty = ["--set", "eval.sample_prompts=[\"\"]"];
    bench.expect(2, &[&chars[..], &empty].concat());
    assert!(!bench.path("out").exists());
}

#[test]
fn a_folder_that_is_not_a_run_is_left_alone() {
    let bench = Bench::new();
    fs::write(bench.path("README.md"), "mine").unwrap();
    let (_, stderr) = bench.expect(2, &["train", "x.toml", "--output-dir", "."]);
    assert!(stderr.contains("holds no run"), "{stderr}");
    assert_eq!(fs::read_to_string(bench.path("README.md")).unwrap(), "mine");
    for name in ["resolved.toml", "logs", ".lock"] {
        assert!(!bench.path(name).exists(), "{name}");
    }
}

#[test]
fn r8_a_warmup_longer_than_the_run_is_found_once_the_data_is_counted() {
    let bench = Bench::new();
    let short = ["train", "x.toml", "--set", "lr_scheduler.warmup_steps=1000"];
    let epochs = fs::read_to_string(bench.path("x.toml")).unwrap();
    let epochs = epochs.replace("max_steps = 6", "num_epochs = 1");
    fs::write(bench.path("x.toml"), epochs).unwrap();
    let (_, stderr) = bench.expect(2, &short);
    assert!(
        stderr.contains("a warm-up of 1000 steps in a run of 27"),
        "{stderr}"
    );
    assert!(!bench.path("out").exists());
}

#[test]
fn absurd_sizes_are_refused() {
    let bench = Bench::new();
    let batch = "train.micro_batch_size=1000000";
    let passes = "train.gradient_accumulation_steps=1000000";
    let huge = [
        "train",
        "x.toml",
        "--dry-run",
        "--set",
        batch,
        "--set",
        passes,
    ];
    let (_, stderr) = bench.expect(2, &huge);
    assert!(stderr.contains("tokens in one optimizer step"), "{stderr}");
}

#[test]
#[cfg(unix)]
fn a_run_outlives_its_audience() {
    let bench = Bench::new();
    for (name, redirect) in [
        ("full", "2>/dev/full >/dev/null"),
        ("closed", "2>&1 | true"),
    ] {
        let line = format!(
            "'{}' train x.toml --output-dir {name} {redirect}",
            env!("CARGO_BIN_EXE_runner")
        );
        let mut shell = Command::new("sh");
        shell.args(["-c", &line]).current_dir(bench.folder.path());
        shell.env("FIREBRICK_CACHE", bench.path("cache"));
        assert!(shell.status().unwrap().success(), "{name}");
        // With the pipe closed the last lines have nowhere to go, but the model is there.
        let record = json(&bench.path(name).join("run.json"));
        assert_eq!(record["final"]["step"], 6, "{name}");
    }
}
