//! The arithmetic of a training step, from what is trained and how far the backward pass goes.

use std::collections::BTreeSet;

use burn::module::Param;
use burn::tensor::Tensor;

use super::OfPhase;
use crate::config::DecoderSpec;
use crate::model::{Decoder, VisitParameters};

/// Multiplications and additions for one token, forward and backward (Kaplan et al., 2020, section
/// 2.1). A matrix product takes two for each weight; so does the gradient of its weights, if they
/// are trained, and that of its input, if anything before it is trained. Pairs of answers take a
/// forward pass of the reference and a second one of the output head besides. Attention counts every
/// key, seen or masked, as others count it; the CPU computes those that are seen, and their scores
/// twice.
pub(super) fn per_token(of: OfPhase, spec: &DecoderSpec, model: &Decoder) -> Flops {
    let count = Count {
        of,
        trained: trained_paths(model),
    };
    let (phase, shape) = (of.phase, &spec.shape);
    let queries = (shape.num_attention_heads * shape.head_dim) as f64;
    let scores = 4.0 * queries * phase.data.sequence_len as f64;
    let mut is_reached = ["embed_tokens", "embed_positions"]
        .iter()
        .any(|module| count.trains(module));
    let (mut forward, mut backward, mut again) = (0.0, 0.0, 0.0);
    let layers = shape.linear_layers(spec.vocab_size);
    for block in 0..shape.num_hidden_layers {
        let path = |name: &str| format!("layers.{block}.{name}");
        let of_block = |names: &[&str]| -> Vec<Layer> {
            let paths = names.iter().map(|name| path(name));
            let found = paths.filter_map(|path| {
                let layer = layers.iter().find(|layer| layer.path == path)?;
                Some((path, layer.dims))
            });
            found.collect()
        };
        let stages = [
            (
                "input_layernorm",
                of_block(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
            ),
            ("self_attn.attn_sub_norm", of_block(&["self_attn.o_proj"])),
            (
                "post_attention_layernorm",
                of_block(&["mlp.gate_proj", "mlp.up_proj"]),
            ),
            ("mlp.ffn_sub_norm", of_block(&["mlp.down_proj"])),
        ];
        let mut block_forward = scores;
        let mut flows = is_reached;
        for (place, (norm, layers)) in stages.iter().enumerate() {
            // The residual stream goes into the first and the third stage.
            let input =
                (if place % 2 == 0 { is_reached } else { flows }) || count.trains(&path(norm));
            flows = input;
            for layer in layers {
                let (ahead, back) = count.layer(layer, input);
                block_forward += ahead;
                backward += back;
                flows |= count.trains(&layer.0);
            }
            if place == 0 {
                flows |= ["self_attn.q_norm", "self_attn.k_norm"]
                    .iter()
                    .any(|norm| count.trains(&path(norm)));
                backward += if flows { 2.0 * scores } else { 0.0 };
            } else if place % 2 == 1 {
                is_reached |= flows;
            }
        }
        forward += block_forward;
        if is_reached && phase.gradient_checkpointing {
            again += block_forward;
        }
    }
    let head = if shape.tie_word_embeddings {
        "embed_tokens"
    } else {
        "lm_head"
    };
    // The gradient of the head's input is computed whether it is needed or not.
    let dims = [shape.hidden_size, spec.vocab_size];
    let (head, of_head) = count.layer(&(head.to_string(), dims), true);
    let reference = match &phase.dpo {
        Some(_) => forward + 2.0 * head,
        None => 0.0,
    };
    Flops {
        step: forward + backward + again + head + of_head + reference,
        forward: forward + head,
    }
}

/// The arithmetic for one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Flops {
    /// Multiplications and additions of a training step, forward and backward.
    pub step: f64,
    /// Those of a forward pass alone.
    pub forward: f64,
}

/// A linear layer: its path and `[in, out]`.
type Layer = (String, [usize; 2]);

struct Count<'a> {
    of: OfPhase<'a>,
    /// Paths of the trained parameters.
    trained: BTreeSet<String>,
}

impl Count<'_> {
    /// Whether a parameter of the module is trained.
    fn trains(&self, module: &str) -> bool {
        let within = format!("{module}.");
        let mut from = self.trained.range(within.clone()..);
        from.next().is_some_and(|path| path.starts_with(&within))
    }

    /// Operations of the forward and the backward pass. `input`: whether the gradient of the layer's
    /// input is needed.
    fn layer(&self, (path, [inputs, outputs]): &Layer, input: bool) -> (f64, f64) {
        let product = 2.0 * (inputs * outputs) as f64;
        let times = |flag: bool, count: f64| if flag { count } else { 0.0 };
        let trains_weight = self.trained.contains(&format!("{path}.weight"));
        let (mut forward, mut backward) = (
            product,
            times(trains_weight, product) + times(input, product),
        );
        let rank = self.of.adapter.and_then(|adapter| adapter.layers.get(path));
        if let Some(shape) = rank {
            let low = 2.0 * (shape.rank * (inputs + outputs)) as f64;
            let trains_adapter = self.trains(&format!("{path}.adapter"));
            forward += low;
            backward += times(trains_adapter, low);
            // Through the second matrix to the first one, and from there to the input.
            backward += times(trains_adapter || input, 2.0 * (shape.rank * outputs) as f64);
            backward += times(input, 2.0 * (shape.rank * inputs) as f64);
        }
        (forward, backward)
    }
}

fn trained_paths(model: &Decoder) -> BTreeSet<String> {
    struct Paths(BTreeSet<String>);
    impl VisitParameters for Paths {
        fn visit<const D: usize>(&mut self, path: &str, _param: &Param<Tensor<D>>) {
            self.0.insert(path.to_string());
        }
    }
    let mut paths = Paths(BTreeSet::new());
    model.visit_trained(&mut paths);
    paths.0
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::flops_of_phase;
    use crate::config::{
        AdapterInit, AdapterPlan, Architecture, Config, DatasetConfig, DecoderSpec, LoraShape,
        PhaseModel, Plan,
    };

    const VOCAB: usize = 100;
    /// Hidden and feed-forward width, and sequence length.
    const WIDTH: f64 = 16.0;
    const WIDE: f64 = 24.0;
    const LENGTH: f64 = 8.0;

    fn plan(is_tied: bool) -> Plan {
        let mut config = Config::default();
        config.model.architecture = Some(Architecture::Llama);
        config.model.hidden_size = Some(WIDTH as usize);
        config.model.intermediate_size = Some(WIDE as usize);
        config.model.num_hidden_layers = Some(2);
        config.model.num_attention_heads = Some(2);
        config.model.tie_word_embeddings = Some(is_tied);
        config.data.sequence_len = LENGTH as usize;
        config.data.datasets.push(DatasetConfig::new("data/*.txt"));
        config.train.max_steps = Some(1);
        Plan::from_config(config).unwrap()
    }

    fn flops(plan: &Plan) -> f64 {
        let spec = DecoderSpec {
            shape: plan.shape.clone(),
            vocab_size: VOCAB,
            eos_token_id: None,
            bos_token_id: None,
        };
        let model = PhaseModel::beginning(plan);
        flops_of_phase((plan, &plan.phases[0], model), &spec)
            .unwrap()
            .step
    }

    /// The forward pass of a projection of the attention, of one of the mlp, of the scores of a
    /// block, and of the head.
    fn parts() -> [f64; 4] {
        [
            2.0 * WIDTH * WIDTH,
            2.0 * WIDTH * WIDE,
            4.0 * WIDTH * LENGTH,
            2.0 * WIDTH * VOCAB as f64,
        ]
    }

    #[test]
    fn p1_frozen_layers_are_passed_through_forward_only() {
        let [attention, mlp, scores, head] = parts();
        let block = 4.0 * attention + 3.0 * mlp + scores;
        let frozen = |selectors: &[&str]| {
            let mut plan = plan(true);
            let selectors = selectors.iter().map(|text| text.parse().unwrap());
            plan.phases[0].freeze = selectors.collect();
            flops(&plan)
        };
        assert_eq!(frozen(&[]), 3.0 * (2.0 * block + head));
        // The embedding is the head: its gradient is not computed, that of the head's input is.
        assert_eq!(
            frozen(&["embed_tokens", "layers.0"]),
            4.0 * block + 2.0 * head
        );
        // Nothing before the mlp of the last block is trained: gate and up need the gradients of
        // their weights alone.
        let but_mlp = [
            "embed_tokens",
            "layers.0",
            "layers.1.self_attn",
            "layers.1.input_layernorm",
            "layers.1.post_attention_layernorm",
        ];
        let expected = 2.0 * block + 2.0 * mlp + 2.0 * mlp + 2.0 * head;
        assert_eq!(frozen(&but_mlp), expected);
    }

    #[test]
    fn a_head_with_an_adapter_or_trained_beside_one_is_counted() {
        let [attention, mlp, scores, head] = parts();
        let block = 4.0 * attention + 3.0 * mlp + scores;
        let adapter = |layers: &[&str], saved: &[&str]| {
            let mut plan = plan(false);
            let shape = LoraShape {
                rank: 4,
                scale: 1.0,
                dropout: 0.0,
                magnitude: false,
            };
            let layers = layers.iter().map(|path| (path.to_string(), shape));
            plan.adapter = Some(AdapterPlan {
                layers: layers.collect::<BTreeMap<_, _>>(),
                saved: saved.iter().map(|path| path.to_string()).collect(),
                init: AdapterInit::Default,
                loftq_iterations: 1,
                lora_plus_ratio: 1.0,
            });
            flops(&plan)
        };
        let low = 2.0 * 4.0 * (WIDTH + VOCAB as f64);
        // Nothing below the head is trained.
        let below = 2.0 * block;
        assert_eq!(adapter(&["lm_head"], &[]), below + 2.0 * head + 3.0 * low);
        let low = 2.0 * 4.0 * (WIDTH + WIDE);
        let last = "layers.1.mlp.down_proj";
        // The first matrix needs no gradient of its input.
        let of_last = 3.0 * low - 2.0 * 4.0 * WIDE;
        assert_eq!(adapter(&[last], &["lm_head"]), below + of_last + 3.0 * head);
    }
}
