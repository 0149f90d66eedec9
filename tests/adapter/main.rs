//! Adapters beside a model, named by the rows of the design they hold up.
#![allow(missing_docs)]

mod files;
mod merging;
#[path = "../support/mod.rs"]
mod support;
mod training;

use burn::module::Module;
use burn::tensor::{Device, TensorData};
use firebrick::config::{
    AdamWPlan, AdapterInit, AdapterPlan, Architecture, LoraShape, OptimizerPlan, PackedLayout,
};
use firebrick::data::Batch;
use firebrick::model::{Decoder, DecoderSpec};
use firebrick::objective::backward;
use firebrick::optimizer::Optimizer;
use support::{ternary, variants};

const LORA: LoraShape = LoraShape {
    rank: 3,
    scale: 2.0,
    dropout: 0.0,
    magnitude: false,
};

const DORA: LoraShape = LoraShape {
    magnitude: true,
    ..LORA
};

fn linear_layers(spec: &DecoderSpec) -> Vec<String> {
    let leaves = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
    ];
    let mlp: &[&str] = match spec.shape.architecture {
        Architecture::Gpt2 => &["mlp.up_proj", "mlp.down_proj"],
        _ => &["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    };
    let names = || leaves.iter().chain(mlp);
    let blocks = 0..spec.shape.num_hidden_layers;
    blocks
        .flat_map(|block| names().map(move |name| format!("layers.{block}.{name}")))
        .collect()
}

fn plan(spec: &DecoderSpec, shape: LoraShape) -> AdapterPlan {
    AdapterPlan {
        layers: linear_layers(spec)
            .into_iter()
            .map(|path| (path, shape))
            .collect(),
        saved: Vec::new(),
        init: AdapterInit::Default,
        loftq_iterations: 1,
        lora_plus_ratio: 1.0,
    }
}

fn trainable(spec: &DecoderSpec) -> Decoder {
    Decoder::new(spec, 5, &Device::flex().autodiff()).unwrap()
}

fn floats(data: &TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

fn logits(model: &Decoder, batch: &Batch) -> Vec<f32> {
    floats(&model.valid().forward(batch).unwrap().into_data())
}

fn is_adapter(path: &str) -> bool {
    path.contains(".adapter.")
}

fn adamw() -> Optimizer {
    Optimizer::new(&OptimizerPlan::AdamW(AdamWPlan::new(
        [0.9, 0.99],
        1e-8,
        0.01,
    )))
}

fn trained(mut model: Decoder, batch: &Batch, steps: usize) -> Decoder {
    let mut optimizer = adamw();
    for _ in 0..steps {
        let result = backward(&model, std::slice::from_ref(batch)).unwrap();
        model = optimizer.step(model, result.gradient, 2e-2);
    }
    model
}

/// Every form of decoder, and ternary ones with packed weights.
fn bases() -> Vec<(String, Decoder)> {
    let latent = variants()
        .into_iter()
        .filter(|(_, spec)| spec.shape.ternary.is_none());
    let dense = latent.map(|(name, spec)| (name, trainable(&spec)));
    let packed = ternary().into_iter().map(|spec| {
        let model = trainable(&spec).packed(PackedLayout::Compute).unwrap();
        (format!("packed {:?}", spec.shape.ternary), model)
    });
    dense.chain(packed).collect()
}
