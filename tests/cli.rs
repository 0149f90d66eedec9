//! The runner as a user meets it: exit codes, files, resume, bad input.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A folder with a text and a config that trains a tiny model on it in well under a second.
struct Bench {
    folder: tempfile::TempDir,
}

const CONFIG: &str = r#"
output_dir = "out"
seed = 3

[model]
architecture = "llama"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 2

[tokenizer]
type = "byte"

[data]
sequence_len = 16
val_fraction = 0.1
[[data.datasets]]
path = "text.txt"

[train]
micro_batch_size = 4
max_steps = 6
threads = 2

[eval]
eval_steps = 3
sample_prompts = ["the "]
sample_tokens = 4

[checkpoint]
save_steps = 2

[logging]
logging_steps = 1
"#;

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let words = ["the ", "river ", "is ", "older ", "than ", "its ", "bed.\n"];
        let text: String = (0..400)
            .map(|i| words[(i * i + i / 3) % words.len()])
            .collect();
        fs::write(folder.path().join("text.txt"), text).unwrap();
        fs::write(folder.path().join("x.toml"), CONFIG).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_runner"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env("FIREBRICK_CACHE", self.path("cache"))
            .env_remove("CARGO")
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs and insists on an exit code; returns standard output and standard error.
    fn expect(&self, code: i32, arguments: &[&str]) -> (String, String) {
        let output = self.run(arguments);
        let stdout = String::from_utf8(output.stdout).unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            output.status.code(),
            Some(code),
            "{arguments:?}\n{stdout}\n{stderr}"
        );
        (stdout, stderr)
    }

    fn train(&self, extra: &[&str]) -> (String, String) {
        self.expect(0, &[&["train", "x.toml", "--quiet"], extra].concat())
    }

    /// Every file of a checkpoint but the clock.
    fn checkpoint(&self, run: &str, step: u64) -> BTreeMap<String, Vec<u8>> {
        let folder = self.path(run).join(format!("checkpoints/step-{step:06}"));
        let mut files = BTreeMap::new();
        for name in ["model.safetensors", "optimizer.safetensors"] {
            files.insert(name.to_string(), fs::read(folder.join(name)).unwrap());
        }
        let mut state: Value = json(&folder.join("state.json"));
        state["progress"]["seconds"] = Value::Null;
        files.insert("state.json".to_string(), state.to_string().into_bytes());
        files
    }

    /// metrics.jsonl without the speed, which no two runs share.
    fn metrics(&self, run: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        let mut rows: Vec<Value> = text
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect();
        for row in &mut rows {
            row["tokens_per_second"] = Value::Null;
        }
        rows
    }

    fn spawn(&self, arguments: &[&str]) -> Child {
        self.command(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn a_run_leaves_a_complete_folder_and_says_what_to_do_next() {
    let bench = Bench::new();
    let (stdout, _) = bench.train(&[]);
    for line in [
        "trained 6 steps",
        "val loss ",
        "bigram ",
        "model    out (step ",
    ] {
        assert!(stdout.contains(line), "{stdout}");
    }
    assert!(
        stdout
            .trim_end()
            .ends_with(r#"runner generate --model out --prompt "the ""#),
        "{stdout}"
    );
    for name in [
        "config.toml",
        "resolved.toml",
        "run.json",
        "metrics.jsonl",
        "metrics.csv",
        "logs/train.log",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "checkpoints/last",
        "checkpoints/best",
    ] {
        assert!(bench.path("out").join(name).is_file(), "{name}");
    }
    let record = json(&bench.path("out/run.json"));
    assert_eq!(record["final"]["step"], 6);
    assert_eq!(record["final"]["tokens"], 6 * 4 * 16);
    assert!(record["final"]["best_val_loss"].as_f64().unwrap() > 0.0);
    assert_eq!(record["data"][0]["path"], "text.txt");
    let rows = bench.metrics("out");
    assert_eq!(rows.len(), 6);
    assert_eq!(
        (&rows[0]["step"], &rows[0]["tokens"]),
        (&Value::from(1), &Value::from(64))
    );
    assert!(rows[2]["val_loss"].is_f64() && rows[2]["bits_per_byte"].is_f64());
    for key in ["loss", "lr", "grad_norm"] {
        assert!(rows[5][key].is_f64(), "{key}");
    }
}

#[test]
fn generate_writes_the_completion_alone() {
    let bench = Bench::new();
    bench.train(&[]);
    let generate = |extra: &[&str]| {
        let fixed = [
            "generate",
            "--model",
            "out",
            "--prompt",
            "the ",
            "--max-new-tokens",
            "12",
        ];
        bench.expect(0, &[&fixed[..], extra].concat())
    };
    let (text, stderr) = generate(&["--temperature", "0"]);
    assert!(!text.is_empty() && stderr.is_empty());
    assert_eq!(generate(&["--temperature", "0"]).0, text);
    let as_json: Value =
        serde_json::from_str(&generate(&["--temperature", "0", "--json"]).0).unwrap();
    assert_eq!(as_json["text"], text);
    assert_eq!(as_json["tokens"].as_array().unwrap().len(), 12);
    assert_eq!(as_json["finish"], "length");
    let seeded = |seed: &str| generate(&["--temperature", "1", "--seed", seed]).0;
    assert_eq!(seeded("1"), seeded("1"));
    assert_ne!(seeded("1"), seeded("2"));
    let first: String = text.chars().take(1).collect();
    assert_eq!(generate(&["--temperature", "0", "--stop", &first]).0, "");
}

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
            "99",
            "--json",
        ],
    );
    let completion: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(completion["finish"], "context_full");
    assert_eq!(completion["tokens"].as_array().unwrap().len(), 16);
}

#[test]
fn r10_an_interrupted_run_goes_on_bit_for_bit() {
    let bench = Bench::new();
    let long = [
        "--set",
        "train.max_steps=300",
        "--set",
        "eval.eval_steps=100",
    ];
    bench.train(&[&long[..], &["--output-dir", "whole"]].concat());
    let mut interrupted = 0;
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let run = &format!("cut{signal}");
        let arguments = [
            &["train", "x.toml", "--quiet", "--output-dir", run],
            &long[..],
        ]
        .concat();
        let mut child = bench.spawn(&arguments);
        let metrics = bench.path(run).join("metrics.jsonl");
        let waiting = Instant::now();
        while fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 20 {
            assert!(
                waiting.elapsed() < Duration::from_secs(60),
                "the run never started"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        let kill = Command::new("kill")
            .args([signal, &child.id().to_string()])
            .status()
            .unwrap();
        assert!(kill.success());
        let status = child.wait().unwrap();
        // On a fast machine the run may be over before the signal comes.
        interrupted += u32::from(status.code() == Some(code));
        assert!(matches!(status.code(), Some(0 | 130 | 143)), "{status}");
        bench.expect(0, &arguments);
        assert_eq!(bench.checkpoint(run, 300), bench.checkpoint("whole", 300));
        assert_eq!(bench.metrics(run), bench.metrics("whole"));
    }
    assert!(interrupted > 0, "no run was interrupted in time");
}

#[test]
fn r10_a_killed_run_goes_on_bit_for_bit_and_step_goes_back() {
    let bench = Bench::new();
    bench.train(&["--output-dir", "whole"]);
    // What a kill -9 after the save of step 4 leaves: later lines in the metrics, no later save.
    bench.train(&["--output-dir", "cut"]);
    fs::remove_dir_all(bench.path("cut/checkpoints/step-000006")).unwrap();
    bench.train(&["--output-dir", "cut"]);
    assert_eq!(bench.checkpoint("cut", 6), bench.checkpoint("whole", 6));
    assert_eq!(bench.metrics("cut"), bench.metrics("whole"));

    bench.train(&["--output-dir", "cut", "--resume", "2"]);
    assert_eq!(bench.checkpoint("cut", 6), bench.checkpoint("whole", 6));
    assert_eq!(bench.metrics("cut"), bench.metrics("whole"));
    let (_, stderr) = bench.expect(
        1,
        &["train", "x.toml", "--output-dir", "cut", "--resume", "5"],
    );
    assert!(
        stderr.contains("has no checkpoint of step 5; there are: 2, 3, 4, 6"),
        "{stderr}"
    );
}

#[test]
fn r10_a_finished_run_is_complete_and_a_longer_one_goes_on() {
    let bench = Bench::new();
    bench.train(&[]);
    let before = bench.metrics("out");
    let (stdout, _) = bench.train(&[]);
    assert!(stdout.contains("out is already complete"), "{stdout}");
    assert_eq!(bench.metrics("out"), before);
    bench.train(&[
        "--set",
        "train.max_steps=8",
        "--set",
        "lr_scheduler.name=cosine",
    ]);
    assert_eq!(bench.metrics("out").len(), 8);
}

#[test]
fn r10_another_config_in_the_folder_is_refused_with_the_difference() {
    let bench = Bench::new();
    bench.train(&[]);
    let (_, stderr) = bench.expect(
        2,
        &["train", "x.toml", "--set", "optimizer.learning_rate=0.5"],
    );
    assert!(
        stderr.contains("optimizer.learning_rate: 0.001 there, 0.5 here"),
        "{stderr}"
    );
    assert!(stderr.contains("--output-dir"), "{stderr}");
    let (_, stderr) = bench.expect(2, &["train", "x.toml", "--resume", "never"]);
    assert!(stderr.contains("not empty"), "{stderr}");
    bench.expect(
        0,
        &[
            "train",
            "x.toml",
            "--resume",
            "never",
            "--output-dir",
            "fresh",
            "-q",
        ],
    );
}

#[test]
fn r2_the_resolved_config_gives_the_same_run() {
    let bench = Bench::new();
    bench.train(&[
        "--set",
        "optimizer.name=lion",
        "--set",
        "lr_scheduler.warmup_ratio=0.5",
    ]);
    bench.expect(
        0,
        &[
            "train",
            "out/resolved.toml",
            "--output-dir",
            "again",
            "--quiet",
        ],
    );
    assert_eq!(bench.checkpoint("again", 6), bench.checkpoint("out", 6));
    assert_eq!(bench.metrics("again"), bench.metrics("out"));
}

#[test]
fn r6_the_order_of_data_does_not_depend_on_the_micro_batch() {
    let bench = Bench::new();
    bench.train(&["--output-dir", "one"]);
    let split = [
        "--set",
        "train.micro_batch_size=1",
        "--set",
        "train.gradient_accumulation_steps=4",
    ];
    bench.train(&[&split[..], &["--output-dir", "four"]].concat());
    for (one, four) in bench.metrics("one").iter().zip(bench.metrics("four")) {
        let difference = one["loss"].as_f64().unwrap() - four["loss"].as_f64().unwrap();
        assert!(difference.abs() < 1e-4, "{one} {four}");
    }
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
    for file in ["checkpoints", "resolved.toml", "metrics.jsonl"] {
        assert!(!bench.path("out").join(file).exists(), "{file}");
    }
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
    // checkpoint. The signal that comes with it is ignored, as the error code is what is tested.
    let limited = format!(
        "trap '' XFSZ; ulimit -f 16; exec '{}' train x.toml --quiet",
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
    assert!(stderr.contains("model.safetensors"), "{stderr}");
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
    let bench = Bench::new();
    bench.train(&["--set", "train.max_steps=4"]);
    let file = bench.path("out/checkpoints/step-000004/model.safetensors");
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

#[test]
fn dry_run_and_validate_write_nothing() {
    let bench = Bench::new();
    let (stdout, _) = bench.expect(0, &["train", "x.toml", "--dry-run"]);
    assert!(
        stdout.contains("parameters; 6 steps of 4 x 16 tokens"),
        "{stdout}"
    );
    let (stdout, _) = bench.expect(0, &["train", "x.toml", "--dry-run", "--json"]);
    let summary: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(
        (&summary["steps"], &summary["tokens_per_step"]),
        (&Value::from(6), &Value::from(64))
    );
    bench.expect(0, &["validate", "x.toml"]);
    assert!(!bench.path("out").exists());
}

#[test]
fn json_events_are_one_object_a_line() {
    let bench = Bench::new();
    let (stdout, _) = bench.expect(0, &["train", "x.toml", "--json"]);
    let events: Vec<Value> = stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let count = |name: &str| events.iter().filter(|event| event["event"] == name).count();
    assert_eq!(
        (count("started"), count("step"), count("finished")),
        (1, 6, 1)
    );
    assert_eq!((count("evaluated"), count("sample")), (2, 2));
    assert!(count("saved") >= 3 && count("note") > 0);
}

#[test]
fn r11_rotation_is_announced() {
    let bench = Bench::new();
    let (_, stderr) = bench.expect(
        0,
        &[
            "train",
            "x.toml",
            "--set",
            "checkpoint.save_total_limit=1",
            "--set",
            "checkpoint.save_steps=1",
        ],
    );
    assert!(
        stderr.contains("deleted the checkpoint of step 1 "),
        "{stderr}"
    );
    let steps = fs::read_dir(bench.path("out/checkpoints"))
        .unwrap()
        .filter(|entry| {
            entry
                .as_ref()
                .unwrap()
                .file_name()
                .to_str()
                .unwrap()
                .starts_with("step-")
        });
    assert!(steps.count() <= 3);
}

#[test]
fn every_config_in_the_repository_runs() {
    let bench = Bench::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    fs::create_dir(bench.path("data")).unwrap();
    fs::copy(
        bench.path("text.txt"),
        bench.path("data/tinyshakespeare.txt"),
    )
    .unwrap();
    for entry in fs::read_dir(root.join("configs")).unwrap() {
        let config = entry.unwrap().path();
        let name = config.file_stem().unwrap().to_str().unwrap();
        let quickstart = name == "quickstart";
        let mut command = bench.command(&["train", config.to_str().unwrap(), "--quiet"]);
        let out = bench.path(name);
        command.args(["--output-dir", out.to_str().unwrap()]);
        for set in [
            "train.max_steps=2",
            "train.micro_batch_size=2",
            "lr_scheduler.warmup_steps=1",
            "eval.sample_tokens=2",
            "eval.eval_steps=1",
        ] {
            command.args(["--set", set]);
        }
        // The quickstart trains on the repository it lies in, the others on data/.
        if quickstart {
            command.current_dir(root);
        } else {
            command.args(["--set", "eval.sample_prompts=[\"the \"]"]);
        }
        let output = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {stderr}");
        assert!(out.join("model.safetensors").is_file(), "{name}");
    }
}

#[test]
fn the_small_verbs_answer() {
    let bench = Bench::new();
    let (stdout, _) = bench.expect(0, &["env", "--json"]);
    let environment: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(environment["backends"][0], "cpu");
    assert!(bench.expect(0, &["env"]).0.contains("threads"));
    let schema: Value = serde_json::from_str(&bench.expect(0, &["schema"]).0).unwrap();
    assert!(schema["properties"]["train"].is_object());
    bench.expect(0, &["init", "-o", "new.toml"]);
    bench.expect(0, &["validate", "new.toml"]);
    bench.expect(1, &["init", "-o", "new.toml"]);
    assert!(bench.expect(0, &["--help"]).0.contains("generate"));
}
