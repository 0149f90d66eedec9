//! P1: `[[phase]]`.

use firebrick::config::{
    AdamWPlan, Config, DatasetConfig, Length, OptimizerPlan, PhaseAdapter, PhaseConfig,
    PhaseLength, PhaseLengthKey, Plan, Preset, Sampling, ScheduleSpan, Task, Warmup, json_schema,
};

use crate::{golden, issues, only, resolve};

const RUN: &str = "\
[model]
architecture = \"llama\"
hidden_size = 32
num_hidden_layers = 4
num_attention_heads = 2
[data]
sequence_len = 64
[[data.datasets]]
path = \"data/*.txt\"
[train]
max_steps = 100
micro_batch_size = 4
[optimizer]
learning_rate = 1e-3
betas = [0.9, 0.99]
weight_decay = 0.05
[lr_scheduler]
name = \"cosine\"
warmup_steps = 5
min_lr_ratio = 0.1
";

fn with(phases: &str) -> String {
    format!("{RUN}{phases}")
}

fn plan(phases: &str) -> Plan {
    resolve(&with(phases), &[]).unwrap_or_else(|error| panic!("{error}"))
}

/// "message (help)" of the only issue, and the line that it points at.
fn refused(phases: &str) -> String {
    only(&with(phases), &[])
}

#[test]
fn p1_every_mistake_in_a_phase_is_reported_with_its_line() {
    let text = std::fs::read_to_string("tests/golden/phase-errors.toml").unwrap();
    let Err(error) = resolve(&text, &[]) else {
        panic!("resolved")
    };
    golden("tests/golden/phase-errors.txt", &format!("{error}\n"));
}

#[test]
fn p1_a_phase_needs_a_length_above_zero() {
    let said = refused("[[phase]]\nname = \"x\"");
    assert!(said.starts_with("[[phase]] needs `length`"), "{said}");
    let said = refused("[[phase]]\nlength = 0");
    assert!(
        said.starts_with("`length` in [[phase]] must be from 1 to"),
        "{said}"
    );
}

#[test]
fn p1_a_phase_has_its_own_keys_and_the_rest_of_the_sections() {
    let plan = plan(
        "[[phase]]
         name = \"short\"
         length = \"30%\"
         sequence_len = 16
         micro_batch_size = 16
         optimizer = { learning_rate = 2e-3 }
         freeze = [\"embed_tokens\", \"layers.0-1\"]
         [[phase]]
         length = 20
         lr_scheduler = { name = \"constant\", warmup_steps = 3 }
         optimizer = { name = \"sgd\" }
         gradient_accumulation_steps = 2
         max_grad_norm = 0.5
         dtype = \"bf16\"
         gradient_checkpointing = true
         data = { val_fraction = 0.1 }
         [[phase]]
         length = \"rest\"",
    );
    let [first, second, third] = plan.phases.as_slice() else {
        panic!("{:?}", plan.phases)
    };
    assert_eq!(plan.length, Length::Steps(100));
    assert_eq!(
        (first.name.as_str(), first.length),
        ("short", PhaseLength::Share(0.3))
    );
    assert_eq!((first.data.sequence_len, first.micro_batch_size), (16, 16));
    let adamw = OptimizerPlan::AdamW(AdamWPlan::new([0.9, 0.99], 1e-8, 0.05));
    assert_eq!((&first.optimizer, first.learning_rate), (&adamw, 2e-3));
    assert_eq!(first.schedule_span, ScheduleSpan::Run);
    assert_eq!(first.schedule.warmup, Warmup::Steps(5));
    let frozen: Vec<String> = first.freeze.iter().map(ToString::to_string).collect();
    assert_eq!(frozen, ["embed_tokens", "layers.0-1"]);

    assert_eq!(
        (second.name.as_str(), second.length),
        ("phase-2", PhaseLength::Steps(20))
    );
    // The keys of AdamW in [optimizer] say nothing about SGD; the general ones do.
    let sgd = OptimizerPlan::Sgd {
        momentum: 0.9,
        nesterov: false,
        weight_decay: 0.05,
    };
    assert_eq!((&second.optimizer, second.learning_rate), (&sgd, 1e-3));
    assert_eq!(second.schedule_span, ScheduleSpan::Phase);
    assert_eq!(second.schedule.warmup, Warmup::Steps(3));
    // A schedule of the phase's own takes nothing from the section.
    assert_eq!(second.schedule.min_lr_ratio, 0.0);
    assert_eq!(
        (second.data.val_fraction, second.data.sequence_len),
        (0.1, 64)
    );
    assert_eq!(second.gradient_accumulation_steps, 2);
    assert_eq!(second.max_grad_norm, 0.5);
    assert!(second.gradient_checkpointing && !third.gradient_checkpointing);

    assert_eq!(
        (third.name.as_str(), third.length),
        ("phase-3", PhaseLength::Rest)
    );
    assert_eq!((&third.optimizer, third.micro_batch_size), (&adamw, 4));
    // Positions for the longest phase.
    assert_eq!(plan.shape.max_position_embeddings, 64);
}

#[test]
fn p1_a_resolved_file_gives_the_same_phases() {
    let lion = "optimizer = { name = \"lion\" }";
    for phases in [
        "[[phase]]\nlength = \"50%\"\n[[phase]]\nlength = \"50%\"",
        &format!("[[phase]]\nlength = 40\n{lion}\n[[phase]]\nlength = \"rest\""),
        "[[phase]]\nlength = \"1%\"\nsequence_len = 128\nadapter = \"on\"\n[[phase]]\nlength = \"rest\"\n\
         lr_scheduler = { name = \"wsd\" }\ndata = { sampling = \"epoch\" }",
    ] {
        let plan = plan(phases);
        let again =
            Plan::from_config(plan.config.clone()).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(plan, again);
        let again = resolve(&plan.to_toml(), &[]).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(plan, again);
    }
}

#[test]
fn p1_a_phase_may_have_another_task() {
    let sft = "[[phase]]
        length = \"50%\"
        [[phase]]
        length = \"50%\"
        task = \"sft\"
        data = { datasets = [{ path = \"data/answers.jsonl\", type = \"alpaca\" }], overlong = \"drop\" }";
    // The section's sampling is about windows of text, so it does not reach the rows.
    let run = RUN
        .replace("[data]", "[data]\nsampling = \"random\"")
        .replace("[model]", "[tokenizer]\ntype = \"byte\"\n[model]");
    let text = format!("{run}{sft}");
    let plan = resolve(&text, &[]).unwrap_or_else(|error| panic!("{error}"));
    let tasks: Vec<Task> = plan.phases.iter().map(|phase| phase.task).collect();
    assert_eq!(tasks, [Task::Pretrain, Task::Sft]);
    let sampling = |phase: usize| plan.phases[phase].data.sampling;
    assert_eq!(
        (sampling(0), sampling(1)),
        (Sampling::Random, Sampling::Epoch)
    );
    assert_eq!(plan.phases[1].data.sample_packing, Some(true));
    let again = resolve(&plan.to_toml(), &[]).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(plan, again);
    // What the phase says itself is checked for its task.
    let random = sft.replace("data = { ", "data = { sampling = \"random\", ");
    let said = only(&format!("{run}{random}"), &[]);
    assert!(said.contains("`sampling` = \"random\""), "{said}");
    let text_rows = sft.replace("\"alpaca\"", "\"preference\"");
    let said = only(&format!("{run}{text_rows}"), &[]);
    assert!(said.contains("task = \"dpo\""), "{said}");
    // A task of rows for the run, and text in one phase.
    let run = run
        .replace("[tokenizer]", "task = \"sft\"\n[tokenizer]")
        .replace("sampling = \"random\"\n", "");
    let text =
        format!("{run}[[phase]]\nlength = 50\ntask = \"pretrain\"\n[[phase]]\nlength = \"rest\"");
    let plan = resolve(&text, &[]).unwrap_or_else(|error| panic!("{error}"));
    let again = resolve(&plan.to_toml(), &[]).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(plan, again);
}

#[test]
fn p1_the_run_is_as_long_as_its_phases() {
    let without = |phases: &str| with(phases).replace("max_steps = 100\n", "");
    let length = |phases: &str| {
        let plan = resolve(&without(phases), &[]).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(resolve(&plan.to_toml(), &[]).unwrap(), plan);
        plan.length
    };
    let steps = "[[phase]]\nlength = 30\n[[phase]]\nlength = \"50 steps\"";
    assert_eq!(length(steps), Length::Steps(80));
    let tokens = "[[phase]]\nlength = \"1M tokens\"\n[[phase]]\nlength = \"500k tokens\"";
    assert_eq!(length(tokens), Length::Tokens(1_500_000));
    for mixed in ["\"20%\"", "\"rest\"", "\"1M tokens\""] {
        let phases = format!("[[phase]]\nlength = 30\n[[phase]]\nlength = {mixed}");
        let said = only(&without(&phases), &[]);
        assert!(
            said.contains("the length of the run is not given"),
            "{said}"
        );
    }
}

#[test]
fn p1_lengths_that_do_not_add_up_are_refused() {
    let phases = |lengths: &[&str]| -> String {
        let tables = lengths
            .iter()
            .map(|length| format!("[[phase]]\nlength = {length}\n"));
        tables.collect()
    };
    for (lengths, expected) in [
        (
            &["\"rest\"", "\"rest\""][..],
            "phase `phase-2` takes the rest of the run",
        ),
        (
            &["\"60%\"", "\"50%\""],
            "phase `phase-2` brings the phases to 110 of the run's 100 steps",
        ),
        (
            &["60", "50"],
            "phase `phase-2` brings the phases to 110 of the run's 100 steps",
        ),
        (
            &["60", "\"30%\""],
            "phase `phase-2` ends the phases at 90 of the run's 100 steps",
        ),
        (
            &["60", "\"40%\"", "\"rest\""],
            "phase `phase-3` has no steps",
        ),
        (&["\"0.1%\"", "\"rest\""], "phase `phase-1` has no steps"),
    ] {
        let said = refused(&phases(lengths));
        assert!(said.contains(expected), "{said}");
    }
    let plan = plan(&phases(&["\"70%\"", "\"20%\"", "\"10%\""]));
    assert_eq!(plan.phases.len(), 3);
}

#[test]
fn p1_an_issue_of_a_phase_points_at_the_key_that_holds_there() {
    // One mistake of a section that two phases inherit is one issue.
    let text = with("[[phase]]\nlength = 50\n[[phase]]\nlength = 50")
        .replace("betas = [0.9, 0.99]", "momentum = 0.9");
    let found = issues(&text, &[]);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(
        found[0]
            .message
            .contains("adamw ignores `momentum` in [optimizer]")
    );
    for (phases, expected) in [
        (
            "length = 50\nfreeze = [\"layers.4\"]",
            "phase `phase-1` freezes `layers.4`, which matches no parameter",
        ),
        (
            "length = 50\nfreeze = [\"layers.1-9.mlp\", \"lm_head\"]",
            "phase `phase-1` freezes `lm_head`",
        ),
        (
            "length = 50\nadapter = \"off\"",
            "phase `phase-1` turns an adapter off",
        ),
        (
            "length = 50\nternary_blend = [0.0, 1.0]",
            "the model has no ternary weights",
        ),
        (
            "length = 50\ntask = \"dpo\"\ndata = { datasets = [{ path = \"x.jsonl\" }] }",
            "without a base model",
        ),
        (
            "length = 50\ndpo = { beta = 0.2 }",
            "takes effect only with task = \"dpo\"",
        ),
        (
            "length = 50\nsequence_len = 8\ndata = { sequence_len = 16 }",
            "in [[phase]] and in its `data`",
        ),
        (
            "length = 50\nlr_scheduler = { name = \"linear\", warmup_steps = 60 }",
            "a warm-up of 60 steps in a run of 50",
        ),
    ] {
        let found = issues(
            &with(&format!(
                "[[phase]]\n{phases}\n[[phase]]\nlength = \"rest\""
            )),
            &[],
        );
        let said: Vec<&str> = found.iter().map(|issue| issue.message.as_str()).collect();
        assert!(
            said.iter().any(|message| message.contains(expected)),
            "{phases}: {said:?}"
        );
        assert!(
            found.iter().all(|issue| issue.origin.is_some()),
            "{found:#?}"
        );
    }
    // A position table is as long as it is.
    let gpt2 = RUN.replace("\"llama\"", "\"gpt2\"\nmax_position_embeddings = 64");
    let said = only(
        &format!("{gpt2}[[phase]]\nlength = 50\nsequence_len = 65\n[[phase]]\nlength = 50"),
        &[],
    );
    assert!(
        said.contains("`sequence_len` in [[phase]] is 65, but the model has 64 positions"),
        "{said}"
    );
}

#[test]
fn p1_blends_end_at_the_model_that_is_exported() {
    let ternary = with("[quantization]\nweights = \"ternary\"\n");
    let blend = |first: &str, last: &str| {
        format!("{ternary}[[phase]]\nlength = 50\n{first}\n[[phase]]\nlength = \"rest\"\n{last}")
    };
    let text = blend("ternary_blend = [0.0, 0.0]", "ternary_blend = [0.0, 1.0]");
    let plan = resolve(&text, &[]).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(plan.phases[1].ternary_blend, [0.0, 1.0]);
    assert_eq!(resolve(&plan.to_toml(), &[]).unwrap(), plan);
    let said = only(&blend("", "ternary_blend = [0.0, 0.9]"), &[]);
    assert!(said.contains("ends the run at a blend"), "{said}");
}

#[test]
fn p1_phases_can_be_made_in_code() {
    let mut config = Config::default();
    config.model.preset = Some(Preset::Stories260K);
    config.data.datasets.push(DatasetConfig::new("data/*.txt"));
    config.train.max_steps = Some(100);
    let mut first = PhaseConfig::new(PhaseLengthKey::Text("25%".to_string()));
    first.optimizer = Some(toml::toml! { learning_rate = 0.5 });
    config.phase = vec![
        first,
        PhaseConfig::new(PhaseLengthKey::Text("rest".to_string())),
    ];
    let plan = Plan::from_config(config).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(plan.phases[0].learning_rate, 0.5);
    assert_eq!(plan.phases[1].adapter, PhaseAdapter::On);
}

#[test]
fn p1_the_schema_knows_the_keys_of_a_phase() {
    let schema = json_schema();
    let phase = &schema["$defs"]["PhaseConfig"]["properties"];
    assert!(phase["optimizer"]["properties"]["learning_rate"].is_object());
    assert!(phase["optimizer"]["properties"]["learning_rate"]["default"].is_null());
    assert_eq!(phase["lr_scheduler"]["required"][0], "name");
}

#[test]
fn p1_overrides_reach_into_phases() {
    let phases = with("[[phase]]\nlength = 50\n[[phase]]\nlength = \"rest\"");
    let sets = [
        "phase.1.sequence_len=32",
        "phase.0.optimizer.learning_rate=0.25",
    ];
    let plan = resolve(&phases, &sets).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(plan.phases[1].data.sequence_len, 32);
    assert_eq!(plan.phases[0].learning_rate, 0.25);
}
