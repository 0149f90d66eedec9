//! report.html: one page that needs nothing but itself.

use std::fmt::Write;

use serde_json::Value;

use super::history::{History, Samples, Status};
use super::series::Series;
use crate::page::{Chart, Floor, Horizontal, Line, Unit, document, escaped, section, table};
use crate::readable::{bytes, duration, grouped, scaled};

/// Data files in the table; run.json has them all.
const MOST_FILES: usize = 40;
/// Checkpoints in the table.
const MOST_CHECKPOINTS: usize = 60;
/// Prompts shown per evaluation, and characters of each text.
const MOST_PROMPTS: usize = 8;
const LONGEST_TEXT: usize = 1500;
/// Characters of the config: one with thousands of data files is in resolved.toml.
const LONGEST_CONFIG: usize = 100_000;

/// Fewer rows need no smoothing, and a dot per row says more.
const ROWS_TO_SMOOTH: u64 = 20;

/// What a report is made of.
pub(super) struct Page<'a> {
    /// The run folder's name.
    pub(super) name: &'a str,
    pub(super) history: &'a History,
    /// run.json.
    pub(super) record: &'a Value,
    /// resolved.toml.
    pub(super) config: &'a str,
    /// Steps that have a checkpoint, ascending.
    pub(super) checkpoints: &'a [u64],
    pub(super) best_checkpoint: Option<u64>,
    pub(super) peak_memory: Option<u64>,
}

impl Page<'_> {
    pub(super) fn html(&self) -> String {
        let charts = self.charts();
        // The chart of the loss comes first and is as wide as the page.
        let loss: String = charts.iter().take(1).map(Chart::html).collect();
        let rest: String = charts.iter().skip(1).map(Chart::html).collect();
        let body = format!(
            "{header}{figures}{loss}<div class=grid2>\n{rest}</div>\n\
             {samples}{checkpoints}{events}{data_files}{environment}{config}",
            header = self.header(),
            figures = self.figures(),
            samples = self.samples(),
            checkpoints = self.checkpoints(),
            events = self.events(),
            data_files = self.data_files(),
            environment = self.environment(),
            config = self.config(),
        );
        document(&format!("{} - {}", self.name, self.state()), &body, &charts)
    }

    fn state(&self) -> &'static str {
        match &self.history.status {
            Status::Running => "running",
            Status::Finished => "finished",
            Status::FinishedEarly => "stopped early",
            Status::Stopped { kind, .. } if kind == "interrupted" => "interrupted",
            Status::Stopped { kind, .. } if kind == "diverged" => "diverged",
            Status::Stopped { kind, .. } if kind == "suspended" => "suspended",
            Status::Stopped { .. } => "failed",
        }
    }

    fn header(&self) -> String {
        let history = self.history;
        let (state, word) = (self.state().replace(' ', "-"), self.state());
        let mut html = format!(
            "<header>\n<h1>{}</h1>\n<p><strong class=\"state {state}\">{word}</strong> \
             step {} of {} <span class=quiet>as of {} UTC</span></p>\n",
            escaped(self.name),
            grouped(history.step),
            grouped(history.steps),
            escaped(&clock(&history.updated)),
        );
        if let Status::Stopped { message, .. } = &history.status {
            let _ = writeln!(
                html,
                "<p class=\"message {state}\">{}</p>",
                escaped(message)
            );
        }
        html + "</header>\n"
    }

    /// The numbers that a person looks for first.
    fn figures(&self) -> String {
        let history = self.history;
        let mut html = String::new();
        let mut figure = |name: &str, value: String, note: String| {
            let _ = writeln!(
                html,
                "<div><dt>{name}</dt><dd>{value}</dd><dd class=quiet>{note}</dd></div>"
            );
        };
        let unit = escaped(&history.loss_unit());
        if let Some((step, val_loss)) = history.best {
            let whose = history.weights_of(step);
            let note = format!("{unit}, step {}{whose}", grouped(step));
            figure("Best validation loss", format!("{val_loss:.4}"), note);
            let evaluation = history.evaluation_of(step);
            for spec in history.specs(|objective| &objective.evaluation) {
                let value = evaluation.and_then(|found| found.metrics.get(&spec.name));
                if let Some(value) = value {
                    let (title, unit) = (spec.title(), &spec.unit);
                    let note = match title == *unit {
                        true => "at the best".to_string(),
                        false => format!("{}, at the best", escaped(unit)),
                    };
                    figure(&escaped(&capital(&title)), format!("{value:.4}"), note);
                }
            }
        }
        let last = history.evaluations.last();
        if let Some((step, last)) =
            last.filter(|last| Some(last.0) != history.best.map(|best| best.0))
        {
            let whose = history.weights_of(*step);
            let note = format!("{unit}, step {}{whose}", grouped(*step));
            figure(
                "Last validation loss",
                format!("{:.4}", last.val_loss),
                note,
            );
        }
        if let Some((loss, rows)) = history.recent_loss() {
            let note = match rows {
                1 => "last row".to_string(),
                rows => format!("mean of the last {rows} rows"),
            };
            figure("Training loss", format!("{loss:.4}"), note);
        }
        if let Some(parameters) = self.record["parameters"].as_u64() {
            figure("Parameters", grouped(parameters), String::new());
        }
        if history.rows > 0 {
            let of = self.record["train_tokens"].as_u64().map(grouped);
            let of = of.map_or(String::new(), |tokens| format!("from {tokens} in the data"));
            figure("Tokens trained", grouped(history.tokens), of);
        }
        let cost = history.cost;
        if cost.backward_passes > 0 {
            let note = format!("{}FLOP, by the forecast", scaled(cost.flops));
            figure("Backward passes", grouped(cost.backward_passes), note);
            let note = "evaluation and saving left out".to_string();
            figure("Time of training steps", duration(cost.train_seconds), note);
        }
        if let Some(seconds) = history.seconds {
            let running = history.status == Status::Running;
            let note = if running { "up to the last save" } else { "" };
            figure("Time", duration(seconds), note.to_string());
        }
        if let Some(speed) = history.mean_speed() {
            figure(
                "Speed",
                format!("{} tok/s", grouped(speed.round() as u64)),
                "mean while training".to_string(),
            );
        }
        let rows = history.memory.highest().map(|bytes| bytes as u64);
        if let Some(peak) = self.peak_memory.max(rows) {
            figure("Peak memory", bytes(peak), "resident".to_string());
        }
        format!("<dl class=figures>\n{html}</dl>\n")
    }

    /// The charts: the loss, then the values that every run has, then the metrics of the
    /// objectives.
    fn charts(&self) -> Vec<Chart<'_>> {
        let history = self.history;
        let chart = |id: &str, title: &str, unit, floor, lines| Chart {
            id: id.to_string(),
            title: title.to_string(),
            unit,
            floor,
            // Of these two, orders of magnitude are what matters.
            may_log: matches!(id, "loss" | "grad_norm"),
            has_legend: true,
            explains_marks: id == "loss",
            lines,
            baseline: None,
            horizontal: Horizontal::Steps,
            last: history.step as f64,
            skips: &history.skips,
            phases: &history.phases,
            resumes: &history.resumes,
        };
        let noisy = |series: &Series, names: [&str; 2]| {
            let mut lines = vec![Line::by_step(names[0], "train", series.points())];
            if history.rows >= ROWS_TO_SMOOTH {
                lines[0].class = "raw".to_string();
                lines.push(Line::by_step(names[1], "train", series.smoothed()));
            }
            lines
        };
        let each = ["each row", "smoothed"];
        let mut loss = chart(
            "loss",
            &format!("Loss, {}", history.loss_unit()),
            Unit::Plain,
            Floor::Lowest,
            noisy(&history.loss, ["training", "training, smoothed"]),
        );
        let mut validation = Line::by_step("validation", "val", history.val_loss.points());
        validation.dots = true;
        loss.lines.push(validation);
        let bigram = self.record["bigram_loss"].as_f64();
        loss.baseline = bigram.map(|bigram| ("bigram baseline", bigram));
        let lr = vec![Line::by_step("learning rate", "train", history.lr.points())];
        let grad_norm = noisy(&history.grad_norm, each);
        let speed = noisy(&history.speed, each);
        let memory = noisy(&history.memory, each);
        let norm_title = "Gradient norm, before clipping";
        let mut charts = vec![
            loss,
            chart("lr", "Learning rate", Unit::Rate, Floor::Zero, lr),
            chart("grad_norm", norm_title, Unit::Plain, Floor::Zero, grad_norm),
            chart(
                "speed",
                "Speed, tokens per second",
                Unit::Speed,
                Floor::Zero,
                speed,
            ),
            chart(
                "memory",
                "Memory, resident",
                Unit::Bytes,
                Floor::Zero,
                memory,
            ),
        ];
        for spec in history.specs(|objective| &objective.step) {
            let Some(series) = history.number(&spec.name) else {
                continue;
            };
            let mut lines = noisy(series, ["training", "training, smoothed"]);
            if let Some(validation) = history.number(&format!("val_{}", spec.name)) {
                let mut line = Line::by_step("validation", "val", validation.points());
                line.dots = true;
                lines.push(line);
            }
            let title = format!("{}, {}", capital(&spec.title()), spec.unit);
            charts.push(chart(&spec.name, &title, Unit::Plain, Floor::Lowest, lines));
        }
        charts
    }

    /// The newest open, the earlier ones a click away.
    fn samples(&self) -> String {
        let samples = &self.history.samples;
        let mut html = String::new();
        for (index, evaluation) in samples.iter().rev().enumerate() {
            let open = if index == 0 { " open" } else { "" };
            let Samples { step, texts } = evaluation;
            let _ = writeln!(
                html,
                "<details{open}><summary>Step {}</summary>",
                grouped(*step)
            );
            for (prompt, completion) in texts.iter().take(MOST_PROMPTS) {
                let (prompt, completion) = (shortened(prompt), shortened(completion));
                let _ = writeln!(
                    html,
                    "<pre class=sample><b>{}</b>{}</pre>",
                    escaped(&prompt),
                    escaped(&completion)
                );
            }
            html += &left_out(texts.len().saturating_sub(MOST_PROMPTS), "prompts");
            html += "</details>\n";
        }
        html += &left_out(samples.left_out(), "evaluations between these");
        section("Samples", &html)
    }

    fn checkpoints(&self) -> String {
        let surplus = self.checkpoints.len().saturating_sub(MOST_CHECKPOINTS);
        let shown = &self.checkpoints[surplus..];
        let mut rows = String::new();
        for &step in shown.iter().rev() {
            let mut marks = Vec::new();
            if self.best_checkpoint == Some(step) {
                marks.push("best");
            }
            if self.checkpoints.last() == Some(&step) {
                marks.push("last");
            }
            if self.record["exported_step"].as_u64() == Some(step) {
                marks.push("exported");
            }
            let val = self.history.evaluation_of(step);
            let val = val.map_or("-".to_string(), |found| {
                format!("{:.4}{}", found.val_loss, self.history.weights_of(step))
            });
            let _ = writeln!(
                rows,
                "<tr><td class=n>{}<td class=n>{val}<td>{}",
                grouped(step),
                marks.join(", ")
            );
        }
        if rows.is_empty() {
            return String::new();
        }
        let table = table(&["Step", "Validation loss", ""], &rows);
        section(
            "Checkpoints",
            &(table + &left_out(surplus, "earlier checkpoints")),
        )
    }

    fn events(&self) -> String {
        let history = self.history;
        let mut rows = String::new();
        for line in history.lines.iter().rev() {
            let _ = writeln!(
                rows,
                "<tr><td class=n>{}<td class=time>{}<td>{}",
                grouped(line.step),
                escaped(&clock(&line.time)),
                escaped(&line.text)
            );
        }
        if rows.is_empty() {
            return String::new();
        }
        let table = table(&["Step", "Time, UTC", "Event"], &rows);
        section(
            "Events",
            &(table + &left_out(history.lines_left_out, "earlier events")),
        )
    }

    fn data_files(&self) -> String {
        let files = self.record["data"]
            .as_array()
            .map_or(&[][..], Vec::as_slice);
        let mut rows = String::new();
        for file in files.iter().take(MOST_FILES) {
            let text = |key: &str| escaped(file[key].as_str().unwrap_or_default());
            let hash: String = text("blake3").chars().take(16).collect();
            let _ = writeln!(
                rows,
                "<tr><td>{}<td class=n>{}<td><code>{hash}</code>",
                text("path"),
                grouped(file["bytes"].as_u64().unwrap_or(0)),
            );
        }
        let count = match (
            self.record["train_tokens"].as_u64(),
            self.record["val_tokens"].as_u64(),
        ) {
            (Some(train), Some(val)) => format!(
                "<p>{} files; {} tokens to train on, {} to validate on.</p>\n",
                grouped(files.len() as u64),
                grouped(train),
                grouped(val)
            ),
            _ => String::new(),
        };
        let table = table(&["File", "Bytes", "BLAKE3"], &rows);
        let more = left_out(files.len().saturating_sub(MOST_FILES), "files, in run.json");
        folded("Data", &(count + &table + &more))
    }

    fn environment(&self) -> String {
        let mut rows = String::new();
        let mut row = |name: &str, value: &Value| {
            let text = match value {
                Value::Null => return,
                Value::String(text) => text.clone(),
                Value::Array(items) => {
                    let items: Vec<&str> = items.iter().filter_map(Value::as_str).collect();
                    items.join(", ")
                }
                Value::Number(number) if name == "memory_bytes" => {
                    bytes(number.as_u64().unwrap_or(0))
                }
                other => other.to_string(),
            };
            let name = name.replace("_bytes", "").replace('_', " ");
            let _ = writeln!(rows, "<tr><td>{}<td>{}", escaped(&name), escaped(&text));
        };
        row("started", &self.record["started"]);
        row("git", &self.record["git"]);
        row("seed", &self.record["seed"]);
        row("device", &self.record["device"]["name"]);
        for (name, value) in self.record["environment"].as_object().into_iter().flatten() {
            row(name, value);
        }
        folded("Environment", &table(&[], &rows))
    }

    fn config(&self) -> String {
        let mut text: String = self.config.chars().take(LONGEST_CONFIG).collect();
        if text.len() < self.config.len() {
            text += "\n… the rest is in resolved.toml";
        }
        folded("Configuration", &format!("<pre>{}</pre>\n", escaped(&text)))
    }
}

/// A section that is opened when wanted.
fn folded(title: &str, html: &str) -> String {
    format!(
        "<section>\n<details><summary><h2>{title}</h2></summary>\n{html}</details>\n</section>\n"
    )
}

/// Says what a report had no room for.
fn left_out(count: usize, what: &str) -> String {
    if count == 0 {
        return String::new();
    }
    format!(
        "<p class=quiet>And {} more {what}.</p>\n",
        grouped(count as u64)
    )
}

fn shortened(text: &str) -> String {
    let mut short: String = text.chars().take(LONGEST_TEXT).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// "2026-01-02T03:04:05Z" -> "2026-01-02 03:04:05".
fn clock(time: &str) -> String {
    time.trim_end_matches('Z').replace('T', " ")
}

/// Makes the first letter a capital.
fn capital(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().into_iter().flat_map(char::to_uppercase);
    first.chain(letters).collect()
}
