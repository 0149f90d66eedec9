//! Checks that a resumed run has the same data, tokens, base model and phases as before.

use std::path::PathBuf;

use super::folder::{RunRecord, data_record};
use super::inputs::RunInputs;
use super::{RunFolder, TrainError};
use crate::checkpoint::Progress;
use crate::config::Plan;
use crate::data::FileRecord;
use crate::phase::Timeline;

/// Checks that a checkpoint continues in the phase in which it was saved.
pub(super) fn check_phase(progress: &Progress, planned: usize) -> Result<(), TrainError> {
    let planned = planned as u64;
    if progress.phase == planned {
        return Ok(());
    }
    Err(TrainError::OtherPhase {
        step: progress.step,
        saved: progress.phase,
        planned,
    })
}

/// Checks that the data, the tokens and the base model are the same. Other data would change the
/// order and any tokenizer that was learned on it. Inputs that an older version did not record
/// cannot be compared.
pub(super) fn same_inputs(
    folder: &RunFolder,
    record: Option<&RunRecord>,
    inputs: &RunInputs,
) -> Result<(), TrainError> {
    let Some(record) = record else { return Ok(()) };
    let folder = || folder.path().to_path_buf();
    let before = record.token_inputs.as_array().into_iter().flatten();
    let now = inputs.token_inputs();
    for (before, now) in before.zip(now.as_array().into_iter().flatten()) {
        let facts = before.as_object().into_iter().flatten();
        let mut changed = facts.filter(|(what, value)| now[what.as_str()] != **value);
        if let Some((what, _)) = changed.next() {
            let (folder, what) = (folder(), what.clone());
            return Err(TrainError::OtherTokens { folder, what });
        }
    }
    same_base(record, &inputs.base, folder())?;
    match changed(&record.data, &data_record(&inputs.files())) {
        Some(file) => Err(TrainError::OtherData {
            folder: folder(),
            file,
        }),
        None => Ok(()),
    }
}

/// Checks that the base model's files are those that the run began with.
pub(super) fn same_base(
    record: &RunRecord,
    files: &[FileRecord],
    folder: PathBuf,
) -> Result<(), TrainError> {
    match changed(&record.base_model, &data_record(files)) {
        Some(file) => Err(TrainError::OtherBaseModel { folder, file }),
        None => Ok(()),
    }
}

/// Checks the phases of a plan that was made in code, because resolved.toml does not have them.
pub(super) fn same_phases(
    folder: &RunFolder,
    record: Option<&RunRecord>,
    plan: &Plan,
) -> Result<(), TrainError> {
    let Some(record) = record else { return Ok(()) };
    let now = phases_in_code(plan)?;
    if record.phases == now {
        return Ok(());
    }
    Err(TrainError::OtherPhases {
        folder: folder.path().to_path_buf(),
        difference: format!("  {} there, {now} here", record.phases),
    })
}

/// Checks that phases which have begun keep their first step. With another length of the run, a
/// phase that takes a share of it would begin elsewhere.
pub(super) fn same_starts(
    record: Option<&RunRecord>,
    timeline: &Timeline,
    step: u64,
) -> Result<(), TrainError> {
    let before = record.map(|record| record.phase_starts.as_slice());
    let starts = before.unwrap_or_default().iter().zip(timeline.phases());
    let mut begun = starts.filter(|(before, now)| **before < step || now.first_step < step);
    match begun.find(|(before, now)| **before != now.first_step) {
        Some((&before, now)) => Err(TrainError::MovedPhase {
            name: now.plan.name.clone(),
            before,
            now: now.first_step,
        }),
        None => Ok(()),
    }
}

/// The phases of a plan that was made in code; null if its config describes them completely.
pub(super) fn phases_in_code(plan: &Plan) -> Result<serde_json::Value, TrainError> {
    let of_config = Plan::from_config(plan.config.clone()).map(|plan| plan.phases);
    let mut phases = plan.phases.clone();
    // The ranks are no part of a configuration.
    phases.iter_mut().for_each(|phase| phase.ranks = 1);
    if of_config.is_ok_and(|of_config| of_config == phases) {
        return Ok(serde_json::Value::Null);
    }
    serde_json::to_value(&plan.phases).map_err(|error| TrainError::Unwritable {
        what: "the phases of the plan",
        message: error.to_string(),
    })
}

/// The first file that differs, or is missing, in one of the records.
fn changed(before: &serde_json::Value, now: &serde_json::Value) -> Option<String> {
    let hashes = |data: &serde_json::Value| -> Vec<(String, String)> {
        let files = data.as_array().map(Vec::as_slice).unwrap_or_default();
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_string();
        let pairs = files
            .iter()
            .map(|file| (text(&file["path"]), text(&file["blake3"])));
        pairs.collect()
    };
    let (before, now) = (hashes(before), hashes(now));
    let mut all = before.iter().chain(&now);
    let changed = all.find(|file| !(before.contains(file) && now.contains(file)));
    changed.map(|(file, _)| file.clone())
}
