//! R1: every mistake at once, each with its place and a way out.

use firebrick::cli::report::render_config;
use firebrick::config::{Config, ConfigError, DatasetConfig, Length, Plan, Preset, load};

use crate::{MINIMAL, golden, issues, only, plan, resolve};

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
        (
            "packing=true",
            "did you mean `sample_packing` in [data]? (HF: packing)",
        ),
        (
            "data.template=\"llama3\"",
            "did you mean `chat_template`? (LLaMA-Factory: template)",
        ),
        (
            "train.train_on_inputs=true",
            "did you mean `train_on` in [data]? (axolotl: train_on_inputs)",
        ),
        (
            "data.mask_prompt=true",
            "did you mean `train_on`? (mlx-lm: mask_prompt)",
        ),
        (
            "model_ema_decay=0.99",
            "did you mean `decay` in [average]? (timm: model_ema_decay)",
        ),
        (
            "train.use_ema=true",
            "did you mean [average]? (HF: use_ema)",
        ),
        ("average.swa_start=7", "did you mean `start`?"),
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
            "did you mean \"adamw\"? (one of: adamw, adamw8bit, adam, sgd, sign, lion, adafactor, muon, normuon, soap, velvet)",
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
    let found = issues(&text, &["output_dir=", "lr_scheduler.power=2"]);
    let messages: Vec<&str> = found.iter().map(|issue| issue.message.as_str()).collect();
    assert_eq!(
        messages,
        [
            "unknown key `max_step` in [train]",
            "`output_dir` is empty",
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
