//! Kills runs at random moments, resumes them until they end, and compares each with the run that
//! was left alone: `cargo bench --bench kills -- [KILLED [INTERRUPTED [SEED]]]`, runs that are to be
//! killed (200) and to be interrupted by a signal that saves (40).
#![allow(missing_docs, reason = "a program, not an interface")]

#[cfg(unix)]
#[path = "../tests/cli/bench.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod bench;
#[cfg(unix)]
#[path = "../tests/cli/kills.rs"]
mod kills;

#[cfg(unix)]
fn main() {
    use kills::{SCENARIOS, STEPS, Tally, Trials, random};

    // cargo adds `--bench`.
    let numbers: Vec<u64> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .map(|argument| argument.parse().expect("a whole number"))
        .collect();
    let number = |place: usize, default: u64| numbers.get(place).copied().unwrap_or(default);
    let (killed, interrupted, seed) = (number(0, 200), number(1, 40), number(2, 1));
    let mut random = random(seed);
    let environment = firebrick::environment::Environment::detect();
    println!(
        "{}, {} threads; seed {seed}; runs of {STEPS} steps, saved after every one",
        environment.cpu, environment.threads
    );
    let share = |all: u64, place: usize| {
        let scenarios = SCENARIOS.len() as u64;
        all / scenarios + u64::from((place as u64) < all % scenarios)
    };
    for (place, scenario) in SCENARIOS.iter().enumerate() {
        let mut runs = Trials::new(scenario, &mut random);
        let mut tally = Tally::default();
        for trial in 0..share(killed, place) {
            runs.kill(&format!("trial-{trial}"), &mut tally);
        }
        println!(
            "{}: {} runs killed {} times, {} bit-equal ends; of the kills {} inside a save, {} inside \
             another write, {} before the first checkpoint, {} after the last step",
            scenario.name,
            tally.trials,
            tally.cuts,
            tally.equal,
            tally.inside_a_save,
            tally.inside_a_write,
            tally.before_the_first,
            tally.after_the_last,
        );
        let mut tally = Tally::default();
        for trial in 0..share(interrupted, place) {
            runs.interrupt(&format!("signal-{trial}"), &mut tally);
        }
        println!(
            "{}: {} runs stopped by Ctrl-C, SIGTERM or SIGHUP, {} bit-equal ends; {} before there was \
             anything to save",
            scenario.name, tally.trials, tally.equal, tally.before_the_first,
        );
    }
}

#[cfg(not(unix))]
fn main() {
    println!("signals are Unix's");
}
