//! Row R3: what becomes of files on the way to a batch.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use firebrick::config::{
    DataConfig, DatasetConfig, DatasetKind, FieldNames, OneOrMany, Sampling, TokenizerConfig,
    TokenizerKind,
};
use firebrick::data::{Batch, Bigram, Corpus, DataError, Sampler, TokenCache, eval_batches};
use tempfile::TempDir;

/// A folder with data files and a cache of its own.
struct Place {
    folder: TempDir,
    cache: TokenCache,
}

impl Place {
    fn new(files: &[(&str, &[u8])]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (name, contents) in files {
            fs::write(folder.path().join(name), contents).unwrap();
        }
        let cache = TokenCache::at(&folder.path().join("cache"));
        Self { folder, cache }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn dataset(&self, patterns: &[&str]) -> DatasetConfig {
        let patterns = patterns
            .iter()
            .map(|p| self.path(p).to_str().unwrap().to_string());
        DatasetConfig {
            path: OneOrMany::Many(patterns.collect()),
            kind: DatasetKind::Auto,
            weight: 1.0,
            fields: FieldNames::default(),
        }
    }

    fn data(&self, patterns: &[&str]) -> DataConfig {
        DataConfig {
            sequence_len: 4,
            val_fraction: 0.1,
            datasets: vec![self.dataset(patterns)],
            ..DataConfig::default()
        }
    }

    fn load(&self, data: &DataConfig, kind: TokenizerKind) -> Result<Corpus, DataError> {
        let tokenizer = TokenizerConfig {
            kind,
            vocab_size: (kind == TokenizerKind::Bpe).then_some(280),
            path: None,
        };
        Corpus::load(data, &tokenizer, &self.cache)
    }

    fn cached(&self, ending: &str) -> PathBuf {
        let entries = fs::read_dir(self.cache.folder().unwrap()).unwrap();
        let mut paths = entries.map(|entry| entry.unwrap().path());
        paths
            .find(|path| path.to_str().unwrap().ends_with(ending))
            .unwrap()
    }
}

fn text(corpus: &Corpus, dataset: usize) -> String {
    let ids: Vec<u32> = corpus.train[dataset].tokens.iter().collect();
    corpus.tokenizer.decode(&ids).unwrap()
}

fn val_text(corpus: &Corpus) -> String {
    let ids: Vec<u32> = corpus.val.as_ref().unwrap().iter().collect();
    corpus.tokenizer.decode(&ids).unwrap()
}

/// 1000 characters of a three-letter alphabet that do not repeat soon.
fn letters() -> Vec<u8> {
    (0..1000u32).map(|i| b'a' + (i * i / 7 % 3) as u8).collect()
}

// ---- files to documents -------------------------------------------------------------------------

#[test]
fn r3_files_come_sorted_and_once() {
    let place = Place::new(&[("b.txt", b"bbbbb"), ("a.txt", b"aaaaa"), ("c.md", b"ccccc")]);
    let mut data = place.data(&["*.txt", "a.txt", "*.md", "./b.txt"]);
    data.val_fraction = 0.0;
    let corpus = place.load(&data, TokenizerKind::Char).unwrap();
    assert_eq!(text(&corpus, 0), "aaaaabbbbbccccc");
    assert!(corpus.val.is_none());
    let names: Vec<_> = corpus
        .files
        .iter()
        .map(|f| f.path.file_name().unwrap())
        .collect();
    assert_eq!(names, ["a.txt", "b.txt", "c.md"]);
    assert_eq!(corpus.files[0].bytes, 5);
    assert_eq!(
        corpus.files[0].blake3,
        blake3::hash(b"aaaaa").to_hex().to_string()
    );
}

#[test]
fn r3_hidden_files_are_not_matched_but_can_be_named() {
    let place = Place::new(&[(".hidden.txt", b"hidden"), ("seen.txt", b"seen.")]);
    let mut data = place.data(&["*.txt"]);
    data.val_fraction = 0.0;
    assert_eq!(
        text(&place.load(&data, TokenizerKind::Char).unwrap(), 0),
        "seen."
    );
    data.datasets = vec![place.dataset(&[".hidden.txt"])];
    assert_eq!(
        text(&place.load(&data, TokenizerKind::Char).unwrap(), 0),
        "hidden"
    );
}

#[test]
fn r3_every_document_ends_with_the_end_token() {
    let jsonl = b"{\"text\": \"one\"}\n\n{\"text\": \"\"}\n{\"other\": 1, \"text\": \"two\"}\n";
    let array = b" [ {\"text\": \"three\"},\n {\"text\": \"four\"} ]\n";
    let place = Place::new(&[("a.jsonl", jsonl), ("b.json", array), ("c.txt", b"five")]);
    let mut data = place.data(&["*"]);
    data.val_fraction = 0.0;
    let corpus = place.load(&data, TokenizerKind::Byte).unwrap();
    let end = "<|endoftext|>";
    let expected = ["one", "two", "three", "four", "five"].map(|d| format!("{d}{end}"));
    assert_eq!(text(&corpus, 0), expected.concat());
    assert_eq!(corpus.train[0].tokens.iter().last(), Some(256));
    let said = corpus.notes.join("\n");
    assert!(
        said.contains("auto: 1 .txt as plain text; 1 .json as records"),
        "{said}"
    );
    assert!(
        said.contains("5 documents") && said.contains("1 empty text left out"),
        "{said}"
    );
}

#[test]
fn r3_byte_order_marks_go_and_line_ends_stay() {
    let place = Place::new(&[("a.txt", "\u{feff}a\r\nb\r\n".as_bytes())]);
    let mut data = place.data(&["a.txt"]);
    data.val_fraction = 0.0;
    let corpus = place.load(&data, TokenizerKind::Char).unwrap();
    assert_eq!(text(&corpus, 0), "a\r\nb\r\n");
    assert!(
        corpus
            .notes
            .join("\n")
            .contains("1 byte order mark taken off")
    );
}

// ---- split ---------------------------------------------------------------------------------------

#[test]
fn r3_validation_is_the_tail() {
    let place = Place::new(&[
        ("a.txt", b"0123456789"),
        ("r.jsonl", b"{\"text\":\"first\"}\n{\"text\":\"second\"}"),
    ]);
    let mut data = place.data(&["a.txt"]);
    data.datasets.push(place.dataset(&["r.jsonl"]));
    data.val_fraction = 0.4;
    let corpus = place.load(&data, TokenizerKind::Char).unwrap();
    assert_eq!([text(&corpus, 0), text(&corpus, 1)], ["012345", "first"]);
    assert_eq!(val_text(&corpus), "6789second");
    assert_eq!(corpus.val_bytes, 10);
}

#[test]
fn r3_bpe_is_learned_on_the_training_part_only() {
    let contents = ["ab ".repeat(300), "xyz".repeat(100)].concat();
    let place = Place::new(&[("a.txt", contents.as_bytes())]);
    let mut data = place.data(&["a.txt"]);
    data.val_fraction = 0.25;
    let corpus = place.load(&data, TokenizerKind::Bpe).unwrap();
    assert!(corpus.tokenizer.token_to_id("ab").is_some());
    assert!(corpus.tokenizer.token_to_id("xy").is_none());
    assert_eq!(
        val_text(&corpus),
        format!("{}<|endoftext|>", "xyz".repeat(100))
    );
    assert_eq!(corpus.val_bytes, 300);
    let said = corpus.notes.join("\n");
    assert!(
        said.contains("warning: tokenizer.vocab_size = 280 is more than this data supports"),
        "{said}"
    );
}

#[test]
fn r3_val_path_is_the_validation_split() {
    let place = Place::new(&[
        ("a.txt", b"aaaaaaaa"),
        ("v.jsonl", "{\"text\":\"v\u{e9}\"}".as_bytes()),
    ]);
    let mut data = place.data(&["a.txt"]);
    data.val_path = Some(place.path("v.jsonl"));
    let corpus = place.load(&data, TokenizerKind::Char).unwrap();
    assert_eq!(
        (text(&corpus, 0).as_str(), val_text(&corpus).as_str()),
        ("aaaaaaaa", "v\u{e9}")
    );
    assert_eq!(corpus.val_bytes, 3);

    data.val_path = Some(place.path("a.txt"));
    let corpus = place.load(&data, TokenizerKind::Char).unwrap();
    assert!(
        corpus.notes[0].contains("is also trained on"),
        "{:?}",
        corpus.notes
    );
}

// ---- batches -------------------------------------------------------------------------------------

fn rows(batch: &Batch) -> Vec<(Vec<u32>, Vec<u32>)> {
    let cols = batch.cols;
    let row = |i: usize| {
        let range = i * cols..(i + 1) * cols;
        (
            batch.tokens[range.clone()].to_vec(),
            batch.targets[range].to_vec(),
        )
    };
    (0..batch.rows).map(row).collect()
}

/// Two datasets of bytes that count up, so that a token tells its place.
fn counting(weights: [f64; 2]) -> (Place, Corpus) {
    let first: Vec<u8> = (0..=98).collect();
    let second: Vec<u8> = (99..=127).collect();
    let place = Place::new(&[("a.txt", &first), ("b.txt", &second)]);
    let mut data = place.data(&["a.txt"]);
    data.datasets.push(place.dataset(&["b.txt"]));
    data.datasets[0].weight = weights[0];
    data.datasets[1].weight = weights[1];
    data.val_fraction = 0.0;
    let corpus = place.load(&data, TokenizerKind::Char).unwrap();
    (place, corpus)
}

#[test]
fn r3_targets_are_shifted_by_one() {
    let (_place, corpus) = counting([1.0, 1.0]);
    for sampling in [Sampling::Random, Sampling::Epoch] {
        let sampler = Sampler::new(&corpus, sampling, 4, 1).unwrap();
        let batch = sampler.batch(0, 64);
        for (tokens, targets) in rows(&batch) {
            assert_eq!(tokens[1..], targets[..3]);
            assert_eq!(targets[3], tokens[3] + 1);
        }
        assert_eq!(batch.weight(), 64.0 * 4.0);
        assert_eq!(batch.positions[..8], [0, 1, 2, 3, 0, 1, 2, 3]);
        assert!(batch.segment_ids.iter().all(|&id| id == 0));
    }
}

#[test]
fn r3_the_order_does_not_depend_on_the_micro_batch_size() {
    let (_place, corpus) = counting([1.0, 2.5]);
    for sampling in [Sampling::Random, Sampling::Epoch] {
        let sampler = Sampler::new(&corpus, sampling, 4, 7).unwrap();
        let whole = rows(&sampler.batch(10, 96));
        let ones: Vec<_> = (10..106)
            .flat_map(|row| rows(&sampler.batch(row, 1)))
            .collect();
        assert_eq!(whole, ones);
        let other_seed = Sampler::new(&corpus, sampling, 4, 8).unwrap();
        assert_ne!(whole, rows(&other_seed.batch(10, 96)));
    }
}

#[test]
fn r3_an_epoch_covers_each_window_once() {
    let (_place, corpus) = counting([1.0, 2.0]);
    let sampler = Sampler::new(&corpus, Sampling::Epoch, 4, 3).unwrap();
    // (99 - 1) / 4 = 24 windows, and twice (29 - 1) / 4 = 7.
    assert_eq!(sampler.windows_per_epoch(), 24 + 14);
    assert_eq!(sampler.tokens_per_epoch(), 38 * 4);
    let mut orders = Vec::new();
    for epoch in 0..3 {
        let starts: Vec<u32> = rows(&sampler.batch(epoch * 38, 38))
            .iter()
            .map(|(tokens, _)| tokens[0])
            .collect();
        let mut counts: HashMap<u32, u32> = HashMap::new();
        for start in &starts {
            *counts.entry(*start).or_default() += 1;
        }
        assert_eq!(counts.len(), 24 + 7);
        // Side by side, all shifted alike; the second dataset's come twice.
        let shift = *counts.keys().min().unwrap();
        assert!(shift <= 2);
        for (start, count) in counts {
            let second = start >= 99;
            assert_eq!(count, if second { 2 } else { 1 });
            assert_eq!(
                if second {
                    (start - 99) % 4
                } else {
                    (start - shift) % 4
                },
                0
            );
        }
        orders.push(starts);
    }
    assert_ne!(orders[0], orders[1]);
    assert_ne!(orders[1], orders[2]);
}

#[test]
fn r3_a_fractional_weight_takes_another_part_each_epoch() {
    let (_place, corpus) = counting([0.5, 1.0]);
    let sampler = Sampler::new(&corpus, Sampling::Epoch, 4, 3).unwrap();
    assert_eq!(sampler.windows_per_epoch(), 12 + 7);
    let part = |epoch: u64| {
        let rows = rows(&sampler.batch(epoch * 19, 19));
        let mut starts: Vec<u32> = rows
            .iter()
            .map(|(t, _)| t[0] / 4)
            .filter(|&s| s < 24)
            .collect();
        starts.sort_unstable();
        starts.dedup();
        starts
    };
    assert_eq!(part(0).len(), 12);
    assert_ne!(part(0), part(1));
}

#[test]
fn r3_random_windows_follow_weight_times_tokens() {
    let (_place, corpus) = counting([1.0, 3.0]);
    let sampler = Sampler::new(&corpus, Sampling::Random, 4, 11).unwrap();
    let rows = rows(&sampler.batch(0, 20_000));
    let second = rows.iter().filter(|(tokens, _)| tokens[0] >= 99).count() as f64 / 20_000.0;
    let expected = 3.0 * 29.0 / (99.0 + 3.0 * 29.0);
    assert!((second - expected).abs() < 0.015, "{second} {expected}");
    // Every offset that leaves room for the target occurs, as in nanoGPT.
    let mut starts: Vec<u32> = rows.iter().map(|(tokens, _)| tokens[0]).collect();
    starts.sort_unstable();
    starts.dedup();
    assert_eq!(starts, (0..95).chain(99..124).collect::<Vec<_>>());
}

#[test]
fn r3_the_bigram_baseline_beats_a_uniform_guess_and_not_the_truth() {
    let place = Place::new(&[("a.txt", &letters())]);
    let corpus = place
        .load(&place.data(&["a.txt"]), TokenizerKind::Char)
        .unwrap();
    let streams = corpus.train.iter().map(|stream| &stream.tokens);
    let model = Bigram::fit(streams, corpus.tokenizer.vocab_size());
    let nats = model.nats_per_token(corpus.val.as_ref().unwrap()).unwrap();
    assert!(nats > 0.0 && nats < 3f64.ln(), "{nats}");
    let predicted: f64 = eval_batches(corpus.val.as_ref().unwrap(), 7, 3)
        .map(|batch| batch.weight())
        .sum();
    assert_eq!(predicted, 99.0);
}

// ---- cache ---------------------------------------------------------------------------------------

fn origin(corpus: &Corpus) -> &str {
    corpus
        .notes
        .last()
        .unwrap()
        .rsplit('(')
        .next()
        .unwrap()
        .trim_end_matches(')')
}

#[test]
fn r3_the_second_load_is_a_cache_hit_and_says_the_same() {
    let place = Place::new(&[("a.txt", &letters())]);
    let data = place.data(&["a.txt"]);
    for kind in [TokenizerKind::Char, TokenizerKind::Bpe, TokenizerKind::Byte] {
        let first = place.load(&data, kind).unwrap();
        let second = place.load(&data, kind).unwrap();
        assert_eq!(
            (origin(&first), origin(&second)),
            ("cache miss, now cached", "cache hit")
        );
        assert_eq!(first.train[0].tokens, second.train[0].tokens);
        assert_eq!(
            (&first.val, first.val_bytes),
            (&second.val, second.val_bytes)
        );
        assert_eq!(first.tokenizer.to_json(), second.tokenizer.to_json());
        let files = |corpus: &Corpus| corpus.notes[0].clone();
        assert_eq!(files(&first), files(&second));
    }
}

#[test]
fn r3_other_contents_or_another_split_are_another_entry() {
    let place = Place::new(&[("a.txt", &letters())]);
    let mut data = place.data(&["a.txt"]);
    place.load(&data, TokenizerKind::Char).unwrap();
    data.val_fraction = 0.2;
    assert_eq!(
        origin(&place.load(&data, TokenizerKind::Char).unwrap()),
        "cache miss, now cached"
    );
    let mut changed = letters();
    changed[500] = b'z';
    fs::write(place.path("a.txt"), changed).unwrap();
    let corpus = place.load(&data, TokenizerKind::Char).unwrap();
    assert_eq!(origin(&corpus), "cache miss, now cached");
    assert!(text(&corpus, 0).contains('z'));
    // What does not change the tokens does not change the entry.
    data.sequence_len = 9;
    data.datasets[0].weight = 3.0;
    assert_eq!(
        origin(&place.load(&data, TokenizerKind::Char).unwrap()),
        "cache hit"
    );
}

#[test]
fn r3_a_damaged_cache_is_announced_and_made_anew() {
    let place = Place::new(&[("a.txt", &letters())]);
    let data = place.data(&["a.txt"]);
    let good = place.load(&data, TokenizerKind::Bpe).unwrap();
    let damages: [fn(&Path); 5] = [
        |path| fs::write(path, b"").unwrap(),
        |path| fs::write(path, vec![0xff; 100]).unwrap(),
        |path| {
            let contents = fs::read(path).unwrap();
            fs::write(path, &contents[..contents.len() / 2]).unwrap();
        },
        |path| {
            let mut contents = fs::read(path).unwrap();
            let last = contents.len() - 9;
            contents[last] ^= 1;
            fs::write(path, contents).unwrap();
        },
        |path| {
            // The same bytes under another type.
            let contents = fs::read(path).unwrap();
            let at = contents.windows(5).position(|w| w == b"\"U16\"");
            let Some(at) = at else {
                return fs::write(path, b"{}").unwrap();
            };
            let mut contents = contents;
            contents[at..at + 5].copy_from_slice(b"\"F16\"");
            fs::write(path, contents).unwrap();
        },
    ];
    for ending in [".safetensors", ".tokenizer.json"] {
        for (number, damage) in damages.iter().enumerate() {
            let path = place.cached(ending);
            // The loaded corpus maps the file, so a damaged copy is put in its place.
            let copy = path.with_extension("copy");
            fs::copy(&path, &copy).unwrap();
            damage(&copy);
            fs::rename(&copy, &path).unwrap();
            let corpus = place.load(&data, TokenizerKind::Bpe).unwrap();
            let said = corpus.notes.join("\n");
            assert!(said.contains("; made anew"), "{ending} {number}: {said}");
            assert_eq!(corpus.train[0].tokens, good.train[0].tokens);
            let again = place.load(&data, TokenizerKind::Bpe).unwrap();
            assert!(
                !again.notes.join("\n").contains("made anew"),
                "{ending} {number}"
            );
        }
    }
}

#[test]
fn r3_a_cache_that_cannot_be_written_does_not_stop_the_run() {
    let place = Place::new(&[
        ("a.txt", &letters()),
        ("cache", b"a file where the folder should be"),
    ]);
    let data = place.data(&["a.txt"]);
    for kind in [TokenizerKind::Char, TokenizerKind::Bpe] {
        let corpus = place.load(&data, kind).unwrap();
        assert_eq!(origin(&corpus), "not cached");
        assert!(
            corpus
                .notes
                .join("\n")
                .contains("the tokens stay in memory"),
            "{:?}",
            corpus.notes
        );
        assert_eq!(corpus.val_bytes, 100);
    }
}
