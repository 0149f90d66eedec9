//! What a run leaves for people and tools to look at.

use std::fs;

use serde_json::Value;

use super::bench::Bench;

fn events(bench: &Bench) -> Vec<Value> {
    let text = fs::read_to_string(bench.path("out/logs/events.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn count(events: &[Value], name: &str) -> usize {
    events.iter().filter(|event| event["event"] == name).count()
}

fn report(bench: &Bench) -> String {
    fs::read_to_string(bench.path("out/report.html")).unwrap()
}

/// Everything that the tags of a page's charts are drawn from, as the page's script reads it.
fn charts(html: &str) -> Value {
    let (_, data) = html.split_once("id=data>").unwrap();
    serde_json::from_str(data.split_once("</script>").unwrap().0).unwrap()
}

#[test]
fn r12_a_run_leaves_every_report_and_a_journal() {
    let bench = Bench::new();
    bench.train(&[]);
    let events = events(&bench);
    assert_eq!(
        (
            count(&events, "step"),
            count(&events, "evaluated"),
            count(&events, "sample")
        ),
        (6, 2, 2)
    );
    assert_eq!(
        (count(&events, "started"), count(&events, "finished")),
        (1, 1)
    );
    assert!(
        events
            .iter()
            .all(|event| event["at"].is_u64() && event["time"].is_string())
    );
    let html = report(&bench);
    assert!(html.contains("<strong class=\"state finished\">finished</strong> step 6 of 6"));
    for part in [
        "text.txt",
        "hidden_size = 16",
        "<b>the </b>",
        "best, ",
        "last",
    ] {
        assert!(html.contains(part), "{part}");
    }
    let training = &charts(&html)[0]["lines"][0];
    let losses: Vec<f64> = bench
        .metrics("out")
        .iter()
        .map(|row| row["loss"].as_f64().unwrap())
        .collect();
    for (drawn, loss) in training["y"].as_array().unwrap().iter().zip(&losses) {
        assert!((drawn.as_f64().unwrap() / loss - 1.0).abs() < 1e-5);
    }
    assert_eq!(training["x"].as_array().unwrap().len(), 6);
    let tb: Vec<_> = fs::read_dir(bench.path("out/tb")).unwrap().collect();
    assert_eq!(tb.len(), 1);
    let memory = fs::read_to_string(bench.path("out/metrics.jsonl")).unwrap();
    assert!(!cfg!(target_os = "linux") || memory.contains("\"memory_bytes\":"));
}

#[test]
fn r12_a_report_shows_a_resumed_run_from_its_beginning_whatever_was_asked_for_before() {
    let bench = Bench::new();
    bench.train(&["--set", "logging.report_to=[]"]);
    assert!(!bench.path("out/report.html").exists() && !bench.path("out/tb").exists());
    assert!(!bench.path("out/metrics.jsonl").exists());
    // What a kill -9 after the save of step 4 leaves.
    fs::remove_dir_all(bench.path("out/checkpoints/step-000006")).unwrap();
    bench.train(&["--set", "logging.report_to=[\"html\"]"]);
    let events = events(&bench);
    let at = |name: &str| -> Vec<u64> {
        let named = events.iter().filter(|event| event["event"] == name);
        named.map(|event| event["at"].as_u64().unwrap()).collect()
    };
    assert_eq!(at("step"), [1, 2, 3, 4, 5, 6]);
    assert_eq!(
        (at("resumed"), at("started"), at("finished")),
        (vec![4], vec![0, 4], vec![6])
    );
    let html = report(&bench);
    assert!(html.contains("resumed from the checkpoint of step 4"));
    assert_eq!(
        charts(&html)[0]["lines"][0]["x"],
        serde_json::json!([1, 2, 3, 4, 5, 6])
    );
    assert!(!bench.path("out/metrics.jsonl").exists());

    bench.train(&["--resume", "2", "--set", "logging.report_to=[\"jsonl\"]"]);
    assert_eq!(bench.metrics("out").len(), 4);
    // Not kept up to date, but not lost either.
    assert_eq!(report(&bench), html);
}

#[test]
fn r12_a_run_that_ends_badly_says_so_in_its_report() {
    let bench = Bench::new();
    let diverging = [
        "train",
        "x.toml",
        "-q",
        "--set",
        "optimizer.learning_rate=1e30",
    ];
    bench.expect(5, &diverging);
    let html = report(&bench);
    assert!(
        html.contains("state diverged") && html.contains("3 times in a row"),
        "{html}"
    );
    assert!(html.contains("step skipped: loss"), "{html}");
    let stopped = events(&bench).pop().unwrap();
    assert_eq!(
        (&stopped["event"], &stopped["kind"]),
        (&"stopped".into(), &"diverged".into())
    );
}

#[test]
fn r12_text_from_the_data_is_escaped() {
    let bench = Bench::new();
    let prompt = "eval.sample_prompts=[\"</script><b>\"]";
    bench.train(&["--set", prompt, "--set", "train.max_steps=1"]);
    let html = report(&bench);
    assert!(html.contains("<b>&lt;/script&gt;&lt;b&gt;</b>"));
    assert_eq!(html.matches("</script>").count(), 2);
}
