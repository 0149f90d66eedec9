//! Fine-tuning as a user meets it: `task = "sft"`, and `runner inspect`.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use serde_json::{Value, json};

use super::bench::{Bench, json as read_json};

/// A folder with a tokenizer that knows ChatML, conversations, and a config that trains on them.
fn bench() -> Bench {
    let bench = Bench::new();
    let tokenizer = firebrick::data::Tokenizer::bytes().unwrap();
    let mut file: Value = serde_json::from_str(tokenizer.to_json()).unwrap();
    let added = file["added_tokens"].as_array_mut().unwrap();
    for token in ["<|im_start|>", "<|im_end|>"] {
        let mut next = added.last().unwrap().clone();
        next["id"] = json!(next["id"].as_u64().unwrap() + 1);
        next["content"] = json!(token);
        added.push(next);
    }
    fs::write(bench.path("tokenizer.json"), file.to_string()).unwrap();
    let row = |n: usize| {
        json!({"messages": [
            {"role": "user", "content": format!("{n}?")},
            {"role": "assistant", "content": "yes ".repeat(1 + n % 5)},
        ]})
    };
    let rows: String = (0..40).map(|n| format!("{}\n", row(n))).collect();
    fs::write(bench.path("rows.jsonl"), rows).unwrap();
    let text = fs::read_to_string(bench.path("x.toml")).unwrap();
    let text = text
        .replace("output_dir", "task = \"sft\"\noutput_dir")
        .replace(
            "type = \"byte\"",
            "type = \"file\"\npath = \"tokenizer.json\"",
        )
        .replace("text.txt", "rows.jsonl")
        .replace(
            "sequence_len = 16",
            "sequence_len = 128\nchat_template = \"chatml\"",
        );
    fs::write(bench.path("x.toml"), text).unwrap();
    bench
}

#[test]
fn r3_r5_a_fine_tuned_model_brings_its_template_and_stops_at_the_end_of_a_turn() {
    let bench = bench();
    let (_, stderr) = bench.expect(0, &["train", "x.toml"]);
    for line in [
        "auto: messages",
        "chat template `chatml`",
        "packing: 36 rows per epoch",
    ] {
        assert!(stderr.contains(line), "{stderr}");
    }
    let template = fs::read_to_string(bench.path("out/chat_template.jinja")).unwrap();
    assert!(template.contains("<|im_start|>"));
    let config = read_json(&bench.path("out/config.json"));
    assert_eq!(config["eos_token_id"], 258);
    let config = read_json(&bench.path("out/tokenizer_config.json"));
    assert_eq!(config["eos_token"], "<|im_end|>");
    let record = read_json(&bench.path("out/run.json"));
    assert!(record["final"]["best_val_loss"].as_f64().unwrap() > 0.0);
    assert_eq!(record["bigram_loss"], Value::Null);
    let tokens = bench.metrics("out")[5]["tokens"].as_u64().unwrap();
    assert!(tokens > 0 && tokens < 6 * 4 * 128);
    // The samples are asked for as the rows are.
    let journal = fs::read_to_string(bench.path("out/logs/events.jsonl")).unwrap();
    assert!(journal.contains("\"completion\""), "{journal}");
    // What the folder holds is a base model for the next run, template included.
    bench.train(&[
        "--output-dir",
        "again",
        "--set",
        "model={base_model=\"out\"}",
        "--set",
        "tokenizer={type=\"file\", path=\"out/tokenizer.json\"}",
        "--set",
        "data.chat_template=tokenizer",
    ]);
    assert_eq!(
        fs::read_to_string(bench.path("again/chat_template.jinja")).unwrap(),
        template
    );
}

#[test]
fn r10_a_fine_tuning_run_resumes_to_the_same_bits() {
    let bench = bench();
    for packing in ["true", "false"] {
        let set = format!("data.sample_packing={packing}");
        let whole = format!("whole-{packing}");
        let parts = format!("parts-{packing}");
        bench.train(&["--set", &set, "--output-dir", &whole]);
        bench.train(&[
            "--set",
            &set,
            "--output-dir",
            &parts,
            "--set",
            "train.max_steps=4",
        ]);
        bench.train(&["--set", &set, "--output-dir", &parts]);
        // The schedule of a shorter run is another; from its step 2 on nothing is shared but the data.
        let steps = |run: &str| -> Vec<u64> {
            bench
                .metrics(run)
                .iter()
                .map(|row| row["tokens"].as_u64().unwrap())
                .collect()
        };
        assert_eq!(steps(&whole), steps(&parts));
        bench.train(&["--set", &set, "--output-dir", &whole, "--resume", "2"]);
        bench.train(&["--set", &set, "--output-dir", "third"]);
        assert_eq!(bench.checkpoint(&whole, 6), bench.checkpoint("third", 6));
        fs::remove_dir_all(bench.path("third")).unwrap();
    }
}

#[test]
fn epochs_are_passes_over_the_rows() {
    let bench = bench();
    let text = fs::read_to_string(bench.path("x.toml")).unwrap();
    fs::write(
        bench.path("x.toml"),
        text.replace("max_steps = 6", "num_epochs = 2"),
    )
    .unwrap();
    bench.train(&["--set", "data.sample_packing=false"]);
    // 36 rows, 4 a step.
    let record = read_json(&bench.path("out/run.json"));
    assert_eq!(record["final"]["step"], 18);
    let rows: u64 = (0..36u64).map(|n| 4 * (1 + n % 5) + 1).sum();
    assert_eq!(record["final"]["tokens"].as_u64().unwrap(), 2 * rows);
    let (stdout, _) = bench.expect(0, &["estimate", "x.toml", "--json"]);
    assert!(
        serde_json::from_str::<Value>(&stdout).unwrap()["epochs"]
            .as_f64()
            .unwrap()
            >= 2.0
    );
}

#[test]
fn r14_inspect_shows_what_is_trained() {
    let bench = bench();
    let (stdout, stderr) = bench.expect(0, &["inspect", "x.toml", "--rows", "2"]);
    assert!(stderr.contains("packing: 36 rows"), "{stderr}");
    let mut lines = stdout.lines();
    assert_eq!(lines.next(), Some("⟦trained⟧ masked"));
    assert!(stdout.contains("<|im_start|>assistant\n⟦yes "), "{stdout}");
    assert!(stdout.contains("<|im_end|>⟧\n"), "{stdout}");
    assert!(stdout.contains("--- row 0, rows.jsonl:"), "{stdout}");
    assert!(stdout.contains("--- and "), "{stdout}");
    assert!(!stdout.contains('\u{1b}'), "no colours in a pipe");
    assert!(
        stdout.lines().last().unwrap().starts_with("per epoch: "),
        "{stdout}"
    );

    let (stdout, _) = bench.expect(0, &["inspect", "x.toml", "--rows", "3", "--json"]);
    let shown: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(
        (&shown["task"], &shown["chat_template"]),
        (&json!("sft"), &json!("`chatml`"))
    );
    let rows = shown["sequences"].as_array().unwrap().iter();
    let rows: Vec<&Value> = rows
        .flat_map(|sequence| sequence["rows"].as_array().unwrap())
        .collect();
    assert_eq!(rows.len(), 3);
    for row in rows {
        assert_eq!(
            row["tokens"].as_array().unwrap().len(),
            row["trained"].as_array().unwrap().len()
        );
        let text = row["text"].as_str().unwrap();
        let trained = row["trained_text"][0].as_str().unwrap();
        assert!(text.starts_with("<|im_start|>user\n") && trained.ends_with("<|im_end|>"));
        let line = row["line"].as_u64().unwrap() as usize;
        let file = fs::read_to_string(bench.path("rows.jsonl")).unwrap();
        let source: Value = serde_json::from_str(file.lines().nth(line - 1).unwrap()).unwrap();
        assert!(text.contains(source["messages"][0]["content"].as_str().unwrap()));
    }
}

#[test]
fn r14_inspect_shows_windows_of_text_too() {
    let bench = Bench::new();
    let (stdout, _) = bench.expect(0, &["inspect", "x.toml", "--rows", "1"]);
    assert!(
        stdout.contains("16 of 16 places, 16 trained (100.0 %)"),
        "{stdout}"
    );
    assert!(
        stdout.contains("--- row 0, window: 17 tokens, 16 trained"),
        "{stdout}"
    );
}

#[test]
fn r14_inspect_does_not_obey_the_data() {
    let bench = bench();
    let row = json!({"messages": [
        {"role": "user", "content": "\u{1b}[31mred\u{7}"}, {"role": "assistant", "content": "x"},
    ]});
    fs::write(bench.path("rows.jsonl"), format!("{row}\n")).unwrap();
    let (stdout, _) = bench.expect(0, &["inspect", "x.toml", "--set", "data.val_fraction=0"]);
    assert!(stdout.contains("\\u{1b}[31mred\\u{7}"), "{stdout}");
}

#[test]
fn r3_what_is_wrong_with_rows_ends_with_3_and_leaves_nothing_behind() {
    let bench = bench();
    fs::write(
        bench.path("rows.jsonl"),
        "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}]}\n".repeat(3),
    )
    .unwrap();
    let (_, stderr) = bench.expect(3, &["train", "x.toml"]);
    let wanted = "error[data]: 3 of 3 rows have no trainable token";
    assert!(stderr.contains(wanted), "{stderr}");
    assert!(
        stderr.contains("first: rows.jsonl:1 - no message is the assistant's"),
        "{stderr}"
    );
    assert!(stderr.contains("help: take them out"), "{stderr}");
    assert!(!bench.path("out").exists());
    let (_, stderr) = bench.expect(
        2,
        &["train", "x.toml", "--set", "data.chat_template=tokenizer"],
    );
    assert!(
        stderr.contains("the tokenizer has no chat template"),
        "{stderr}"
    );
}

/// Lines in, answers out.
fn chat(bench: &Bench, extra: &[&str], lines: &str) -> (i32, String, String) {
    let fixed = [
        "chat",
        "--model",
        "out",
        "--temperature",
        "0",
        "--max-new-tokens",
        "12",
    ];
    let mut child = bench
        .command(&[&fixed[..], extra].concat())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(lines.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn r5_chat_asks_as_training_did() {
    let bench = bench();
    bench.train(&[
        "--set",
        "train.max_steps=150",
        "--set",
        "optimizer.learning_rate=1e-2",
        "--set",
        "eval.eval_steps=0",
        "--set",
        "checkpoint.save_steps=0",
        "--set",
        "eval.sample_prompts=[]",
    ]);
    let (code, stdout, stderr) = chat(&bench, &[], "7?\n\n/reset\n7?\n/quit\n8?\n");
    assert_eq!((code, stderr.as_str()), (0, ""));
    let answers: Vec<&str> = stdout.lines().collect();
    assert_eq!(answers.len(), 2, "{stdout}");
    assert_eq!(
        answers[0], answers[1],
        "a new conversation has the same answer"
    );
    assert!(answers[0].starts_with("yes"), "{stdout}");
    // The same by hand.
    let prompt = "<|im_start|>user\n7?<|im_end|>\n<|im_start|>assistant\n";
    let fixed = [
        "generate",
        "--model",
        "out",
        "--temperature",
        "0",
        "--max-new-tokens",
        "12",
    ];
    let (text, _) = bench.expect(0, &[&fixed[..], &["--prompt", prompt]].concat());
    assert_eq!(text.trim_end(), answers[0].trim_end());

    let (code, _, stderr) = chat(&bench, &["--chat-template", "nowhere.jinja"], "7?\n");
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("nowhere.jinja"), "{stderr}");
    fs::remove_file(bench.path("out/chat_template.jinja")).unwrap();
    let (code, _, stderr) = chat(&bench, &[], "7?\n");
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("the tokenizer has no chat template"),
        "{stderr}"
    );
}
