//! Adapters from Rust: your own choice of layers and ranks, your own loop, several adapters over one
//! base model.
//!
//!     cargo run --release --example custom_adapter
//!
//! What it does that no key of the TOML does: the rank grows with the depth of the block.

use std::error::Error;

use burn::module::Module;
use burn::tensor::Device;
use firebrick::adapter::{Adapter, PeftOptions, Registry};
use firebrick::config::{AdamWPlan, AdapterInit, AdapterPlan, LoraShape, OptimizerPlan, Preset};
use firebrick::data::{Batch, Tokenizer};
use firebrick::model::{Decoder, DecoderSpec};
use firebrick::objective::backward;
use firebrick::optimizer::Optimizer;

fn main() -> Result<(), Box<dyn Error>> {
    let losses = run(60)?;
    for (name, loss) in losses {
        println!("{name:<24} {loss:.3} nats per token");
    }
    Ok(())
}

/// Learns two texts apart from each other, each as an adapter; returns the loss on the first text of
/// the base model, of each adapter, and of a mix of both.
pub fn run(steps: usize) -> Result<Vec<(&'static str, f64)>, Box<dyn Error>> {
    let tokenizer = Tokenizer::bytes()?;
    let rows = |text: &str| -> Result<Batch, Box<dyn Error>> {
        Ok(Batch::of_row(&tokenizer.encode(text)?))
    };
    let (river, clock) = (
        rows("the river is older than its bed, and the bed is older than the bridge")?,
        rows("a clock that has stopped is right twice a day, and nobody looks at it then")?,
    );
    let spec = DecoderSpec {
        shape: Preset::Stories260K.shape(),
        vocab_size: tokenizer.vocab_size(),
        eos_token_id: None,
        bos_token_id: None,
    };
    // A base model; `model::folder::load` reads one from a Hugging Face folder.
    let base = Decoder::new(&spec, 1, &Device::flex().autodiff())?;

    let mut registry = Registry::new(base.valid());
    registry.insert("river", learn(&base, &river, steps)?)?;
    registry.insert("clock", learn(&base, &clock, steps)?)?;

    let loss = |model: &Decoder| -> Result<f64, Box<dyn Error>> {
        let nats = model.valid().evaluate(&river)?.into_scalar::<f32>();
        Ok(f64::from(nats) / river.weight())
    };
    let folder = std::env::temp_dir().join("firebrick-custom-adapter");
    std::fs::create_dir_all(&folder)?;
    // What peft reads: adapter_config.json and adapter_model.safetensors.
    registry
        .get("river")?
        .write(&folder, &spec, &PeftOptions::new("the/base/model".as_ref()))?;
    let read_back = Adapter::read(&folder, &spec)?;
    Ok(vec![
        ("the base model", loss(registry.base())?),
        ("with the river adapter", loss(&registry.with("river")?)?),
        (
            "read back from its files",
            loss(&read_back.attach(registry.base().clone())?)?,
        ),
        ("merged into the weights", loss(&registry.merged("river")?)?),
        ("with the clock adapter", loss(&registry.with("clock")?)?),
        (
            "with half of each",
            loss(&registry.mixed(&[("river", 0.5), ("clock", 0.5)])?)?,
        ),
    ])
}

/// An adapter that has learned a text by heart.
fn learn(base: &Decoder, text: &Batch, steps: usize) -> Result<Adapter, Box<dyn Error>> {
    let layers = base.spec().shape.num_hidden_layers;
    // Deeper blocks get wider adapters.
    let of_block = |block: usize| {
        let shape = LoraShape {
            rank: 2 + 2 * block,
            scale: 2.0,
            dropout: 0.0,
            magnitude: false,
        };
        let names = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"];
        names.map(|name| (format!("layers.{block}.{name}"), shape))
    };
    let plan = AdapterPlan {
        layers: (0..layers).flat_map(of_block).collect(),
        saved: Vec::new(),
        init: AdapterInit::Default,
        loftq_iterations: 1,
        lora_plus_ratio: 1.0,
    };
    let mut model = base.clone().adapted(&plan, 7)?;
    let mut optimizer = Optimizer::new(&OptimizerPlan::AdamW(AdamWPlan::new(
        [0.9, 0.99],
        1e-8,
        0.0,
    )));
    for _ in 0..steps {
        let result = backward(&model, std::slice::from_ref(text))?;
        model = optimizer.step(model, result.gradient, 1e-2);
    }
    Ok(Adapter::of(&model))
}
