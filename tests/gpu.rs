//! Training, evaluation and generation through wgpu, held against the CPU: on the GPU that is
//! there, which in CI is Mesa's lavapipe. A kernel is compiled when a process first uses it, and
//! that is where the time goes: so there is one shape, and few processes.
#![cfg(feature = "wgpu")]
#![allow(missing_docs)]

#[path = "cli/bench.rs"]
#[allow(dead_code)]
mod bench;
mod support;

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;

use bench::{Bench, json};
use burn::module::Module;
use burn::tensor::{Device, FloatDType, Tensor};
use firebrick::config::{
    AdamWPlan, Architecture, Backend, Dtype, EraOutput, HiddenAct, LionPlan, MuonPlan,
    OptimizerPlan, SoapPlan, VelvetPlan,
};
use firebrick::data::Batch;
use firebrick::device::{ComputeDevice, DeviceError};
use firebrick::generate::{Request, Sampling, generate};
use firebrick::model::{Decoder, DecoderSpec, Tensors, parameters};
use firebrick::objective::{CrossEntropy, Precision, backward_with};
use firebrick::optimizer::{Optimizer, StepFacts};
use safetensors::SafeTensors;
use serde_json::Value;
use support::{batch, distance, tiny};

fn gpu() -> Device {
    ComputeDevice::open(Backend::Wgpu).unwrap().device
}

/// The shape of the runner's config below.
fn spec(architecture: Architecture) -> DecoderSpec {
    let mut spec = tiny(architecture);
    spec.shape.hidden_size = 16;
    spec.shape.intermediate_size = 32;
    spec.shape.num_attention_heads = 2;
    spec.shape.num_key_value_heads = if spec.shape.is_gpt2_form() { 2 } else { 1 };
    spec.shape.head_dim = 8;
    spec.shape.max_position_embeddings = 64;
    spec.vocab_size = 17;
    spec
}

/// Gated by `act`, with an activation of the output.
fn activated(act: HiddenAct) -> DecoderSpec {
    let mut spec = spec(Architecture::Llama);
    spec.shape.hidden_act = Some(act);
    spec.shape.output_activation = Some(EraOutput { min_entropy: 1.0 });
    spec
}

fn windowed() -> DecoderSpec {
    let mut spec = spec(Architecture::Mistral);
    spec.shape.sliding_window = Some(4);
    spec
}

/// The same weights on the CPU and on the GPU.
fn pair(spec: &DecoderSpec) -> [Decoder; 2] {
    [Device::flex(), gpu()].map(|device| Decoder::new(spec, 5, &device.autodiff()).unwrap())
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn two_rows(spec: &DecoderSpec) -> Batch {
    let mut batch = batch(2, 8, spec.vocab_size);
    batch.weights[3] = 0.0;
    batch
}

#[test]
fn logits_and_evaluated_loss_are_the_cpus() {
    for spec in [
        spec(Architecture::Llama),
        windowed(),
        spec(Architecture::Gpt2),
        activated(HiddenAct::Relu2),
        activated(HiddenAct::GeluEra),
    ] {
        let name = spec.shape.architecture.name();
        let batch = two_rows(&spec);
        let [cpu, gpu] = pair(&spec).map(|model| {
            let model = model.valid();
            let logits = floats(model.forward(&batch).unwrap());
            (logits, floats(model.evaluate(&batch).unwrap())[0])
        });
        let error = distance(&cpu.0, &gpu.0);
        assert!(error < 1e-4, "{name}: logits differ by {error}");
        let error = (cpu.1 - gpu.1).abs() / cpu.1;
        assert!(error < 1e-5, "{name}: loss differs by {error}");
    }
}

#[test]
fn loss_and_gradients_are_the_cpus_with_and_without_checkpointing() {
    for spec in [
        spec(Architecture::Llama),
        spec(Architecture::Gpt2),
        activated(HiddenAct::Relu2),
        activated(HiddenAct::GeluEra),
    ] {
        let name = format!("{:?}", (spec.shape.architecture, spec.shape.hidden_act));
        let batches = [two_rows(&spec), batch(2, 8, spec.vocab_size)];
        for gradient_checkpointing in [false, true] {
            let precision = Precision {
                gradient_checkpointing,
                ..Precision::default()
            };
            let [cpu, gpu] = pair(&spec).map(|model| {
                let found = backward_with(&model, &batches, &CrossEntropy, precision).unwrap();
                (found.loss(), found.gradient.to_tensors())
            });
            let error = (cpu.0 - gpu.0).abs() / cpu.0;
            assert!(error < 1e-5, "{name}: loss differs by {error}");
            let whole = norm(cpu.1.values().flat_map(|data| data.iter::<f64>()));
            for (path, data) in &cpu.1 {
                let pairs = data.iter::<f64>().zip(gpu.1[path].iter::<f64>());
                let difference = norm(pairs.map(|(cpu, gpu)| cpu - gpu));
                let size = norm(data.iter::<f64>()).max(1e-3 * whole);
                assert!(difference < 1e-4 * size, "{name}: {path}: {difference}");
            }
        }
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

/// Through the key/value cache, and past the point where a window's cache begins to forget.
/// burn reads a GPU's tensor when its data is first looked at, and a step updates it in place. A copy that
/// a save is made of, while training goes on, must not change with it.
#[test]
fn a_copy_of_weights_and_state_does_not_change_with_later_steps() {
    let spec = spec(Architecture::Llama);
    let batches = [two_rows(&spec)];
    let [_, mut model] = pair(&spec);
    let plan = OptimizerPlan::AdamW(AdamWPlan::new([0.9, 0.95], 1e-8, 0.1));
    let mut optimizer = Optimizer::new(&plan);
    let read = |tensors: &Tensors| {
        let values = tensors.iter();
        let values = values.map(|(path, data)| (path.clone(), data.iter::<f32>().collect()));
        values.collect::<Vec<(String, Vec<f32>)>>()
    };
    let mut taken = Vec::new();
    for _ in 0..3 {
        let found = backward_with(&model, &batches, &CrossEntropy, Precision::default()).unwrap();
        let gradient = found.gradient.to_tensors();
        let gradient_now = read(&found.gradient.to_tensors());
        model = optimizer.step(model, found.gradient, 1e-2);
        let copies = || [parameters(&model), optimizer.state(&model).tensors];
        let now = copies().map(|tensors| read(&tensors));
        let [weights, state] = copies();
        taken.push(([gradient, weights, state], gradient_now, now));
    }
    for (copies, gradient, [weights, state]) in taken {
        assert!(weights.len() > 5 && state.len() > 10);
        let later = copies.map(|tensors| read(&tensors));
        assert!(later == [gradient, weights, state], "a copy has changed");
    }
}

/// Two steps of every rule: updates of a matrix, an embedding and norms differ by rounding.
#[test]
fn optimizers_take_the_cpus_steps() {
    let spec = spec(Architecture::Llama);
    let adamw = AdamWPlan::new([0.9, 0.95], 1e-8, 0.1);
    let muon = MuonPlan::new(0.95, adamw);
    let plans = [
        OptimizerPlan::AdamW(AdamWPlan {
            cautious_weight_decay: true,
            ..adamw
        }),
        OptimizerPlan::Lion(LionPlan::new([0.9, 0.99], 0.1)),
        OptimizerPlan::Velvet {
            velvet: VelvetPlan {
                sparse: true,
                ..VelvetPlan::default()
            },
            adamw,
        },
        OptimizerPlan::NorMuon {
            neuron_beta: 0.95,
            muon,
        },
        OptimizerPlan::Soap(SoapPlan {
            precondition_frequency: 1,
            ..SoapPlan::new(adamw)
        }),
    ];
    let batches = [two_rows(&spec)];
    for plan in plans {
        let [cpu, gpu] = pair(&spec).map(|model| {
            let before = parameters(&model);
            let (mut optimizer, mut model) = (Optimizer::new(&plan), model);
            for _ in 0..2 {
                let found =
                    backward_with(&model, &batches, &CrossEntropy, Precision::default()).unwrap();
                let facts = StepFacts {
                    learning_rate: 1e-2,
                    loss: Some(found.loss()),
                    grad_norm: Some(1.0),
                };
                model = optimizer.step(model, found.gradient, facts);
            }
            let moved = parameters(&model).into_iter().map(|(path, after)| {
                let pairs = after.iter::<f64>().zip(before[&path].iter::<f64>());
                let moved: Vec<f64> = pairs.map(|(after, before)| after - before).collect();
                (path, moved)
            });
            moved.collect::<Vec<_>>()
        });
        for ((path, cpu), (_, gpu)) in cpu.iter().zip(&gpu) {
            let size = norm(cpu.iter().copied());
            assert!(size > 0.0, "{}: {path} did not move", plan.name());
            // So few tokens leave eigenvalues of zero, whose eigenvectors are any: rounding decides.
            let is_soaps = matches!(plan, OptimizerPlan::Soap(_))
                && path.starts_with("layers.")
                && !path.contains("norm");
            let (difference, allowed) = match is_soaps {
                true => ((size - norm(gpu.iter().copied())).abs(), 0.2),
                false => (norm(cpu.iter().zip(gpu).map(|(cpu, gpu)| cpu - gpu)), 0.01),
            };
            assert!(
                difference < allowed * size,
                "{}: {path} moves by {size} and differs by {difference}",
                plan.name()
            );
        }
    }
}

#[test]
fn greedy_generation_is_the_cpus() {
    let greedy = Request {
        prompt: vec![1, 5, 3],
        max_new_tokens: 12,
        sampling: Sampling {
            temperature: 0.0,
            ..Sampling::default()
        },
        seed: 0,
        vocabulary: None,
    };
    for spec in [spec(Architecture::Llama), windowed()] {
        let [cpu, gpu] = pair(&spec).map(|model| {
            let model = model.valid();
            let continued = generate(&model, &greedy, |_| ControlFlow::Continue(()));
            continued.unwrap().tokens
        });
        assert_eq!(cpu.len(), 12);
        assert_eq!(cpu, gpu, "{}", spec.shape.architecture.name());
    }
}

const CONFIG: &str = r#"
output_dir = "out"
seed = 3

[model]
architecture = "llama"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1

[tokenizer]
type = "char"

[data]
sequence_len = 8
val_fraction = 0.1
[[data.datasets]]
path = "text.txt"

[train]
micro_batch_size = 2
max_steps = 2
threads = 2

[lr_scheduler]
name = "constant"
warmup_steps = 0

[eval]
eval_steps = 0
sample_prompts = []

[checkpoint]
save_steps = 2

[logging]
logging_steps = 1
"#;

fn bench() -> Bench {
    let bench = Bench::new();
    fs::write(bench.path("x.toml"), CONFIG).unwrap();
    bench
}

fn train(bench: &Bench, run: &str, backend: &str, steps: u64) -> String {
    let backend = format!("device.backend={backend}");
    let steps = format!("train.max_steps={steps}");
    let arguments = [
        "train",
        "x.toml",
        "--output-dir",
        run,
        "--set",
        &backend,
        "--set",
        &steps,
    ];
    bench.expect(0, &arguments).1
}

/// Both runs' numbers agree in every step.
fn same_metrics(bench: &Bench, cpu: &str, gpu: &str) {
    let (cpu, gpu) = (bench.metrics(cpu), bench.metrics(gpu));
    assert_eq!(cpu.len(), gpu.len());
    for (cpu, gpu) in cpu.iter().zip(&gpu) {
        assert_eq!(cpu["step"], gpu["step"]);
        for key in ["loss", "grad_norm"] {
            let number = |row: &Value| row[key].as_f64().unwrap();
            let error = (number(cpu) - number(gpu)).abs() / number(cpu);
            assert!(error < 1e-4, "{key}: {cpu} and {gpu}");
        }
    }
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-r").args([from, to]).status();
    assert!(copied.unwrap().success());
}

#[test]
fn a_run_trains_saves_resumes_and_answers_as_on_the_cpu() {
    let bench = bench();
    train(&bench, "cpu", "cpu", 3);
    let said = train(&bench, "gpu", "wgpu", 2);
    assert!(said.contains("device wgpu: "), "{said}");
    assert!(
        bench
            .path("gpu/checkpoints/step-000002/delta.safetensors")
            .exists()
    );
    let device = &json(&bench.path("gpu/run.json"))["device"];
    assert_eq!(device["backend"], "wgpu", "{device}");

    // The same checkpoint goes on here and there.
    copy(&bench.path("gpu"), &bench.path("moved"));
    let said = train(&bench, "gpu", "wgpu", 3);
    assert!(
        said.contains("step 2") && !said.contains("not bit for bit"),
        "{said}"
    );
    same_metrics(&bench, "cpu", "gpu");
    let said = train(&bench, "moved", "cpu", 3);
    assert!(
        said.contains("results will agree to rounding, not bit for bit"),
        "{said}"
    );
    same_metrics(&bench, "cpu", "moved");

    // What the exported model says does not depend on where it says it.
    let ask = |verb: &[&str]| {
        ["cpu", "wgpu"].map(|device| bench.expect(0, &[verb, &["--device", device]].concat()).0)
    };
    let [cpu, gpu] = ask(&[
        "generate",
        "--model",
        "gpu",
        "--prompt",
        "the river",
        "--temperature",
        "0",
        "--max-new-tokens",
        "6",
    ]);
    assert_eq!(cpu, gpu);
    assert_eq!(cpu.chars().count(), 6, "{cpu}");
    fs::write(bench.path("val.txt"), "the river is older").unwrap();
    let evaluated = ask(&[
        "eval",
        "--model",
        "gpu",
        "--data",
        "val.txt",
        "--sequence-len",
        "8",
        "--json",
    ]);
    let [cpu, gpu] = evaluated.map(|text| serde_json::from_str::<Value>(&text).unwrap());
    assert_eq!(cpu["tokens"], gpu["tokens"]);
    let [cpu, gpu] = [cpu, gpu].map(|found| found["val_loss"].as_f64().unwrap());
    assert!((cpu - gpu).abs() < 1e-5 * cpu, "{cpu} and {gpu}");
    let [cpu, gpu] = ["cpu", "wgpu"].map(|device| {
        let tokens = ["logits", "--model", "gpu", "--tokens", "1,2,3,4,5,6,7,8"];
        let out = ["--out", "logits.safetensors", "--device", device];
        bench.expect(0, &[&tokens[..], &out].concat());
        logits(&bench.path("logits.safetensors"))
    });
    assert_eq!(cpu.len() % 8, 0);
    assert!(!cpu.is_empty());
    assert!(distance(&cpu, &gpu) < 1e-4);
}

/// The kernels of our own among burn's.
#[test]
fn a_ternary_run_trains_and_its_packed_model_answers_as_on_the_cpu() {
    let bench = bench();
    let ternary = "\n[quantization]\nweights = \"ternary\"\nactivation_bits = 8\n";
    fs::write(bench.path("x.toml"), [CONFIG, ternary].concat()).unwrap();
    train(&bench, "cpu", "cpu", 2);
    train(&bench, "gpu", "wgpu", 2);
    same_metrics(&bench, "cpu", "gpu");

    let export = [
        "export", "--model", "gpu", "--to", "packed", "--out", "packed",
    ];
    bench.expect(0, &export);
    let ask = |verb: &[&str]| {
        ["cpu", "wgpu"].map(|device| bench.expect(0, &[verb, &["--device", device]].concat()).0)
    };
    let prompt = ["--prompt", "the river", "--temperature", "0"];
    let [cpu, gpu] = ask(&[
        &["generate", "--model", "packed"],
        &prompt[..],
        &["--max-new-tokens", "6"],
    ]
    .concat());
    assert_eq!(cpu, gpu);
    assert_eq!(cpu.chars().count(), 6, "{cpu}");
    fs::write(bench.path("val.txt"), "the river is older than its bed").unwrap();
    let data = ["--data", "val.txt", "--sequence-len", "24", "--json"];
    let evaluated = ask(&[&["eval", "--model", "packed"], &data[..]].concat());
    let [cpu, gpu] = evaluated.map(|text| serde_json::from_str::<Value>(&text).unwrap());
    assert_eq!(cpu["tokens"], gpu["tokens"]);
    let [cpu, gpu] = [cpu, gpu].map(|found| found["val_loss"].as_f64().unwrap());
    assert!((cpu - gpu).abs() < 1e-5 * cpu, "{cpu} and {gpu}");
}

fn logits(path: &Path) -> Vec<f32> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = file.tensor("logits").unwrap().data().chunks_exact(4);
    values
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect()
}

/// An emulated GPU is slower than the CPU that emulates it.
#[test]
fn auto_takes_a_gpu_and_passes_over_an_emulated_one_aloud() {
    let bench = bench();
    let adapter = ComputeDevice::open(Backend::Wgpu).unwrap().name;
    let is_emulated = ["llvmpipe", "SwiftShader", "Basic Render Driver"]
        .iter()
        .any(|name| adapter.contains(name));
    let auto = ComputeDevice::open(Backend::Auto).unwrap();
    assert_eq!(auto.backend == Backend::Cpu, is_emulated, "{auto:?}");
    if !is_emulated {
        return;
    }
    let said = train(&bench, "out", "auto", 2);
    let line = said
        .lines()
        .find(|line| line.contains("device cpu: "))
        .unwrap();
    assert!(
        line.contains("auto passed over wgpu: ") && line.contains(&adapter),
        "{line}"
    );
    assert_eq!(
        json(&bench.path("out/run.json"))["device"]["backend"],
        "cpu"
    );
    let (_, said) = bench.expect(0, &["generate", "--model", "out", "--prompt", "the"]);
    assert!(said.contains("auto passed over wgpu: "), "{said}");
    // Nothing was passed over for what was asked for by name.
    assert!(!train(&bench, "named", "cpu", 2).contains("passed over"));
}

#[test]
fn half_precision_is_computed_or_refused_by_name() {
    let bench = bench();
    let device = ComputeDevice::open(Backend::Wgpu).unwrap();
    for (dtype, float) in [
        (Dtype::F16, FloatDType::F16),
        (Dtype::Bf16, FloatDType::BF16),
    ] {
        match device.dtype(dtype) {
            Ok((chosen, found)) => {
                assert_eq!((chosen, found), (dtype, float));
                let spec = spec(Architecture::Llama);
                let batches = [two_rows(&spec)];
                let [cpu, gpu] = pair(&spec).map(|model| {
                    let precision = Precision {
                        dtype: float,
                        ..Precision::default()
                    };
                    backward_with(&model, &batches, &CrossEntropy, precision)
                        .unwrap()
                        .loss()
                });
                assert!((cpu - gpu).abs() < 0.02 * cpu, "{cpu} and {gpu}");
            }
            Err(error) => {
                assert!(matches!(error, DeviceError::Dtype { .. }), "{error}");
                let set = format!("model.dtype={}", dtype.name());
                let arguments = [
                    "train",
                    "x.toml",
                    "--set",
                    "device.backend=wgpu",
                    "--set",
                    &set,
                ];
                let (_, said) = bench.expect(2, &arguments);
                assert!(said.contains("does not compute in it"), "{said}");
                assert!(said.contains("set model.dtype = \"f32\""), "{said}");
                assert!(!bench.path("out").exists());
            }
        }
    }
}

#[test]
fn without_a_vulkan_driver_wgpu_is_exit_2_and_says_what_to_install() {
    let bench = bench();
    let run = |arguments: &[&str], hidden: &[&str]| {
        let mut command = bench.command(arguments);
        command.envs(hidden.iter().map(|name| (name, "/dev/null")));
        let output = command.output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(said).unwrap())
    };
    let vulkan = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"];
    let all = [
        "VK_DRIVER_FILES",
        "VK_ICD_FILENAMES",
        "__EGL_VENDOR_LIBRARY_FILENAMES",
    ];
    let arguments = ["train", "x.toml", "--set", "device.backend=wgpu"];
    // Without Vulkan wgpu turns to OpenGL, where there is one; without either there is nothing.
    for hidden in [&vulkan[..], &all[..]] {
        let (code, said) = run(&arguments, hidden);
        assert_eq!(code, Some(2), "{said}");
        assert!(
            said.contains("device.backend = \"wgpu\", and there is no such device"),
            "{said}"
        );
        assert!(said.contains("install the GPU's Vulkan driver"), "{said}");
        assert!(!bench.path("out").exists());
        let (code, said) = run(&["env"], hidden);
        assert_eq!(code, Some(0));
        assert!(said.contains("wgpu (absent: "), "{said}");
    }
    let (code, said) = run(&["train", "x.toml", "--dry-run"], &all);
    assert_eq!(code, Some(0), "{said}");
}
