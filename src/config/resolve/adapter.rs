//! `[adapter]`: which layers are meant, and whether the base model has them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::config::adapter::{AdapterPlan, LinearLayer, LoraShape, Selector};
use crate::config::checks::Checks;
use crate::config::keys::{ALL_LINEAR, AdapterConfig, AdapterInit, AdapterKind, Config};
use crate::config::shape::ModelShape;
use crate::config::spec::DecoderSpec;

/// The limit of `r`, and of what takes its place for some layers.
const MOST_RANK: usize = 65536;

impl Checks<'_> {
    /// The adapters; none without the section, or where something in it is wrong.
    pub(super) fn adapter(
        &mut self,
        config: &mut Config,
        model: Option<&(ModelShape, Option<DecoderSpec>)>,
    ) -> Option<AdapterPlan> {
        let adapter = config.adapter.as_mut()?;
        // Without a shape something else is wrong already.
        let (target, base) = model?;
        let Some(base) = base else {
            self.refuse(
                &["adapter", "model.base_model"],
                "[adapter] without a base model: there is nothing to adapt".to_string(),
                "base_model = \"some/folder\" in [model], or remove [adapter]",
            );
            return None;
        };
        let shape = &base.shape;
        let layers = self.targets(adapter, base)?;
        self.patterns(adapter, shape, &layers);
        let shapes = layers.iter().map(|layer| {
            let paths = shape.known_paths(&layer.path);
            (layer.path.clone(), adapter.shape_of(&paths))
        });
        let shapes: BTreeMap<_, _> = shapes.collect();
        self.init(adapter, target, base);
        let place = (&config.output_dir, config.model.base_model.as_ref());
        if adapter.init != AdapterInit::Default && target.blockwise.is_some() {
            self.own_base(place);
        }
        self.fused(adapter, shape, &shapes);
        if shapes.contains_key("lm_head") && adapter.lora_dropout > 0.0 {
            self.refuse(
                &["adapter.lora_dropout", "adapter.target_modules"],
                "`lora_dropout` in [adapter] does not reach an adapter of the output head"
                    .to_string(),
                "lora_dropout = 0, or modules_to_save = [\"lm_head\"] instead",
            );
        }
        let saved = self.saved_modules(adapter, shape, &shapes)?;
        Some(AdapterPlan {
            layers: shapes,
            saved,
            init: adapter.init,
            loftq_iterations: adapter.loftq_iterations.unwrap_or(1),
            lora_plus_ratio: adapter.lora_plus_ratio,
        })
    }

    /// What begins as a part of the weights has to be able to.
    fn init(&mut self, adapter: &mut AdapterConfig, target: &ModelShape, base: &DecoderSpec) {
        let is_loftq = adapter.init == AdapterInit::Loftq;
        let given = adapter.loftq_iterations.is_some();
        self.only_with(
            given && !is_loftq,
            "adapter.loftq_iterations",
            "adapter.init",
            "\"loftq\"",
        );
        if is_loftq {
            adapter.loftq_iterations.get_or_insert(1);
        }
        let name = match adapter.init {
            AdapterInit::Default => return,
            AdapterInit::Pissa => "pissa",
            AdapterInit::Loftq => "loftq",
        };
        let keys = ["adapter.init", "adapter.type"];
        if adapter.kind == AdapterKind::Dora {
            self.refuse(
                &keys,
                format!("init = \"{name}\" together with type = \"dora\" in [adapter]"),
                "keep one of them",
            );
        }
        let changes = if base.shape.blockwise.is_some() {
            Some("the base model's weights are codes already")
        } else if target.ternary.is_some() {
            Some("ternary weights stay as they are")
        } else if is_loftq && target.blockwise.is_none() {
            Some("nothing is quantised: there is nothing to correct")
        } else {
            None
        };
        if let Some(problem) = changes {
            self.refuse(
                &["adapter.init", "quantization.weights", "model.base_model"],
                format!("init = \"{name}\" in [adapter]: {problem}"),
                "init = \"default\"; \"loftq\" goes with [quantization] of a dense base model",
            );
        }
    }

    /// The run writes a base model of its own, and must not write it over the one that it is made of.
    fn own_base(&mut self, (output, base): (&PathBuf, Option<&PathBuf>)) {
        let absolute = |path: &Path| std::path::absolute(path).ok();
        let own = absolute(&output.join("base_model"));
        if own.is_some() && own == base.and_then(|base| absolute(base)) {
            self.refuse(
                &["output_dir", "model.base_model", "adapter.init"],
                "the run keeps a changed base model in base_model/ of `output_dir`, which is where \
                 `base_model` in [model] is"
                    .to_string(),
                "another output_dir",
            );
        }
    }

    /// DoRA has a length for every output of a module as files have it.
    fn fused(
        &mut self,
        adapter: &AdapterConfig,
        shape: &ModelShape,
        shapes: &BTreeMap<String, LoraShape>,
    ) {
        if adapter.kind != AdapterKind::Dora {
            return;
        }
        let file_path = |path: &str| shape.known_paths(path).pop();
        let layers = shape.linear_layers(1);
        let alone = shapes.keys().find_map(|path| {
            let whole = file_path(path)?;
            let mut parts = layers
                .iter()
                .filter(|layer| file_path(&layer.path).as_ref() == Some(&whole));
            let missing = parts.find(|layer| !shapes.contains_key(&layer.path))?;
            Some((whole, missing.path.clone()))
        });
        if let Some((whole, missing)) = alone {
            self.refuse(
                &["adapter.target_modules", "adapter.type"],
                format!(
                    "type = \"dora\" in [adapter] for a part of {whole}, which this family's files \
                     have as one: {missing} is not in target_modules"
                ),
                "name all parts of it, or type = \"lora\"",
            );
        }
    }

    /// The layers that `target_modules` and `layers` name.
    fn targets(&mut self, adapter: &AdapterConfig, base: &DecoderSpec) -> Option<Vec<LinearLayer>> {
        let key = "adapter.target_modules";
        let shape = &base.shape;
        let mut all = shape.linear_layers(base.vocab_size);
        let count = shape.num_hidden_layers;
        if let Some(blocks) = &adapter.layers {
            if let Some(&beyond) = blocks.iter().find(|&&block| block >= count) {
                self.refuse(
                    &["adapter.layers"],
                    format!(
                        "`layers` in [adapter] names block {beyond}, but the base model has blocks \
                         0 to {}",
                        count - 1
                    ),
                    "blocks are numbered from 0",
                );
            }
            all.retain(|layer| layer.block.is_none_or(|block| blocks.contains(&block)));
        }
        let names = adapter.target_modules.as_slice();
        let mut chosen = vec![false; all.len()];
        for name in names {
            let selector = match Selector::target(name) {
                Ok(selector) => selector,
                Err(error) => {
                    self.refuse(
                        &[key],
                        format!(
                            "{} is not a regular expression: {error}",
                            self.describe(key)
                        ),
                        "as in \"re:.*_proj\"",
                    );
                    return None;
                }
            };
            let mut any = false;
            for (layer, chosen) in all.iter().zip(&mut chosen) {
                if selector.matches(&shape.known_paths(&layer.path)) {
                    (*chosen, any) = (true, true);
                }
            }
            if !any {
                self.refuse(
                    &[key, "adapter.layers"],
                    format!(
                        "\"{}\" in {} matches no linear layer of the base model",
                        name.escape_debug(),
                        self.describe(key)
                    ),
                    &format!("it has {}", layer_names(base)),
                );
                return None;
            }
        }
        if !chosen.contains(&true) {
            let help = format!(
                "target_modules = \"{ALL_LINEAR}\", or some of {}",
                layer_names(base)
            );
            self.refuse(
                &[key, "adapter"],
                format!("{} names no layer", self.describe(key)),
                &help,
            );
            return None;
        }
        let kept = all.into_iter().zip(chosen).filter(|(_, chosen)| *chosen);
        Some(kept.map(|(layer, _)| layer).collect())
    }

    /// Each pattern has to say something about a layer that gets an adapter, and no two of them
    /// different things about one: a table has no order that could decide.
    fn patterns(&mut self, adapter: &AdapterConfig, shape: &ModelShape, layers: &[LinearLayer]) {
        let ranks = adapter.rank_pattern.iter();
        self.patterns_of("rank_pattern", ranks, (shape, layers));
        let alphas = adapter.alpha_pattern.iter();
        self.patterns_of("alpha_pattern", alphas, (shape, layers));
        let ranks = adapter.rank_pattern.iter();
        let beyond = ranks.filter(|(_, rank)| !(1..=MOST_RANK).contains(*rank));
        for (name, rank) in beyond {
            let name = name.escape_debug();
            let message = format!("rank {rank} for \"{name}\" in `rank_pattern` of [adapter]");
            let help = format!("a rank from 1 to {MOST_RANK}");
            self.refuse(&["adapter.rank_pattern"], message, &help);
        }
        let alphas = adapter.alpha_pattern.iter();
        for (name, alpha) in alphas.filter(|(_, alpha)| **alpha <= 0.0) {
            let name = name.escape_debug();
            let message =
                format!("lora_alpha {alpha} for \"{name}\" in `alpha_pattern` of [adapter]");
            self.refuse(&["adapter.alpha_pattern"], message, "a number above 0");
        }
    }

    fn patterns_of<'a, T: PartialEq + 'a>(
        &mut self,
        key: &str,
        patterns: impl Iterator<Item = (&'a String, &'a T)>,
        (shape, layers): (&ModelShape, &[LinearLayer]),
    ) {
        let path = format!("adapter.{key}");
        // What the patterns before have said, by layer.
        let mut said: Vec<Option<(&String, &T)>> = vec![None; layers.len()];
        for (pattern, value) in patterns {
            let selector = match Selector::end(pattern) {
                Ok(selector) => selector,
                Err(error) => {
                    let message = format!(
                        "\"{}\" in {} is not a regular expression: {error}",
                        pattern.escape_debug(),
                        self.describe(&path)
                    );
                    let help = "a name as \"down_proj\", or the end of a path";
                    self.refuse(&[&path], message, help);
                    continue;
                }
            };
            let matches = |layer: &LinearLayer| selector.matches(&shape.known_paths(&layer.path));
            let (mut any, mut conflict) = (false, None);
            for (layer, said) in layers.iter().zip(&mut said) {
                if !matches(layer) {
                    continue;
                }
                any = true;
                let before = said.replace((pattern, value));
                let other = before.filter(|(_, before)| *before != value);
                conflict = conflict.or(other.map(|(before, _)| (before, &layer.path)));
            }
            if !any {
                self.refuse(
                    &[&path, "adapter.target_modules"],
                    format!(
                        "\"{}\" in {} matches no layer that has an adapter",
                        pattern.escape_debug(),
                        self.describe(&path)
                    ),
                    "remove it, or name the layer in target_modules too",
                );
            }
            if let Some((before, layer)) = conflict {
                let message = format!(
                    "\"{}\" and \"{}\" in {} say different things about {layer}",
                    before.escape_debug(),
                    pattern.escape_debug(),
                    self.describe(&path)
                );
                let help = "patterns that match no layer together, as \"self_attn\\\\.q_proj\"";
                self.refuse(&[&path], message, help);
            }
        }
    }

    /// The paths of `modules_to_save`.
    fn saved_modules(
        &mut self,
        adapter: &AdapterConfig,
        shape: &ModelShape,
        adapted: &BTreeMap<String, LoraShape>,
    ) -> Option<Vec<String>> {
        let key = "adapter.modules_to_save";
        let mut modules = shape.other_modules();
        if !shape.tie_word_embeddings {
            modules.push("lm_head".to_string());
        }
        let mut saved = Vec::new();
        for name in &adapter.modules_to_save {
            let selector = Selector::Name(name.clone());
            let found: Vec<String> = modules
                .iter()
                .filter(|module| selector.matches(std::slice::from_ref(module)))
                .cloned()
                .collect();
            let tied =
                shape.tie_word_embeddings && matches!(name.as_str(), "lm_head" | "embed_tokens");
            let problem = if tied {
                Some(
                    "the base model's embedding and output head are one matrix, which PEFT would \
                      take apart"
                        .to_string(),
                )
            } else if found.is_empty() {
                Some(
                    "the base model has no such module that is not a linear layer of a block"
                        .to_string(),
                )
            } else if found.iter().any(|module| adapted.contains_key(module)) {
                Some("it has an adapter already (target_modules)".to_string())
            } else {
                None
            };
            if let Some(problem) = problem {
                self.refuse(
                    &[key],
                    format!(
                        "\"{}\" in {}: {problem}",
                        name.escape_debug(),
                        self.describe(key)
                    ),
                    "for an untied model [\"embed_tokens\", \"lm_head\"]; norms by their names",
                );
                return None;
            }
            saved.extend(
                found
                    .into_iter()
                    .filter(|module| !saved.contains(module))
                    .collect::<Vec<_>>(),
            );
        }
        Some(saved)
    }
}

/// "q_proj, k_proj, ... and lm_head", in the words of the family's files.
fn layer_names(base: &DecoderSpec) -> String {
    let mut names: Vec<String> = Vec::new();
    for layer in base.shape.linear_layers(base.vocab_size) {
        let path = base.shape.known_paths(&layer.path).pop();
        let leaf = path.as_deref().and_then(|path| path.rsplit('.').next());
        let leaf = leaf.unwrap_or(&layer.path).to_string();
        if !names.contains(&leaf) {
            names.push(leaf);
        }
    }
    names.join(", ")
}
