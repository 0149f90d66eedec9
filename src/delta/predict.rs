//! What is foreseen of a mean of gradients, a mean of their squares, and the parameter: in this order, since each is told
//! with the help of those before it.

use firebrick_kernels::difference::adam::AdamStep;

use super::index::{Rule, StepRecord};

/// How the tensors of a section help each other.
pub(super) struct Prediction {
    rule: Rule,
    step: Option<AdamStep>,
}

/// Their places in a section.
const FIRST: usize = 0;
const SECOND: usize = 1;

impl Prediction {
    pub(super) fn new(rule: Rule, step: Option<&StepRecord>) -> Self {
        Self {
            rule,
            step: step.map(StepRecord::step),
        }
    }

    /// What the numbers of the `i`-th tensor have the scale of: gradients that of the root of their mean square.
    pub(super) fn roots<'a>(&self, i: usize, before: &[Option<&'a [u8]>]) -> Option<&'a [u8]> {
        match (self.rule, i) {
            (Rule::Moments, FIRST) => before[SECOND],
            _ => None,
        }
    }

    /// A chunk of the `i`-th tensor as the optimizer's rule has it, from chunks of all parents and of the tensors before
    /// it; none without a step or without all it needs.
    pub(super) fn of(
        &self,
        i: usize,
        before: &[Option<&[u8]>],
        after: &[&[u8]],
    ) -> Option<Vec<u8>> {
        let step = self.step.as_ref()?;
        let own = before[i]?;
        Some(match i {
            FIRST => step.first(own),
            SECOND => step.second([before[FIRST]?, after[FIRST], own]),
            _ => step.parameter([own, after[FIRST], after[SECOND]]),
        })
    }
}
