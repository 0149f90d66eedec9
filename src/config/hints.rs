//! "Did you mean": from what a person wrote to the key or value they want.
//!
//! In order: another trainer's name for a key of this section, the right key in the wrong section,
//! another trainer's name for a key elsewhere, and spelling. Names of other trainers count for
//! spelling too, so a misspelled `lora_rnk` still finds the key that axolotl calls `lora_r`.

use super::schema::{Alias, Choice, Key, Kind, Section};

/// A key and the section it belongs in, as a path without list positions.
struct Place<'s> {
    section: String,
    key: &'s Key,
}

/// Every key of the format.
pub(super) struct Hints<'s> {
    places: Vec<Place<'s>>,
}

/// What an unknown key should have been.
pub(super) struct Hint<'s> {
    pub(super) help: String,
    /// The path of the key that was probably meant, and the key.
    pub(super) meant: Option<(String, &'s Key)>,
}

impl<'s> Hints<'s> {
    pub(super) fn new(root: &'s Section) -> Self {
        let mut places = Vec::new();
        collect(root, "", &mut places);
        // A key of a phase stands for a section's key: the section's is what is meant elsewhere.
        places.sort_by_key(|place| is_of_phase(&place.section));
        Self { places }
    }

    /// What the unknown key `name` in the section at `path` should have been.
    /// `is_section`: it was written with keys of its own.
    pub(super) fn unknown_key(&self, path: &str, name: &str, is_section: bool) -> Hint<'s> {
        let here = section_of(path);
        let all = || {
            let places = self.places.iter();
            let in_phase = is_of_phase(&here);
            places
                .filter(move |place| in_phase || !is_of_phase(&place.section))
                .filter(move |place| !is_section || place.key.has_keys())
        };
        let local = || all().filter(|place| place.section == here);
        let misplaced = || all().find(|place| place.key.name == name);
        let alias = local().find(|place| place.key.is_called(name));
        if alias.is_none()
            && let Some(place) = misplaced()
        {
            return Hint {
                help: format!("`{name}` belongs {}", place.written_in()),
                meant: Some(place.meant()),
            };
        }
        let place = alias
            .or_else(|| all().find(|place| place.key.is_called(name)))
            .or_else(|| nearest(local(), name))
            .or_else(|| nearest(all(), name));
        match place {
            Some(place) => Hint {
                help: place.suggest(&here, name),
                meant: Some(place.meant()),
            },
            None => Hint {
                help: self.known(&here),
                meant: None,
            },
        }
    }

    /// A section was given a plain value, as in axolotl's `optimizer = "adamw"`: the key inside it
    /// that other trainers call by the section's name.
    pub(super) fn inside(&self, path: &str) -> Option<String> {
        let section = section_of(path);
        let name = path.rsplit('.').next().unwrap_or(path);
        let mut places = self.places.iter();
        let place = places.find(|place| place.section == section && place.key.is_called(name))?;
        Some(format!("did you mean `{}` in [{section}]?", place.key.name))
    }

    fn known(&self, here: &str) -> String {
        let local = self.places.iter().filter(|place| place.section == here);
        let names: Vec<&str> = local.map(|place| place.key.name.as_str()).collect();
        format!("known here: {}", names.join(", "))
    }
}

/// The value that a misspelled choice stands for, and all there are.
pub(super) fn choice(choices: &[Choice], written: &str) -> String {
    let names: Vec<&str> = choices.iter().map(|choice| choice.name.as_str()).collect();
    let all = names.join(", ");
    let near = names
        .iter()
        .map(|name| (similarity(name, written), name))
        .filter(|(score, _)| *score >= SIMILAR)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match near {
        Some((_, name)) => format!("did you mean \"{name}\"? (one of: {all})"),
        None => format!("one of: {all}"),
    }
}

/// "`max_steps` in [train]", "element 2 of `betas` in [optimizer]", "`seed`".
pub(super) fn describe(path: &str) -> String {
    match path.rsplit_once('.') {
        Some((list, position)) if is_position(position) => {
            // Positions are counted from 0 in paths and from 1 in prose.
            let position = position.parse::<usize>().map_or(0, |p| p.saturating_add(1));
            format!("element {position} of {}", describe(list))
        }
        Some((section, key)) => format!("`{}` in {}", key.escape_debug(), header(section)),
        None => format!("`{}`", path.escape_debug()),
    }
}

/// "[train]", "[[data.datasets]]"; the root is "the top level".
pub(super) fn header(path: &str) -> String {
    let name = section_of(path);
    if name.is_empty() {
        "the top level".to_string()
    } else if path.rsplit('.').next().is_some_and(is_position) {
        format!("[[{}]]", name.escape_debug())
    } else {
        format!("[{}]", name.escape_debug())
    }
}

fn section_of(path: &str) -> String {
    let names: Vec<&str> = path.split('.').filter(|name| !is_position(name)).collect();
    names.join(".")
}

pub(super) fn is_position(segment: &str) -> bool {
    !segment.is_empty() && segment.bytes().all(|byte| byte.is_ascii_digit())
}

impl<'s> Place<'s> {
    fn meant(&self) -> (String, &'s Key) {
        (self.path(), self.key)
    }

    fn path(&self) -> String {
        if self.section.is_empty() {
            self.key.name.clone()
        } else {
            format!("{}.{}", self.section, self.key.name)
        }
    }

    /// "did you mean `hidden_size`? (GPT-2: n_embd)"
    fn suggest(&self, here: &str, written: &str) -> String {
        let elsewhere = self.key.elsewhere(written);
        let wanted = &self.key.name;
        if let ("", Kind::Section(_)) = (self.section.as_str(), &self.key.kind) {
            format!("did you mean [{wanted}]?{elsewhere}")
        } else if self.section == here {
            format!("did you mean `{wanted}`?{elsewhere}")
        } else {
            format!("did you mean `{wanted}` {}?{elsewhere}", self.written_in())
        }
    }

    fn written_in(&self) -> String {
        match (self.section.as_str(), &self.key.kind) {
            (_, Kind::List { .. }) if self.key.has_keys() => format!("in [[{}]]", self.path()),
            ("", Kind::Section(_)) => format!("at the top level, as [{}]", self.key.name),
            ("", _) => "at the top level, before the first [section]".to_string(),
            (section, _) if is_list(section) => format!("in [[{section}]]"),
            (section, _) => format!("in [{section}]"),
        }
    }
}

/// Whether the section is written once per element.
fn is_list(section: &str) -> bool {
    section == PHASE || section.ends_with("data.datasets")
}

const PHASE: &str = "phase";

/// Whether the section is that of a phase, or inside it.
fn is_of_phase(section: &str) -> bool {
    let rest = section.strip_prefix(PHASE);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

impl Key {
    /// Whether it is a section or a list of sections.
    fn has_keys(&self) -> bool {
        self.kind.section().is_some()
    }

    fn is_called(&self, name: &str) -> bool {
        let mut names = self.aliases.iter();
        names.any(|alias| alias.name.eq_ignore_ascii_case(name))
    }

    /// " (axolotl: lora_r, LLaMA-Factory: lora_rank)": whose word this is. The exact ones where
    /// there are any, else those that are closer to what was written than our own name.
    fn elsewhere(&self, written: &str) -> String {
        let owned = || {
            let others = self.aliases.iter().filter(|alias| alias.name != self.name);
            others.filter(|alias| alias.tool.is_some())
        };
        let exact: Vec<&Alias> = owned()
            .filter(|alias| alias.name.eq_ignore_ascii_case(written))
            .collect();
        let named = if exact.is_empty() {
            let own = similarity(&self.name, written);
            owned()
                .filter(|alias| similarity(&alias.name, written) >= own.max(SIMILAR))
                .collect()
        } else {
            exact
        };
        let named: Vec<String> = named.into_iter().map(Alias::to_string).collect();
        if named.is_empty() {
            String::new()
        } else {
            format!(" ({})", named.join(", "))
        }
    }
}

impl std::fmt::Display for Alias {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.tool {
            Some(tool) => write!(f, "{tool}: {}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// Jaro-Winkler scores above this look like a slip of the keyboard; tuned on the names here:
/// `max_step`, `hiden_size`, `adamx` pass, `momentum` / `num_epochs` do not.
const SIMILAR: f64 = 0.85;

fn similarity(a: &str, b: &str) -> f64 {
    strsim::jaro_winkler(&a.to_lowercase(), &b.to_lowercase())
}

/// The key whose own or other name is closest to `name`, if any is close.
fn nearest<'p, 's>(places: impl Iterator<Item = &'p Place<'s>>, name: &str) -> Option<&'p Place<'s>>
where
    's: 'p,
{
    let score = |key: &Key| {
        let own = similarity(&key.name, name);
        let aliases = key
            .aliases
            .iter()
            .map(|alias| similarity(&alias.name, name));
        aliases.fold(own, f64::max)
    };
    places
        .map(|place| (score(place.key), place))
        .filter(|(score, _)| *score >= SIMILAR)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, place)| place)
}

fn collect<'s>(section: &'s Section, path: &str, places: &mut Vec<Place<'s>>) {
    for key in &section.keys {
        let place = Place {
            section: path.to_string(),
            key,
        };
        let inner_path = place.path();
        places.push(place);
        if let Some(inner) = key.kind.section() {
            collect(inner, &inner_path, places);
        }
    }
}
