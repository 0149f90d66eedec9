//! `runner train`: a TOML in, a trained model out.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use super::CliError;
use crate::collective::{self, Collective};
use crate::config::{self, Plan};
use crate::readable::duration;
use crate::train::{
    EvaluatedWeights, EventLines, Interrupt, Observer, Options, Outcome, Resume, Run, Terminal,
    TrainError,
};

/// Arguments of `runner train`.
#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    /// The experiment
    config: PathBuf,
    /// Override a key: `--set optimizer.learning_rate=3e-4`; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Run folder, instead of the config's `output_dir`
    #[arg(long, value_name = "DIR")]
    output_dir: Option<String>,
    /// What to do with a run already in the folder: auto continues it, never refuses, a number goes
    /// back to that step
    #[arg(long, default_value = "auto", value_name = "auto|never|STEP")]
    resume: Resume,
    /// Load the data and print what would run; train nothing
    #[arg(long)]
    dry_run: bool,
    /// Report only what needs attention
    #[arg(short, long)]
    quiet: bool,
    /// Print every event as a line of JSON
    #[arg(long)]
    json: bool,
}

impl TrainArgs {
    /// Whether nothing is to be trained.
    pub(super) fn is_dry(&self) -> bool {
        self.dry_run
    }
}

pub(super) fn run(args: &TrainArgs) -> Result<(), CliError> {
    let sets = super::with_output_dir(&args.sets, args.output_dir.as_deref());
    let plan = config::load(&args.config, &sets)?;
    if args.dry_run {
        return dry_run(args, &plan);
    }
    let collective = collective::started_together(timeout(&plan))?;
    let trained = train(args, &plan, &collective);
    if let (Err(error), 2..) = (&trained, collective.ranks()) {
        give_up(error, collective);
    }
    trained
}

/// How long a rank waits for the others.
fn timeout(plan: &Plan) -> Duration {
    let gradient = plan.config.gradient.clone().unwrap_or_default();
    Duration::from_secs(gradient.timeout_seconds)
}

/// Reports an error of one of several ranks and ends all of them. Ranks that were asked to stop, and have
/// saved, end by themselves; rank 0 reports it.
fn give_up(error: &CliError, collective: Arc<dyn Collective>) {
    if let CliError::Train(TrainError::Interrupted { .. }) = error {
        let rank = collective.rank();
        drop(collective);
        if rank > 0 {
            std::process::exit(i32::from(error.exit_code()));
        }
        return;
    }
    let is_of_all = matches!(error, CliError::Train(error) if error.is_of_all_ranks());
    if is_of_all && collective.rank() > 0 {
        // Rank 0 reports it, if it still can.
        std::thread::sleep(Duration::from_secs(2));
    }
    if collective.rank() > 0 {
        super::remark(&format!("rank {}:", collective.rank()));
    }
    error.print();
    collective.abandon(i32::from(error.exit_code()));
}

fn train(args: &TrainArgs, plan: &Plan, collective: &Arc<dyn Collective>) -> Result<(), CliError> {
    let is_lead = collective.rank() == 0;
    let reporter: Box<dyn Observer> = if args.json {
        Box::new(EventLines)
    } else {
        Box::new(Terminal::new(plan.config.logging.logging_steps, args.quiet))
    };
    let interrupt = Interrupt::new();
    // A file that can be read only once, such as a pipe, leaves nothing to keep.
    let text = std::fs::read_to_string(&args.config).unwrap_or_default();
    let options = Options {
        resume: args.resume,
        config_text: Some(text).filter(|text| !text.is_empty()),
        interrupt: interrupt.clone(),
        observers: is_lead.then_some(reporter).into_iter().collect(),
        collective: Some(collective.clone()),
        ..Options::default()
    };
    let Some(run) = Run::prepare(plan, options)? else {
        return match is_lead {
            true => say(args, &already_complete(plan)),
            false => Ok(()),
        };
    };
    // Only now is there something to save; before, a signal ends the process as usual.
    interrupt
        .listen()
        .map_err(CliError::io("signal handlers"))?;
    let outcome = run.train()?;
    match is_lead {
        true => say(args, &summary(plan, &outcome)),
        false => Ok(()),
    }
}

/// Prose for people; with `--json` the events have said it all.
fn say(args: &TrainArgs, text: &str) -> Result<(), CliError> {
    if args.json {
        Ok(())
    } else {
        super::print_line(text)
    }
}

fn dry_run(args: &TrainArgs, plan: &Plan) -> Result<(), CliError> {
    Run::would_start_at(plan, args.resume)?;
    let estimate = Run::estimate(plan, false, |note| {
        if !args.json && !args.quiet {
            // The summary is what matters; notes may go unheard.
            let _ = writeln!(std::io::stderr(), "{note}");
        }
    })?;
    if args.json {
        return super::print_line(&serde_json::json!(estimate).to_string());
    }
    super::print_line(&estimate.describe(plan))
}

fn already_complete(plan: &Plan) -> String {
    format!(
        "{} is already complete\nnext    {}",
        plan.config.output_dir.display(),
        next_command(plan)
    )
}

fn summary(plan: &Plan, outcome: &Outcome) -> String {
    let progress = &outcome.progress;
    let mut lines = vec![format!(
        "trained {} steps, {:.2} million tokens, in {}",
        progress.step,
        progress.tokens as f64 / 1e6,
        duration(progress.seconds)
    )];
    if outcome.stopped_early {
        lines.push(format!(
            "stopped early: no improvement in {} evaluations",
            progress.evaluations_since_best
        ));
    }
    if let Some(best) = progress.best {
        lines.push(format!(
            "val loss {:.4} {} at step {} (best)",
            best.val_loss, outcome.loss_unit, best.step
        ));
        if let Some(bigram) = outcome.bigram {
            let margin = bigram - best.val_loss;
            let relation = if margin >= 0.0 { "better" } else { "worse" };
            lines.push(format!(
                "bigram   {bigram:.4}, a smoothed bigram model on the same tokens and split: the model is {:.4} {relation}",
                margin.abs()
            ));
        }
    }
    lines.push(format!(
        "model    {} (step {}{})",
        outcome.folder.display(),
        outcome.exported_step,
        match outcome.exported_weights {
            Some(EvaluatedWeights::Average) => ", the average of the weights",
            Some(EvaluatedWeights::Current) => ", before the average of the weights began",
            None => "",
        }
    ));
    lines.push(format!("next     {}", next_command(plan)));
    lines.join("\n")
}

/// The command that shows the user what the model has learned, as they would have to type it.
fn next_command(plan: &Plan) -> String {
    let runner = if std::env::var_os("CARGO").is_some() {
        "cargo run --release --"
    } else {
        "runner"
    };
    let prompt = plan
        .config
        .eval
        .sample_prompts
        .first()
        .map_or("The ", String::as_str);
    format!(
        "{runner} generate --model {} --prompt {}",
        shell_word(&plan.config.output_dir.to_string_lossy()),
        shell_quoted(prompt)
    )
}

/// A path, quoted only if it has to be.
pub(super) fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-=,".contains(c);
    if text.chars().all(plain) {
        text.to_string()
    } else {
        shell_quoted(text)
    }
}

fn shell_quoted(text: &str) -> String {
    if text.contains(['"', '$', '`', '\\', '!', '\n']) {
        format!("'{}'", text.replace('\'', "'\\''"))
    } else {
        format!("\"{text}\"")
    }
}
