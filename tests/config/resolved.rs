//! R2: overrides, defaults, and what is generated from the keys. M4: presets.

use std::path::Path;

use firebrick::cli::report::render_config;
use firebrick::config::{
    Config, DatasetConfig, Decay, Length, LionPlan, OptimizerPlan, Overlong, Plan, Preset,
    Sampling, Task, TemplateName, TokenizerKind, TrainOn, Warmup, json_schema, load,
    reference_markdown, template,
};
use proptest::prelude::*;

use crate::{MINIMAL, golden, issues, plan, resolve};

#[test]
fn r2_set_overrides_creates_appends_and_indexes() {
    let plan = plan(&[
        "train.max_steps=7",
        "optimizer.name=lion",
        "output_dir=outputs/a=b",
        "data.datasets.0.path=other.txt",
        "data.datasets.1.path=[\"x\", \"y\"]",
        "data.datasets.1.weight=2",
        "eval.sample_prompts.0=Once",
        "lr_scheduler.warmup_ratio = 0.5",
        "model.hidden_size=32",
    ]);
    assert_eq!(plan.length, Length::Steps(7));
    assert_eq!(plan.config.output_dir, Path::new("outputs/a=b"));
    let data = &plan.config.data.datasets;
    assert_eq!(data[0].path.as_slice(), ["other.txt"]);
    assert_eq!((data[1].path.as_slice().len(), data[1].weight), (2, 2.0));
    assert_eq!(plan.config.eval.sample_prompts, ["Once"]);
    assert_eq!(plan.phases[0].schedule.warmup, Warmup::Ratio(0.5));
    assert!(matches!(
        plan.phases[0].optimizer,
        OptimizerPlan::Lion(LionPlan {
            betas: [0.9, 0.99],
            ..
        })
    ));
    assert_eq!(
        (plan.shape.hidden_size, plan.shape.head_dim),
        (32, 4),
        "the rest is the preset's"
    );
    assert_eq!(plan.shape.intermediate_size, 172);
}

#[test]
fn r2_a_bad_set_is_an_issue_that_shows_the_argument() {
    let cases = [
        ("train.max_steps", "--set without a `=`"),
        ("=1", "--set with an empty key"),
        ("train..max_steps=1", "--set with an empty key"),
        (
            "train.max_steps.x=1",
            "`train.max_steps` is neither a section nor a list",
        ),
        (
            "data.datasets.x.path=1",
            "`data.datasets` is a list: its elements are numbered",
        ),
        (
            "data.datasets.2.path=1",
            "`data.datasets` has 1 elements, counted from 0",
        ),
    ];
    for (set, message) in cases {
        let error = resolve(MINIMAL, &[set]).unwrap_err();
        assert_eq!(error.issues().len(), 1, "{error}");
        assert_eq!(error.issues()[0].message, message);
        assert!(render_config(&error, false).contains(&format!("1 | {set}\n")));
    }
    let error = resolve(MINIMAL, &["seed=1", "train.max_steps=0"]).unwrap_err();
    assert!(
        error.to_string().starts_with("--set:1:17: `max_steps`"),
        "{error}"
    );
    let deep = format!("{}=1", vec!["a"; 100_000].join("."));
    assert_eq!(issues(MINIMAL, &[&deep]).len(), 1);
}

#[test]
fn r2_defaults_are_filled_in() {
    let p = plan(&[]);
    assert_eq!(p.config.model.preset, None, "expanded");
    assert_eq!(p.shape, {
        let mut shape = Preset::Stories260K.shape();
        shape.max_position_embeddings = 512;
        shape
    });
    assert_eq!(p.config.tokenizer.vocab_size, Some(4096));
    assert_eq!(p.phases[0].schedule.decay, Decay::Cosine);
    assert_eq!(
        (
            &p.phases[0].schedule.warmup,
            p.phases[0].schedule.min_lr_ratio
        ),
        (&Warmup::Steps(0), 0.0)
    );
    let gpt2 =
        "model={architecture=\"gpt2\", hidden_size=96, num_hidden_layers=1, num_attention_heads=3}";
    let p = plan(&[gpt2, "data.sequence_len=77"]);
    assert_eq!(
        (p.shape.intermediate_size, p.shape.max_position_embeddings),
        (384, 77)
    );
    let llama = gpt2.replace("gpt2", "llama");
    assert_eq!(plan(&[&llama]).shape.intermediate_size, 256);
    let p = plan(&["data.sequence_len=1024"]);
    assert_eq!(
        p.shape.max_position_embeddings, 1024,
        "rotary positions grow with the data"
    );
}

#[test]
fn r2_running_the_resolved_config_gives_the_same_plan() {
    let variants: &[&[&str]] = &[
        &[],
        &["data.val_path=v.txt"],
        &["task=sft", "tokenizer.type=byte"],
        &[
            "task=sft",
            "tokenizer.type=byte",
            "data.chat_template=chatml",
            "data.datasets.0.fields.prompt=question",
        ],
        &["model.preset=gpt2-xl", "data.datasets.0.fields.text=body"],
        &[
            "model.preset=tinyllama-1.1b",
            "optimizer.name=muon",
            "tokenizer.type=char",
        ],
        &[
            "optimizer.name=sgd",
            "lr_scheduler.name=wsd",
            "lr_scheduler.warmup_ratio=0.1",
        ],
        &[
            "optimizer.name=adafactor",
            "lr_scheduler={name=\"inverse_sqrt\", warmup_steps=3}",
        ],
        &["optimizer.name=lion", "lr_scheduler.name=polynomial"],
        &["optimizer.name=soap", "lr_scheduler.name=linear_to_zero"],
        &[
            "optimizer={name=\"normuon\", momentum_warmup_steps=9, momentum_start=0.5}",
            "optimizer.beta2_warmup_steps=3",
            "optimizer.beta2_start=0.25",
        ],
        &["optimizer={name=\"velvet\", velvet_signals=[]}"],
        &[
            "optimizer.name=adam",
            "lr_scheduler.name=constant",
            "train={max_tokens=99}",
        ],
        &[
            "tokenizer={type=\"file\", path=\"t.json\"}",
            "train={num_epochs=0.3}",
        ],
        &["seed=9007199254740991", "output_dir=ö \"quoted\"\t\\"],
    ];
    for sets in variants {
        let first = plan(sets);
        let again = resolve(&first.to_toml(), &[]).unwrap_or_else(|e| panic!("{sets:?}\n{e}"));
        assert_eq!(again, first, "{sets:?}");
        assert_eq!(
            Plan::from_config(first.config.clone()).unwrap(),
            first,
            "{sets:?}"
        );
    }
}

#[test]
fn r2_every_config_of_the_repository_resolves() {
    let mut count = 0;
    for entry in std::fs::read_dir("configs").unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        // The model of these is not in the repository.
        let sets = match text.contains("base_model = \"models/SmolLM2-135M\"") {
            true => vec![
                "model.base_model=tests/data/reference/llama",
                "data.sequence_len=256",
            ],
            false => Vec::new(),
        };
        let sets: Vec<String> = sets.into_iter().map(str::to_string).collect();
        let plan = load(&path, &sets).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(
            resolve(&plan.to_toml(), &[]).unwrap(),
            plan,
            "{}",
            path.display()
        );
        let launch = format!("#   cargo run --release -- train {}\n", path.display());
        assert!(text.contains(&launch), "{launch} is missing");
        count += 1;
    }
    assert!(count >= 3);
}

#[test]
fn m4_the_char_models_are_of_one_size() {
    let parameters = |name: &str| load(Path::new(name), &[]).unwrap().shape.parameters(65);
    assert_eq!(parameters("configs/nanogpt-char.toml"), 804_096);
    assert_eq!(parameters("configs/llama-char.toml"), 800_000);
}

/// The counts that the models' publishers give.
#[test]
fn m4_presets_have_the_published_size() {
    let published = [
        (Preset::Stories15M, 15_191_712),
        (Preset::SmolLm2_135M, 134_515_008),
        (Preset::SmolLm2_360M, 361_821_120),
        (Preset::SmolLm2_1_7B, 1_711_376_384),
        (Preset::TinyLlama1_1B, 1_100_048_384),
        (Preset::Gpt2, 124_439_808),
        (Preset::Gpt2Medium, 354_823_168),
        (Preset::Gpt2Large, 774_030_080),
        (Preset::Gpt2Xl, 1_557_611_200),
    ];
    for (preset, count) in published {
        let vocab = preset.published_vocab_size();
        assert_eq!(preset.shape().parameters(vocab), count, "{}", preset.name());
    }
    for preset in Preset::ALL {
        let set = format!("model.preset={}", preset.name());
        assert_eq!(plan(&[&set]).shape, preset.shape());
    }
}

#[test]
fn r2_templates_are_valid_as_they_are_and_with_every_line_on() {
    for name in [TemplateName::Llama, TemplateName::Gpt2] {
        let text = template(name);
        let plan = resolve(&text, &[]).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(plan.length, Length::Steps(1000));
        // Every commented key is a real key with a value of its type: only contradictions remain.
        let on: String = text
            .lines()
            .map(|line| match line.strip_prefix("# ") {
                Some(rest) if rest.split_once(" = ").is_some_and(|(key, _)| is_key(key)) => rest,
                Some(rest) if rest.starts_with('[') && rest.ends_with(']') => rest,
                _ => line,
            })
            .map(|line| format!("{line}\n"))
            .collect();
        for issue in issues(&on, &[]) {
            for word in ["unknown", "must", "syntax"] {
                assert!(!issue.message.contains(word), "{}", issue.message);
            }
        }
    }
}

fn is_key(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

#[test]
fn r2_the_reference_page_is_the_generated_one() {
    golden("docs/reference.md", &reference_markdown());
}

#[test]
fn r2_the_schema_describes_every_key() {
    let schema = json_schema();
    assert_eq!(schema["additionalProperties"], false);
    let definitions = schema["$defs"].as_object().unwrap();
    for (name, definition) in definitions {
        let properties = definition.get("properties").and_then(|p| p.as_object());
        for (key, property) in properties.into_iter().flatten() {
            assert!(
                property.get("description").is_some(),
                "{name}.{key} is not documented"
            );
        }
    }
}

proptest! {
    /// Any combination of settings either has issues or survives being written and read.
    #[test]
    fn r2_every_plan_survives_being_written(
        sets in proptest::sample::subsequence(SETTINGS, 0..12).prop_shuffle(),
    ) {
        if let Ok(first) = resolve(MINIMAL, &sets) {
            let again = resolve(&first.to_toml(), &[]);
            prop_assert_eq!(again.map_err(|error| error.to_string()), Ok(first));
        }
    }
}

const SETTINGS: &[&str] = &[
    "model.preset=gpt2",
    "model.preset=smollm2-360m",
    "model.num_attention_heads=16",
    "model.head_dim=10",
    "model.norm_eps=1e-6",
    "model.rope_theta=500000",
    "model.tie_word_embeddings=false",
    "tokenizer.type=byte",
    "tokenizer.vocab_size=300",
    "data.val_path=v.txt",
    "data.val_fraction=0.123456789",
    "data.sequence_len=600",
    "data.datasets.1.path=[\"a\", \"b\"]",
    "train={num_epochs=0.1}",
    "train.gradient_accumulation_steps=3",
    "optimizer.name=lion",
    "optimizer.name=sgd",
    "optimizer.name=muon",
    "optimizer.momentum=0",
    "optimizer.betas=[0, 0.999]",
    "optimizer.learning_rate=3e-4",
    "lr_scheduler.name=wsd",
    "lr_scheduler.name=polynomial",
    "lr_scheduler.name=inverse_sqrt",
    "lr_scheduler.warmup_steps=10",
    "lr_scheduler.warmup_ratio=0.3",
    "lr_scheduler.min_lr_ratio=0.1",
    "lr_scheduler.decay_ratio=0.7",
    "eval.sample_prompts=[\"\", \"\\n\"]",
    "device.backend=cpu",
    "device.backend=cuda",
    "model.dtype=bf16",
    "train.gradient_checkpointing=true",
    "task=sft",
    "data.train_on=last",
    "data.overlong=truncate",
    "data.sample_packing=false",
    "data.chat_template=tokenizer:tool_use",
    "data.datasets.0.type=alpaca",
    "average.decay=0.5",
    "average={every=7, start=\"50%\"}",
];

/// A run that was started before there was `[quantization]` goes on: its resolved.toml says nothing of it.
#[test]
fn r10_dense_weights_leave_nothing_of_quantization_in_the_resolved_toml() {
    let dense = plan(&[]).to_toml();
    assert!(!dense.contains("weights"), "{dense}");
    let ternary = plan(&["quantization.weights=ternary"]).to_toml();
    assert!(ternary.contains("weights = \"ternary\""), "{ternary}");
}

#[test]
fn r2_rows_have_their_defaults_filled_in() {
    let config = plan(&["task=sft", "tokenizer.type=byte"]).config;
    assert_eq!(config.data.sampling, Sampling::Epoch);
    assert_eq!(config.data.sample_packing, Some(true));
    assert_eq!(config.data.overlong, Some(Overlong::Error));
    assert_eq!(config.data.train_on, Some(TrainOn::Assistant));
    assert_eq!(config.data.chat_template, None);
    let text = plan(&[]).to_toml();
    assert!(!text.contains("sample_packing"), "{text}");
    // From code as from a file.
    let mut config = Config {
        task: Task::Sft,
        ..Config::default()
    };
    config.model.preset = Some(Preset::Stories260K);
    config.tokenizer.kind = TokenizerKind::Byte;
    config.data.datasets.push(DatasetConfig::new("a.jsonl"));
    config.train.max_steps = Some(1);
    assert_eq!(
        Plan::from_config(config).unwrap().config.data.sampling,
        Sampling::Epoch
    );
}
