//! Which layers get an adapter: what `[adapter]` resolves to.

use std::collections::BTreeMap;

use regex::Regex;

use super::keys::{ALL_LINEAR, AdapterConfig, AdapterInit, AdapterKind, Architecture};
use super::shape::ModelShape;

/// The adapters of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterPlan {
    /// Their shapes, by the path of the layer: `layers.0.self_attn.q_proj`.
    pub layers: BTreeMap<String, LoraShape>,
    /// Paths of other modules that are trained whole: `lm_head`, `layers.0.input_layernorm`.
    pub saved: Vec<String>,
    /// What the new matrices begin as.
    pub init: AdapterInit,
    /// Rounds of LoftQ.
    pub loftq_iterations: usize,
    /// The second matrix of each adapter learns at so many times the learning rate.
    pub lora_plus_ratio: f64,
}

/// What an adapter adds to one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraShape {
    /// Width of the bottleneck.
    pub rank: usize,
    /// What the product of the two matrices is multiplied by.
    pub scale: f64,
    /// Share of what goes in that is set to zero while training.
    pub dropout: f64,
    /// Whether the lengths of each output's weights are trained apart (DoRA).
    pub magnitude: bool,
}

/// lora_alpha / r, or lora_alpha / sqrt(r) (Kalajdzievski, 2023).
pub fn lora_scale(alpha: f64, rank: usize, use_rslora: bool) -> f64 {
    let rank = rank as f64;
    alpha / if use_rslora { rank.sqrt() } else { rank }
}

/// A regular expression that is to match a whole text.
pub(crate) fn whole(pattern: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!("^(?:{pattern})$"))
}

/// Names and patterns of layers, as `target_modules`, `rank_pattern` and `modules_to_save` have
/// them.
pub(crate) enum Selector {
    /// The linear layers of all blocks.
    AllLinear,
    /// The path, or its end.
    Name(String),
    /// The whole path.
    Path(Regex),
    /// The path, or its end, as a pattern: what PEFT takes the keys of `rank_pattern` for.
    End(Regex),
}

impl Selector {
    /// An entry of `target_modules`.
    pub(crate) fn target(text: &str) -> Result<Self, regex::Error> {
        match text.strip_prefix("re:") {
            Some(pattern) => whole(pattern).map(Self::Path),
            None if text == ALL_LINEAR => Ok(Self::AllLinear),
            None => Ok(Self::Name(text.to_string())),
        }
    }

    /// A key of `rank_pattern` or `alpha_pattern`.
    pub(crate) fn end(text: &str) -> Result<Self, regex::Error> {
        let pattern = text.strip_prefix("re:").unwrap_or(text);
        whole(&format!(r"(?:.*\.)?(?:{pattern})")).map(Self::End)
    }

    /// Whether a layer that has these paths is meant: its own, and those it has in files.
    pub(crate) fn matches(&self, paths: &[String]) -> bool {
        let ends = |path: &String, name: &str| {
            let rest = path.strip_suffix(name);
            rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        paths.iter().any(|path| match self {
            Self::AllLinear => path.starts_with("layers."),
            Self::Name(name) => ends(path, name),
            Self::Path(pattern) | Self::End(pattern) => pattern.is_match(path),
        })
    }
}

/// A linear layer of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LinearLayer {
    /// Its path.
    pub(crate) path: String,
    /// `[in, out]`.
    pub(crate) dims: [usize; 2],
    /// Number of its block; none for the output head.
    pub(crate) block: Option<usize>,
}

impl ModelShape {
    /// The linear layers of a block, by their paths within it, `[in, out]`.
    fn block_layers(&self) -> Vec<(&'static str, [usize; 2])> {
        let (dim, ffn) = (self.hidden_size, self.intermediate_size);
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        let mut layers = vec![
            ("self_attn.q_proj", [dim, queries]),
            ("self_attn.k_proj", [dim, keys]),
            ("self_attn.v_proj", [dim, keys]),
            ("self_attn.o_proj", [queries, dim]),
            ("mlp.up_proj", [dim, ffn]),
            ("mlp.down_proj", [ffn, dim]),
        ];
        if !self.is_gpt2_form() {
            layers.insert(4, ("mlp.gate_proj", [dim, ffn]));
        }
        layers
    }

    /// Every linear layer, the head of `vocab_size` outputs included where it is one.
    pub(crate) fn linear_layers(&self, vocab_size: usize) -> Vec<LinearLayer> {
        let blocks = (0..self.num_hidden_layers).flat_map(|block| {
            let layers = self.block_layers().into_iter();
            layers.map(move |(name, dims)| LinearLayer {
                path: format!("layers.{block}.{name}"),
                dims,
                block: Some(block),
            })
        });
        let head = (!self.tie_word_embeddings).then(|| LinearLayer {
            path: "lm_head".to_string(),
            dims: [self.hidden_size, vocab_size],
            block: None,
        });
        blocks.chain(head).collect()
    }

    /// The paths that people know a layer by: ours, and with the name that its family's files have,
    /// where that is another one.
    pub(crate) fn known_paths(&self, path: &str) -> Vec<String> {
        let (parent, leaf) = path.rsplit_once('.').unwrap_or(("", path));
        let theirs = match (self.architecture, leaf) {
            (Architecture::Phi3, "q_proj" | "k_proj" | "v_proj") => "qkv_proj",
            (Architecture::Phi3, "gate_proj" | "up_proj") => "gate_up_proj",
            (Architecture::Gpt2, "q_proj" | "k_proj" | "v_proj") => "c_attn",
            (Architecture::Gpt2, "o_proj" | "down_proj") => "c_proj",
            (Architecture::Gpt2, "up_proj") => "c_fc",
            _ => return vec![path.to_string()],
        };
        vec![path.to_string(), format!("{parent}.{theirs}")]
    }

    /// Paths of the modules other than linear layers that have weights.
    pub(crate) fn other_modules(&self) -> Vec<String> {
        let mut in_block = vec!["input_layernorm", "post_attention_layernorm"];
        if self.qk_norm {
            in_block.extend(["self_attn.q_norm", "self_attn.k_norm"]);
        }
        if self.is_bitnet_form() {
            in_block.extend(["self_attn.attn_sub_norm", "mlp.ffn_sub_norm"]);
        }
        let blocks = (0..self.num_hidden_layers).flat_map(|block| {
            in_block
                .iter()
                .map(move |name| format!("layers.{block}.{name}"))
        });
        let positions = self.is_gpt2_form().then(|| "embed_positions".to_string());
        let first = ["embed_tokens", "norm"].map(str::to_string);
        first.into_iter().chain(positions).chain(blocks).collect()
    }
}

impl AdapterConfig {
    /// What applies to a layer with these paths.
    pub(super) fn shape_of(&self, paths: &[String]) -> LoraShape {
        let matching = |pattern: &String| {
            // Patterns were compiled when the section was checked, and agree where they overlap.
            Selector::end(pattern).is_ok_and(|pattern| pattern.matches(paths))
        };
        let ranks = self
            .rank_pattern
            .iter()
            .find(|(pattern, _)| matching(pattern));
        let alphas = self
            .alpha_pattern
            .iter()
            .find(|(pattern, _)| matching(pattern));
        let rank = ranks.map_or(self.r, |(_, &rank)| rank);
        let alpha = alphas.map_or(self.lora_alpha, |(_, &alpha)| alpha);
        LoraShape {
            rank,
            scale: lora_scale(alpha, rank, self.use_rslora),
            dropout: self.lora_dropout,
            magnitude: self.kind == AdapterKind::Dora,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a1_selectors_match_ends_of_paths_and_whole_patterns() {
        let path = ["layers.3.self_attn.q_proj".to_string()];
        let matches = |text: &str| Selector::target(text).unwrap().matches(&path);
        assert!(matches("q_proj") && matches("self_attn.q_proj") && matches("all-linear"));
        assert!(matches("layers.3.self_attn.q_proj") && matches("re:.*_proj"));
        assert!(matches(r"re:layers\.[0-3]\..*"));
        assert!(!matches("proj") && !matches("_proj") && !matches("k_proj"));
        assert!(!matches("re:q_proj") && !matches(r"re:layers\.1\..*"));
        let end = |text: &str| Selector::end(text).unwrap().matches(&path);
        assert!(end("q_proj") && end(".*_proj") && end(r"3\.self_attn\.q_proj"));
        assert!(!end("proj") && !end("k_proj"));
        assert!(Selector::target("re:(").is_err() && Selector::end("(").is_err());
    }

    #[test]
    fn a1_scales_are_alpha_over_r_or_its_root() {
        assert_eq!(lora_scale(32.0, 16, false), 2.0);
        assert_eq!(lora_scale(32.0, 16, true), 8.0);
    }
}
