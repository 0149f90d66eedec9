//! R1 and R2: strict TOML, overrides, resolution.

use std::path::{Path, PathBuf};

use firebrick::cli::report::render_config;
use firebrick::config::{
    Config, ConfigError, DatasetConfig, Decay, Issue, Length, OptimizerPlan, Plan, Preset, Sources,
    TemplateName, Warmup, json_schema, load, reference_markdown, template,
};
use proptest::prelude::*;

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

#[test]
fn r1_every_error_at_once_rendered_with_file_line_column_source_and_hint() {
    let text = std::fs::read_to_string("tests/golden/config-errors.toml").unwrap();
    let sets = ["train.max_steps=1e3", "optimizer.betas=[0.9]", "nonsense"];
    let error = resolve(&text, &sets).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    golden(
        "tests/golden/config-errors.txt",
        &render_config(&error, false),
    );
}

/// The example in the conventions, with keys that exist.
#[test]
fn r1_the_rendering_is_the_one_promised() {
    let text = format!("{MINIMAL}\n[data]\nsequnce_len = 16\n[lr_scheduler]\nwarmup_iter = 16\n");
    let text = text.replace("[[data.datasets]]\npath = \"data/*.txt\"\n", "");
    let error = resolve(&text, &[]).unwrap_err();
    let expected = "\
error[config]: unknown key `sequnce_len` in [data]
 --> configs/x.toml:7:1
  |
7 | sequnce_len = 16
  | ^^^^^^^^^^^
  |
  = help: did you mean `sequence_len`?

error[config]: unknown key `warmup_iter` in [lr_scheduler]
 --> configs/x.toml:9:1
  |
9 | warmup_iter = 16
  | ^^^^^^^^^^^
  |
  = help: did you mean `warmup_steps`? (nanoGPT: warmup_iters)

2 errors in configs/x.toml
";
    assert_eq!(render_config(&error, false), expected);
}

#[test]
fn r1_colours_only_when_asked() {
    let error = resolve("seed = -1", &[]).unwrap_err();
    assert!(render_config(&error, true).contains('\u{1b}'));
    assert!(!render_config(&error, false).contains('\u{1b}'));
}

#[test]
fn r1_what_was_written_cannot_drive_the_terminal() {
    let text = "\"\\u001b[31mred\" = 1\n[device]\nbackend = \"\\u001b]0;x\\u0007\"\n";
    let error = resolve(text, &["a.\u{1b}[1m=1"]).unwrap_err();
    assert!(!render_config(&error, false).contains('\u{1b}'));
}

#[test]
fn r1_hints_name_the_key_that_was_meant() {
    let cases = [
        // Spelling, in this section and elsewhere.
        (
            "train.micro_batch_sise=4",
            "did you mean `micro_batch_size`?",
        ),
        (
            "train.learning_rat=1",
            "did you mean `learning_rate` in [optimizer]?",
        ),
        // The right key in the wrong section.
        (
            "train.learning_rate=1",
            "`learning_rate` belongs in [optimizer]",
        ),
        ("learning_rate=1", "`learning_rate` belongs in [optimizer]"),
        (
            "train.seed=1",
            "`seed` belongs at the top level, before the first [section]",
        ),
        ("data.weight=1", "`weight` belongs in [[data.datasets]]"),
        // Other trainers' names.
        (
            "model.n_embd=8",
            "did you mean `hidden_size`? (GPT-2: n_embd)",
        ),
        (
            "train.per_device_train_batch_size=4",
            "did you mean `micro_batch_size`? (HF: per_device_train_batch_size)",
        ),
        (
            "cutoff_len=4",
            "did you mean `sequence_len` in [data]? (LLaMA-Factory: cutoff_len)",
        ),
        ("optimizer.lr=1", "did you mean `learning_rate`?"),
        (
            "val_set_size=0.1",
            "did you mean `val_fraction` in [data]? (axolotl: val_set_size)",
        ),
        // Sections.
        ("optimiser={name=\"sgd\"}", "did you mean [optimizer]?"),
        (
            "scheduler={name=\"linear\"}",
            "did you mean [lr_scheduler]?",
        ),
        // Nothing like it.
        ("device.zzz=1", "known here: backend"),
        // Values.
        (
            "optimizer.name=\"adamww\"",
            "did you mean \"adamw\"? (one of: adamw, adam, sgd, lion, adafactor, muon)",
        ),
        ("device.backend=\"tpu\"", "one of: auto, cpu, cuda, wgpu"),
        (
            "train.max_steps=\"100\"",
            "write --set 'train.max_steps=100'",
        ),
        ("train.max_steps=1e2", "write --set 'train.max_steps=100'"),
        ("output_dir=7", "write --set 'output_dir=\"7\"'"),
        (
            "eval.sample_prompts=\"x\"",
            "write --set 'eval.sample_prompts=[\"x\"]'",
        ),
        ("optimizer=\"adamw\"", "did you mean `name` in [optimizer]?"),
    ];
    for (set, help) in cases {
        let found = issues(MINIMAL, &[set]);
        assert_eq!(found.len(), 1, "{set}: {found:#?}");
        assert_eq!(found[0].help.as_deref(), Some(help), "{set}");
    }
}

#[test]
fn r1_types_and_ranges() {
    let cases = [
        (
            "seed=-1",
            "`seed` must be from 0 to 9007199254740991, found -1",
        ),
        ("version=2", "`version` must be 1, found 2"),
        (
            "train.micro_batch_size=0",
            "`micro_batch_size` in [train] must be from 1 to 1048576, found 0",
        ),
        (
            "optimizer.learning_rate=0",
            "`learning_rate` in [optimizer] must be greater than 0, found 0",
        ),
        (
            "optimizer.learning_rate=nan",
            "`learning_rate` in [optimizer] must be a finite number, found NaN",
        ),
        (
            "optimizer.learning_rate=inf",
            "`learning_rate` in [optimizer] must be a finite number, found inf",
        ),
        (
            "optimizer.learning_rate=1e999",
            "`learning_rate` in [optimizer] must be a finite number, found inf",
        ),
        (
            "data.val_fraction=0.95",
            "`val_fraction` in [data] must be from 0 to 0.9, found 0.95",
        ),
        (
            "optimizer.betas=[0.9]",
            "`betas` in [optimizer] must have 2 elements, found 1",
        ),
        (
            "optimizer.betas=[0.9, 2]",
            "element 2 of `betas` in [optimizer] must be from 0 to 0.999999, found 2",
        ),
        (
            "data.datasets.0.path=1",
            "`path` in [[data.datasets]] must be a string or a list, found the whole number 1",
        ),
        (
            "data.datasets.0.path=[1]",
            "element 1 of `path` in [[data.datasets]] must be a string, found the whole number 1",
        ),
        ("data.datasets=[{}]", "[[data.datasets]] needs `path`"),
        (
            "model.bias=1",
            "`bias` in [model] must be true or false, found the whole number 1",
        ),
        (
            "output_dir=1979-05-27",
            "`output_dir` must be a string, found a date or time",
        ),
    ];
    for (set, message) in cases {
        let found = issues(MINIMAL, &[set]);
        assert_eq!(found.len(), 1, "{set}: {found:#?}");
        assert_eq!(found[0].message, message);
    }
    let plan = plan(&["optimizer.weight_decay=1"]);
    assert_eq!(
        plan.config.optimizer.weight_decay, 1.0,
        "integers are numbers"
    );
}

#[test]
fn r1_contradictions_are_found_beside_other_errors_and_without_echoes() {
    // The unknown key is what max_steps was meant to be: no "length is not given" on top.
    let text = MINIMAL.replace("max_steps", "max_step");
    let found = issues(&text, &["device.backend=cuda", "lr_scheduler.power=2"]);
    let messages: Vec<&str> = found.iter().map(|issue| issue.message.as_str()).collect();
    assert_eq!(
        messages,
        [
            "unknown key `max_step` in [train]",
            "this build has only the CPU backend",
            "`power` in [lr_scheduler] takes effect only with name = \"polynomial\"",
        ]
    );
    // A bad optimizer name decides nothing about momentum.
    let found = only(MINIMAL, &["optimizer.name=sgdd", "optimizer.momentum=0.5"]);
    assert!(found.starts_with("unknown value \"sgdd\""), "{found}");
    // Keys of a misspelled section are checked as that section's.
    let found = issues(&MINIMAL.replace("[train]", "[trian]\nmicro_batch = 1"), &[]);
    assert_eq!(found.len(), 2, "{found:#?}");
}

#[test]
fn r1_all_syntax_errors_and_the_keys_around_them() {
    let found = issues("seeed = 1\nseed = = 3\noutput_dir =\n[model]\nx = 1\n", &[]);
    let lines: Vec<&str> = found.iter().map(|issue| issue.message.as_str()).collect();
    assert_eq!(lines.len(), 4, "{lines:#?}");
    assert!(lines[1].starts_with("TOML syntax: "), "{lines:#?}");
    assert!(lines[2].starts_with("TOML syntax: "), "{lines:#?}");
    assert!(
        issues("seed = 1\nseed = 2\n", &[])[0]
            .message
            .contains("duplicate key")
    );
    let huge = only(MINIMAL, &["lr_scheduler.warmup_steps=99999999999999999999"]);
    assert!(
        huge.contains("64-bit integer, found 99999999999999999999"),
        "{huge}"
    );
}

/// Every cross-field check: the `--set`s that trip it, part of the message, where it points.
#[test]
fn r1_every_contradiction_is_refused() {
    let cases: &[(&[&str], &str)] = &[
        (&["output_dir="], "`output_dir` is empty"),
        (&["device.backend=wgpu"], "only the CPU backend"),
        (&["train={}"], "length of the run is not given"),
        (
            &["train.num_epochs=1"],
            "`num_epochs` in [train] together with max_steps",
        ),
        (
            &["train.num_epochs=1", "train.max_tokens=1"],
            "`max_tokens` in [train] together with max_steps and num_epochs",
        ),
        (&["tokenizer={type=\"file\"}"], "needs `path`"),
        (&["tokenizer={type=\"file\", path=\"\"}"], "needs `path`"),
        (&["tokenizer.path=t.json"], "only with type = \"file\""),
        (
            &["tokenizer={type=\"byte\", vocab_size=300}"],
            "only with type = \"bpe\"",
        ),
        (&["data.datasets=[]"], "nothing to train on"),
        (&["data.datasets.0.path=[]"], "names no file"),
        (&["data.datasets.0.path="], "names no file"),
        (&["data.datasets.0.path=[\"a\", \"\"]"], "names no file"),
        (&["data.datasets.0.fields.text="], "names no field"),
        (
            &["data.val_path=v.txt", "data.val_fraction=0.05"],
            "together with `val_path`",
        ),
        (&["data.val_path="], "`val_path` in [data] names no file"),
        (
            &["eval.sample_prompts=[\"a\"]", "eval.sample_tokens=0"],
            "completed by 0 tokens",
        ),
        (&["logging.report_to=[\"csv\", \"csv\"]"], "a format twice"),
        // The model.
        (
            &["model={}"],
            "[model] needs architecture, hidden_size, num_hidden_layers, num_attention_heads",
        ),
        (
            &["model={architecture=\"gpt2\", hidden_size=8, num_hidden_layers=1}"],
            "[model] needs num_attention_heads",
        ),
        (&["model.architecture=gpt2"], "not a gpt2 model"),
        (&["model.hidden_size=65"], "65 is not divisible by 8"),
        (&["model.hidden_size=8"], "head_dim 1 is odd"),
        (&["model.head_dim=7"], "head_dim 7 is odd"),
        (
            &["model.num_key_value_heads=3"],
            "8 attention heads cannot share 3",
        ),
        (
            &["model.num_key_value_heads=16"],
            "8 attention heads cannot share 16",
        ),
        (&["model.bias=true"], "llama has no biases"),
        (
            &["model.max_position_embeddings=8"],
            "the model has 8 positions",
        ),
        (
            &["model.preset=gpt2", "data.sequence_len=2048"],
            "the model has 1024 positions",
        ),
        (
            &["model.preset=gpt2", "model.rope_theta=1e4"],
            "gpt2 learns its positions",
        ),
        (
            &["model.preset=gpt2", "model.num_key_value_heads=6"],
            "each of its 12 attention heads",
        ),
        (
            &["model.preset=gpt2", "model.head_dim=32"],
            "gpt2's head_dim is",
        ),
        (
            &[
                "model.preset=gpt2",
                "model.hidden_size=100",
                "model.head_dim=32",
            ],
            "100 is not divisible by 12",
        ),
        // The optimizer.
        (
            &["optimizer={name=\"sgd\", betas=[0.9, 0.9]}"],
            "sgd ignores `betas`",
        ),
        (
            &["optimizer={name=\"adafactor\", betas=[0.9, 0.9]}"],
            "adafactor ignores `betas`",
        ),
        (
            &["optimizer={name=\"lion\", eps=1e-8}"],
            "lion ignores `eps`",
        ),
        (&["optimizer={name=\"sgd\", eps=1e-8}"], "sgd ignores `eps`"),
        (&["optimizer.momentum=0.9"], "adamw ignores `momentum`"),
        (
            &["optimizer={name=\"adam\", nesterov=true}"],
            "adam ignores `nesterov`",
        ),
        (
            &["optimizer={name=\"sgd\", momentum=0, nesterov=true}"],
            "momentum is 0",
        ),
        // The schedule.
        (
            &["lr_scheduler={warmup_steps=1, warmup_ratio=0.1}"],
            "together with `warmup_steps`",
        ),
        (
            &["lr_scheduler.warmup_steps=101"],
            "a warm-up of 101 steps in a run of 100",
        ),
        (
            &["lr_scheduler={name=\"constant\", min_lr_ratio=0.1}"],
            "constant ignores `min_lr_ratio`",
        ),
        (
            &["lr_scheduler={name=\"inverse_sqrt\", warmup_steps=9, min_lr_ratio=0.1}"],
            "inverse_sqrt ignores `min_lr_ratio`",
        ),
        (&["lr_scheduler.name=inverse_sqrt"], "needs a warm-up"),
        (
            &["lr_scheduler={name=\"inverse_sqrt\", warmup_ratio=0}"],
            "needs a warm-up",
        ),
        (
            &["lr_scheduler.decay_ratio=0.1"],
            "`decay_ratio` in [lr_scheduler] takes effect only",
        ),
        (
            &["lr_scheduler.decay_shape=sqrt"],
            "`decay_shape` in [lr_scheduler] takes effect only",
        ),
        (
            &["lr_scheduler.power=2"],
            "`power` in [lr_scheduler] takes effect only",
        ),
        (
            &["lr_scheduler={name=\"wsd\", warmup_steps=90}"],
            "take 110 % of the run",
        ),
        (
            &["lr_scheduler={name=\"wsd\", warmup_ratio=0.5, decay_ratio=0.6}"],
            "take 110 % of the run",
        ),
    ];
    for (sets, message) in cases {
        let found = issues(MINIMAL, sets);
        assert_eq!(found.len(), 1, "{sets:?}: {found:#?}");
        assert!(
            found[0].message.contains(message),
            "{sets:?}: {}",
            found[0].message
        );
        assert!(found[0].origin.is_some(), "{sets:?} points nowhere");
        assert!(found[0].help.is_some(), "{sets:?} says not what to do");
    }
}

#[test]
fn r1_an_unreadable_file_is_a_config_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.toml");
    assert!(matches!(load(&path, &[]), Err(ConfigError::Read { .. })));
    assert!(matches!(
        load(folder.path(), &[]),
        Err(ConfigError::Read { .. })
    ));
    std::fs::write(&path, b"seed = 1\n# \xff\n").unwrap();
    match load(&path, &[]) {
        Err(ConfigError::NotUtf8 { offset, line, .. }) => assert_eq!((offset, line), (11, 2)),
        other => panic!("{other:?}"),
    }
    std::fs::write(&path, vec![b'#'; (1 << 20) + 1]).unwrap();
    assert!(matches!(
        load(&path, &[]),
        Err(ConfigError::TooLarge { .. })
    ));
}

#[test]
fn r1_a_config_from_code_gets_the_same_checks() {
    let mut config = Config::default();
    config.train.micro_batch_size = 0;
    config.optimizer.learning_rate = f64::NAN;
    config.seed = u64::MAX;
    let error = Plan::from_config(config.clone()).unwrap_err();
    assert!(error.to_string().contains("`seed` must be"), "{error}");
    config.seed = 1;
    let error = Plan::from_config(config).unwrap_err().to_string();
    assert!(
        error.contains("`micro_batch_size` in [train] must be"),
        "{error}"
    );
    assert!(
        error.contains("`learning_rate` in [optimizer] must be a finite"),
        "{error}"
    );

    let mut config = Config::default();
    config.model.preset = Some(Preset::Stories260K);
    config.data.datasets.push(DatasetConfig::new("a.txt"));
    config.data.val_path = Some("v.txt".into());
    config.train.num_epochs = Some(1.5);
    let plan = Plan::from_config(config).unwrap();
    assert_eq!(plan.length, Length::Epochs(1.5));
    assert_eq!(plan.config.data.val_fraction, 0.0, "nothing is held out");
}

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
    assert_eq!(plan.schedule.warmup, Warmup::Ratio(0.5));
    assert!(matches!(
        plan.optimizer,
        OptimizerPlan::Lion {
            betas: [0.9, 0.99],
            ..
        }
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
    assert_eq!(p.schedule.decay, Decay::Cosine);
    assert_eq!(
        (p.schedule.warmup, p.schedule.min_lr_ratio),
        (Warmup::Steps(0), 0.0)
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
        let plan = load(&path, &[]).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(
            resolve(&plan.to_toml(), &[]).unwrap(),
            plan,
            "{}",
            path.display()
        );
        let text = std::fs::read_to_string(&path).unwrap();
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
    assert_eq!(parameters("configs/llama-char.toml"), 804_608);
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
    golden("docs/src/reference.md", &reference_markdown());
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn r1_no_text_panics(text in "(?s).{0,200}", set in "(?s).{0,40}") {
        if let Err(error) = resolve(&text, &[&set]) {
            prop_assert!(!render_config(&error, true).is_empty());
        }
    }

    /// TOML-like text, with the format's own words in the wrong places.
    #[test]
    fn r1_no_arrangement_of_our_words_panics(
        words in proptest::collection::vec(proptest::sample::select(WORDS), 0..60),
    ) {
        let text = words.concat();
        if let Err(error) = resolve(&text, &[&text]) {
            prop_assert!(!render_config(&error, false).is_empty());
        }
    }

    #[test]
    fn r1_no_toml_value_panics(key in "[a-z_]{1,12}(\\.[a-z_]{1,12}){0,3}", value in value()) {
        let set = format!("{key}={value}");
        if let Err(error) = resolve(MINIMAL, &[&set]) {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}

const WORDS: &[&str] = &[
    "[",
    "]",
    "[[",
    "]]",
    "{",
    "}",
    "=",
    ".",
    ",",
    "\n",
    "\n",
    " ",
    "\"",
    "'",
    "\"\"\"",
    "#",
    "\r",
    "model",
    "train",
    "data",
    "datasets",
    "data.datasets",
    "path",
    "type",
    "fields",
    "optimizer",
    "name",
    "betas",
    "adamw",
    "\"adamw\"",
    "0",
    "1",
    "-1",
    "1.5",
    "nan",
    "1e999",
    "true",
    "ö",
    "1979-05-27",
    "\n[model]\n",
    "\n[[data.datasets]]\n",
    "preset = \"gpt2\"\n",
    "max_steps = 1\n",
];

/// Any TOML value, nested.
fn value() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        any::<i64>().prop_map(|number| number.to_string()),
        any::<f64>().prop_map(|number| format!("{number:?}").to_lowercase()),
        any::<bool>().prop_map(|truth| truth.to_string()),
        "\\PC{0,12}".prop_map(|text| toml::Value::from(text).to_string()),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4)
                .prop_map(|items| format!("[{}]", items.join(", "))),
            ("[a-z_]{1,8}", inner).prop_map(|(key, value)| format!("{{ {key} = {value} }}")),
        ]
    })
}
