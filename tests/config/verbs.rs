//! R1 and R2 from the command line: `validate`, `init`, `schema`, and their exit codes.

use std::path::Path;
use std::process::{Command, Output};

fn runner(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_runner"))
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn r2_init_writes_a_valid_file_once() {
    let folder = tempfile::tempdir().unwrap();
    let init = ["init", "--template", "gpt2", "-o", "x.toml"];
    assert!(runner(folder.path(), &init).status.success());
    let written = std::fs::read_to_string(folder.path().join("x.toml")).unwrap();
    let valid = runner(folder.path(), &["validate", "x.toml"]);
    assert_eq!(
        stdout(&valid),
        "x.toml is valid: gpt2, 4 layers, hidden 192, 1000 steps of 8 x 256 tokens\n"
    );
    let again = runner(folder.path(), &["init", "-o", "x.toml"]);
    assert_eq!(again.status.code(), Some(1));
    let kept = std::fs::read_to_string(folder.path().join("x.toml")).unwrap();
    assert_eq!(kept, written);
}

#[test]
fn r1_validate_exits_with_2_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("x.toml"), "seed = -1\n").unwrap();
    let output = runner(folder.path(), &["validate", "x.toml", "--json"]);
    assert_eq!(output.status.code(), Some(2));
    let verdict: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(verdict["valid"], false);
    let first = &verdict["issues"][0];
    assert_eq!(first["file"], "x.toml");
    assert_eq!((&first["line"], &first["column"]), (&1.into(), &8.into()));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.starts_with("error[config]: `seed` must be"),
        "{stderr}"
    );
    assert!(!stderr.contains('\u{1b}'), "a pipe gets no colours");

    let missing = runner(folder.path(), &["validate", "nope.toml"]);
    assert_eq!(missing.status.code(), Some(2));
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(names.len(), 1);
}

#[test]
fn r2_schema_is_json() {
    let output = runner(Path::new("."), &["schema"]);
    let schema: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(schema, firebrick::config::json_schema());
}
