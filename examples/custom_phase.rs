//! Phases made in code: a model is trained from its top down, one block more in each phase.
//!
//!     cargo run --release --example custom_phase
//!
//! What it does that no file can: the phases follow from the depth of the model.

use std::error::Error;
use std::path::Path;

use firebrick::config::{
    Architecture, Config, DatasetConfig, PathSelector, PhaseLength, Plan, TokenizerKind,
};
use firebrick::train::{Options, Outcome, Run};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::temp_dir().join("firebrick-custom-phase");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder)?;
    let (plan, outcome) = run(&folder, 320)?;
    for phase in &plan.phases {
        let frozen: Vec<String> = phase.freeze.iter().map(ToString::to_string).collect();
        println!("phase {}: frozen [{}]", phase.name, frozen.join(", "));
    }
    let loss = outcome
        .evaluation
        .map_or(f64::NAN, |evaluation| evaluation.val_loss);
    println!("{loss:.3} nats per token, in {}", outcome.folder.display());
    Ok(())
}

/// Trains a small model in `folder` for so many steps.
pub fn run(folder: &Path, steps: u64) -> Result<(Plan, Outcome), Box<dyn Error>> {
    let text = folder.join("text.txt");
    let sentence = "the river is older than its bed, and the bed is older than the bridge. ";
    std::fs::write(&text, sentence.repeat(60))?;
    let mut config = Config {
        output_dir: folder.join("run"),
        ..Config::default()
    };
    config.model.architecture = Some(Architecture::Llama);
    config.model.hidden_size = Some(32);
    config.model.num_hidden_layers = Some(4);
    config.model.num_attention_heads = Some(2);
    config.tokenizer.kind = TokenizerKind::Byte;
    config.data.sequence_len = 32;
    config.data.val_fraction = 0.1;
    config
        .data
        .datasets
        .push(DatasetConfig::new(text.display().to_string()));
    config.train.micro_batch_size = 4;
    config.train.max_steps = Some(steps);
    config.optimizer.learning_rate = 1e-2;
    let mut plan = Plan::from_config(config)?;

    let depth = plan.shape.num_hidden_layers;
    let whole = plan.phases[0].clone();
    plan.phases = (0..depth)
        .rev()
        .map(|lowest| {
            let mut phase = whole.clone();
            phase.name = format!("from-block-{lowest}");
            phase.length = PhaseLength::Share(1.0 / depth as f64);
            // The last phase trains everything.
            if lowest > 0 {
                let frozen = [
                    "embed_tokens".to_string(),
                    format!("layers.0-{}", lowest - 1),
                ];
                let selectors = frozen.iter().map(|text| text.parse());
                phase.freeze = selectors.collect::<Result<Vec<PathSelector>, _>>()?;
            }
            Ok(phase)
        })
        .collect::<Result<_, String>>()?;

    let run = Run::prepare(&plan, Options::default())?.ok_or("the run is complete already")?;
    let outcome = run.train()?;
    Ok((plan, outcome))
}
