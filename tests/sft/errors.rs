//! R3: what is wrong with a row is said, with its place and a way out.

use firebrick::config::{Overlong, TokenizerKind};
use firebrick::data::RowError;
use serde_json::{Value, json};

use crate::bench::{Bench, messages};

fn bench(rows: &[Value]) -> Bench {
    let mut bench = Bench::new();
    bench.rows(rows);
    bench.template("chatml");
    bench
}

fn good() -> Value {
    messages(&[("user", "A"), ("assistant", "B")])
}

#[test]
fn r3_errors_name_the_line_and_what_to_do() {
    let turns = |list: Value| json!({"messages": list});
    let cases = [
        (
            json!({"messages": "hi"}),
            "rows-0.jsonl:2: field `messages` is a string, not a list | correct the row, or take it out",
        ),
        (
            json!({"messages": []}),
            "rows-0.jsonl:2: `messages` is empty | correct the row, or take it out",
        ),
        (
            json!({"other": 1}),
            "rows-0.jsonl:2: messages rows have a field `messages`, this record has not (it has: other) | name the field that holds it: fields = { messages = \"...\" }, or say what the dataset holds: type = \"...\"",
        ),
        (
            turns(json!(["hi"])),
            "rows-0.jsonl:2: message 1 is a string, not an object | correct the row, or take it out",
        ),
        (
            turns(json!([{"content": "x"}])),
            "rows-0.jsonl:2: `role` of message 1 is null, not a string | correct the row, or take it out",
        ),
        (
            turns(json!([{"role": "narrator", "content": "x"}])),
            "rows-0.jsonl:2: message 1 is by `narrator`, who is none of: system, developer, user, human, assistant, gpt, tool, observation, function, function_call | name the role as one of these",
        ),
        (
            turns(json!([{"role": "user", "content": 5}])),
            "rows-0.jsonl:2: the content of message 1 is a number, not a string | correct the row, or take it out",
        ),
        (
            turns(json!([{"role": "user"}])),
            "rows-0.jsonl:2: the content of message 1 is null, not a string | correct the row, or take it out",
        ),
        (
            turns(json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])),
            "rows-0.jsonl:2: message 1 holds a part of type `image_url`; only text can be trained on | correct the row, or take it out",
        ),
        (
            turns(json!([{"role": "function_call", "content": "add(1)"}])),
            "rows-0.jsonl:2: message 1 calls a function, but its text is not JSON: expected value at line 1 column 1 | a call is {\"name\": ..., \"arguments\": {...}}, or a list of such",
        ),
        (
            turns(json!([{"role": "assistant", "tool_calls": [{"arguments": {}}]}])),
            "rows-0.jsonl:2: message 1 calls a function, but it has no name | a call is {\"name\": ..., \"arguments\": {...}}, or a list of such",
        ),
        (
            turns(json!([{"role": "user", "content": "x"}])),
            "1 of 2 rows have no trainable token\nfirst: rows-0.jsonl:2 - no message is the assistant's | take them out, or train on every token: data.train_on = \"all\"",
        ),
        (
            turns(json!([{"role": "assistant", "content": "x", "weight": 0}])),
            "1 of 2 rows have no trainable token\nfirst: rows-0.jsonl:2 - the assistant's messages are switched off by weight = 0 or train = false | take them out, or train on every token: data.train_on = \"all\"",
        ),
        (
            json!({"messages": good()["messages"], "tools": 5}),
            "rows-0.jsonl:2: `tools`: neither a list nor an object | tools are a list of {\"name\": ..., \"description\": ..., \"parameters\": ...}, as JSON or as a string of it",
        ),
    ];
    for (row, said) in cases {
        assert_eq!(bench(&[good(), row]).error(), said);
    }
}

#[test]
fn r3_rows_that_do_not_fit_are_counted_together() {
    let long = |n: usize| messages(&[("user", "A"), ("assistant", &"b".repeat(n))]);
    let mut bench = bench(&[good(), long(300), long(400), good()]);
    let length = |n: usize| 22 + n;
    assert_eq!(
        bench.error(),
        format!(
            "2 of 4 rows are longer than data.sequence_len = 256\nfirst: rows-0.jsonl:2 - {} tokens; the longest has {} | \
             raise data.sequence_len to {}, or set data.overlong = \"drop\" or \"truncate\"",
            length(300),
            length(400),
            length(400) - 1,
        )
    );
    // What the help says is enough, and less is not.
    bench.data.sequence_len = length(400) - 2;
    assert!(matches!(
        bench.row_error(),
        RowError::Overlong { count: 1, .. }
    ));
    bench.data.sequence_len += 1;
    assert_eq!(bench.load().train[0].rows.len(), 4);

    bench.data.sequence_len = 256;
    bench.data.overlong = Some(Overlong::Drop);
    let corpus = bench.load();
    assert_eq!(corpus.train[0].rows.len(), 2);
    let notes = corpus.notes.join("\n");
    assert!(
        notes.contains("left out as longer than sequence_len = 256: 2 rows (first: "),
        "{notes}"
    );

    bench.data.overlong = Some(Overlong::Truncate);
    let corpus = bench.load();
    let rows = &corpus.train[0].rows;
    assert_eq!(
        (rows.len(), rows.places(1), rows.targets(1)),
        (4, 256, 257 - 20)
    );
    let notes = corpus.notes.join("\n");
    assert!(
        notes.contains("cut, being longer than sequence_len = 256: 2 rows"),
        "{notes}"
    );
}

#[test]
fn r3_what_truncation_leaves_nothing_of_is_an_error() {
    let late = messages(&[("user", &"a".repeat(300)), ("assistant", "B")]);
    let mut bench = bench(&[good(), late.clone(), late]);
    bench.data.overlong = Some(Overlong::Truncate);
    assert_eq!(
        bench.error(),
        "2 of 3 rows have no trainable token\nfirst: rows-0.jsonl:2 - the trained part starts at token 320, \
         data.sequence_len = 256 | raise data.sequence_len, or leave such rows out: data.overlong = \"drop\""
    );
}

/// Megabytes in one row are refused or cut without being tokenised.
#[test]
fn r3_an_enormous_row_costs_no_more_than_a_long_one() {
    let enormous = json!({"prompt": "A", "completion": "b".repeat(20 << 20)});
    let mut bench = Bench::new();
    bench.rows(&[enormous]);
    let started = std::time::Instant::now();
    let said = bench.error();
    assert!(
        said.contains("first: rows-0.jsonl:1 - at least 1,"),
        "{said}"
    );
    bench.data.overlong = Some(Overlong::Truncate);
    assert_eq!(bench.load().train[0].rows.tokens(0).len(), 257);
    bench.data.datasets.clear();
    bench.rows(&[json!({"prompt": "b".repeat(20 << 20), "completion": "A"})]);
    assert_eq!(
        bench.error(),
        "1 of 1 rows have no trainable token\nfirst: rows-0.jsonl:1 - the trained part starts far behind data.sequence_len = 256 | \
         raise data.sequence_len, or leave such rows out: data.overlong = \"drop\""
    );
    assert!(started.elapsed().as_secs() < 20);
}

#[test]
fn r3_what_a_template_refuses_is_said_with_the_line() {
    let mut bench = bench(&[good(), messages(&[("tool", "A"), ("assistant", "B")])]);
    bench.template("vicuna");
    assert_eq!(
        bench.error(),
        "rows-0.jsonl:2: chat template `vicuna` refuses these messages: only system, user and assistant messages, not tool | \
         change the row, or use a template that takes such messages: data.chat_template"
    );
    let call = json!({"messages": [
        {"role": "user", "content": "A"},
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {}}]},
    ]});
    bench.data.datasets.clear();
    bench.rows(&[call]);
    bench.template("zephyr");
    assert_eq!(
        bench.error(),
        "rows-0.jsonl:1: chat template `zephyr` leaves out the call of `add` | \
         use a template that writes tool_calls: data.chat_template = \"chatml\""
    );
}

#[test]
fn r3_conversations_without_a_template_say_how_to_get_one() {
    let mut bench = bench(&[good()]);
    bench.data.chat_template = None;
    let said = bench.error();
    assert!(said.starts_with("data.datasets[0] (`rows-0.jsonl`) holds conversations, and there is no chat template: the tokenizer has no chat template | set data.chat_template to one of \"chatml\""), "{said}");
    assert_eq!(bench.try_load().unwrap_err().exit_code(), 2);
    bench.template("tokenizer");
    assert_eq!(bench.try_load().unwrap_err().exit_code(), 2);
}

#[test]
fn r3_preference_pairs_are_not_rows() {
    let bench = bench(&[json!({"prompt": "A", "chosen": "B", "rejected": "C"})]);
    let said = bench.error();
    assert!(
        said.contains("holds preference pairs, which task = \"sft\" does not train on"),
        "{said}"
    );
    assert!(
        said.contains("fields = { completion = \"chosen\" }"),
        "{said}"
    );
}

#[test]
fn r3_a_tokenizer_cannot_be_learned_from_rows() {
    let mut bench = bench(&[good()]);
    bench.tokenizer.kind = TokenizerKind::Bpe;
    assert_eq!(bench.row_error(), RowError::LearnedTokenizer);
}

#[test]
fn r3_nothing_left_is_an_error() {
    let long = messages(&[("user", "A"), ("assistant", &"b".repeat(300))]);
    let mut bench = bench(&[long]);
    bench.data.overlong = Some(Overlong::Drop);
    assert!(
        bench
            .error()
            .contains("no rows are left to train on, of 1 in the files"),
        "{}",
        bench.error()
    );
    bench.data.datasets.clear();
    bench.rows(&[good()]);
    bench.data.val_fraction = 0.5;
    assert!(matches!(
        bench.row_error(),
        RowError::NothingLeft {
            purpose: "train",
            ..
        }
    ));
}

#[test]
fn r3_hostile_rows_are_errors_or_rows() {
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let lines = [
        format!("{{\"messages\": {deep}}}"),
        "{\"messages\": [{\"role\": \"user\", \"content\": \"\\ud800\"}]}".to_string(),
        "{\"messages\"".to_string(),
        "5".to_string(),
    ];
    for line in lines {
        let mut bench = Bench::new();
        bench.file("rows.jsonl", &line);
        bench.template("chatml");
        assert!(bench.error().contains("rows.jsonl:1"), "{}", bench.error());
    }
    // Odd, and text all the same.
    let odd = messages(&[
        ("user", "\u{0}\u{fffd}\r\n"),
        ("assistant", "\u{202e}\u{0}"),
    ]);
    let marked = bench(&[odd]).marked().concat();
    assert!(marked.contains("[\u{202e}\u{0}<|im_end|>]"), "{marked:?}");
    // Special tokens in the text are taken as such, as everywhere.
    let special = messages(&[("user", "<|im_end|>"), ("assistant", "B")]);
    assert_eq!(bench(&[special]).load().train[0].rows.len(), 1);
}
