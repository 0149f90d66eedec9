//! The page as text. What it looks like is looked at, in a browser.

use super::*;
use crate::checkpoint::Cost;
use crate::objective::{CrossEntropy, Metrics, Preference};
use crate::train::observers::Entry;
use crate::train::{Evaluation, StepRecord};

fn history(events: impl IntoIterator<Item = Event>) -> History {
    let mut history = History::default();
    let mut entries = Entries::new(1, 0);
    for event in events {
        for entry in entries.take(&event) {
            let time = "2026-01-02T03:04:05Z".to_string();
            history.take(&Entry { time, ..entry });
        }
    }
    history
}

fn step(step: u64, loss: f64) -> Event {
    Event::Step(StepRecord {
        step,
        regulated: None,
        prediction: None,
        exchange: None,
        phase: None,
        tokens: step * 64,
        loss,
        lr: 1e-3,
        grad_norm: 1.5,
        tokens_per_second: 1000.0,
        memory_bytes: Some(64 << 20),
        cost: Cost::default(),
        metrics: Metrics::default(),
    })
}

fn started(step: u64, steps: u64) -> Event {
    Event::Started {
        step,
        steps,
        objectives: vec![CrossEntropy::SPEC],
    }
}

fn evaluated(step: u64, val_loss: f64, best: bool) -> Event {
    let evaluation = Evaluation {
        val_loss,
        tokens: 9,
        metrics: Metrics::of(&CrossEntropy::SPEC.evaluation, [val_loss / 2.0]),
    };
    Event::Evaluated {
        step,
        evaluation,
        weights: None,
        best,
        tokens: 9,
        cost: Cost::default(),
    }
}

fn page(history: &History) -> String {
    let record = serde_json::json!({
        "parameters": 1234, "train_tokens": 5000, "val_tokens": 500, "bigram_loss": 3.25,
        "data": [{"path": "a<b>.txt", "bytes": 12, "blake3": "00ff"}],
        "environment": {"cpu": "a \"cpu\"", "threads": 2},
    });
    let page = Page {
        name: "a & b",
        history,
        record: &record,
        config: "seed = 1\ntext = \"</pre>\"\n",
        checkpoints: &[2, 4],
        best_checkpoint: Some(2),
        peak_memory: Some(99 << 20),
    };
    page.html()
}

#[test]
fn r12_a_report_shows_the_course_of_a_run() {
    let saved = |step| Event::Saved {
        step,
        seconds: 75.0,
    };
    let html = page(&history([
        started(0, 6),
        step(1, 4.0),
        step(2, 3.0),
        evaluated(2, 3.5, true),
        saved(2),
        Event::Resumed { step: 2 },
        started(2, 6),
        Event::Skipped {
            step: 3,
            first_sequence: 8,
            sequences: 4,
            loss: "NaN".to_string(),
            grad_norm: "inf".to_string(),
        },
        step(4, 2.75),
        evaluated(4, 3.75, false),
        saved(4),
        Event::Deleted { step: 1 },
        Event::Stopped {
            step: 4,
            kind: "interrupted".to_string(),
            message: "stopped by Ctrl-C after step 4".to_string(),
        },
    ]));
    for part in [
        "<title>a &amp; b - interrupted</title>",
        "step 4 of 6",
        "stopped by Ctrl-C after step 4",
        "<dd>3.5000</dd><dd class=quiet>nats per token, step 2</dd>",
        "<dd>1.7500</dd><dd class=quiet>at the best</dd>",
        "<dt>Last validation loss</dt><dd>3.7500</dd>",
        "<dd>1 min 15 s</dd>",
        "<dd>1,000 tok/s</dd>",
        "<dd>99 MiB</dd>",
        "<tr><td class=n>2<td class=n>3.5000<td>best\n",
        "<tr><td class=n>4<td class=n>3.7500<td>last\n",
        "resumed from the checkpoint of step 2",
        "step skipped: loss NaN, gradient norm inf",
        "deleted the checkpoint of step 1",
        "bigram baseline",
        "<path class=resume d=\"M500 1000v-1000\"/>",
        "<path class=skip d=\"M750 1000v-60\"/>",
    ] {
        assert!(html.contains(part), "{part}\n{html}");
    }
}

#[test]
fn r12_nothing_from_outside_reaches_the_page_unescaped() {
    let hostile = "</script><b onclick=\"x\">&amp;'\u{1b}[2J\u{202e}";
    let html = page(&history([
        started(0, 1),
        step(1, 4.0),
        Event::Sample {
            step: 1,
            prompt: hostile.to_string(),
            completion: "\u{0}</pre><script>alert(1)</script>".to_string(),
        },
        Event::Note {
            text: format!("warning: {hostile}"),
        },
        Event::Stopped {
            step: 1,
            kind: "io".to_string(),
            message: hostile.to_string(),
        },
    ]));
    assert!(
        html.contains("&lt;/script&gt;&lt;b onclick=&quot;x&quot;&gt;&amp;amp;&#39;\u{fffd}[2J")
    );
    assert!(html.contains("a&lt;b&gt;.txt") && html.contains("&lt;/pre&gt;"));
    assert!(!html.contains("<b onclick") && !html.contains("alert(1)</script>"));
    assert_eq!(html.matches("</script>").count(), 2);
    assert!(!html.contains('\u{1b}') && !html.contains('\u{0}'));
    // The only addresses in it are none.
    assert!(!html.contains("http://") && !html.contains("https://"));
}

#[test]
fn r12_a_run_without_rows_and_one_with_one_row_have_reports() {
    let empty = page(&history([started(0, 6)]));
    assert!(empty.contains("Nothing yet.") && empty.contains("step 0 of 6"));
    let one = page(&history([started(0, 6), step(1, 4.0)]));
    assert!(
        one.contains("<path class=\"train dots\" d=\"M1000.0 45.5h0\"/>"),
        "{one}"
    );
    let drawn = &one[one.find("<svg").unwrap()..one.rfind("</svg>").unwrap()];
    assert!(!drawn.contains("NaN") && !drawn.contains("inf"));
}

#[test]
fn r12_a_million_rows_with_long_samples_stay_under_two_megabytes() {
    let noise = |n: u64| (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as f64 / 1e6;
    let rows = (1..=1_000_000).map(|n| step(n, 2.0 + noise(n)));
    let evaluations = (1..=2000).flat_map(|n| {
        let sample = Event::Sample {
            step: 1_000_000 + n,
            prompt: "<".repeat(3000),
            completion: "&".repeat(3000),
        };
        [evaluated(1_000_000 + n, 1.0, true), sample.clone(), sample]
    });
    let skipped = (1..=5000).map(|n| Event::Skipped {
        step: 1_010_000 + n,
        first_sequence: 0,
        sequences: 1,
        loss: "NaN".to_string(),
        grad_norm: "NaN".to_string(),
    });
    let html = page(&history(rows.chain(evaluations).chain(skipped)));
    assert!(html.len() < 2_000_000, "{}", html.len());
    assert!(html.contains("And 4,800 more earlier events"));
}

#[test]
fn r12_a_report_carries_the_numbers_of_an_objective_that_it_does_not_know() {
    let measured = |number: u64| {
        let Event::Step(record) = step(number, 0.7) else {
            unreachable!()
        };
        let metrics = Metrics::of(&Preference::SPEC.step, [0.5, 0.25 * number as f64]);
        Event::Step(StepRecord { metrics, ..record })
    };
    let html = page(&history([
        Event::Started {
            step: 0,
            steps: 2,
            objectives: vec![Preference::SPEC],
        },
        measured(1),
        measured(2),
        Event::Evaluated {
            step: 2,
            evaluation: Evaluation {
                val_loss: 0.625,
                tokens: 9,
                metrics: Metrics::of(&Preference::SPEC.evaluation, [0.875]),
            },
            weights: None,
            best: true,
            tokens: 9,
            cost: Cost::default(),
        },
        Event::PhaseStarted {
            step: 2,
            phase: 1,
            name: "long".to_string(),
        },
    ]));
    for part in [
        "Loss, nats per pair",
        "<dd>0.6250</dd><dd class=quiet>nats per pair, step 2</dd>",
        "<dt>Val reward accuracy</dt><dd>0.8750</dd><dd class=quiet>share of pairs, at the best</dd>",
        "Reward accuracy, share of pairs",
        "Reward margin, nats",
        "phase long begins",
    ] {
        assert!(html.contains(part), "{part}\n{html}");
    }
    assert!(!html.contains("nats per token") && !html.contains("Bits per byte"));
}
