//! Preference data.

use firebrick::config::{DatasetKind, Overlong};
use firebrick::data::{DataError, RowError};
use serde_json::json;

use crate::bench::{Bench, marked, messages};

#[test]
fn r3_every_form_of_a_pair_means_the_same() {
    let user = json!({"role": "user", "content": "A"});
    let answer = |text: &str| json!({"role": "assistant", "content": text});
    let rows = [
        json!({"prompt": "A", "chosen": "B", "rejected": "C"}),
        json!({"prompt": [user], "chosen": [answer("B")], "rejected": [answer("C")]}),
        json!({"chosen": [user, answer("B")], "rejected": [user, answer("C")]}),
        json!({"prompt": "A", "chosen": [user, answer("B")], "rejected": [user, answer("C")]}),
        json!({
            "conversations": [{"from": "human", "value": "A"}],
            "chosen": {"from": "gpt", "value": "B"}, "rejected": {"from": "gpt", "value": "C"},
        }),
    ];
    for row in rows {
        let mut bench = Bench::new();
        bench.rows(std::slice::from_ref(&row));
        bench.template("chatml");
        let pairs = bench.pairs().unwrap();
        let text = |answer: &str| {
            format!("<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n[{answer}<|im_end|>]\n")
        };
        assert_eq!(
            marked(&pairs.tokenizer, &pairs.chosen),
            [text("B")],
            "{row}"
        );
        assert_eq!(
            marked(&pairs.tokenizer, &pairs.rejected),
            [text("C")],
            "{row}"
        );
    }
}

/// Answers earlier in the conversation are the prompt's, and the same on both sides.
#[test]
fn r3_only_where_answers_differ_is_trained() {
    let mut bench = Bench::new();
    let side = |last: &str| {
        messages(&[
            ("user", "1"),
            ("assistant", "2"),
            ("user", "3"),
            ("assistant", last),
        ])["messages"]
            .clone()
    };
    bench.rows(&[json!({"chosen": side("4"), "rejected": side("5")})]);
    bench.template("chatml");
    let pairs = bench.pairs().unwrap();
    let text = marked(&pairs.tokenizer, &pairs.chosen).concat();
    assert!(
        text.ends_with("[4<|im_end|>]\n") && text.matches('[').count() == 1,
        "{text}"
    );
}

#[test]
fn r3_a_batch_of_pairs_has_the_chosen_answer_in_every_other_row() {
    let mut bench = Bench::new();
    let pair =
        |n: usize| json!({"prompt": "p", "chosen": "c".repeat(n), "rejected": "r".repeat(2 * n)});
    bench.rows(&[pair(1), pair(9), pair(3)]);
    let pairs = bench.pairs().unwrap();
    let found = pairs.batch(&[1, 2]);
    assert_eq!(
        (found.pairs(), found.batch.rows, found.batch.cols),
        (2, 4, 32)
    );
    let row = |row: usize| found.batch.rows(row..row + 1);
    let tokens = |row: usize, n: usize| found.batch.tokens[row * 32 + 1..row * 32 + 1 + n].to_vec();
    assert_eq!(tokens(0, 9), [u32::from(b'c'); 9]);
    assert_eq!(tokens(1, 18), [u32::from(b'r'); 18]);
    assert_eq!(tokens(2, 3), [u32::from(b'c'); 3]);
    // The answer and its end.
    let weights: Vec<f64> = (0..4).map(|i| row(i).weight()).collect();
    assert_eq!(weights, [10.0, 19.0, 4.0, 7.0]);
}

#[test]
fn r3_a_pair_with_one_answer_that_fits_is_left_out() {
    let mut bench = Bench::new();
    bench.rows(&[
        json!({"prompt": "p", "chosen": "c", "rejected": "r".repeat(300)}),
        json!({"prompt": "p", "chosen": "c", "rejected": "r"}),
    ]);
    let error = bench.pairs().unwrap_err();
    assert!(
        matches!(&error, DataError::Rows(error) if matches!(**error, RowError::Overlong { count: 1, rows: 2, .. }))
    );
    bench.data.overlong = Some(Overlong::Drop);
    let pairs = bench.pairs().unwrap();
    assert_eq!((pairs.len(), pairs.rejected.place(0).line), (1, 2));
    assert!(
        pairs
            .notes
            .join("\n")
            .contains("1 preference pair, 1 left out")
    );
}

#[test]
fn r3_the_fields_of_pairs_are_named_by_the_config() {
    let mut bench = Bench::new();
    let dataset = bench.rows(&[json!({"prompt": "p", "better": "c", "worse": "r"})]);
    dataset.fields.chosen = "better".to_string();
    dataset.fields.rejected = "worse".to_string();
    let pairs = bench.pairs().unwrap();
    assert_eq!(
        marked(&pairs.tokenizer, &pairs.chosen),
        ["p[c<|endoftext|>]"]
    );
    assert_eq!(
        pairs
            .chat_template
            .map(|template| template.name().to_string()),
        None
    );
    bench.data.datasets[0].fields.rejected = "rejected".to_string();
    bench.data.datasets[0].kind = DatasetKind::Preference;
    let said = bench.said(&bench.pairs().unwrap_err());
    assert!(
        said.contains("preference rows have a field `rejected`, this record has not"),
        "{said}"
    );
}

#[test]
fn r3_rows_are_not_pairs() {
    let mut bench = Bench::new();
    bench.rows(&[json!({"prompt": "p", "completion": "c"})]);
    let said = bench.said(&bench.pairs().unwrap_err());
    assert!(
        said.contains("holds completion rows, not preference pairs"),
        "{said}"
    );
}
