//! What a difference will consist of: which tensors are coded together, beside what, and how.

use std::collections::HashMap;

use firebrick_kernels::lossy::Rounding;
use safetensors::Dtype;

use super::chunk::chunk_bytes;
use super::container::ROW;
use super::index::{Entry, FileEntry, Index, Rule, Section, StepRecord, VERSION};
use super::lossy::{LossRecord, Method, Treatment};
use super::write::{Options, Parent};
use super::{Codec, Source, TensorInfo};

/// Tensors that are coded together.
pub(super) struct Group {
    pub rule: Rule,
    /// Places in the list of tensors.
    pub tensors: Vec<usize>,
    /// The parent's, in the same order.
    pub parents: Vec<Option<String>>,
    pub chunks: usize,
    pub step: Option<StepRecord>,
    /// How much of it may be lost, where it is one tensor with a parent.
    pub treatment: Option<Treatment>,
}

/// The groups of a state.
pub(super) fn groups(
    tensors: &[TensorInfo],
    parent: Option<&Parent>,
    of_parent: &HashMap<String, TensorInfo>,
    options: &Options,
) -> Vec<Group> {
    let places: HashMap<&str, usize> = tensors
        .iter()
        .enumerate()
        .map(|(i, info)| (info.name.as_str(), i))
        .collect();
    let parent_of = |tensor: usize| -> Option<String> {
        let info = &tensors[tensor];
        let name = parent?.names.get(&info.name).unwrap_or(&info.name);
        of_parent
            .get(name)
            .filter(|other| other.is_like(info))
            .map(|_| name.clone())
    };
    let treatment_of = |tensor: usize| {
        let (info, lossy) = (&tensors[tensor], options.lossy.as_ref()?);
        if !lossy.allows(info) || parent_of(tensor).is_none() {
            return None;
        }
        let is_second = options.moments.iter().any(|of| of.second == info.name);
        // With a smaller mean square a step is larger than it should be: what was near zero must not be zero.
        let (method, rounding) = if is_second {
            (Method::Int8, Rounding::Up)
        } else {
            (lossy.method, Rounding::Nearest)
        };
        Some(Treatment {
            method,
            rounding,
            energy: lossy.energy,
        })
    };
    let make = |rule: Rule, places: Vec<usize>, step: Option<StepRecord>| {
        let info = &tensors[places[0]];
        let treatment = treatment_of(places[0]).filter(|_| rule == Rule::One);
        let is_product = treatment.is_some_and(|of| of.method == Method::LowRank);
        Group {
            rule: if is_product { Rule::LowRank } else { rule },
            parents: places.iter().map(|&tensor| parent_of(tensor)).collect(),
            chunks: info.bytes().unwrap_or(0).div_ceil(chunk_bytes(info.dtype)),
            tensors: places,
            step,
            treatment,
        }
    };
    let mut grouped = vec![false; tensors.len()];
    let mut groups = Vec::new();
    for of in &options.moments {
        let place = |name: &String| places.get(name.as_str()).copied();
        let (Some(first), Some(second)) = (place(&of.first), place(&of.second)) else {
            continue;
        };
        let mut found = vec![first, second];
        if let Some(name) = &of.parameter {
            let Some(parameter) = place(name) else {
                continue;
            };
            // What is lossy is no one's prediction.
            found.extend(Some(parameter).filter(|&parameter| treatment_of(parameter).is_none()));
        }
        // Without parents they are no help to each other, but whoever reads them needs them together.
        let beside = parent_of(found[0]).is_some();
        let alike = found.iter().all(|&tensor| {
            let info = &tensors[tensor];
            info.is_like(&tensors[found[0]])
                && info.dtype == Dtype::F32
                && parent_of(tensor).is_some() == beside
                && treatment_of(tensor).is_none()
        });
        if alike && found.iter().all(|&tensor| !grouped[tensor]) {
            found.iter().for_each(|&tensor| grouped[tensor] = true);
            groups.push(make(Rule::Moments, found, of.step));
        }
    }
    let rest = (0..tensors.len()).filter(|&tensor| !grouped[tensor]);
    groups.extend(rest.map(|tensor| make(Rule::One, vec![tensor], None)));
    // As tensors come: the parts of one layer next to each other.
    groups.sort_by_key(|group| group.tensors[0]);
    groups
}

/// An index with everything that is known before coding, and the longest text for what is not.
pub(super) fn longest_index(
    tensors: &[TensorInfo],
    groups: &[Group],
    files: Vec<FileEntry>,
    child: &dyn Source,
) -> Index {
    let hash = "0".repeat(64);
    let mut entries: Vec<Entry> = tensors
        .iter()
        .map(|info| Entry {
            name: info.name.clone(),
            dtype: info.dtype,
            shape: info.shape.clone(),
            blake3: hash.clone(),
            parent: None,
            lossy: child.lossy(&info.name).map(|_| LossRecord::longest()),
        })
        .collect();
    for group in groups {
        for (&tensor, parent) in group.tensors.iter().zip(&group.parents) {
            entries[tensor].parent.clone_from(parent);
            if group.treatment.is_some() {
                entries[tensor].lossy = Some(LossRecord::longest());
            }
        }
    }
    let mut steps: Vec<StepRecord> = Vec::new();
    for step in groups.iter().filter_map(|group| group.step) {
        if !steps.contains(&step) {
            steps.push(step);
        }
    }
    let place_of = |step: StepRecord| steps.iter().position(|other| *other == step);
    let sections = groups.iter().filter(|group| group.chunks > 0).map(|group| {
        // A row of the table for each chunk, and one for factors.
        let rows = (group.chunks * group.tensors.len() + 1) as u64;
        let bytes = tensors[group.tensors[0]].bytes().unwrap_or(0) as u64;
        let of_group = |codec: &Codec| match group.treatment {
            Some(treatment) => !codec.is_lossy() || *codec == treatment.method.codec(),
            None => !codec.is_lossy(),
        };
        Section {
            step: group.step.and_then(place_of),
            name: tensors[group.tensors[0]].name.clone(),
            rule: group.rule,
            tensors: group.tensors.clone(),
            // No codec takes more than the bytes themselves, but for one that names another.
            bytes: 2 * (bytes * group.tensors.len() as u64) + 2 * rows * ROW as u64,
            table: u32::MAX,
            codecs: Codec::ALL
                .iter()
                .filter(|codec| of_group(codec))
                .map(|codec| (codec.name().to_string(), rows))
                .collect(),
        }
    });
    Index {
        version: VERSION,
        parent: Some(hash.clone()),
        parent_name: None,
        result: hash.clone(),
        sections: sections.collect(),
        steps,
        tensors: entries,
        files,
    }
}
