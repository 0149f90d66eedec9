//! R1 and R2: strict TOML, overrides, resolution.

mod adapters;
mod contradictions;
mod hostile;
mod phases;
mod resolved;
mod strict;
mod verbs;

use std::path::PathBuf;

use firebrick::config::{ConfigError, Issue, Plan, Sources};

/// The least that runs; tests append sections or `--set` over it.
const MINIMAL: &str = "\
[model]
preset = \"stories-260k\"
[[data.datasets]]
path = \"data/*.txt\"
[train]
max_steps = 100
";

fn resolve(text: &str, sets: &[&str]) -> Result<Plan, ConfigError> {
    Plan::from_sources(Sources {
        path: PathBuf::from("configs/x.toml"),
        text: text.to_string(),
        sets: sets.iter().map(ToString::to_string).collect(),
    })
}

fn plan(sets: &[&str]) -> Plan {
    resolve(MINIMAL, sets).unwrap_or_else(|error| panic!("{sets:?}\n{error}"))
}

fn issues(text: &str, sets: &[&str]) -> Vec<Issue> {
    match resolve(text, sets) {
        Ok(_) => panic!("resolved: {text} {sets:?}"),
        Err(error) => error.issues().to_vec(),
    }
}

/// "message (help)" of the only issue.
fn only(text: &str, sets: &[&str]) -> String {
    let issues = issues(text, sets);
    assert_eq!(issues.len(), 1, "{issues:#?}");
    let help = issues[0].help.as_deref().unwrap_or("-");
    format!("{} ({help})", issues[0].message)
}

/// Compares with a file; `FIREBRICK_BLESS=1` writes it instead.
fn golden(path: &str, text: &str) {
    if std::env::var_os("FIREBRICK_BLESS").is_some() {
        std::fs::write(path, text).unwrap();
    }
    let expected = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        expected == text,
        "{path} is out of date: FIREBRICK_BLESS=1\n{text}"
    );
}
