//! Checks whether the phases of a plan can be trained, as far as that follows from the plan. A file
//! and a plan made in code pass through the same checks: those of a file point at its lines.

use super::adapter::AdapterPlan;
use super::keys::{AdapterInit, Task};
use super::length::Length;
use super::phase::{PathSelector, PhaseAdapter, PhaseLength, PhasePlan};
use super::phase_model::{Held, PhaseModel};
use super::plan::Plan;

/// What is wrong with a phase.
#[derive(Debug, Clone, PartialEq)]
pub struct PhaseProblem {
    /// The position of the phase, from 0.
    pub phase: usize,
    /// The keys that cause it, as paths in the sections: `data.sequence_len`.
    pub(crate) keys: Vec<&'static str>,
    /// What is wrong, as the end of a sentence that begins with the phase.
    pub reason: String,
    /// What to do about it.
    pub help: String,
}

impl PhaseProblem {
    fn new(phase: usize, keys: &[&'static str], reason: String, help: &str) -> Self {
        Self {
            phase,
            keys: keys.to_vec(),
            reason,
            help: help.to_string(),
        }
    }
}

/// Everything that is wrong with the phases of a plan, before any data is read.
pub fn problems(plan: &Plan) -> Vec<PhaseProblem> {
    let phases = plan.phases.iter().enumerate();
    let settings = phases.filter_map(|(number, phase)| settings(plan, number, phase));
    let mut problems: Vec<PhaseProblem> = settings.collect();
    problems.extend(blends(plan));
    problems.extend(selectors(plan));
    problems.extend(adapters(plan));
    problems.extend(lengths(plan));
    problems
}

/// Checks the settings of one phase by themselves.
fn settings(plan: &Plan, number: usize, phase: &PhasePlan) -> Option<PhaseProblem> {
    let problem = |keys: &[&'static str], reason: String, help: &str| {
        Some(PhaseProblem::new(number, keys, reason, help))
    };
    let is_dpo = phase.task == Task::Dpo;
    if is_dpo != phase.dpo.is_some() {
        let (reason, help) = match is_dpo {
            true => ("has task = dpo and no `dpo`", "set `dpo`"),
            false => ("has `dpo` and another task", "remove `dpo`"),
        };
        return problem(&["dpo", "task"], reason.to_string(), help);
    }
    if is_dpo && plan.config.model.base_model.is_none() {
        return problem(
            &["task"],
            "trains on pairs, and the run has no base model to hold the answers against"
                .to_string(),
            "base_model = \"some/folder\" in [model]",
        );
    }
    let counts = [
        ("train.micro_batch_size", phase.micro_batch_size),
        (
            "train.gradient_accumulation_steps",
            phase.gradient_accumulation_steps,
        ),
        ("data.sequence_len", phase.data.sequence_len),
    ];
    if let Some((key, _)) = counts.iter().find(|(_, count)| *count == 0) {
        let reason = format!("has a {} of 0", leaf(key));
        return problem(&[key], reason, "a number above 0");
    }
    let numbers = [
        ("optimizer.learning_rate", phase.learning_rate),
        ("train.max_grad_norm", phase.max_grad_norm),
    ];
    let is_bad = |value: f64| !value.is_finite() || value < 0.0;
    if let Some((key, value)) = numbers.iter().find(|(_, value)| is_bad(*value)) {
        let reason = format!("has a {} of {value}", leaf(key));
        return problem(&[key], reason, "a finite number that is not negative");
    }
    let positions = plan.shape.max_position_embeddings;
    let length = phase.data.sequence_len;
    if length > positions {
        return problem(
            &["data.sequence_len"],
            format!("has sequences of {length} tokens, and the model has {positions} positions"),
            &format!("sequence_len = {positions}"),
        );
    }
    let length = phase.eval_sequence_len.unwrap_or(0);
    if length > positions {
        return problem(
            &["eval.sequence_len", "data.sequence_len"],
            format!(
                "is validated on sequences of {length} tokens, and the model has {positions} positions"
            ),
            &format!("sequence_len = {positions} in [eval]"),
        );
    }
    None
}

fn leaf(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

/// Checks that blends are of ternary weights that are trained, and that the run ends with the model
/// that it exports.
fn blends(plan: &Plan) -> Option<PhaseProblem> {
    let key = ["ternary_blend"];
    let (number, phase) = plan
        .phases
        .iter()
        .enumerate()
        .find(|(_, phase)| phase.ternary_blend != [1.0, 1.0])?;
    let problem = |number, reason: &str, help| {
        Some(PhaseProblem::new(number, &key, reason.to_string(), help))
    };
    let is_share = |share: &f64| (0.0..=1.0).contains(share);
    if !phase.ternary_blend.iter().all(is_share) {
        return problem(
            number,
            "has a ternary blend outside 0 to 1",
            "as in [0.0, 1.0]",
        );
    }
    if plan.shape.ternary.is_none() {
        return problem(
            number,
            "blends dense and ternary weights, and the model has no ternary weights",
            "weights = \"ternary\" in [quantization], or remove ternary_blend",
        );
    }
    if plan.adapter.is_some() {
        return problem(
            number,
            "blends dense and ternary weights, and the weights beside an adapter are packed trits",
            "remove ternary_blend, or [adapter]",
        );
    }
    let last = plan.phases.len() - 1;
    if plan.phases[last].ternary_blend[1] != 1.0 {
        return problem(
            last,
            "ends the run at a blend, and the model that the run exports is ternary",
            "end the last phase's ternary_blend at 1.0",
        );
    }
    None
}

/// Checks that each selector can match a parameter. The model itself checks it exactly, when it is
/// built.
fn selectors(plan: &Plan) -> Vec<PhaseProblem> {
    let linear = plan.shape.linear_layers(1).into_iter();
    let mut modules = plan.shape.other_modules();
    modules.extend(linear.map(|layer| layer.path));
    let matches = |selector: &PathSelector| modules.iter().any(|path| selector.can_match_in(path));
    let phases = plan.phases.iter().enumerate();
    let unmatched = phases.flat_map(|(number, phase)| {
        let selectors = phase.freeze.iter().filter(|selector| !matches(selector));
        selectors.map(move |selector| (number, selector))
    });
    let problems = unmatched.map(|(number, selector)| {
        let blocks = plan.shape.num_hidden_layers;
        PhaseProblem::new(
            number,
            &["freeze"],
            format!("freezes `{selector}`, which matches no parameter of the model"),
            &format!(
                "the model has embed_tokens, norm and layers.0 to layers.{}",
                blocks - 1
            ),
        )
    });
    problems.collect()
}

/// Checks that each phase's setting of the adapter is possible.
fn adapters(plan: &Plan) -> Option<PhaseProblem> {
    let key = ["adapter"];
    let Some(adapter) = &plan.adapter else {
        let mut phases = plan.phases.iter();
        let number = phases.position(|phase| phase.adapter != PhaseAdapter::On)?;
        return Some(PhaseProblem::new(
            number,
            &key,
            "turns an adapter off or begins it anew, and the run has no adapter".to_string(),
            "add [adapter], or remove `adapter` from the phase",
        ));
    };
    let reason = changed_base_problem(plan, adapter)?;
    let models = PhaseModel::of_plan(plan);
    let number = models.iter().position(|model| model.held() == Held::Both)?;
    Some(PhaseProblem::new(
        number,
        &key,
        format!("begins a new adapter on changed weights, and {reason}"),
        "adapter = \"off\" to go on with all weights, or a dense base model with init = \"default\"",
    ))
}

/// Why an adapter cannot begin on weights that another adapter was merged into.
fn changed_base_problem(plan: &Plan, adapter: &AdapterPlan) -> Option<&'static str> {
    if plan.shape.blockwise.is_some() {
        Some("quantized weights would have to be quantized again")
    } else if plan.shape.ternary.is_some() {
        Some("ternary weights would have to be rounded again")
    } else if adapter.init != AdapterInit::Default {
        Some(
            "an adapter that begins as a part of the weights would have to be taken out of them again",
        )
    } else {
        None
    }
}

/// Checks that the lengths add up to the run, as far as that is known before the data is counted.
fn lengths(plan: &Plan) -> Option<PhaseProblem> {
    let key = ["length"];
    let phases: Vec<PhaseLength> = plan.phases.iter().map(|phase| phase.length).collect();
    let last = phases.len().checked_sub(1)?;
    let mut rests = (0..phases.len()).filter(|&number| phases[number] == PhaseLength::Rest);
    let rest = rests.next();
    if let Some(second) = rests.next() {
        return Some(PhaseProblem::new(
            second,
            &key,
            "takes the rest of the run, as an earlier phase does".to_string(),
            "give all phases but one a length of their own",
        ));
    }
    let (mut shares, mut before) = (0.0, 0.0);
    for (number, length) in phases.iter().enumerate() {
        let share = match (length, plan.length) {
            (PhaseLength::Steps(0) | PhaseLength::Tokens(0), _) => {
                let reason = "has no steps".to_string();
                return Some(PhaseProblem::new(number, &key, reason, "a length above 0"));
            }
            (PhaseLength::Steps(steps), Length::Steps(run)) => *steps as f64 / run.max(1) as f64,
            (PhaseLength::Tokens(tokens), Length::Tokens(run)) => {
                *tokens as f64 / run.max(1) as f64
            }
            (PhaseLength::Share(share), _) => *share,
            // How many steps or tokens these are depends on the data.
            _ => 0.0,
        };
        shares += share;
        if let (PhaseLength::Share(share), Length::Steps(run)) = (length, plan.length) {
            // Rounded as the timeline rounds.
            let at = |share: f64| (share * run as f64).round();
            if at(before) == at(before + share) {
                let reason = format!("has no steps: its share of {run} steps is less than one");
                return Some(PhaseProblem::new(number, &key, reason, "a longer phase"));
            }
            before += share;
        }
        // Tolerates the rounding of a sum such as 0.7 + 0.2 + 0.1.
        if shares > 1.0 + 1e-9 {
            return Some(PhaseProblem::new(
                number,
                &key,
                format!("brings the phases to {}", part_of_run(shares, plan.length)),
                "shorten a phase, or lengthen the run",
            ));
        }
    }
    let is_known = phases.iter().all(|length| {
        matches!(
            (length, plan.length),
            (PhaseLength::Share(_) | PhaseLength::Rest, _)
                | (PhaseLength::Steps(_), Length::Steps(_))
                | (PhaseLength::Tokens(_), Length::Tokens(_))
        )
    });
    let left = 1.0 - shares;
    match rest {
        Some(rest) if is_known && left < 1e-9 => Some(PhaseProblem::new(
            rest,
            &key,
            "has no steps: the others take all of the run".to_string(),
            "shorten another phase",
        )),
        None if is_known && left > 1e-9 => Some(PhaseProblem::new(
            last,
            &key,
            format!("ends the phases at {}", part_of_run(shares, plan.length)),
            "length = \"rest\" for one phase",
        )),
        _ => None,
    }
}

/// "5 of the run's 7 steps", "110 % of the run".
fn part_of_run(share: f64, run: Length) -> String {
    match run {
        Length::Steps(steps) => {
            format!("{:.0} of the run's {steps} steps", share * steps as f64)
        }
        Length::Tokens(tokens) => {
            format!("{:.0} of the run's {tokens} tokens", share * tokens as f64)
        }
        Length::Epochs(_) => format!("{} % of the run", (1000.0 * share).round() / 10.0),
    }
}
