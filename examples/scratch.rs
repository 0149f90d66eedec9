#[global_allocator]
static A: mimalloc::MiMalloc = mimalloc::MiMalloc;
use burn::module::Module;
use burn::optim::*;
use burn::tensor::Device;
use firebrick::{config::*, data::Batch, model::*};
fn main() {
    let arch = std::env::args().nth(1).unwrap();
    let quick = arch == "quick";
    let (b, t, d, v, ff, l, h, kv) = if quick { (16, 128, 192, 1024, 512, 4, 6, 2) } else { (12, 64, 128, 65, 512, 4, 4, 4) };
    let shape = ModelShape { architecture: if arch == "gpt2" { Architecture::Gpt2 } else { Architecture::Llama }, hidden_size: d, intermediate_size: ff, num_hidden_layers: l, num_attention_heads: h, num_key_value_heads: kv, head_dim: d / h, max_position_embeddings: t, tie_word_embeddings: true, bias: false, norm_eps: 1e-5, rope_theta: 1e4, initializer_range: 0.02 };
    let spec = DecoderSpec { shape, vocab_size: v, eos_token_id: None, bos_token_id: None };
    let device = Device::flex().autodiff();
    let mut model = Decoder::new(&spec, 1, &device).unwrap();
    println!("{} params", model.num_params());
    let n = b * t;
    let batch = Batch { rows: b, cols: t, tokens: (0..n).map(|i| (i * 7919 % v) as u32).collect(), targets: (0..n).map(|i| ((i + 1) * 7919 % v) as u32).collect(), weights: vec![1.0; n], segment_ids: vec![0; n], positions: (0..n).map(|i| (i % t) as u32).collect() };
    let mut opt = AdamWConfig::new().with_epsilon(1e-8).init();
    let mut times = vec![];
    for step in 0..60 {
        let t0 = std::time::Instant::now();
        let loss = model.loss(&batch, 1.0 / n as f64).unwrap();
        let t1 = std::time::Instant::now();
        let grads = loss.objective.backward();
        let t2 = std::time::Instant::now();
        let grads = GradientsParams::from_grads(grads, &model);
        model = opt.step(1e-3, model, grads);
        let t3 = std::time::Instant::now();
        times.push([(t1 - t0).as_secs_f64(), (t2 - t1).as_secs_f64(), (t3 - t2).as_secs_f64(), (t3 - t0).as_secs_f64()]);
        if step % 20 == 0 { println!("loss {}", loss.sum.into_scalar::<f32>() / n as f32); }
    }
    for i in 0..4 { let mut x: Vec<f64> = times.iter().map(|t| t[i] * 1e3).collect(); x.sort_by(f64::total_cmp); print!("{:.1} ms  ", x[30]); }
    println!();
}
