//! R5: which tokens are trained.

use firebrick::config::{TokenizerKind, TrainOn};
use firebrick::data::{RowError, Tokenizer};
use serde_json::json;

use crate::bench::{Bench, message, messages};

const TURNS: [(&str, &str); 5] = [
    ("system", "S"),
    ("user", "A"),
    ("assistant", "B"),
    ("user", "C"),
    ("assistant", "D"),
];

fn bench(template: &str) -> Bench {
    let mut bench = Bench::new();
    bench.rows(&[messages(&TURNS)]);
    let path = bench.path("t.jinja");
    std::fs::write(&path, template).unwrap();
    bench.template(path.to_str().unwrap());
    bench
}

#[test]
fn r5_each_named_template_trains_answers_and_their_ends() {
    let wanted = [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n[B<|im_end|>]\n\
             <|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n[D<|im_end|>]\n",
        ),
        (
            "mistral",
            "<s>[INST] S\n\nA [/INST][ B<|endoftext|>][INST] C [/INST][ D<|endoftext|>]",
        ),
        (
            "gemma",
            "<s><start_of_turn>user\nS\n\nA<end_of_turn>\n<start_of_turn>model\n[B<end_of_turn>\n]\
             <start_of_turn>user\nC<end_of_turn>\n<start_of_turn>model\n[D<end_of_turn>\n]",
        ),
        (
            "vicuna",
            "S\n\nUSER: A\nASSISTANT:[ B<|endoftext|>]\nUSER: C\nASSISTANT:[ D<|endoftext|>]\n",
        ),
    ];
    for (name, wanted) in wanted {
        let mut bench = Bench::new();
        bench.rows(&[messages(&TURNS)]);
        bench.template(name);
        assert_eq!(bench.marked(), [wanted], "{name}");
    }
}

#[test]
fn r5_train_on_last_and_all() {
    let mut bench = Bench::new();
    bench.rows(&[messages(&TURNS[1..])]);
    bench.template("chatml");
    let whole = "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n";
    bench.data.train_on = Some(TrainOn::Last);
    assert_eq!(bench.marked(), [format!("{whole}[D<|im_end|>]\n")]);
    bench.data.train_on = Some(TrainOn::All);
    assert_eq!(bench.marked(), [format!("[{whole}D<|im_end|>\n]")]);
}

/// `{% generation %}` decides, also where the prefix says otherwise.
#[test]
fn r5_generation_spans_are_what_is_trained() {
    let template = "{% for m in messages %}{% if m.role == 'assistant' %}>{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    let mut bench = bench(template);
    assert_eq!(bench.marked(), ["SA>[B<|im_end|>]C>[D<|im_end|>]"]);
    let notes = bench.load().notes.join("\n");
    assert!(notes.contains("turns by {% generation %}"), "{notes}");
    bench.data.train_on = Some(TrainOn::Last);
    assert_eq!(bench.marked(), ["SA>B<|im_end|>C>[D<|im_end|>]"]);
}

#[test]
fn r5_a_turn_can_be_switched_off() {
    let row = json!({"messages": [
        message("user", "A"),
        {"role": "assistant", "content": "B", "weight": 0},
        message("user", "C"),
        {"role": "assistant", "content": "D", "weight": 1},
        {"role": "assistant", "content": "E", "train": false},
    ]});
    let generation = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    for template in [
        generation,
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}",
    ] {
        let mut bench = bench(template);
        bench.data.datasets.clear();
        bench.rows(std::slice::from_ref(&row));
        assert_eq!(bench.marked(), ["AB<|im_end|>C[D<|im_end|>]E<|im_end|>"]);
    }
}

/// Templates that rewrite what came before cannot be masked by prefixes.
#[test]
fn r5_a_template_that_rewrites_earlier_turns_is_refused() {
    let rewriting = [
        // Drops earlier answers.
        "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '...' }}{% endfor %}",
        // Ends every text with a generation prompt.
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>",
    ];
    for template in rewriting {
        let bench = bench(template);
        let error = bench.row_error();
        assert!(
            matches!(error, RowError::NotConsistent { message: 3, .. }),
            "{error}"
        );
        let said = bench.error();
        assert!(
            said.starts_with("rows-0.jsonl:1: chat template `t.jinja` rewrites"),
            "{said}"
        );
        assert!(said.contains("{% generation %}"), "{said}");
    }
    // The last answer can be told apart if what comes before it is not rewritten.
    let mut bench = bench(rewriting[0]);
    bench.data.train_on = Some(TrainOn::Last);
    assert!(bench.try_load().is_err());
    // One answer, and a generation prompt that would be trained.
    let mut bench = self::bench(rewriting[1]);
    bench.data.datasets.clear();
    bench.rows(&[messages(&[("user", "A"), ("assistant", "B")])]);
    assert!(matches!(
        bench.row_error(),
        RowError::NotConsistent { message: 2, .. }
    ));
}

/// An end token that only the whole text has (as Phi-3-small's) is trained with the last turn.
#[test]
fn r5_an_end_that_only_the_whole_text_has_is_trained() {
    let mut bench = bench(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% else %}<|im_end|>{% endif %}",
    );
    bench.data.datasets.clear();
    bench.rows(&[messages(&[("user", "A"), ("assistant", "B")])]);
    assert_eq!(bench.marked(), ["<user>A<assistant>[B<|im_end|>]"]);
}

/// A generation prompt that opens an empty thought: what both have in common is given.
#[test]
fn r5_a_generation_prompt_may_say_more_than_the_turn() {
    let mut bench = bench(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}",
    );
    bench.data.datasets.clear();
    bench.rows(&[messages(&[("user", "A"), ("assistant", "B")])]);
    assert_eq!(
        bench.marked(),
        ["<|im_start|>user\nA<|im_end|><|im_start|>assistant\n[B<|im_end|>]"]
    );
}

#[test]
fn r5_never_a_double_begin_token() {
    let mut bench = Bench::new();
    let config = json!({"bos_token": "<s>", "eos_token": "<|im_end|>"});
    std::fs::write(bench.path("tokenizer_config.json"), config.to_string()).unwrap();
    std::fs::write(
        bench.path("chat_template.jinja"),
        "<s>{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
    )
    .unwrap();
    bench.rows(&[messages(&[("user", "A"), ("assistant", "B")])]);
    assert_eq!(bench.marked(), ["<s>A<|im_end|>[B<|im_end|>]"]);
    // A tokenizer that would add one of its own is not asked to.
    let path = bench.path("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut tokenizer: serde_json::Value = serde_json::from_str(&text).unwrap();
    tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [259], "tokens": ["<s>"]}},
    });
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    assert_eq!(bench.marked(), ["<s>A<|im_end|>[B<|im_end|>]"]);
}

/// ` Paris` is one token, and the answer begins behind its blank.
#[test]
fn r5_a_token_that_straddles_the_border_is_trained() {
    let mut bench = Bench::new();
    let text = "Answer: Paris. ".repeat(50);
    let bpe = Tokenizer::train_bpe([text.as_str()].into_iter(), 300).unwrap();
    bpe.save(&bench.path(".")).unwrap();
    bench.rows(&[json!({"prompt": "Answer: ", "completion": "Paris"})]);
    assert_eq!(bench.marked(), ["Answer:[ Paris<|endoftext|>]"]);
    let notes = bench.load().notes.join("\n");
    assert!(
        notes.contains("first characters are the prompt's: 1 token"),
        "{notes}"
    );
}

#[test]
fn r5_characters_of_several_tokens_are_trained_whole() {
    let mut bench = Bench::new();
    bench.rows(&[json!({"prompt": "é", "completion": "日本"})]);
    let corpus = bench.load();
    let rows = &corpus.train[0].rows;
    assert_eq!(rows.tokens(0).len(), 9);
    assert_eq!(rows.trained(0).first(), Some(&(2..9)));
    assert_eq!(rows.targets(0), 7);
}

#[test]
fn r5_the_end_of_a_turn_is_known_and_its_absence_said() {
    let mut bench = Bench::new();
    bench.rows(&[messages(&TURNS)]);
    bench.template("chatml");
    let corpus = bench.load();
    assert_eq!(corpus.turn_end, corpus.tokenizer.token_to_id("<|im_end|>"));
    assert_eq!(
        corpus.tokenizer.chat_template("default").unwrap(),
        corpus.chat_template.unwrap().source()
    );

    bench.template("gemma");
    let corpus = bench.load();
    assert_eq!(corpus.turn_end, None);
    let notes = corpus.notes.join("\n");
    assert!(notes.contains("end without a special token"), "{notes}");
}

#[test]
fn r5_an_empty_answer_is_trained_to_end_and_said() {
    let mut bench = Bench::new();
    bench.rows(&[messages(&[("user", "A"), ("assistant", " ")])]);
    bench.template("chatml");
    assert_eq!(
        bench.marked(),
        ["<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n[ <|im_end|>]\n"]
    );
    let notes = bench.load().notes.join("\n");
    assert!(
        notes.contains("warning: 1 empty answer (first: "),
        "{notes}"
    );
}

#[test]
fn r5_byte_tokenizers_need_no_special_tokens() {
    let mut bench = Bench::new();
    bench.tokenizer.kind = TokenizerKind::Byte;
    bench.tokenizer.path = None;
    bench.rows(&[messages(&[
        ("assistant", "A"),
        ("user", "B"),
        ("assistant", "C"),
    ])]);
    bench.template("chatml");
    assert_eq!(
        bench.marked(),
        [
            "<|im_start|>assistant\n[A<|im_end|>\n]<|im_start|>user\nB<|im_end|>\n<|im_start|>assistant\n[C<|im_end|>\n]"
        ]
    );
}
