//! comparison.html: the curves of all runs and the table of results, on one page that needs no
//! network.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use super::table::Table;
use super::{CandidateResult, Costs, Results, RunResult, RunState};
use crate::page::{Chart, Floor, Horizontal, Line, Unit, document, escaped, section, table};

/// Candidates with a colour of their own; the others share one.
const COLOURS: usize = 8;
/// Candidates whose curves are drawn.
const MOST_DRAWN: usize = 60;

pub(super) fn html(results: &Results, folder: &Path) -> String {
    let name = folder
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let charts = [
        chart(results, "loss", Horizontal::Seconds, |costs| costs.seconds),
        chart(results, "by_tokens", Horizontal::Tokens, |costs| {
            costs.tokens
        }),
        chart(results, "by_steps", Horizontal::Steps, |costs| costs.steps),
    ];
    let drawn: Vec<String> = charts.iter().map(Chart::html).collect();
    let mut body = header(results, &name);
    body += &section("Results", &results_table(results));
    let _ = write!(body, "<section>\n{}", drawn[0]);
    let _ = write!(body, "<div class=grid2>\n{}</div>\n", drawn[1..].concat());
    if results.candidates.len() > MOST_DRAWN {
        let _ = writeln!(
            body,
            "<p class=quiet>The curves of the best {MOST_DRAWN} are drawn.</p>"
        );
    }
    body += "</section>\n";
    body += &section("Runs", &runs_table(results));
    document(&name, &body, &charts)
}

fn header(results: &Results, name: &str) -> String {
    let seeds: Vec<String> = results.seeds.iter().map(u64::to_string).collect();
    let budget = results
        .budget
        .as_deref()
        .unwrap_or("each at its own length");
    let mut html = format!(
        "<header>\n<h1>{}</h1>\n<p>{} candidates, seeds {}, budget: {}</p>\n",
        escaped(name),
        results.candidates.len(),
        seeds.join(", "),
        escaped(budget)
    );
    if let Some(best) = results.winner() {
        let loss = best
            .val_loss
            .map_or(String::new(), |mean| format!("{:.4}", mean.mean));
        let _ = writeln!(
            html,
            "<p>Best: <strong>{}</strong>, {loss} {}</p>",
            escaped(&best.name),
            escaped(&results.loss_unit)
        );
    }
    html + "</header>\n"
}

fn class(rank: usize) -> String {
    if rank < COLOURS {
        format!("c{rank}")
    } else {
        "others".to_string()
    }
}

/// A table of texts, with the colours of the candidates in front.
fn coloured(results: &Results, shown: &Table) -> String {
    let ranks: Vec<usize> = match shown.rows.len() {
        all if all == results.candidates.len() => (0..all).collect(),
        // The first candidate is not compared with itself.
        _ => {
            let all = results.candidates.iter().enumerate();
            let others = all.filter(|(_, candidate)| candidate.versus_first.is_some());
            others.map(|(rank, _)| rank).collect()
        }
    };
    let mut rows = String::new();
    for (row, rank) in shown.rows.iter().zip(ranks) {
        rows.push_str("<tr>");
        for (column, cell) in row.iter().enumerate() {
            let text = escaped(cell);
            let _ = match column {
                0 => write!(
                    rows,
                    "<td class=n><i class=\"swatch {}\"></i>{text}",
                    class(rank)
                ),
                _ => write!(rows, "<td class=n>{text}"),
            };
        }
        rows.push('\n');
    }
    let header: Vec<String> = shown.header.iter().map(|name| escaped(name)).collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    table(&header, &rows)
}

fn results_table(results: &Results) -> String {
    let mut html = coloured(results, &results.table());
    if let Some(versus) = results.versus_table() {
        html += &coloured(results, &versus);
    }
    for line in results.remarks() {
        let _ = writeln!(html, "<p class=quiet>{}</p>", escaped(&line));
    }
    html
}

fn runs_table(results: &Results) -> String {
    let mut rows = String::new();
    for candidate in &results.candidates {
        for run in &candidate.runs {
            let loss = run
                .val_loss
                .map_or("-".to_string(), |loss| format!("{loss:.4}"));
            let folder = run.folder.file_name().unwrap_or_default().to_string_lossy();
            let report = match run.folder.join("report.html").exists() {
                true => format!("<a href=\"runs/{}/report.html\">report</a>", link(&folder)),
                false => String::new(),
            };
            let _ = writeln!(
                rows,
                "<tr><td class=n>{}<td class=n>{}<td class=n>{loss}<td class=n>{:.1}<td>{}<td>{report}",
                escaped(&candidate.name),
                run.seed,
                run.costs.seconds,
                escaped(&state(candidate, run)),
            );
        }
    }
    table(&["name", "seed", "val loss", "seconds", "state", ""], &rows)
}

/// How a run ended.
fn state(candidate: &CandidateResult, run: &RunResult) -> String {
    if let Some(reason) = &run.reason {
        return reason.clone();
    }
    match (run.state, candidate.given_up_at) {
        (RunState::Unfinished, Some(share)) => format!("given up at {:.0} %", 100.0 * share),
        (state, _) => {
            let word = serde_json::json!(state);
            word.as_str().unwrap_or_default().replace('_', " ")
        }
    }
}

/// A folder's name in an address.
fn link(name: &str) -> String {
    let mut text = String::new();
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-' => text.push(byte as char),
            // Writing to a string cannot fail.
            byte => {
                let _ = write!(text, "%{byte:02X}");
            }
        }
    }
    text
}

/// A chart of the validation losses: a thin line per run, a bold one per candidate.
fn chart(
    results: &Results,
    id: &str,
    horizontal: Horizontal,
    pick: fn(&Costs) -> f64,
) -> Chart<'static> {
    let over = match horizontal {
        Horizontal::Seconds => "seconds of training steps",
        Horizontal::Tokens => "tokens",
        Horizontal::Steps => "steps",
    };
    let mut lines = Vec::new();
    let drawn = results.candidates.iter().enumerate().take(MOST_DRAWN);
    for (rank, candidate) in drawn {
        let class = class(rank);
        if candidate.runs.len() > 1 {
            for run in &candidate.runs {
                let points = run
                    .curve
                    .iter()
                    .map(|point| (pick(&point.costs), point.val_loss));
                lines.push(Line::new("", &format!("{class} seed"), points.collect()));
            }
        }
        let points = mean_curve(candidate, pick);
        lines.push(Line::new(&candidate.name, &format!("{class} mean"), points));
    }
    let last = lines
        .iter()
        .flat_map(|line| &line.points)
        .map(|point| point.0);
    Chart {
        id: id.to_string(),
        title: format!("Validation loss over {over}"),
        unit: Unit::Plain,
        floor: Floor::Lowest,
        may_log: true,
        has_legend: id == "loss",
        explains_marks: false,
        last: last.fold(0.0, f64::max),
        horizontal,
        lines,
        baseline: results.target_loss.map(|target| ("target", target)),
        skips: &[],
        phases: &[],
        resumes: &[],
    }
}

/// The means over the runs of a candidate, at the steps at which all of them were evaluated.
fn mean_curve(candidate: &CandidateResult, pick: fn(&Costs) -> f64) -> Vec<(f64, f64)> {
    let mut steps: BTreeMap<u64, Vec<(f64, f64)>> = BTreeMap::new();
    let is_drawn = |run: &&RunResult| !run.curve.is_empty();
    let runs: Vec<&RunResult> = candidate.runs.iter().filter(is_drawn).collect();
    for point in runs.iter().flat_map(|run| &run.curve) {
        let step = point.costs.steps as u64;
        let at = (pick(&point.costs), point.val_loss);
        steps.entry(step).or_default().push(at);
    }
    let all = steps
        .into_values()
        .filter(|points| points.len() == runs.len());
    let mean = all.map(|points| {
        let n = points.len() as f64;
        let sum = |pick: fn(&(f64, f64)) -> f64| points.iter().map(pick).sum::<f64>();
        (sum(|point| point.0) / n, sum(|point| point.1) / n)
    });
    mean.collect()
}
