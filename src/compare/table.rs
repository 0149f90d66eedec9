//! The results as a table, for the terminal and for the page.

use super::{CandidateResult, Mean, Ratio, Reach, Results, RunResult, Versus, mean};
use crate::readable::{grouped, scaled};

/// A table of texts.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Table {
    pub(super) header: Vec<String>,
    pub(super) rows: Vec<Vec<String>>,
}

impl Table {
    /// The table as lines of text. The first columns are texts; the others, but for the last, are
    /// numbers and stand to the right.
    fn lines(&self, texts: usize) -> Vec<String> {
        let columns = self.header.len();
        let width = |column: usize| {
            let cells = self.rows.iter().map(|row| &row[column]);
            let all = cells.chain([&self.header[column]]);
            all.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).enumerate();
            let cells = cells.map(|(column, (cell, width))| match column {
                column if column < texts || column + 1 == columns => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            });
            let text = cells.collect::<Vec<_>>().join("  ");
            text.trim_end().to_string()
        };
        std::iter::once(&self.header)
            .chain(&self.rows)
            .map(line)
            .collect()
    }
}

impl Results {
    /// The results for a terminal: the candidates, the best first; their ratios to the first; and
    /// what the tables do not say.
    pub fn describe(&self) -> String {
        // Names and values of keys are texts; the rest are numbers.
        let texts = usize::from(self.has_baseline()) + self.columns().len();
        let mut lines = self.table().lines(texts);
        if let Some(versus) = self.versus_table() {
            lines.push(String::new());
            lines.extend(versus.lines(1));
        }
        lines.push(String::new());
        lines.extend(self.remarks());
        lines.join("\n")
    }

    /// The table, with columns for the keys that differ.
    pub(super) fn table(&self) -> Table {
        let has_target = self.has_target();
        let has_baseline = self.has_baseline();
        let mut header = Vec::new();
        // The values of the keys say which combination of a sweep it is.
        if has_baseline {
            header.push("name".to_string());
        }
        header.extend(self.columns().iter().map(|key| self.short(key)));
        header.extend(
            [
                "n", "val loss", "best", "steps", "seconds", "tokens", "passes", "FLOPs",
            ]
            .map(str::to_string),
        );
        if has_target {
            header.push("to target".to_string());
        }
        header.push(String::new());
        let rows = self.candidates.iter().map(|candidate| {
            let mut row = Vec::new();
            if has_baseline {
                row.push(candidate.name.clone());
            }
            let value = |key: &String| candidate.values.get(key).cloned();
            row.extend(
                self.columns()
                    .iter()
                    .map(|key| value(key).unwrap_or_else(|| "-".to_string())),
            );
            row.extend(results_of(candidate));
            if has_target {
                row.push(to_target(candidate));
            }
            row.push(candidate.remark());
            row
        });
        Table {
            rows: rows.collect(),
            header,
        }
    }

    /// The keys that have a column. The keys of phases would be dozens; the name of a file stands for
    /// them. A sweep's candidates have no names, so there every key has a column.
    fn columns(&self) -> Vec<&String> {
        let has_names = self.has_baseline();
        let keys = self.keys.iter();
        keys.filter(|key| !has_names || !key.starts_with("phase."))
            .collect()
    }

    /// The ratios to the first candidate; none in a sweep.
    pub(super) fn versus_table(&self) -> Option<Table> {
        let first = self.first()?;
        let title = format!("against {}", first.name);
        let header = ["loss", "p", "seconds", "p", "steps", "tokens"];
        let header = std::iter::once(title).chain(header.map(str::to_string));
        let rows = self.candidates.iter().filter_map(|candidate| {
            let versus = candidate.versus_first.as_ref()?;
            let mut row = vec![candidate.name.clone()];
            row.extend(versus_cells(versus));
            row.push(String::new());
            Some(row)
        });
        Some(Table {
            header: header.chain([String::new()]).collect(),
            rows: rows.collect(),
        })
    }

    /// The candidate that the others are held against.
    fn first(&self) -> Option<&CandidateResult> {
        let mut candidates = self.candidates.iter();
        candidates.find(|candidate| candidate.number == 0 && self.has_baseline())
    }

    fn has_target(&self) -> bool {
        let mut runs = self.candidates.iter().flat_map(|candidate| &candidate.runs);
        runs.any(|run| run.target.is_some())
    }

    fn has_baseline(&self) -> bool {
        self.candidates
            .iter()
            .any(|candidate| candidate.versus_first.is_some())
    }

    /// A key without its section, where that is enough.
    fn short(&self, key: &str) -> String {
        let last = |key: &str| key.rsplit('.').next().unwrap_or(key).to_string();
        let short = last(key);
        let is_alone = self
            .keys
            .iter()
            .filter(|other| last(other) == short)
            .count()
            == 1;
        if is_alone && short.parse::<usize>().is_err() {
            short
        } else {
            key.to_string()
        }
    }

    /// What the columns mean, and what they cannot say.
    pub(super) fn remarks(&self) -> Vec<String> {
        let mut lines = vec![format!(
            "val loss in {}: mean of the final losses ± half its 95 % interval; seconds of training steps",
            self.loss_unit
        )];
        if self.columns().len() < self.keys.len() {
            lines
                .push("the files differ in keys of [[phase]]: comparison.csv has them".to_string());
        }
        let first = self.first();
        if self.has_target() {
            let target = match (self.target_loss, first) {
                (Some(target), _) => format!("target: val loss {target}"),
                (None, Some(first)) => {
                    format!(
                        "target: the final val loss of {} with the same seed",
                        first.name
                    )
                }
                (None, None) => String::new(),
            };
            lines.push(target);
        }
        if let Some(first) = first {
            lines.push(format!(
                "against {}: its final val loss, and its seconds, steps and tokens to the target, over those \
                 of the other; geometric means of pairs with the same seed, [95 % interval]; above 1 the \
                 other is better; p: two-sided t test of the logarithms",
                first.name
            ));
        }
        if self.has_baseline() && self.seeds.len() < 2 {
            lines.push("one seed: no interval and no p; --seeds 3 runs three".to_string());
        }
        for candidate in &self.candidates {
            let without = candidate
                .versus_first
                .map_or(0, |versus| versus.without_time);
            if without > 0 && self.has_target() {
                lines.push(format!(
                    "{}: {without} of {} seeds are not in the ratios of seconds, steps and tokens: \
                     the target was not reached, or before the first evaluation",
                    candidate.name,
                    candidate.runs.len()
                ));
            }
        }
        if !self.took_turns {
            lines.push(
                "the runs did not take turns: together they did not fit in memory".to_string(),
            );
        }
        lines
    }
}

fn results_of(candidate: &CandidateResult) -> [String; 8] {
    let loss = match (&candidate.val_loss, candidate.last_loss()) {
        (Some(mean), _) => with_interval(mean),
        (None, Some(loss)) => format!("({loss:.4})"),
        (None, None) => "-".to_string(),
    };
    let n = candidate.val_loss.map_or(0, |mean| mean.n);
    let best = candidate.best_val_loss;
    let cost = |number: fn(&super::Costs) -> String| {
        candidate.costs.as_ref().map_or("-".to_string(), number)
    };
    [
        n.to_string(),
        loss,
        best.map_or("-".to_string(), |mean| format!("{:.4}", mean.mean)),
        cost(|costs| grouped(costs.steps.round() as u64)),
        cost(|costs| format!("{:.1}", costs.seconds)),
        cost(|costs| grouped(costs.tokens.round() as u64)),
        cost(|costs| grouped(costs.backward_passes.round() as u64)),
        cost(|costs| scaled(costs.flops).trim_end().to_string()),
    ]
}

fn with_interval(mean: &Mean) -> String {
    let half = mean.interval.map(|[low, high]| (high - low) / 2.0);
    match half {
        Some(half) => format!("{:.4} ± {half:.4}", mean.mean),
        None => format!("{:.4}", mean.mean),
    }
}

/// Mean seconds to the target of the runs that reached it, and how many did not.
fn to_target(candidate: &CandidateResult) -> String {
    let reached = |run: &RunResult| run.reach.and_then(|reach| reach.exact());
    let seconds: Vec<f64> = candidate
        .runs
        .iter()
        .filter_map(|run| Some(reached(run)?.seconds))
        .collect();
    let count = |is: fn(&Reach) -> bool| {
        let reaches = candidate.runs.iter().filter_map(|run| run.reach);
        reaches.filter(is).count()
    };
    let mut parts: Vec<String> = Vec::new();
    if let Some(mean) = mean(&seconds) {
        parts.push(format!("{:.1} s", mean.mean));
    }
    match count(|reach| *reach == Reach::Not) {
        0 => {}
        all if all == candidate.runs.len() => parts.push("not reached".to_string()),
        some => parts.push(format!("{some} not reached")),
    }
    match count(|reach| matches!(reach, Reach::ByFirstEvaluation(_))) {
        0 => {}
        some => parts.push(format!("{some} by the first evaluation")),
    }
    match parts.is_empty() {
        true => "-".to_string(),
        false => parts.join(", "),
    }
}

fn versus_cells(versus: &Versus) -> [String; 6] {
    let text = |ratio: &Option<Ratio>, digits: usize| match ratio {
        None => "-".to_string(),
        Some(found) => {
            let interval = found.interval.map_or(String::new(), |[low, high]| {
                format!(" [{low:.digits$}, {high:.digits$}]")
            });
            format!("{:.digits$}{interval}", found.ratio)
        }
    };
    let p = |ratio: &Option<Ratio>| ratio.as_ref().map_or("-".to_string(), p_value);
    [
        text(&versus.val_loss, 4),
        p(&versus.val_loss),
        text(&versus.seconds, 2),
        p(&versus.seconds),
        text(&versus.steps, 2),
        text(&versus.tokens, 2),
    ]
}

fn p_value(ratio: &Ratio) -> String {
    match ratio.p {
        None => "-".to_string(),
        Some(p) if p < 0.0001 => format!("{p:.0e}"),
        Some(p) => format!("{p:.4}"),
    }
}
