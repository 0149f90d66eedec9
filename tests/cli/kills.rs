//! Runs that are killed or interrupted at random moments and resumed until they end, beside the same
//! runs left alone. `benches/kills.rs` does it hundreds of times.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant, SystemTime};

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

use super::bench::{Bench, json};

/// A run to kill: a config, and what is special about it.
pub struct Scenario {
    pub name: &'static str,
    sets: &'static [&'static str],
}

pub const STEPS: u64 = 12;

/// Most of the time of these runs goes into saves, so most kills land in one.
const COMMON: [&str; 4] = [
    "train.max_steps=12",
    "checkpoint.save_steps=1",
    "checkpoint.save_total_limit=2",
    "eval.eval_steps=4",
];

pub const SCENARIOS: [Scenario; 4] = [
    Scenario {
        name: "llama, AdamW",
        sets: &[],
    },
    Scenario {
        name: "gpt2, Muon",
        sets: &["model.architecture=gpt2", "optimizer.name=muon"],
    },
    Scenario {
        name: "f16 with a loss scale",
        sets: &["model.dtype=f16", "optimizer.learning_rate=0.01"],
    },
    Scenario {
        name: "accumulation, epochs",
        sets: &[
            "train.gradient_accumulation_steps=3",
            "train.micro_batch_size=2",
            "data.sampling=epoch",
        ],
    },
];

/// What came of many trials.
#[derive(Debug, Default)]
pub struct Tally {
    /// Runs that were cut short at least once.
    pub trials: u32,
    /// Kills, or signals, that reached a live run.
    pub cuts: u32,
    /// Of these, how many left an unfinished checkpoint: they landed inside a save.
    pub inside_a_save: u32,
    /// How many left half of another file: a pointer, the record, a report, the exported model.
    pub inside_a_write: u32,
    /// How many came before the first checkpoint.
    pub before_the_first: u32,
    /// How many came after the last step.
    pub after_the_last: u32,
    /// Runs that ended as the run that was left alone: it has to be all.
    pub equal: u32,
}

type Leftovers = BTreeSet<(String, SystemTime)>;

/// A scenario's folder and how it ends when it is left alone.
pub struct Trials<'a> {
    name: &'static str,
    bench: Bench,
    arguments: Vec<String>,
    whole: BTreeMap<String, String>,
    seconds: f64,
    random: &'a mut ChaCha8Rng,
}

pub fn random(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

impl<'a> Trials<'a> {
    pub fn new(scenario: &Scenario, random: &'a mut ChaCha8Rng) -> Self {
        let bench = Bench::new();
        let mut arguments = vec!["train", "x.toml", "--quiet"];
        for set in COMMON.iter().chain(scenario.sets) {
            arguments.extend(["--set", set]);
        }
        let arguments: Vec<String> = arguments.into_iter().map(String::from).collect();
        let mut trials = Self {
            name: scenario.name,
            bench,
            arguments,
            whole: BTreeMap::new(),
            seconds: 0.0,
            random,
        };
        // The first also fills the token cache.
        for name in ["first", "whole"] {
            let started = Instant::now();
            trials.finish(name);
            trials.seconds = started.elapsed().as_secs_f64();
        }
        trials.whole = trials.end_of("whole");
        trials
    }

    fn command(&self, run: &str) -> Vec<String> {
        let folder = ["--output-dir".to_string(), run.to_string()];
        [&self.arguments[..], &folder].concat()
    }

    fn finish(&self, run: &str) {
        let command = self.command(run);
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        self.bench.expect(0, &command);
    }

    /// Starts the run and sends a signal after a random time; none if it was over by then.
    fn cut(&mut self, run: &str, signal: &str) -> Option<ExitStatus> {
        let command = self.command(run);
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let delay = self.random.random_range(0.0..self.seconds);
        let mut child: Child = self.bench.spawn(&command);
        std::thread::sleep(Duration::from_secs_f64(delay));
        if child.try_wait().unwrap().is_some() {
            return None;
        }
        let id = child.id().to_string();
        // It may still end before the signal comes.
        let _ = Command::new("kill").args([signal, &id]).status().unwrap();
        let status = child.wait().unwrap();
        (!status.success()).then_some(status)
    }

    /// Kills a run once or several times, lets it end and compares.
    pub fn kill(&mut self, run: &str, tally: &mut Tally) {
        let mut cuts = 0;
        while cuts == 0 || self.random.random_range(0..3) == 0 {
            let earlier = self.leftovers(run);
            let Some(status) = self.cut(run, "-KILL") else {
                if cuts > 0 {
                    break;
                }
                // It got away: another one.
                fs::remove_dir_all(self.bench.path(run)).unwrap();
                continue;
            };
            assert_eq!(status.signal(), Some(9), "{status}");
            cuts += 1;
            self.count(run, &earlier, tally);
        }
        self.compare(run, cuts, tally);
    }

    /// Asks a run to stop with one of the signals that save, lets it end and compares.
    pub fn interrupt(&mut self, run: &str, tally: &mut Tally) {
        let signals = [("-INT", 2), ("-TERM", 15), ("-HUP", 1)];
        loop {
            let (signal, number) = signals[self.random.random_range(0..3)];
            let Some(status) = self.cut(run, signal) else {
                fs::remove_dir_all(self.bench.path(run)).unwrap();
                continue;
            };
            // While a run is being prepared, a signal ends it as it ends any program.
            if status.signal() == Some(number) {
                tally.before_the_first += 1;
            } else {
                assert_eq!(status.code(), Some(128 + number), "{status}");
                assert!(self.bench.path(run).join("checkpoints/last").exists());
            }
            break;
        }
        self.compare(run, 1, tally);
    }

    fn compare(&mut self, run: &str, cuts: u32, tally: &mut Tally) {
        self.finish(run);
        let end = self.end_of(run);
        let keys = self.whole.keys().chain(end.keys());
        let wrong: Vec<_> = keys
            .map(|key| (key, self.whole.get(key), end.get(key)))
            .filter(|(_, whole, end)| whole != end)
            .collect();
        assert!(wrong.is_empty(), "{}, {run}: {wrong:#?}", self.name);
        tally.trials += 1;
        tally.cuts += cuts;
        tally.equal += 1;
        fs::remove_dir_all(self.bench.path(run)).unwrap();
    }

    /// Looks at what a kill left, beside what an earlier one had.
    fn count(&self, run: &str, earlier: &Leftovers, tally: &mut Tally) {
        let left = self.leftovers(run);
        let new = |start: &str| {
            let mut new = left.difference(earlier);
            u32::from(new.any(|(name, _)| name.starts_with(start)))
        };
        tally.inside_a_save += new("save ");
        tally.inside_a_write += new("write ");
        let saved = self.names(&format!("{run}/checkpoints"));
        let any = saved.iter().any(|name| name.starts_with("step-"));
        tally.before_the_first += u32::from(!any);
        tally.after_the_last += u32::from(saved.contains(&format!("step-{STEPS:06}")));
    }

    /// What is half written in a run folder: checkpoints being saved, other files being replaced,
    /// each with the time it was last changed.
    fn leftovers(&self, run: &str) -> Leftovers {
        let mut left = Leftovers::new();
        for folder in [run.to_string(), format!("{run}/checkpoints")] {
            for name in self.names(&folder) {
                let path = self.bench.path(&folder).join(&name);
                let kind = if name.starts_with(".step-") {
                    "save"
                } else if firebrick::durable::is_temporary(&name) {
                    "write"
                } else {
                    continue;
                };
                let changed = fs::metadata(path).unwrap().modified().unwrap();
                left.insert((format!("{kind} {name}"), changed));
            }
        }
        left
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.bench.path(folder));
        let entries = entries.into_iter().flatten();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Everything that a run leaves but times and speeds: weights, moments, progress, metrics, best
    /// and last, the exported model, and the names of all files.
    fn end_of(&self, run: &str) -> BTreeMap<String, String> {
        let mut end = BTreeMap::new();
        let checkpoints = self.names(&format!("{run}/checkpoints"));
        for name in checkpoints.iter().filter(|name| name.starts_with("step-")) {
            let step = name.trim_start_matches("step-").parse().unwrap();
            end.insert(
                name.clone(),
                format!("{:?}", self.bench.checkpoint(run, step)),
            );
        }
        end.insert("checkpoints".to_string(), format!("{checkpoints:?}"));
        end.insert("files".to_string(), format!("{:?}", self.names(run)));
        for name in [
            "checkpoints/best",
            "checkpoints/last",
            "model.safetensors",
            "config.json",
        ] {
            let bytes = fs::read(self.bench.path(run).join(name)).unwrap();
            end.insert(name.to_string(), blake3::hash(&bytes).to_string());
        }
        let rows = self.bench.metrics(run);
        end.insert("metrics".to_string(), Value::from(rows).to_string());
        let table = fs::read_to_string(self.bench.path(run).join("metrics.csv")).unwrap();
        let rows = table.lines().map(|line| {
            let cells: Vec<&str> = line.split(',').collect();
            // Without speed and memory.
            [&cells[..5], &cells[6..8]].concat().join(",")
        });
        end.insert("table".to_string(), rows.collect::<Vec<_>>().join("\n"));
        let record = json(&self.bench.path(run).join("run.json"));
        for key in ["step", "val_loss", "best_val_loss", "tokens"] {
            end.insert(key.to_string(), record["final"][key].to_string());
        }
        end
    }
}

#[test]
fn r10_random_kills_end_bit_for_bit() {
    let mut random = random(20_261_121);
    let mut tally = Tally::default();
    for (number, scenario) in SCENARIOS.iter().enumerate() {
        let trials = if number == 0 { 2 } else { 1 };
        let mut runs = Trials::new(scenario, &mut random);
        for trial in 0..trials {
            runs.kill(&format!("trial-{trial}"), &mut tally);
        }
    }
    assert_eq!((tally.trials, tally.equal), (5, 5), "{tally:?}");
}

#[test]
fn r10_random_signals_save_and_end_bit_for_bit() {
    let mut random = random(20_261_122);
    let mut tally = Tally::default();
    let mut runs = Trials::new(&SCENARIOS[0], &mut random);
    for trial in 0..5 {
        runs.interrupt(&format!("trial-{trial}"), &mut tally);
    }
    assert_eq!((tally.trials, tally.equal), (5, 5), "{tally:?}");
    // The second of two is the program's own exit, the first the system's.
    assert!(
        tally.before_the_first < 5,
        "no signal came in time: {tally:?}"
    );
}
