//! R3: what records mean.

use firebrick::config::{DatasetKind, TrainOn};
use serde_json::{Value, json};

use crate::bench::{Bench, messages};

const CHATML: &str = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Hello<|im_end|>]\n";

/// Each row says the same thing in another form.
#[test]
fn r3_every_conversation_format_is_detected_said_and_means_the_same() {
    let cases = [
        (
            messages(&[("user", "Hi"), ("assistant", "Hello")]),
            "auto: messages, from messages",
        ),
        (
            json!({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
            "auto: sharegpt, from conversations",
        ),
        (
            json!({"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}),
            "auto: sharegpt, from conversations",
        ),
        (
            json!({"prompt": "Hi", "completion": "Hello"}),
            "auto: completion, from prompt, completion",
        ),
        (
            json!({"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}),
            "auto: completion, from prompt, completion",
        ),
        (
            json!({"instruction": "Hi", "input": "", "output": "Hello"}),
            "auto: alpaca, from instruction, output",
        ),
        (
            json!({"messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": "Hello"},
            ]}),
            "auto: messages, from messages",
        ),
    ];
    for (row, said) in cases {
        let mut bench = Bench::new();
        bench.rows(std::slice::from_ref(&row));
        bench.template("chatml");
        assert_eq!(bench.marked(), [CHATML], "{row}");
        let notes = bench.load().notes.join("\n");
        assert!(
            notes.contains(&format!("1 file ({said}): 1 row")),
            "{notes}"
        );
    }
}

#[test]
fn r3_fields_are_named_by_the_config() {
    let mut bench = Bench::new();
    let row = json!({"question": "Hi", "answer": "Hello", "id": 7});
    bench.rows(&[row]);
    assert_eq!(
        bench.error(),
        "rows-0.jsonl:1: the record's fields are those of no known format (it has: question, answer, id) | \
         if these are prompts and answers: fields = { prompt = \"question\", completion = \"answer\" }"
    );
    let fields = &mut bench.data.datasets[0].fields;
    fields.prompt = "question".to_string();
    fields.completion = "answer".to_string();
    bench.template("chatml");
    assert_eq!(bench.marked(), [CHATML]);
    let notes = bench.load().notes.join("\n");
    assert!(
        notes.contains("from question, answer): 1 row, fields not used: id"),
        "{notes}"
    );

    let mut bench = Bench::new();
    let turns = json!([{"who": "human", "said": "Hi"}, {"who": "gpt", "said": "Hello"}]);
    let dataset = bench.rows(&[json!({"dialog": turns})]);
    dataset.kind = DatasetKind::Sharegpt;
    dataset.fields.conversations = "dialog".to_string();
    dataset.fields.from = "who".to_string();
    dataset.fields.value = "said".to_string();
    bench.template("chatml");
    assert_eq!(bench.marked(), [CHATML]);
}

/// Without a template, rows that are no conversations are written plainly.
#[test]
fn r3_without_a_template_completions_are_joined_and_alpaca_has_its_prompt() {
    let mut bench = Bench::new();
    bench.rows(&[json!({"prompt": "2+2=", "completion": "4"})]);
    bench.rows(&[
        json!({"instruction": "Add", "input": "1 2", "output": "3"}),
        json!({"instruction": "Hi", "output": "Hello", "system": "Be kind.", "history": [["A", "B"]]}),
    ]);
    bench.rows(&[json!({"text": "All of it"})]);
    assert_eq!(
        bench.marked(),
        [
            "2+2=[4<|endoftext|>]",
            "Below is an instruction that describes a task, paired with an input that provides further \
             context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd\n\n\
             ### Input:\n1 2\n\n### Response:\n[3<|endoftext|>]",
            "Be kind.\n\n### Instruction:\nA\n\n### Response:\n[B<|endoftext|>]\n\n### Instruction:\nHi\n\n\
             ### Response:\n[Hello<|endoftext|>]",
            "[All of it<|endoftext|>]",
        ]
    );
    bench.data.train_on = Some(TrainOn::Last);
    assert!(bench.marked()[2].contains("Response:\nB<|endoftext|>\n\n"));
    bench.data.train_on = Some(TrainOn::All);
    assert_eq!(bench.marked()[0], "[2+2=4<|endoftext|>]");
}

#[test]
fn r3_alpaca_becomes_a_conversation_with_a_template() {
    let mut bench = Bench::new();
    bench.rows(&[json!({
        "instruction": "Add", "input": "1 2", "output": "3", "system": "S", "history": [["A", "B"]],
    })]);
    bench.template("zephyr");
    assert_eq!(
        bench.marked(),
        [
            "<|system|>\nS<|endoftext|>\n<|user|>\nA<|endoftext|>\n<|assistant|>\n[B<|endoftext|>]\n\
          <|user|>\nAdd\n1 2<|endoftext|>\n<|assistant|>\n[3<|endoftext|>]\n"
        ]
    );
}

#[test]
fn r3_calls_of_functions_come_in_three_forms_and_go_out_in_one() {
    let call = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>";
    let wanted = format!(
        "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n[{call}<|im_end|>]\n\
         <|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n\
         <|im_start|>assistant\n[Two<|im_end|>]\n"
    );
    let with = |caller: Value| {
        json!({"messages": [
            {"role": "user", "content": "1?"}, caller, {"role": "tool", "content": "2", "tool_call_id": "x"},
            {"role": "assistant", "content": "Two"},
        ]})
    };
    let rows = [
        with(json!({"role": "assistant", "content": null, "tool_calls": [
            {"id": "x", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 1}"}},
        ]})),
        with(json!({"role": "assistant", "function_call": {"name": "add", "arguments": {"a": 1}}})),
        with(
            json!({"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}),
        ),
        with(
            json!({"role": "function_call", "content": "{\"name\": \"add\", \"arguments\": {\"a\": 1}}"}),
        ),
    ];
    for row in rows {
        let mut bench = Bench::new();
        bench.rows(std::slice::from_ref(&row));
        bench.template("chatml");
        assert_eq!(bench.marked().concat(), wanted, "{row}");
    }
}

#[test]
fn r3_tools_are_lists_or_texts_and_reach_the_template() {
    let tool = json!({"name": "add", "description": "Adds", "parameters": {}});
    for tools in [
        json!([tool]),
        json!(json!([tool]).to_string()),
        json!([{"type": "function", "function": tool}]),
    ] {
        let mut bench = Bench::new();
        let mut row = messages(&[("user", "Hi"), ("assistant", "Hello")]);
        row["tools"] = tools;
        bench.rows(&[row]);
        bench.data.sequence_len = 1024;
        bench.template("chatml");
        let marked = bench.marked().concat();
        let line = "\n{\"type\": \"function\", \"function\": {\"name\": \"add\", \"description\": \"Adds\", \"parameters\": {}}}\n";
        assert!(marked.contains(line), "{marked}");
        // A template without tools leaves them out, and that is said.
        bench.template("zephyr");
        let notes = bench.load().notes.join("\n");
        assert!(notes.contains("1 row (first: "), "{notes}");
        assert!(
            notes.contains("have tools that the chat template does not write"),
            "{notes}"
        );
    }
}

#[test]
fn r3_json_arrays_and_text_files_are_read_too() {
    let mut bench = Bench::new();
    bench.file("rows.json", "[\n {\"prompt\": \"a\",\n  \"completion\": \"b\"},\n {\"prompt\": \"c\", \"completion\": \"d\"}]");
    bench.file("text.txt", "plain");
    assert_eq!(
        bench.marked(),
        [
            "a[b<|endoftext|>]",
            "c[d<|endoftext|>]",
            "[plain<|endoftext|>]"
        ]
    );
    let corpus = bench.load();
    assert_eq!(corpus.train[0].rows.place(1).line, 4);
}

#[test]
fn r3_kto_labels_are_pointed_out() {
    let mut bench = Bench::new();
    let mut row = messages(&[("user", "Hi"), ("assistant", "Hello")]);
    row["label"] = json!(false);
    bench.rows(&[row]);
    bench.template("chatml");
    let notes = bench.load().notes.join("\n");
    assert!(
        notes.contains("warning: 1 row have label = false"),
        "{notes}"
    );
}

#[test]
#[cfg(not(feature = "parquet"))]
fn r3_a_parquet_file_names_the_feature() {
    let mut bench = Bench::new();
    bench.file("rows.parquet", "PAR1");
    assert_eq!(
        bench.error(),
        "`rows.parquet`: this build does not read Parquet | \
         build it with `--features parquet`, or convert the file to .jsonl"
    );
}

#[test]
fn r3_the_second_load_is_from_the_cache_and_the_same() {
    let mut bench = Bench::new();
    bench.rows(&[
        messages(&[("user", "Hi"), ("assistant", "Hello")]),
        messages(&[("user", "Hi"), ("assistant", "")]),
        messages(&[
            ("user", "1"),
            ("assistant", "2"),
            ("user", "3"),
            ("assistant", "4"),
        ]),
    ]);
    bench.template("chatml");
    bench.data.val_fraction = 0.4;
    let (first, second) = (bench.load(), bench.load());
    let without_origin = |notes: &[String]| {
        notes
            .join("\n")
            .replace("(cache miss, now cached)", "()")
            .replace("(cache hit)", "()")
    };
    assert!(first.notes.join("\n").contains("(cache miss, now cached)"));
    assert!(
        second.notes.join("\n").contains("(cache hit)"),
        "{:?}",
        second.notes
    );
    assert_eq!(without_origin(&first.notes), without_origin(&second.notes));
    assert_eq!(
        (first.val_bytes, first.turn_end),
        (second.val_bytes, second.turn_end)
    );
    for (a, b) in [
        (&first.train[0].rows, &second.train[0].rows),
        (first.val.as_ref().unwrap(), second.val.as_ref().unwrap()),
    ] {
        assert_eq!(a.len(), b.len());
        for row in 0..a.len() {
            assert_eq!(
                (a.tokens(row), a.trained(row), a.place(row)),
                (b.tokens(row), b.trained(row), b.place(row))
            );
        }
    }
    // Whatever decides the rows is part of the key.
    type Change = fn(&mut Bench);
    let changes: [Change; 5] = [
        |bench| bench.data.sequence_len = 200,
        |bench| bench.data.train_on = Some(TrainOn::Last),
        |bench| bench.data.val_fraction = 0.0,
        |bench| bench.data.chat_template = Some("zephyr".to_string()),
        |bench| bench.data.datasets[0].kind = DatasetKind::Messages,
    ];
    for change in changes {
        change(&mut bench);
        assert!(
            bench.load().notes.join("\n").contains("(cache miss"),
            "{:?}",
            bench.data
        );
    }
}

#[test]
fn r3_the_validation_part_is_the_last_rows() {
    let mut bench = Bench::new();
    let row = |n: usize| json!({"prompt": "n", "completion": format!("{n}")});
    bench.rows(&(0..10).map(row).collect::<Vec<_>>());
    bench.data.val_fraction = 0.2;
    let corpus = bench.load();
    assert_eq!(corpus.train[0].rows.len(), 8);
    let val = corpus.val.unwrap();
    let lines: Vec<usize> = (0..val.len()).map(|row| val.place(row).line).collect();
    assert_eq!(lines, [9, 10]);
    // The digit of each; the end tokens are not bytes of the text.
    assert_eq!(corpus.val_bytes, 2);

    bench.data.val_path = Some(bench.path("rows-0.jsonl"));
    bench.data.val_fraction = 0.0;
    assert_eq!(bench.load().val.unwrap().len(), 10);
}

#[test]
#[cfg(feature = "parquet")]
fn r3_parquet_rows_are_records() {
    use std::sync::Arc;

    use parquet::basic::Compression;
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    for compression in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(Default::default()),
        Compression::LZ4,
        Compression::LZ4_RAW,
    ] {
        let mut bench = Bench::new();
        bench.file("rows.parquet", "");
        let schema = "message rows { REQUIRED BYTE_ARRAY prompt (UTF8); REQUIRED BYTE_ARRAY completion (UTF8); }";
        let properties = WriterProperties::builder()
            .set_compression(compression)
            .build();
        let file = std::fs::File::create(bench.path("rows.parquet")).unwrap();
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for values in [["a", "c"], ["b", "d"]] {
            let mut column = group.next_column().unwrap().unwrap();
            let values = values.map(ByteArray::from);
            column
                .typed::<ByteArrayType>()
                .write_batch(&values, None, None)
                .unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
        assert_eq!(bench.marked(), ["a[b<|endoftext|>]", "c[d<|endoftext|>]"]);
        assert_eq!(bench.load().train[0].rows.place(1).line, 2);
    }
    let mut bench = Bench::new();
    bench.file("rows.parquet", "PAR1 this is none PAR1");
    assert!(
        bench.error().starts_with("`rows.parquet`: "),
        "{}",
        bench.error()
    );
}
