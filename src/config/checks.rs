//! Collects the issues that checks report, and finds the place where a key was written.
//!
//! A check names a key by its place in the sections of the file, such as `optimizer.betas`. While a
//! phase is checked, the same name stands for the key that applies in that phase: the phase's own
//! key if it has one (`phase.0.optimizer.betas`, or `phase.0.micro_batch_size` for
//! `train.micro_batch_size`), otherwise the section's key. So one check serves both, and its
//! message and line number point at the key that the user has to change.

use super::document::Document;
use super::error::Issue;
use super::hints;

/// Sections whose keys are written in a phase without the section's name.
const FLAT: [&str; 3] = ["data.", "model.", "train."];

/// Collects the issues of a config.
pub(super) struct Checks<'d> {
    document: &'d Document,
    rejected: &'d [String],
    /// The path of the phase that is being checked, such as `phase.0`; empty for the whole file.
    scope: String,
    /// Keys of sections that do not apply in the phase that is being checked.
    left_out: &'static [&'static str],
    issues: Vec<Issue>,
}

impl<'d> Checks<'d> {
    /// `rejected` lists the paths that the strict check removed from the document.
    pub(super) fn new(document: &'d Document, rejected: &'d [String]) -> Self {
        Self {
            document,
            rejected,
            scope: String::new(),
            left_out: &[],
            issues: Vec::new(),
        }
    }

    /// Runs checks of the phase `number`, counted from 0.
    pub(super) fn in_phase<T>(&mut self, number: usize, check: impl FnOnce(&mut Self) -> T) -> T {
        let before = std::mem::replace(&mut self.scope, format!("phase.{number}"));
        let checked = check(self);
        (self.scope, self.left_out) = (before, &[]);
        checked
    }

    /// Leaves keys of sections out of the current phase: there they count as not written.
    pub(super) fn leave_out(&mut self, keys: &'static [&'static str]) {
        self.left_out = keys;
    }

    /// The keys that were written, without defaults.
    pub(super) fn written(&self) -> toml::Table {
        self.document.to_toml()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.issues.is_empty()
    }

    pub(super) fn into_issues(self) -> Vec<Issue> {
        self.issues
    }

    /// Reports that `keys` contradict each other or have a value that is not allowed. The issue
    /// points at the first of `keys` that was written, or at the section if none was. A key is
    /// given as a path such as `train.max_steps`.
    pub(super) fn refuse(&mut self, keys: &[&str], message: String, help: &str) {
        let places: Vec<String> = keys.iter().map(|key| self.place(key)).collect();
        if places.iter().any(|place| self.is_rejected(place)) {
            return;
        }
        let origin = places.iter().find_map(|place| self.document.origin(place));
        let section = places.first().and_then(|place| place.rsplit_once('.'));
        let origin = origin.or_else(|| self.document.origin(section?.0));
        let issue = Issue {
            message,
            origin: origin.or_else(|| self.document.origin(&self.scope)),
            help: Some(help.to_string()),
        };
        // Several phases may inherit the same mistake from a section.
        if !self.issues.contains(&issue) {
            self.issues.push(issue);
        }
    }

    /// Reports a key that takes effect only if another key has a certain value.
    pub(super) fn only_with(&mut self, given: bool, key: &str, decider: &str, needed: &str) {
        if given {
            let name = decider.rsplit('.').next().unwrap_or(decider);
            self.refuse(
                &[key, decider],
                format!(
                    "{} takes effect only with {name} = {needed}",
                    self.describe(key)
                ),
                &format!("remove it, or set {name} = {needed}"),
            );
        }
    }

    /// Describes a key: "`betas` in [optimizer]", or "`betas` in [phase.optimizer]" if the phase
    /// has its own.
    pub(super) fn describe(&self, key: &str) -> String {
        hints::describe(&self.place(key))
    }

    /// Whether the key is in the file or a `--set` argument, and not only a default.
    pub(super) fn is_written(&self, key: &str) -> bool {
        let place = self.place(key);
        let is_left_out = place == key && self.left_out.contains(&key);
        !is_left_out && self.document.origin(&place).is_some()
    }

    /// Whether the key is written, or the strict check removed something that may have been this
    /// key.
    pub(super) fn is_mentioned(&self, key: &str) -> bool {
        let place = self.place(key);
        self.is_rejected(&place) || self.document.origin(&place).is_some()
    }

    /// The path of the key that applies: the phase's if the phase has the key, otherwise the
    /// section's.
    fn place(&self, key: &str) -> String {
        if !self.scope.is_empty() {
            let flat = FLAT.iter().find_map(|section| key.strip_prefix(section));
            for name in std::iter::once(key).chain(flat) {
                let place = format!("{}.{name}", self.scope);
                // A list in the phase replaces the section's whole list.
                let whole = format!("{}.{}", self.scope, list_of(name));
                if self.is_rejected(&whole) || self.document.origin(&whole).is_some() {
                    return place;
                }
            }
        }
        key.to_string()
    }

    /// Whether the strict check removed `path`, something that contains it, or something inside it.
    pub(super) fn is_rejected(&self, path: &str) -> bool {
        let within = |inner: &str, outer: &str| {
            let rest = inner.strip_prefix(outer);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let mut rejected = self.rejected.iter();
        rejected.any(|cut| within(path, cut) || within(cut, path))
    }
}

/// The list that contains `key`, such as `data.datasets` for `data.datasets.0.path`. A key outside
/// any list is returned unchanged.
fn list_of(key: &str) -> &str {
    let mut end = 0;
    for segment in key.split('.') {
        if hints::is_position(segment) {
            return key[..end].trim_end_matches('.');
        }
        end += segment.len() + 1;
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::OptimizerName;
    use crate::config::keys::Config;
    use crate::config::source::{Origin, Sources};

    const FILE: &str = "\
[optimizer]
name = \"adamw\"
betas = [0.9, 0.95]
[train]
micro_batch_size = 100000
max_steps = 5
[[phase]]
optimizer = { name = \"sgd\", betas = [0.9, 0.99] }
[[phase]]
micro_batch_size = 200000
lr_scheduler = { warmup_steps = 7 }
";

    /// Checks the phase at `scope` in `FILE`. Returns the message of each issue and the text that
    /// it points at.
    fn said(
        scope: &str,
        rejected: &[&str],
        check: impl Fn(&mut Checks<'_>, &mut Config),
    ) -> Vec<(String, String)> {
        let sources = Sources {
            text: FILE.to_string(),
            ..Sources::default()
        };
        let document = Document::parse(sources).document;
        let rejected: Vec<String> = rejected.iter().map(|path| path.to_string()).collect();
        let mut checks = Checks::new(&document, &rejected);
        checks.scope = scope.to_string();
        check(&mut checks, &mut Config::default());
        let text = |issue: &Issue| match &issue.origin {
            Some(Origin::File(span)) => FILE[span.clone()].to_string(),
            _ => String::new(),
        };
        let issues = checks.into_issues();
        issues
            .iter()
            .map(|issue| (issue.message.clone(), text(issue)))
            .collect()
    }

    fn optimizer(checks: &mut Checks<'_>, config: &mut Config) {
        config.optimizer.name = OptimizerName::Sgd;
        config.optimizer.betas = Some([0.9, 0.99]);
        checks.optimizer(&mut config.optimizer);
    }

    #[test]
    fn a_check_points_at_the_key_that_holds_in_the_phase() {
        let of = |place: &str, line: &str| {
            let message = format!("sgd ignores `betas` in {place}");
            vec![(message, line.to_string())]
        };
        assert_eq!(
            said("", &[], optimizer),
            of("[optimizer]", "betas = [0.9, 0.95]")
        );
        assert_eq!(
            said("phase.0", &[], optimizer),
            of("[phase.optimizer]", "betas = [0.9, 0.99]")
        );
        // The second phase has no optimizer of its own.
        assert_eq!(
            said("phase.1", &[], optimizer),
            of("[optimizer]", "betas = [0.9, 0.95]")
        );
    }

    #[test]
    fn a_key_of_a_section_may_stand_in_a_phase_without_the_sections_name() {
        let length = |checks: &mut Checks<'_>, config: &mut Config| {
            config.train.micro_batch_size = usize::MAX;
            checks.tokens_per_step(config);
        };
        let line = |scope: &str| said(scope, &[], length)[0].1.clone();
        assert_eq!(line("phase.0"), "micro_batch_size = 100000");
        assert_eq!(line("phase.1"), "micro_batch_size = 200000");
        let warmup = |checks: &mut Checks<'_>, _: &mut Config| {
            let key = "lr_scheduler.warmup_steps";
            let message = checks.describe(key);
            checks.refuse(&[key], message, "");
        };
        let place = "`warmup_steps` in [phase.lr_scheduler]";
        assert_eq!(
            said("phase.1", &[], warmup),
            [(place.to_string(), "warmup_steps = 7".to_string())]
        );
    }

    #[test]
    fn a_list_of_a_phase_replaces_the_sections() {
        let sources = Sources {
            text: "data.datasets = [{ path = \"a\", weight = 2 }]\n\
                   phase = [{ data.datasets = [{ path = \"b\" }] }]"
                .to_string(),
            ..Sources::default()
        };
        let document = Document::parse(sources).document;
        let mut checks = Checks::new(&document, &[]);
        let weight = "data.datasets.0.weight";
        assert_eq!(checks.place(weight), weight);
        checks.scope = "phase.0".to_string();
        assert_eq!(checks.place(weight), "phase.0.data.datasets.0.weight");
        assert_eq!(checks.place("data.val_path"), "data.val_path");
    }

    #[test]
    fn a_check_keeps_silent_about_a_phases_key_that_was_cut_out() {
        let cut = &["phase.0.optimizer.name"];
        assert_eq!(said("phase.0", cut, optimizer), []);
        assert_eq!(said("phase.1", cut, optimizer).len(), 1);
    }
}
