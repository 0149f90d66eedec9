//! `runner ckpt` and `runner delta`, and what a run keeps.

use std::fs;

use super::bench::Bench;

/// Saves after every step, all kept.
const EVERY_STEP: [&str; 6] = [
    "--set",
    "checkpoint.save_steps=1",
    "--set",
    "checkpoint.save_total_limit=0",
    "--set",
    "checkpoint.keyframe_every=4",
];

fn lines(text: &str) -> Vec<&str> {
    text.lines().map(str::trim).collect()
}

#[test]
fn d4_d5_steps_next_to_each_other_are_a_third_of_their_size_and_all_come_back() {
    let bench = Bench::new();
    let shape = [
        "--set",
        "model.hidden_size=64",
        "--set",
        "model.intermediate_size=128",
    ];
    let extra = [&EVERY_STEP[..], &shape].concat();
    bench.train(&[&extra[..], &["--output-dir", "delta"]].concat());
    bench.train(
        &[
            &extra[..],
            &["--output-dir", "full", "--set", "checkpoint.format=full"],
        ]
        .concat(),
    );
    let (table, _) = bench.expect(0, &["ckpt", "ls", "delta"]);
    let table = lines(&table);
    assert_eq!(table.len(), 8, "{table:?}");
    assert!(
        table[1].starts_with("1  alone") && table[2].starts_with("2  beside 1"),
        "{table:?}"
    );
    assert!(
        table[5].starts_with("5  alone") && table[6].starts_with("6  beside 5"),
        "{table:?}"
    );
    let size = |step: u64| {
        let path = format!("delta/checkpoints/step-{step:06}/delta.safetensors");
        fs::metadata(bench.path(&path)).unwrap().len()
    };
    assert!(3 * size(6) < size(5), "{} {}", size(6), size(5));
    let (said, _) = bench.expect(0, &["ckpt", "verify", "delta"]);
    assert_eq!(lines(&said).len(), 6);
    for step in 1..=6 {
        let (step, out) = (step.to_string(), format!("restored-{step}"));
        bench.expect(
            0,
            &["ckpt", "restore", "delta", "--step", &step, "--out", &out],
        );
        for name in ["model.safetensors", "optimizer.safetensors"] {
            let whole = bench.path(&format!("full/checkpoints/step-{step:0>6}/{name}"));
            let restored = fs::read(bench.path(&out).join(name)).unwrap();
            assert!(
                restored == fs::read(whole).unwrap(),
                "{name} of step {step}"
            );
        }
    }
    // A restored step is a model: it answers.
    bench.expect(
        0,
        &[
            "generate",
            "--model",
            "restored-6",
            "--prompt",
            "the ",
            "--temperature",
            "0",
        ],
    );
}

#[test]
fn d5_squash_and_gc_keep_what_is_kept() {
    let bench = Bench::new();
    bench.train(&EVERY_STEP);
    let before: Vec<_> = [3, 6].map(|step| bench.checkpoint("out", step)).into();
    let (said, _) = bench.expect(0, &["ckpt", "squash", "out", "--step", "3"]);
    assert_eq!(said.trim(), "step 3 stands alone");
    let (table, _) = bench.expect(0, &["ckpt", "ls", "out"]);
    assert!(lines(&table)[3].starts_with("3  alone"), "{table}");
    let (said, _) = bench.expect(0, &["ckpt", "gc", "out"]);
    assert!(said.starts_with("nothing to delete"), "{said}");
    // What the run is to keep from now on.
    let resolved = fs::read_to_string(bench.path("out/resolved.toml")).unwrap();
    let resolved = resolved.replace("save_total_limit = 0", "save_total_limit = 1");
    fs::write(bench.path("out/resolved.toml"), resolved).unwrap();
    fs::create_dir(bench.path("out/checkpoints/.step-000009.tmp")).unwrap();
    let (said, _) = bench.expect(0, &["ckpt", "gc", "out"]);
    assert!(said.starts_with("deleted  steps 1, 2"), "{said}");
    assert!(!bench.path("out/checkpoints/.step-000009.tmp").exists());
    assert_eq!(bench.checkpoint("out", 6), before[1]);
    let (said, _) = bench.expect(0, &["ckpt", "verify", "out"]);
    assert!(
        lines(&said)
            .iter()
            .all(|line| line.ends_with("as it was saved")),
        "{said}"
    );
}

#[test]
fn d5_what_is_wrong_with_checkpoints_is_said() {
    let bench = Bench::new();
    let (_, stderr) = bench.expect(1, &["ckpt", "ls", "nowhere"]);
    assert!(stderr.contains("nowhere has no checkpoints"), "{stderr}");
    bench.train(&EVERY_STEP);
    let (_, stderr) = bench.expect(1, &["ckpt", "restore", "out", "--step", "9", "--out", "x"]);
    assert!(
        stderr.contains("has no checkpoint of step 9; there are: 1, 2"),
        "{stderr}"
    );
    let (_, stderr) = bench.expect(1, &["ckpt", "restore", "out", "--out", "out"]);
    assert!(stderr.contains("out is not empty"), "{stderr}");
    let file = bench.path("out/checkpoints/step-000002/delta.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let at = bytes.len() - 100;
    bytes[at] ^= 1;
    fs::write(&file, bytes).unwrap();
    let (said, stderr) = bench.expect(1, &["ckpt", "verify", "out"]);
    let wrong: Vec<&str> = lines(&said)
        .into_iter()
        .filter(|line| !line.ends_with("as it was saved"))
        .collect();
    assert!(
        wrong.len() == 3 && wrong[0].starts_with("step 2: "),
        "{said}"
    );
    assert!(stderr.contains("step-000002/delta.safetensors"), "{stderr}");
    // A live run is left alone.
    let lock = fs::File::create(bench.path("out/.lock")).unwrap();
    lock.lock().unwrap();
    let (_, stderr) = bench.expect(1, &["ckpt", "gc", "out"]);
    assert!(stderr.contains("out"), "{stderr}");
}

#[test]
fn d6_saving_in_the_background_saves_the_same() {
    let bench = Bench::new();
    bench.train(&[&EVERY_STEP[..], &["--output-dir", "behind"]].concat());
    let at_once = [
        "--output-dir",
        "before",
        "--set",
        "checkpoint.background=false",
    ];
    bench.train(&[&EVERY_STEP[..], &at_once].concat());
    for step in 1..=6 {
        assert_eq!(
            bench.checkpoint("behind", step),
            bench.checkpoint("before", step)
        );
    }
}

#[test]
fn d9_a_fine_tune_is_kept_as_what_it_changed() {
    let bench = Bench::new();
    bench.train(&["--output-dir", "base"]);
    bench.train(&["--output-dir", "tuned", "--set", "train.max_steps=8"]);
    let (said, _) = bench.expect(0, &["delta", "make", "base", "tuned", "tuned.safetensors"]);
    assert!(
        said.contains("tuned.safetensors, read back") && said.contains("x smaller"),
        "{said}"
    );
    bench.expect(0, &["delta", "apply", "base", "tuned.safetensors", "again"]);
    for name in ["model.safetensors", "config.json", "tokenizer.json"] {
        let read = |folder: &str| fs::read(bench.path(folder).join(name)).unwrap();
        assert!(read("again") == read("tuned"), "{name}");
    }
    assert!(!bench.path("again/checkpoints").exists());
    let (_, stderr) = bench.expect(
        1,
        &["delta", "apply", "tuned", "tuned.safetensors", "other"],
    );
    assert!(stderr.contains("was not made from tuned"), "{stderr}");
    let (_, stderr) = bench.expect(1, &["delta", "apply", "base", "x.toml", "other"]);
    assert!(stderr.contains("x.toml: it is no difference"), "{stderr}");
    let (_, stderr) = bench.expect(1, &["delta", "make", "base", "nowhere", "x.safetensors"]);
    assert!(stderr.contains("nowhere"), "{stderr}");
    let step = "tuned/checkpoints/step-000008/delta.safetensors";
    bench.expect(1, &["delta", "apply", "base", step, "other"]);
    assert!(!bench.path("other").exists());
}

#[test]
fn d3_lossy_checkpoints_are_labelled_and_a_run_goes_on_from_them() {
    let bench = Bench::new();
    // Without evaluations there is no best checkpoint, which would be stored exactly.
    let lossy = [
        "--set",
        "checkpoint.lossy=int8",
        "--set",
        "eval.eval_steps=0",
        "--output-dir",
        "run",
    ];
    let extra = [&EVERY_STEP[..], &lossy].concat();
    bench.train(&extra);
    let (table, _) = bench.expect(0, &["ckpt", "ls", "run"]);
    let labelled: Vec<bool> = lines(&table)
        .iter()
        .map(|line| line.contains("lossy: int8"))
        .collect();
    // A heading, a keyframe, three deltas, a keyframe, and the last checkpoint, which is exact.
    assert_eq!(
        labelled[..7],
        [false, false, true, true, true, false, false],
        "{table}"
    );
    bench.expect(0, &["ckpt", "verify", "run"]);

    let (_, stderr) = bench.expect(
        0,
        &[
            &[
                "train",
                "x.toml",
                "--resume",
                "3",
                "--set",
                "train.max_steps=6",
            ][..],
            &extra,
        ]
        .concat(),
    );
    assert!(
        stderr.contains("warning: the checkpoint of step 3 is lossy (int8)"),
        "{stderr}"
    );
}

#[test]
fn d3_a_fine_tune_may_come_back_near_what_it_was() {
    let bench = Bench::new();
    bench.train(&["--output-dir", "base"]);
    bench.train(&["--output-dir", "tuned", "--set", "train.max_steps=8"]);
    bench.expect(0, &["delta", "make", "base", "tuned", "exact.safetensors"]);
    let make = |out: &str, more: &[&str]| {
        let (said, _) = bench.expect(
            0,
            &[&["delta", "make", "base", "tuned", out], more].concat(),
        );
        (said, fs::metadata(bench.path(out)).unwrap().len())
    };
    let exact = fs::metadata(bench.path("exact.safetensors")).unwrap().len();
    for method in ["int8", "int4", "hybrid", "onebit"] {
        let (said, size) = make(&format!("{method}.safetensors"), &["--lossy", method]);
        assert!(
            said.contains(&format!("lost     {method}")) && said.contains("% of its change"),
            "{said}"
        );
        assert!(size < exact, "{method}: {size} {exact}");
    }
    let (said, _) = bench.expect(0, &["delta", "apply", "base", "int8.safetensors", "near"]);
    assert!(said.contains("lost     int8"), "{said}");
    let read = |folder: &str, name: &str| fs::read(bench.path(folder).join(name)).unwrap();
    assert!(read("near", "model.safetensors") != read("tuned", "model.safetensors"));
    assert!(read("near", "tokenizer.json") == read("tuned", "tokenizer.json"));
    let ask = ["--prompt", "a", "--max-new-tokens", "2"];
    bench.expect(0, &[&["generate", "--model", "near"][..], &ask].concat());
    // All of the change is more than a sign can keep.
    let (said, _) = make(
        "signs.safetensors",
        &["--lossy", "onebit", "--energy", "0.99"],
    );
    assert!(said.contains("lost     nothing"), "{said}");

    let (_, stderr) = bench.expect(
        2,
        &["delta", "make", "base", "tuned", "o", "--lossy", "int3"],
    );
    assert!(
        stderr.contains("int8, int4, onebit, lowrank, hybrid"),
        "{stderr}"
    );
    for energy in ["0", "1", "95"] {
        let asked = ["--lossy", "lowrank", "--energy", energy];
        let (_, stderr) = bench.expect(
            2,
            &[&["delta", "make", "base", "tuned", "o"], &asked[..]].concat(),
        );
        assert!(stderr.contains("between 0 and 1"), "{stderr}");
    }
    bench.expect(
        2,
        &["delta", "make", "base", "tuned", "o", "--energy", "0.9"],
    );
}

/// A safetensors file of one f32 matrix, written a piece at a time.
#[cfg(target_os = "linux")]
fn large_model(folder: &std::path::Path, elements: usize, by: f32) {
    use std::io::Write;
    fs::create_dir_all(folder).unwrap();
    let shape = [elements / 1024, 1024];
    let header = format!(
        r#"{{"w":{{"dtype":"F32","shape":{shape:?},"data_offsets":[0,{}]}}}}"#,
        4 * elements
    );
    let file = fs::File::create(folder.join("model.safetensors")).unwrap();
    let mut file = std::io::BufWriter::new(file);
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let mut state = 1u32;
    for _ in 0..elements {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let value = f32::from_bits(state >> 9 | 0x3f80_0000) - 1.5;
        let moved = value + by * f32::from((state >> 3) as u8);
        file.write_all(&moved.to_le_bytes()).unwrap();
    }
}

/// The most memory that a process had of the machine's at a time, in KiB, once it has ended well.
#[cfg(target_os = "linux")]
fn peak_memory(mut child: std::process::Child) -> usize {
    let mut peak = 0;
    loop {
        let ended = child.try_wait().unwrap();
        let status = fs::read_to_string(format!("/proc/{}/status", child.id()));
        let lines = status.as_deref().unwrap_or_default().lines();
        let words = lines.filter_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next());
        peak = words.map(|kib| kib.parse().unwrap()).fold(peak, usize::max);
        if let Some(ended) = ended {
            assert!(ended.success(), "{ended}");
            return peak;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "writes more than a gigabyte"]
fn d6_memory_does_not_grow_with_the_folder() {
    const LIMIT_KIB: usize = 128 << 10;
    let bench = Bench::new();
    // Four times what the process may have, its code included.
    let elements = 4 * LIMIT_KIB * 1024 / 4;
    large_model(&bench.path("base"), elements, 0.0);
    large_model(&bench.path("tuned"), elements, 1e-8);
    let limited = |arguments: &str| {
        let child = std::process::Command::new(env!("CARGO_BIN_EXE_runner"))
            .args(arguments.split(' '))
            .current_dir(bench.path(""))
            .env("RAYON_NUM_THREADS", "2")
            .stdout(std::process::Stdio::null())
            .spawn();
        let peak = peak_memory(child.unwrap());
        println!("{arguments}: {} MiB", peak >> 10);
        assert!(peak > 1 << 10, "{peak} KiB is what no program has");
        assert!(peak < LIMIT_KIB, "{arguments}: {peak} KiB");
    };
    limited("delta make base tuned exact.safetensors");
    limited("delta apply base exact.safetensors again");
    let read = |folder: &str| fs::read(bench.path(folder).join("model.safetensors")).unwrap();
    assert!(read("again") == read("tuned"));
    limited("delta make base tuned lossy.safetensors --lossy int8");
    limited("delta apply base lossy.safetensors near");
}
