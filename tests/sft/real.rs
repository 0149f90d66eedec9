//! Real data, in every format.

use std::path::PathBuf;

use firebrick::config::{DatasetConfig, TokenizerKind};
use firebrick::data::RowSampler;

use crate::bench::Bench;

fn data(path: &str) -> String {
    let folder = std::env::var("FIREBRICK_DATA").expect("FIREBRICK_DATA");
    PathBuf::from(folder).join(path).display().to_string()
}

fn bench(path: &str) -> Bench {
    let mut bench = Bench::new();
    bench.tokenizer.path = Some(data("tokenizers/gpt2.json").into());
    bench.data.datasets.push(DatasetConfig::new(data(path)));
    bench.data.sequence_len = 8192;
    bench.template("chatml");
    bench
}

#[test]
#[ignore = "needs FIREBRICK_DATA"]
fn r3_published_files_load_and_say_what_they_are() {
    let files = [
        ("instruct/alpaca_en_demo.json", 999, "alpaca"),
        ("instruct/identity.json", 91, "alpaca"),
        ("instruct/glaive_toolcall_en_demo.json", 300, "sharegpt"),
        ("instruct/kto_en_demo.json", 300, "messages"),
    ];
    for (path, rows, format) in files {
        let corpus = bench(path).load();
        println!("{}", corpus.notes.join("\n"));
        assert_eq!(corpus.train[0].rows.len(), rows, "{path}");
        assert!(
            corpus.notes.join("\n").contains(&format!("auto: {format}")),
            "{path}"
        );
    }
}

#[test]
#[ignore = "needs FIREBRICK_DATA"]
fn r3_gsm8k_packs_without_a_template_and_with_one() {
    for template in [None, Some("chatml".to_string())] {
        let mut bench = bench("gsm8k/train.jsonl");
        bench.data.chat_template = template;
        bench.data.sequence_len = 512;
        bench.data.datasets[0].fields.prompt = "question".to_string();
        bench.data.datasets[0].fields.completion = "answer".to_string();
        let corpus = bench.load();
        println!("{}", corpus.notes.join("\n"));
        assert_eq!(corpus.train[0].rows.len(), 7473);
        let sampler = RowSampler::new(&corpus.train, 512, true, 1).unwrap();
        let places = sampler.places_per_epoch() as f64;
        let fill = places / (512 * sampler.sequences_per_epoch()) as f64;
        assert!(fill > 0.96, "{fill}");
    }
}

#[test]
#[ignore = "needs FIREBRICK_DATA"]
fn r3_published_preference_pairs_load() {
    let pairs = bench("instruct/dpo_en_demo.json").pairs().unwrap();
    assert_eq!(pairs.len(), 300);
    for pair in 0..pairs.len() {
        assert!(pairs.chosen.targets(pair) > 1 && pairs.rejected.targets(pair) > 1);
    }
    let said = bench("instruct/dpo_en_demo.json").error();
    assert!(said.contains("preference pairs"), "{said}");
}

/// Instructions with lists of inputs and outputs are no rows; the error names the fields.
#[test]
#[ignore = "needs FIREBRICK_DATA"]
fn r3_nested_instances_are_an_error_that_names_the_fields() {
    let said = bench("instruct/seed_tasks.jsonl").error();
    assert!(said.contains("seed_tasks.jsonl:1: the record's fields are those of no known format (it has: id, name, instruction, instances, is_classification)"), "{said}");
}

/// Byte-fallback tokenizers put a blank in front and split characters into bytes.
#[test]
#[ignore = "needs FIREBRICK_DATA"]
fn r5_masks_hold_with_sentencepiece() {
    let mut bench = bench("instruct/identity.json");
    bench.tokenizer.path = Some(data("tokenizers/mistral01.json").into());
    assert_eq!(bench.tokenizer.kind, TokenizerKind::File);
    bench.template("mistral");
    let corpus = bench.load();
    let marked = crate::bench::marked(&corpus.tokenizer, &corpus.train[0].rows);
    assert_eq!(
        marked[0],
        "<s>[INST] hi [/INST][Hello! I am {{name}}, an AI assistant developed by {{author}}. How can I assist you today?</s>]"
    );
    assert_eq!(corpus.turn_end, corpus.tokenizer.token_to_id("</s>"));
}
