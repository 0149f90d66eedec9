//! The README.md of an exported model: what it is and how it came to be.

use serde_json::json;

use super::EvaluatedWeights;
use crate::adapter::OWN_BASE;
use crate::checkpoint::Progress;
use crate::config::{Held, PhaseModel, Plan};
use crate::data::{FileRecord, TrainingData};
use crate::environment::Environment;

/// The step whose weights are exported.
pub(super) struct ExportedStep {
    pub(super) step: u64,
    /// Which weights of that step; None if the run does not average them.
    pub(super) weights: Option<EvaluatedWeights>,
}

impl ExportedStep {
    fn describe(&self) -> String {
        let step = self.step;
        match self.weights {
            Some(EvaluatedWeights::Average) => {
                format!("These weights are an average over the steps up to step {step}.")
            }
            Some(EvaluatedWeights::Current) => format!(
                "These are the weights of step {step}, at which their average had not begun."
            ),
            None => format!("These are the weights of step {step}."),
        }
    }
}

/// Markdown with the front matter that model hubs read. `model` and `data` belong to the phase of
/// the exported step, `files` to all phases.
pub(super) fn model_card(
    (plan, model, device): (&Plan, PhaseModel, Option<&str>),
    (data, files, loss_unit): (&dyn TrainingData, &[FileRecord], &str),
    progress: &Progress,
    exported: ExportedStep,
) -> String {
    let config = &plan.config;
    let shape = &plan.shape;
    let name = config
        .output_dir
        .file_name()
        .unwrap_or_default()
        .to_string_lossy();
    let environment = Environment::detect();
    let is_adapter = model.held() == Held::Adapter;
    let base = config.model.base_model.as_ref().filter(|_| is_adapter);
    let (library, kind) = match base {
        Some(base) if plan.changes_base() => {
            let library = format!("peft\nbase_model: {OWN_BASE}");
            let base = base.display();
            let kind = format!(
                "An adapter for the model in `{OWN_BASE}/` beside this file, which was made of the one \
                 in `{base}` and is another one, a"
            );
            (library, kind)
        }
        Some(base) => {
            let library = format!("peft\nbase_model: {}", json!(base));
            (
                library,
                format!("An adapter for the model in `{}`, a", base.display()),
            )
        }
        None if shape.of_its_own().is_some() => ("firebrick".to_string(), "A".to_string()),
        None => ("transformers".to_string(), "A".to_string()),
    };
    let quality = match progress.best {
        Some(best) => format!(
            "Validation loss {:.4} {loss_unit} at step {}, over {} held-out tokens.",
            best.val_loss,
            best.step,
            data.val_tokens().unwrap_or(0),
        ),
        None => "Trained without a validation split.".to_string(),
    };
    let quality = match shape.of_its_own() {
        Some(what) => format!("{quality} Only Firebrick can load this model, because of {what}."),
        None => quality,
    };
    let more = files.len().saturating_sub(50);
    let files: String = files
        .iter()
        .take(50)
        .map(|file| format!("- `{}`, {} bytes\n", file.path.display(), file.bytes))
        .collect();
    let repeats = match plan.phases.len() {
        1 => "`resolved.toml` beside this file repeats the run.",
        _ => "`resolved.toml` and the phases in `run.json` beside this file say what was run.",
    };
    let more = if more > 0 {
        format!("- and {more} more, listed in run.json\n")
    } else {
        String::new()
    };
    format!(
        "---\nlibrary_name: {library}\npipeline_tag: text-generation\n---\n\n# {name}\n\n\
         {kind} {:?} decoder: {} layers, hidden size {}, {} heads ({} for keys and values), vocabulary {}.\n\n\
         {quality} {}\n\n\
         Trained with firebrick {} for {} steps on {} tokens in {:.0} seconds on {}, {} threads. \
         {repeats}\n\n## Data\n\n{files}{more}",
        shape.architecture,
        shape.num_hidden_layers,
        shape.hidden_size,
        shape.num_attention_heads,
        shape.num_key_value_heads,
        data.tokenizer().vocab_size(),
        exported.describe(),
        environment.firebrick,
        progress.step,
        progress.tokens,
        progress.seconds,
        device.unwrap_or(&environment.cpu),
        environment.threads,
    )
}
