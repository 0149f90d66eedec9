//! comparison.json, comparison.csv and comparison.html.

use std::path::Path;

use super::{CompareError, Costs, Reach, Results, page};
use crate::durable;

/// Writes all three, each whole or not at all.
pub(super) fn write(results: &Results, folder: &Path) -> Result<(), CompareError> {
    let json = serde_json::to_string_pretty(results).map_err(std::io::Error::from);
    let json = json.map_err(CompareError::io(folder.join("comparison.json")))?;
    for (name, text) in [
        ("comparison.json", format!("{json}\n")),
        ("comparison.csv", csv(results)),
        ("comparison.html", page::html(results, folder)),
    ] {
        let path = folder.join(name);
        durable::replace_with(&path, text).map_err(CompareError::io(path))?;
    }
    Ok(())
}

/// One row per run, the best candidate first. What is not known is an empty cell.
fn csv(results: &Results) -> String {
    let mut columns = vec!["rank".to_string(), "name".to_string()];
    columns.extend(results.keys.iter().cloned());
    let of_runs = [
        "seed",
        "state",
        "val_loss",
        "best_val_loss",
        "steps",
        "train_seconds",
        "tokens",
        "backward_passes",
        "flops",
        "target_loss",
        "reached",
        "seconds_to_target",
        "steps_to_target",
        "tokens_to_target",
        "backward_passes_to_target",
        "flops_to_target",
        "folder",
    ];
    columns.extend(of_runs.map(str::to_string));
    let mut text = line(&columns);
    for (rank, candidate) in results.candidates.iter().enumerate() {
        for run in &candidate.runs {
            let value = |key: &String| candidate.values.get(key).cloned().unwrap_or_default();
            let optional =
                |number: Option<f64>| number.map_or(String::new(), |number| number.to_string());
            let mut cells = vec![(rank + 1).to_string(), candidate.name.clone()];
            cells.extend(results.keys.iter().map(value));
            let state = serde_json::json!(run.state);
            cells.extend([
                run.seed.to_string(),
                state.as_str().unwrap_or_default().to_string(),
                optional(run.val_loss),
                optional(run.best_val_loss),
                run.costs.steps.to_string(),
                run.costs.seconds.to_string(),
                run.costs.tokens.to_string(),
                run.costs.backward_passes.to_string(),
                run.costs.flops.to_string(),
                optional(run.target),
            ]);
            let (word, costs) = match run.reach {
                None => ("", None),
                Some(Reach::Not) => ("no", None),
                Some(Reach::At(costs)) => ("yes", Some(costs)),
                Some(Reach::ByFirstEvaluation(costs)) => ("by the first evaluation", Some(costs)),
            };
            cells.push(word.to_string());
            let of = |pick: fn(&Costs) -> f64| optional(costs.as_ref().map(pick));
            cells.extend([
                of(|costs| costs.seconds),
                of(|costs| costs.steps),
                of(|costs| costs.tokens),
                of(|costs| costs.backward_passes),
                of(|costs| costs.flops),
                run.folder.display().to_string(),
            ]);
            text.push_str(&line(&cells));
        }
    }
    text
}

fn line(cells: &[String]) -> String {
    let quoted = |cell: &String| {
        if cell.contains([',', '"', '\n', '\r']) {
            format!("\"{}\"", cell.replace('"', "\"\""))
        } else {
            cell.clone()
        }
    };
    let cells: Vec<String> = cells.iter().map(quoted).collect();
    format!("{}\n", cells.join(","))
}
