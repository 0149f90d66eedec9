//! R1: keys that are fine one by one and not together.

use crate::{MINIMAL, issues};

/// Every cross-field check: the `--set`s that trip it, part of the message, where it points.
#[test]
fn r1_every_contradiction_is_refused() {
    let cases: &[(&[&str], &str)] = &[
        (&["output_dir="], "`output_dir` is empty"),
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
        (&["data.datasets.0.fields.value="], "names no field"),
        // Rows.
        (
            &["data.datasets.0.type=messages"],
            "`type` in [[data.datasets]] takes effect only with task = \"sft\"",
        ),
        (
            &[
                "task=sft",
                "tokenizer.type=byte",
                "data.datasets.0.type=preference",
            ],
            "`type` in [[data.datasets]] takes effect only with task = \"dpo\"",
        ),
        (&["data.sample_packing=true"], "only with task = \"sft\""),
        (&["data.overlong=drop"], "only with task = \"sft\""),
        (&["data.chat_template=chatml"], "only with task = \"sft\""),
        (&["data.train_on=all"], "only with task = \"sft\""),
        (
            &["task=sft"],
            "fine-tuning needs a tokenizer that is already there",
        ),
        (
            &["task=sft", "tokenizer.type=byte", "data.sampling=random"],
            "`sampling` = \"random\" in [data] for rows",
        ),
        (
            &[
                "task=sft",
                "tokenizer.type=byte",
                "data.chat_template=chatmll",
            ],
            "there is no chat template \"chatmll\"",
        ),
        (
            &["data.val_path=v.txt", "data.val_fraction=0.05"],
            "together with `val_path`",
        ),
        (&["data.val_path="], "`val_path` in [data] names no file"),
        (
            &["eval.sample_prompts=[\"a\"]", "eval.sample_tokens=0"],
            "completed by 0 tokens",
        ),
        (
            &["eval.early_stopping_patience=2", "data.val_fraction=0"],
            "without a validation split",
        ),
        (
            &["eval.early_stopping_patience=2", "eval.eval_steps=0"],
            "with one evaluation, at the end",
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
            &["model.sliding_window=8"],
            "llama attends to every earlier token",
        ),
        (
            &["model.preset=gpt2", "model.sliding_window=8"],
            "gpt2 attends to every earlier token",
        ),
        (
            &[
                "model.preset=gpt2",
                "model.rope_scaling={type=\"linear\", factor=2}",
            ],
            "rope_scaling has no effect",
        ),
        (
            &["model.rope_scaling={type=\"linear\", factor=2, low_freq_factor=1}"],
            "takes effect only with type = \"llama3\"",
        ),
        (
            &["model.rope_scaling={type=\"llama3\", factor=8}"],
            "needs `original_max_position_embeddings`",
        ),
        (
            &[
                "model.rope_scaling={type=\"llama3\", factor=8, low_freq_factor=4, original_max_position_embeddings=64}",
            ],
            "low_freq_factor 4 is not below high_freq_factor 4",
        ),
        (
            &[
                "model={architecture=\"phi3\", hidden_size=8, num_hidden_layers=1, num_attention_heads=2, rope_scaling={type=\"linear\", factor=2}}",
            ],
            "phi3 has no linear or llama3 rope scaling",
        ),
        (
            &[
                "model={architecture=\"bitnet\", hidden_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=6}",
            ],
            "bitnet's heads are as wide together as hidden_size = 8",
        ),
        // Ternary weights.
        (
            &["quantization.activation_bits=8"],
            "only with weights = \"ternary\"",
        ),
        (
            &["quantization={weights=\"none\", int8_forward=true}"],
            "only with weights = \"ternary\"",
        ),
        (
            &["quantization={weights=\"ternary\", activation_bits=4}"],
            "activation_bits = 4",
        ),
        (
            &["quantization={weights=\"ternary\", activation_bits=0, int8_forward=true}"],
            "without 8-bit activations",
        ),
        (
            &["quantization={weights=\"ternary\", granularity=24}"],
            "24 is not a multiple of 16",
        ),
        (
            &["quantization={weights=\"ternary\", granularity=48}"],
            "groups of 48 do not divide hidden_size = 64",
        ),
        (
            &[
                "model={architecture=\"gpt2\", hidden_size=8, num_hidden_layers=1, num_attention_heads=2}",
                "quantization={weights=\"ternary\"}",
            ],
            "gpt2 has no ternary form",
        ),
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
            &["model.preset=gpt2", "model.hidden_act=relu2"],
            "gpt2's feed-forward layer has no gate",
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
        (
            &["optimizer={name=\"sgd\", cautious_weight_decay=true}"],
            "sgd ignores `cautious_weight_decay`",
        ),
        (
            &["optimizer={name=\"adafactor\", cautious_weight_decay=true}"],
            "adafactor ignores `cautious_weight_decay`",
        ),
        (
            &["optimizer.momentum_start=0.85"],
            "adamw ignores `momentum_start`",
        ),
        (
            &["optimizer={name=\"muon\", neuron_beta=0.9}"],
            "muon ignores `neuron_beta`",
        ),
        (
            &["optimizer={name=\"muon\", momentum_start=0.85}"],
            "`momentum_start` in [optimizer] without steps to rise in",
        ),
        (
            &["optimizer={name=\"muon\", momentum_warmup_steps=9}"],
            "`momentum_warmup_steps` in [optimizer] without a value to start from",
        ),
        (
            &["optimizer={name=\"normuon\", momentum_start=0.95, momentum_warmup_steps=9}"],
            "`momentum_start` in [optimizer] is 0.95, and the value it rises to is 0.95",
        ),
        (
            &["optimizer={beta2_start=0.99, beta2_warmup_steps=9}"],
            "`beta2_start` in [optimizer] is 0.99, and the value it rises to is 0.95",
        ),
        (
            &["optimizer={name=\"soap\", beta2_start=0.9}"],
            "`beta2_start` in [optimizer] without steps to rise in",
        ),
        (
            &["optimizer={name=\"velvet\", velvet_signals=[\"loss\", \"loss\"]}"],
            "has a signal twice",
        ),
        // The schedule.
        (
            &["lr_scheduler={name=\"linear_to_zero\", min_lr_ratio=0.1}"],
            "linear_to_zero ignores `min_lr_ratio`",
        ),
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
        (
            &["checkpoint.lossy=int8", "checkpoint.format=full"],
            "`lossy` in [checkpoint] takes effect only with format = \"delta\"",
        ),
        (
            &["checkpoint.lossy_moments=true"],
            "`lossy_moments` in [checkpoint] takes effect only with `lossy`",
        ),
        // The average of the weights.
        (
            &["average.start=100"],
            "the average of [average] would begin at step 101, and the run has 100 steps",
        ),
        (&["average.every=101"], "would begin at step 101"),
        (
            &["average={start=\"99%\", every=2}"],
            "would begin at step 101",
        ),
        (
            &["average.start=\"1M tokens\""],
            "`start` in [average] is \"1M tokens\", and an average begins after",
        ),
        (
            &["average.start=\"half\""],
            "`start` in [average] is \"half\", which is not a length",
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
