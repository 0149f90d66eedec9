//! `runner inspect`: what the model will see, after template, truncation and packing, and which of
//! it is trained.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::SystemTime;

use clap::Args;
use serde_json::{Value, json};

use super::CliError;
use crate::config::{self, PhasePlan, Plan};
use crate::data::{
    DataError, DataView, Segment, TokenCache, Tokenizer, TrainingData, ViewSpec, load_training_data,
};
use crate::readable::grouped;

/// Arguments of `runner inspect`.
#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// The experiment
    config: PathBuf,
    /// Rows to show, in the order of the run
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    rows: u64,
    /// Only this phase, by its name or its number from 1
    #[arg(long, value_name = "PHASE")]
    phase: Option<String>,
    /// Override a key: `--set data.train_on=last`; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Print JSON, with token ids and masks
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &InspectArgs) -> Result<(), CliError> {
    let plan = config::load(&args.config, &args.sets)?;
    let cache = TokenCache::from_environment();
    let chosen = chosen_phase(args, &plan)?;
    for (number, phase) in plan.phases.iter().enumerate() {
        if chosen.is_some_and(|chosen| chosen != number) {
            continue;
        }
        if plan.phases.len() > 1 && !args.json {
            super::remark(&format!("phase {}", phase.name));
        }
        let data = load_training_data(
            phase.task,
            &phase.data,
            &plan.config.tokenizer,
            &cache,
            SystemTime::now(),
        )?;
        let view = data.view(&ViewSpec::of_phase(phase, number, plan.config.seed))?;
        show(args, phase, (data.as_ref(), view.as_ref()))?;
    }
    Ok(())
}

/// The position of the phase that `--phase` names.
fn chosen_phase(args: &InspectArgs, plan: &Plan) -> Result<Option<usize>, CliError> {
    let Some(wanted) = &args.phase else {
        return Ok(None);
    };
    let mut names = plan.phases.iter().map(|phase| phase.name.as_str());
    let by_name = names.position(|name| name == wanted);
    let number = wanted
        .parse::<usize>()
        .ok()
        .and_then(|number| number.checked_sub(1));
    let by_number = number.filter(|number| *number < plan.phases.len());
    match by_name.or(by_number) {
        Some(number) => Ok(Some(number)),
        None => Err(CliError::NoSuchPhase {
            wanted: wanted.clone(),
            names: plan.phases.iter().map(|phase| phase.name.clone()).collect(),
        }),
    }
}

/// The data of a phase, and its order.
type Shown<'a> = (&'a dyn TrainingData, &'a dyn DataView);

fn show(args: &InspectArgs, phase: &PhasePlan, (data, view): Shown) -> Result<(), CliError> {
    let shown = first_rows(view, args.rows);
    if args.json {
        return super::print_line(&as_json(phase, (data, view), &shown)?.to_string());
    }
    data.notes().iter().for_each(|note| super::remark(note));
    view.note().iter().for_each(|note| super::remark(note));
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let style = if std::io::stdout().is_terminal() && !no_color {
        Style::Colors
    } else {
        Style::Brackets
    };
    super::print_line(style.legend())?;
    for sequence in &shown {
        super::print_line("")?;
        super::print_line(&describe(sequence, phase.data.sequence_len))?;
        for (index, part) in sequence.parts.iter().enumerate() {
            let header = format!("--- {}", header(index, part));
            super::print_line(&style.dim(&header))?;
            super::print_line(&style.text(data.tokenizer(), part)?)?;
        }
        if sequence.left_out > 0 {
            let more = format!("--- and {} more in this sequence", sequence.left_out);
            super::print_line(&style.dim(&more))?;
        }
    }
    super::print_line("")?;
    super::print_line(&totals(phase, view))
}

/// A sequence of the run, or its beginning.
struct Sequence {
    number: u64,
    parts: Vec<Segment>,
    /// Parts that are not shown.
    left_out: usize,
}

/// Sequences from the first one on until so many rows are there.
fn first_rows(view: &dyn DataView, rows: u64) -> Vec<Sequence> {
    let mut left = rows as usize;
    let mut sequences = Vec::new();
    for number in 0..view.epoch().sequences {
        if left == 0 {
            break;
        }
        let mut parts = view.sequence(number);
        let all = parts.len();
        parts.truncate(left);
        left -= parts.len();
        sequences.push(Sequence {
            number,
            left_out: all - parts.len(),
            parts,
        });
    }
    sequences
}

/// "sequence 0: 3 rows, 498 tokens to predict of 512, 201 of them trained (40.4 %)"
fn describe(sequence: &Sequence, sequence_len: usize) -> String {
    let places: usize = sequence
        .parts
        .iter()
        .map(|part| part.tokens.len() - 1)
        .sum();
    let trained: usize = sequence.parts.iter().map(Segment::targets).sum();
    let rows = match sequence.parts.len() {
        1 => "1 row".to_string(),
        rows => format!("{rows} rows"),
    };
    format!(
        "sequence {}: {rows}, {places} of {sequence_len} places, {trained} trained ({})",
        sequence.number,
        percent(trained as u64, places as u64),
    )
}

fn header(index: usize, part: &Segment) -> String {
    let from = match &part.place {
        Some(place) => place.to_string(),
        None => "window".to_string(),
    };
    format!(
        "row {index}, {from}: {} tokens, {} trained",
        part.tokens.len(),
        part.targets()
    )
}

fn totals(phase: &PhasePlan, view: &dyn DataView) -> String {
    let epoch = view.epoch();
    let sequence_len = phase.data.sequence_len;
    let places = epoch.sequences * sequence_len as u64;
    format!(
        "per epoch: {} sequences of {sequence_len} places, {} trained tokens ({})",
        grouped(epoch.sequences),
        grouped(epoch.targets),
        percent(epoch.targets, places),
    )
}

fn percent(part: u64, whole: u64) -> String {
    format!("{:.1} %", 100.0 * part as f64 / whole.max(1) as f64)
}

fn as_json(phase: &PhasePlan, (data, view): Shown, shown: &[Sequence]) -> Result<Value, DataError> {
    let epoch = view.epoch();
    let notes: Vec<String> = data.notes().iter().cloned().chain(view.note()).collect();
    let mut sequences = Vec::new();
    for sequence in shown {
        let mut rows = Vec::new();
        for part in &sequence.parts {
            let runs = runs(data.tokenizer(), part)?;
            let text: String = runs.iter().map(|(text, _)| text.as_str()).collect();
            let trained = runs.iter().filter(|(_, trained)| *trained);
            let trained: Vec<&str> = trained.map(|(text, _)| text.as_str()).collect();
            rows.push(json!({
                "file": part.place.as_ref().map(|place| &place.path),
                "line": part.place.as_ref().map(|place| place.line),
                "tokens": part.tokens,
                "trained": part.trained,
                "text": text,
                "trained_text": trained,
            }));
        }
        sequences.push(json!({"sequence": sequence.number, "rows": rows}));
    }
    Ok(json!({
        "phase": phase.name,
        "task": phase.task,
        "chat_template": data.chat_template().map(|template| template.name()),
        "sequence_len": phase.data.sequence_len,
        "notes": notes,
        "per_epoch": {"sequences": epoch.sequences, "trained_tokens": epoch.targets},
        "sequences": sequences,
    }))
}

/// The text in runs that are trained and runs that are not. A character of several tokens goes with
/// the last of them.
fn runs(tokenizer: &Tokenizer, part: &Segment) -> Result<Vec<(String, bool)>, DataError> {
    let mut runs: Vec<(String, bool)> = Vec::new();
    let mut decoder = tokenizer.stream();
    let mut push = |piece: String, trained: bool| match runs.last_mut() {
        _ if piece.is_empty() => {}
        Some((text, of)) if *of == trained => text.push_str(&piece),
        _ => runs.push((piece, trained)),
    };
    for (&token, &trained) in part.tokens.iter().zip(&part.trained) {
        push(decoder.push(token)?, trained);
    }
    push(decoder.finish()?, part.trained.last() == Some(&true));
    Ok(runs)
}

/// How trained and masked text are told apart.
#[derive(Clone, Copy)]
enum Style {
    /// Green and dim.
    Colors,
    /// For files, and for terminals without colours.
    Brackets,
}

impl Style {
    fn legend(self) -> &'static str {
        match self {
            Self::Colors => "\u{1b}[32mtrained\u{1b}[0m \u{1b}[2mmasked\u{1b}[0m",
            Self::Brackets => "⟦trained⟧ masked",
        }
    }

    fn dim(self, text: &str) -> String {
        match self {
            Self::Colors => format!("\u{1b}[2m{text}\u{1b}[0m"),
            Self::Brackets => text.to_string(),
        }
    }

    fn text(self, tokenizer: &Tokenizer, part: &Segment) -> Result<String, DataError> {
        let runs = runs(tokenizer, part)?.into_iter();
        let shown = runs.map(|(text, trained)| match (self, trained) {
            (Self::Colors, true) => format!("\u{1b}[32m{}\u{1b}[0m", printable(&text)),
            (Self::Brackets, true) => format!("⟦{}⟧", printable(&text)),
            (_, false) => self.dim(&printable(&text)),
        });
        Ok(shown.collect())
    }
}

/// Data can hold anything, also what a terminal would obey.
fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' | '\t' => shown.push(character),
            c if c.is_control() => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
    }
    shown
}
