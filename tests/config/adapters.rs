//! `[adapter]`, `[dpo]` and quantised base models: what is refused, and what follows from what is not.

use firebrick::config::{AdapterInit, BlockFormat, BlockSize, Plan};

use crate::{issues, resolve};

const BASE: &str = "\
[model]
base_model = \"tests/data/reference/llama\"
[tokenizer]
type = \"byte\"
[data]
sequence_len = 32
[[data.datasets]]
path = \"data/*.txt\"
[train]
max_steps = 100
[adapter]
r = 4
lora_alpha = 8
";

fn plan(sets: &[&str]) -> Plan {
    resolve(BASE, sets).unwrap_or_else(|error| panic!("{sets:?}\n{error}"))
}

#[test]
fn a1_every_contradiction_is_refused() {
    let tied = "model.base_model=tests/data/reference/qwen2";
    let phi3 = "model.base_model=tests/data/reference/phi3";
    let quantised = "model.base_model=tests/data/quantised/nf4";
    let cases: &[(&[&str], &str)] = &[
        (&["model={preset=\"stories-260k\"}"], "nothing to adapt"),
        (
            &["adapter.target_modules=[\"qproj\"]"],
            "\"qproj\" in `target_modules`",
        ),
        (&["adapter.target_modules=[]"], "names no layer"),
        (
            &["adapter.target_modules=[\"re:(\"]"],
            "is not a regular expression",
        ),
        (
            &["adapter.target_modules=[\"re:q_proj\"]"],
            "matches no linear layer",
        ),
        (&["adapter.layers=[0, 2]"], "names block 2"),
        (
            &["adapter.rank_pattern={ nothing = 2 }"],
            "matches no layer that has an adapter",
        ),
        (&["adapter.rank_pattern={ q_proj = 0 }"], "rank 0"),
        (
            &["adapter.rank_pattern={ q_proj = 65537 }"],
            "rank 65537 for \"q_proj\"",
        ),
        (
            &["adapter.rank_pattern={ \".*_proj\" = 2, \"q_proj\" = 8 }"],
            "\".*_proj\" and \"q_proj\" in `rank_pattern`",
        ),
        (
            &["adapter.alpha_pattern={ q_proj = 2.0, \"self_attn\\\\..*\" = 8.0 }"],
            "say different things about layers.0.self_attn.q_proj",
        ),
        (
            &["adapter.alpha_pattern={ q_proj = -1.0 }"],
            "lora_alpha -1",
        ),
        (
            &["adapter.alpha_pattern={ \"(\" = 1.0 }"],
            "is not a regular expression",
        ),
        (&["adapter.modules_to_save=[\"q_proj\"]"], "no such module"),
        (
            &[tied, "adapter.modules_to_save=[\"lm_head\"]"],
            "are one matrix",
        ),
        (
            &[
                "adapter.target_modules=[\"lm_head\"]",
                "adapter.modules_to_save=[\"lm_head\"]",
            ],
            "has an adapter already",
        ),
        (
            &[
                "adapter.target_modules=[\"lm_head\"]",
                "adapter.lora_dropout=0.1",
            ],
            "does not reach",
        ),
        (
            &["adapter={type=\"dora\", init=\"pissa\"}"],
            "together with type = \"dora\"",
        ),
        (
            &[phi3, "adapter={type=\"dora\", target_modules=[\"q_proj\"]}"],
            "for a part of layers.0.self_attn.qkv_proj",
        ),
        (&["adapter.init=loftq"], "nothing is quantised"),
        (
            &["adapter.loftq_iterations=2"],
            "only with init = \"loftq\"",
        ),
        (&[quantised, "adapter.init=pissa"], "codes already"),
        (
            &["quantization.weights=ternary", "adapter.init=pissa"],
            "ternary weights stay",
        ),
        (
            &[
                "quantization.weights=ternary",
                "quantization.int8_forward=true",
            ],
            "with [adapter]",
        ),
        (
            &[quantised, "quantization.weights=int8"],
            "not what the base model has",
        ),
        (
            &[quantised, "quantization.double_quant=false"],
            "not what the base model has",
        ),
        (
            &["quantization={weights=\"nf4\", granularity=\"row\"}"],
            "only with weights = \"ternary\"",
        ),
        (
            &["quantization={weights=\"nf4\", symmetric=true}"],
            "only with weights = \"int4\"",
        ),
        (
            &["quantization.double_quant=true"],
            "only with weights = \"nf4\"",
        ),
        (&["dpo.beta=0.2"], "only with task = \"dpo\""),
        (
            &["task=dpo", "adapter.init=pissa"],
            "the reference is the base model as it is",
        ),
        (
            &["task=dpo", "data.sample_packing=true"],
            "two rows of a batch",
        ),
        (
            &["task=dpo", "data.val_path=x.jsonl"],
            "`val_path` in [data] with `task`",
        ),
        (
            &["task=dpo", "data.datasets.0.weight=2"],
            "every pair comes once",
        ),
    ];
    for (sets, message) in cases {
        let found = issues(BASE, sets);
        assert_eq!(found.len(), 1, "{sets:?}: {found:#?}");
        assert!(
            found[0].message.contains(message),
            "{sets:?}: {}",
            found[0].message
        );
        assert!(found[0].origin.is_some(), "{sets:?} points nowhere");
        assert!(found[0].help.is_some(), "{sets:?} says not what to do");
    }
    let without: String = BASE.split("[adapter]").next().unwrap().to_string();
    for format in ["nf4", "fp4", "int4", "int8"] {
        let found = issues(&without, &[&format!("quantization.weights={format}")]);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(
            found[0].help.as_ref().unwrap().contains("[adapter]"),
            "{found:#?}"
        );
    }
    let found = issues(&without, &[quantised]);
    assert!(found[0].message.contains("without [adapter]"), "{found:#?}");
}

#[test]
fn a1_layers_ranks_and_scales_follow_from_names_and_patterns() {
    let all = plan(&[]).adapter.unwrap();
    assert_eq!(all.layers.len(), 14);
    assert!(
        all.layers
            .values()
            .all(|shape| shape.rank == 4 && shape.scale == 2.0)
    );
    let some = plan(&[
        "adapter.target_modules=[\"re:.*attn.[qv]_proj\", \"down_proj\"]",
        "adapter.layers=[1]",
        "adapter.rank_pattern={ down_proj = 16 }",
        "adapter.alpha_pattern={ \"self_attn\\\\.q_proj\" = 4.0 }",
        "adapter.use_rslora=true",
    ]);
    let layers = some.adapter.unwrap().layers;
    let found: Vec<(&str, usize, f64)> = layers
        .iter()
        .map(|(path, shape)| (path.as_str(), shape.rank, shape.scale))
        .collect();
    assert_eq!(
        found,
        [
            ("layers.1.mlp.down_proj", 16, 2.0),
            ("layers.1.self_attn.q_proj", 4, 2.0),
            ("layers.1.self_attn.v_proj", 4, 4.0),
        ]
    );
    // Patterns that overlap and agree.
    plan(&["adapter.rank_pattern={ \"q_.*\" = 8, q_proj = 8 }"]);
    // The names of a family's files are names of its layers.
    let phi3 = plan(&[
        "model.base_model=tests/data/reference/phi3",
        "adapter.target_modules=[\"qkv_proj\"]",
    ]);
    assert_eq!(phi3.adapter.unwrap().layers.len(), 6);
}

#[test]
fn q1_q3_quantised_base_models_resolve_and_repeat() {
    let of = |sets: &[&str]| {
        let plan = plan(sets);
        let again = resolve(&plan.to_toml(), &[]).unwrap();
        assert_eq!(again, plan, "{sets:?}");
        plan.shape.blockwise.unwrap()
    };
    let nf4 = of(&["quantization.weights=nf4"]);
    assert_eq!(
        (nf4.format, nf4.block, nf4.double),
        (BlockFormat::Nf4, BlockSize::Weights(64), false)
    );
    let int8 = of(&["quantization.weights=int8"]);
    assert_eq!(
        (int8.format, int8.block),
        (BlockFormat::Int8, BlockSize::Row)
    );
    let int4 = of(&["quantization={weights=\"int4\", symmetric=false, block_size=32}"]);
    assert_eq!(
        (int4.format, int4.block),
        (BlockFormat::Int4Affine, BlockSize::Weights(32))
    );
    let theirs = of(&["model.base_model=tests/data/quantised/nf4"]);
    assert_eq!((theirs.format, theirs.double), (BlockFormat::Nf4, true));
    let loftq = plan(&["quantization.weights=nf4", "adapter.init=loftq"]);
    assert!(loftq.changes_base() && loftq.adapter.unwrap().init == AdapterInit::Loftq);
}
