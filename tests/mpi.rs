//! Runs whose ranks are processes under `mpirun`: what they compute, and what becomes of the others
//! when one of them dies. Needs the feature `mpi` and an Open MPI.
//!
//! `FIREBRICK_RANK_FAILURES=20` tries each way to die so often, in place of twice.
#![allow(missing_docs)]
#![cfg(all(feature = "mpi", target_os = "linux"))]

#[path = "support/runs.rs"]
mod runs;

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use runs::{metrics, text};
use serde_json::Value;

const RANKS: usize = 4;
const TIMEOUT: u64 = 8;

/// What a job may take to end, beyond the timeout of its exchanges.
const GRACE: Duration = Duration::from_secs(30);

struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new(steps: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("text.txt"), text()).unwrap();
        let config = format!(
            "version = 1
            output_dir = \"run\"
            seed = 5
            [model]
            architecture = \"llama\"
            hidden_size = 16
            intermediate_size = 24
            num_hidden_layers = 2
            num_attention_heads = 2
            [tokenizer]
            type = \"byte\"
            [data]
            sequence_len = 16
            val_fraction = 0.1
            datasets = [{{ path = \"text.txt\", type = \"text\" }}]
            [train]
            micro_batch_size = 2
            max_steps = {steps}
            threads = 1
            [eval]
            eval_steps = 10
            [logging]
            logging_steps = 1
            [checkpoint]
            save_steps = 5
            [gradient]
            timeout_seconds = {TIMEOUT}"
        );
        fs::write(folder.path().join("x.toml"), config).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `mpirun`, as CI may run it: as root, on fewer cores than ranks.
    fn mpirun(&self, ranks: usize) -> Command {
        let mut command = Command::new("mpirun");
        command
            .args(["--allow-run-as-root", "--oversubscribe", "-n"])
            .arg(ranks.to_string())
            .current_dir(self.folder.path());
        command
    }

    fn train(&self, ranks: usize, run: &str, sets: &[&str]) -> Command {
        let mut command = self.mpirun(ranks);
        command.args([
            env!("CARGO_BIN_EXE_runner"),
            "train",
            "x.toml",
            "--output-dir",
            run,
        ]);
        sets.iter().for_each(|set| {
            command.args(["--set", set]);
        });
        command
    }

    fn trained(&self, ranks: usize, run: &str, sets: &[&str]) -> Output {
        let output = self.train(ranks, run, sets).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        output
    }

    fn model(&self, run: &str) -> Vec<u8> {
        fs::read(self.path(run).join("model.safetensors")).unwrap()
    }

    /// Starts a job and returns when it has taken so many steps.
    fn begun(&self, run: &str, steps: usize) -> Child {
        let mut command = self.train(RANKS, run, &[]);
        let job = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while self.steps(run) < steps {
            assert!(begun.elapsed() < Duration::from_secs(120), "no steps");
            std::thread::sleep(Duration::from_millis(5));
        }
        job
    }

    fn steps(&self, run: &str) -> usize {
        let text = fs::read_to_string(self.path(run).join("metrics.jsonl"));
        text.map_or(0, |text| text.lines().count())
    }

    /// The process of a rank.
    fn rank(&self, rank: usize) -> u32 {
        let here = self.folder.path().canonicalize().unwrap();
        let variable = format!("OMPI_COMM_WORLD_RANK={rank}");
        let all = fs::read_dir("/proc").unwrap().flatten();
        let mut found = all.filter_map(|entry| {
            let process = entry.path();
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let is_here = fs::read_link(process.join("cwd")).ok()? == here;
            let program = fs::read_link(process.join("exe")).ok()?;
            let environment = fs::read(process.join("environ")).ok()?;
            let mut variables = environment.split(|byte| *byte == 0);
            let is_rank = variables.any(|one| one == variable.as_bytes());
            (is_here && is_rank && program.ends_with("runner")).then_some(pid)
        });
        found.next().expect("the rank runs")
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn signal(pid: u32, name: &str) {
    let status = Command::new("kill")
        .args(["-s", name, &pid.to_string()])
        .status();
    assert!(status.unwrap().success());
}

/// Waits for a job that has to end by itself. Returns its exit code and what it said.
fn end_of(mut job: Child, within: Duration) -> (Option<i32>, String) {
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = job.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > within {
            job.kill().unwrap();
            panic!("the job goes on after {within:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let mut text = String::new();
    job.stderr
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    (status.code(), text)
}

/// How often each way to die is tried.
fn failures() -> usize {
    let asked = std::env::var("FIREBRICK_RANK_FAILURES");
    asked.map_or(2, |count| count.parse().unwrap())
}

#[test]
fn n1_four_processes_are_one_with_four_times_the_accumulation() {
    let bench = Bench::new(12);
    let output = bench.trained(RANKS, "ranks", &[]);
    assert!(
        said(&output).contains("4 ranks, one thread each"),
        "{}",
        said(&output)
    );
    // What is said, is said once.
    assert_eq!(said(&output).matches("tokenizer:").count(), 1);
    bench.trained(RANKS, "again", &[]);
    bench.trained(1, "alone", &["train.gradient_accumulation_steps=4"]);
    assert_eq!(bench.model("ranks"), bench.model("again"));
    let [ranks, again, alone] = ["ranks", "again", "alone"].map(|run| metrics(&bench.path(run)));
    assert_eq!(ranks, again);
    assert_eq!(ranks.len(), alone.len());
    for (ranks, alone) in ranks.iter().zip(&alone) {
        for key in ["loss", "val_loss", "grad_norm"] {
            let [a, b] = [ranks, alone].map(|row| row[key].as_f64());
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-5 * a.abs();
            assert!(
                a.zip(b).is_none_or(|(a, b)| close(a, b)),
                "{key}: {a:?} and {b:?}"
            );
        }
    }
}

#[test]
fn n1_a_job_that_was_killed_goes_on_bit_for_bit() {
    let bench = Bench::new(150);
    let compressed = [
        "gradient.compression.method=vsa-rotate",
        "gradient.compression.ratio=24",
        "optimizer.name=sign",
    ];
    bench.trained(RANKS, "whole", &compressed);
    let mut command = bench.train(RANKS, "parts", &compressed);
    let mut job = command.stderr(Stdio::null()).spawn().unwrap();
    while bench.steps("parts") < 12 {
        std::thread::sleep(Duration::from_millis(2));
    }
    // All of them at the same time, the launcher first.
    let ranks: Vec<u32> = (0..RANKS).map(|rank| bench.rank(rank)).collect();
    job.kill().unwrap();
    for rank in ranks {
        let _ = Command::new("kill")
            .args(["-9", &rank.to_string()])
            .status();
    }
    job.wait().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    bench.trained(RANKS, "parts", &compressed);
    assert_eq!(bench.model("whole"), bench.model("parts"));
    assert_eq!(metrics(&bench.path("whole")), metrics(&bench.path("parts")));
}

#[test]
fn n3_a_rank_that_is_killed_ends_the_job() {
    let bench = Bench::new(100_000);
    for round in 0..failures() {
        let run = format!("run-{round}");
        let job = bench.begun(&run, 6 + round);
        signal(bench.rank(round % RANKS), "KILL");
        let (code, text) = end_of(job, GRACE);
        assert_ne!(code, Some(0), "{text}");
        // The launcher names the rank.
        assert!(text.contains(&format!("rank {}", round % RANKS)), "{text}");
    }
}

#[test]
fn n3_a_rank_that_stands_still_is_named_and_ends_the_job() {
    let bench = Bench::new(100_000);
    for round in 0..failures().min(5) {
        let run = format!("run-{round}");
        let job = bench.begun(&run, 6 + round);
        let late = 1 + round % (RANKS - 1);
        signal(bench.rank(late), "STOP");
        let (code, text) = end_of(job, Duration::from_secs(TIMEOUT) + GRACE);
        assert_eq!(code, Some(1), "{text}");
        let reason = format!("rank {late} did not come within {TIMEOUT}s");
        assert!(text.contains(&reason), "{text}");
        let report = fs::read_to_string(bench.path(&run).join("logs/train.log")).unwrap();
        assert!(report.contains(&reason), "{report}");
    }
}

#[test]
fn n3_a_rank_that_ends_early_without_an_error_ends_the_job() {
    let bench = Bench::new(100_000);
    let runner = env!("CARGO_BIN_EXE_runner");
    for round in 0..failures().min(5) {
        let early = round % RANKS;
        let script = format!(
            "if [ $OMPI_COMM_WORLD_RANK = {early} ]; then
               {runner} train x.toml --output-dir run-{round} & sleep 1.{round}; kill -9 $!; exit 0
             fi
             exec {runner} train x.toml --output-dir run-{round}"
        );
        let mut command = bench.mpirun(RANKS);
        let job = command
            .args(["sh", "-c", &script])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (code, text) = end_of(job, Duration::from_secs(TIMEOUT + 2) + GRACE);
        assert_ne!(code, Some(0), "{text}");
    }
}

#[test]
fn n3_a_job_goes_on_with_another_number_of_ranks_and_says_so() {
    let bench = Bench::new(20);
    bench.trained(RANKS, "run", &["train.max_steps=10"]);
    let output = bench.trained(2, "run", &[]);
    assert!(
        said(&output).contains("2 ranks in place of 4"),
        "{}",
        said(&output)
    );
    let record = fs::read_to_string(bench.path("run/run.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["ranks"], 2);
    assert_eq!(record["final"]["step"], 20);
}

#[test]
fn n1_ranks_that_disagree_end_with_exit_code_2_before_the_first_step() {
    let bench = Bench::new(20);
    let runner = env!("CARGO_BIN_EXE_runner");
    fs::create_dir(bench.path("other")).unwrap();
    fs::copy(bench.path("x.toml"), bench.path("other/x.toml")).unwrap();
    fs::write(bench.path("other/text.txt"), text() + "and its banks.\n").unwrap();
    let cases = [
        (
            "train x.toml --set seed=6",
            "seed: 5 on rank 0, 6 on rank 1",
        ),
        (
            "train other.toml",
            "the data of rank 1 is not that of rank 0",
        ),
    ];
    let config = fs::read_to_string(bench.path("x.toml")).unwrap();
    let absolute = |folder: &str| {
        let path = bench.path(folder).join("run").display().to_string();
        config.replace("output_dir = \"run\"", &format!("output_dir = \"{path}\""))
    };
    fs::write(bench.path("x.toml"), absolute("")).unwrap();
    fs::write(bench.path("other/other.toml"), absolute("")).unwrap();
    fs::write(bench.path("other/x.toml"), absolute("")).unwrap();
    for (other, expected) in cases {
        let folder = if other.contains("other.toml") {
            "other"
        } else {
            "."
        };
        let script = format!(
            "if [ $OMPI_COMM_WORLD_RANK = 1 ]; then cd {folder}; exec {runner} {other}; fi
             exec {runner} train x.toml"
        );
        let output = bench
            .mpirun(2)
            .args(["sh", "-c", &script])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains(expected), "{}", said(&output));
        assert!(!bench.path("run/checkpoints").exists());
    }
}

#[test]
fn n1_a_signal_to_one_rank_saves_and_stops_all() {
    let bench = Bench::new(100_000);
    let job = bench.begun("run", 7);
    signal(bench.rank(2), "TERM");
    let (code, text) = end_of(job, GRACE);
    assert_eq!(code, Some(143), "{text}");
    let saved = fs::read_dir(bench.path("run/checkpoints")).unwrap().count();
    assert!(saved > 0);
    assert!(text.contains("SIGTERM"), "{text}");
}

#[test]
fn n1_other_verbs_are_refused_under_mpirun() {
    let bench = Bench::new(5);
    let runner = env!("CARGO_BIN_EXE_runner");
    for verb in [&["env"][..], &["train", "x.toml", "--dry-run"]] {
        let output = bench.mpirun(2).arg(runner).args(verb).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(said(&output).contains("only `runner train` shares its work"));
    }
}
