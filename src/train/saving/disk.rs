//! Whether the disk has room for what a run will save.

use std::io;
use std::path::{Path, PathBuf};

use crate::readable::bytes;

/// What lies beside the tensors of a checkpoint or a model: headers, state.json, the tokenizer, and
/// the rest of each file's last block.
const BESIDE_TENSORS: u64 = 1 << 20;

/// The disk has no room for what a run will save.
#[derive(Debug, thiserror::Error)]
#[error("{} needs {} for {what}, and {} is free", folder.display(), bytes(*needed), bytes(*free))]
pub struct InsufficientDisk {
    /// The run folder.
    pub folder: PathBuf,
    /// What is to be written there.
    pub what: String,
    /// Bytes it takes.
    pub needed: u64,
    /// Bytes that this user may still write.
    pub free: u64,
    /// What to do about it.
    pub help: String,
}

/// Bytes that may still be written beside `folder`.
///
/// # Errors
/// The file system's.
pub(in crate::train) fn free_space(folder: &Path) -> io::Result<u64> {
    let disk = fs4::statvfs(folder)?;
    // Some network file systems report nothing at all; that is no reason to refuse them.
    Ok(if disk.total_space() == 0 {
        u64::MAX
    } else {
        disk.available_space()
    })
}

/// What a run will put on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DiskBudget {
    /// Bytes of a base model that is kept beside the run.
    pub(super) base: u64,
    /// Bytes of the weights, in f32.
    pub(super) weights: u64,
    /// Bytes of the optimizer's tensors.
    pub(super) moments: u64,
    /// Bytes of the exported weights.
    pub(super) export: u64,
    /// Whether a checkpoint of step 0 comes first.
    pub(super) trial: bool,
    /// Most checkpoints that the run has yet to save.
    pub(super) saves: u64,
    /// Checkpoints that are there already.
    pub(super) existing: u64,
    /// `checkpoint.save_total_limit`.
    pub(super) limit: u64,
    /// Whether deleting one may mean that another is written anew first, to stand alone.
    pub(super) in_chains: bool,
}

impl DiskBudget {
    /// A checkpoint.
    fn checkpoint(&self) -> u64 {
        self.weights + self.moments + BESIDE_TENSORS
    }

    /// The model that is exported at the end.
    fn exported(&self) -> u64 {
        self.export + BESIDE_TENSORS
    }

    /// Checkpoints that lie there at once, beyond those that do now, with `limit` of them kept: the
    /// best and the last besides, the one being written before the oldest is deleted, and in chains
    /// the one that is written anew.
    fn at_once(&self, limit: u64) -> u64 {
        let most = limit.saturating_add(3).saturating_sub(self.existing);
        let most = self.saves.min(most.max(1));
        // As long as all are kept nothing is deleted.
        let rewritten = self.in_chains && self.saves.saturating_add(self.existing) > limit;
        most.saturating_add(u64::from(rewritten && most > 0))
    }

    /// The most that the run will have added to the disk at any time.
    fn peak(&self, checkpoints: u64) -> u64 {
        let trial = if self.trial {
            self.weights + BESIDE_TENSORS
        } else {
            0
        };
        // The checkpoint of step 0 goes with the first save, the model comes after the last.
        let first = trial.saturating_add(self.checkpoint() * self.saves.min(1));
        let last = self.checkpoint().saturating_mul(checkpoints);
        let run = first.max(last.saturating_add(self.exported()));
        match self.base {
            0 => run,
            base => run.saturating_add(base + BESIDE_TENSORS),
        }
    }

    /// Whether the run can go to its end with so much room: an error if not. Where all checkpoints
    /// are kept, room for one of them and the model is enough to begin, since they can be moved
    /// elsewhere while the run goes on; if that is what it will take, the text says so.
    pub(super) fn check(
        &self,
        folder: &Path,
        free: u64,
    ) -> Result<Option<String>, Box<InsufficientDisk>> {
        let keeps_all = self.limit == 0;
        let checkpoints = if keeps_all {
            self.saves.min(1)
        } else {
            self.at_once(self.limit)
        };
        let needed = self.peak(checkpoints);
        if needed > free {
            let each = bytes(self.checkpoint());
            let checkpoints = match checkpoints {
                0 => String::new(),
                1 => format!("a checkpoint of {each} and "),
                several => format!("up to {several} checkpoints of {each} at once and "),
            };
            let base = match self.base {
                0 => String::new(),
                base => format!("a base model of {}, ", bytes(base + BESIDE_TENSORS)),
            };
            return Err(Box::new(InsufficientDisk {
                folder: folder.to_path_buf(),
                what: format!("{base}{checkpoints}the exported model"),
                needed,
                free,
                help: self.suggestion(free),
            }));
        }
        let all = self.peak(self.saves);
        Ok((keeps_all && all > free).then(|| {
            format!(
                "warning: save_total_limit = 0 keeps all checkpoints, up to {} of them or {}, and {} is \
                 free: the run will stop when the disk is full, and can be resumed then",
                self.saves,
                bytes(all),
                bytes(free)
            )
        }))
    }

    fn suggestion(&self, free: u64) -> String {
        let smaller = (1..self.limit).rev();
        let fitting = smaller.map(|limit| (limit, self.peak(self.at_once(limit))));
        let limit = match fitting.into_iter().find(|&(_, needed)| needed <= free) {
            Some((limit, needed)) => format!(
                "set checkpoint.save_total_limit = {limit}, which needs {}; or ",
                bytes(needed)
            ),
            None => String::new(),
        };
        format!("{limit}make room, or give the run an --output-dir on a larger disk")
    }
}

/// Whether there is room for something that is about to be written, of so many bytes of tensors.
pub(super) fn check_now(
    folder: &Path,
    free: u64,
    (what, tensors): (String, u64),
    last: Option<u64>,
) -> Result<(), Box<InsufficientDisk>> {
    let needed = tensors + BESIDE_TENSORS;
    if needed <= free {
        return Ok(());
    }
    let last = last.map_or(String::new(), |step| {
        let path = folder.join(format!("checkpoints/step-{step:06}"));
        format!("the last checkpoint, {}, is whole: ", path.display())
    });
    Err(Box::new(InsufficientDisk {
        folder: folder.to_path_buf(),
        what,
        needed,
        free,
        help: format!("{last}make room, then run the same command again to go on"),
    }))
}

/// Most checkpoints between `step` and the end of a run of `steps`: one at every multiple of
/// `save_steps` and of `eval_steps`, where the best may be found, and one at the end. 0 is never.
pub(super) fn most_saves(step: u64, steps: u64, save_steps: u64, eval_steps: u64) -> u64 {
    if step >= steps {
        return 0;
    }
    // Before the end, which is counted by itself.
    let multiples = |every: u64| match every {
        0 => 0,
        every => (steps - 1) / every - step / every,
    };
    let both = match (save_steps, eval_steps) {
        (0, _) | (_, 0) => 0,
        (save, eval) => multiples((save / gcd(save, eval)).saturating_mul(eval)),
    };
    multiples(save_steps) + multiples(eval_steps) - both + 1
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Checkpoints of 31 MiB, a model of 11 MiB.
    fn needs(saves: u64, existing: u64, limit: u64) -> DiskBudget {
        DiskBudget {
            base: 0,
            weights: 10 * MIB,
            moments: 20 * MIB,
            export: 10 * MIB,
            trial: existing == 0,
            saves,
            existing,
            limit,
            in_chains: false,
        }
    }

    fn needed(needs: DiskBudget) -> u64 {
        needs.check(Path::new("out"), 0).unwrap_err().needed / MIB
    }

    #[test]
    fn r11_a_run_needs_room_for_all_that_lies_there_at_once() {
        // Three kept, the best, the last, the one being written, the model.
        assert_eq!(needed(needs(100, 0, 3)), 6 * 31 + 11);
        assert_eq!(needed(needs(2, 0, 3)), 2 * 31 + 11);
        // A model in half precision is smaller than the trial at step 0 beside the first checkpoint.
        let half = DiskBudget {
            export: 5 * MIB,
            ..needs(1, 0, 3)
        };
        assert_eq!(needed(half), 11 + 31);
        let with_base = DiskBudget {
            base: 50 * MIB,
            ..needs(1, 0, 3)
        };
        assert_eq!(needed(with_base), 51 + 31 + 11);
        let in_chains = |needs| DiskBudget {
            in_chains: true,
            ..needs
        };
        assert_eq!(needed(in_chains(needs(100, 0, 3))), 7 * 31 + 11);
        assert_eq!(needed(in_chains(needs(2, 0, 3))), 2 * 31 + 11);
        assert_eq!(needed(needs(100, 4, 3)), 2 * 31 + 11);
        assert_eq!(needed(needs(100, 9, 3)), 31 + 11);
        assert_eq!(needed(needs(0, 5, 3)), 11);
        let exact = needs(100, 0, 3);
        assert!(exact.check(Path::new("out"), (6 * 31 + 11) * MIB).is_ok());
        assert!(
            exact
                .check(Path::new("out"), (6 * 31 + 11) * MIB - 1)
                .is_err()
        );
    }

    #[test]
    fn r11_too_little_room_says_what_would_fit() {
        let error = |free| needs(100, 0, 3).check(Path::new("out"), free).unwrap_err();
        let little = error(150 * MIB);
        assert_eq!(
            little.to_string(),
            "out needs 197 MiB for up to 6 checkpoints of 31 MiB at once and the exported model, and \
             150 MiB is free"
        );
        assert_eq!(
            little.help,
            "set checkpoint.save_total_limit = 1, which needs 135 MiB; or make room, or give the run \
             an --output-dir on a larger disk"
        );
        assert!(error(100 * MIB).help.starts_with("make room"));
    }

    #[test]
    fn r11_keeping_all_needs_room_to_begin_and_warns_of_the_rest() {
        let check = |free| needs(100, 0, 0).check(Path::new("out"), free * MIB);
        assert_eq!(check(41).unwrap_err().needed, 42 * MIB);
        let warning = check(42).unwrap().unwrap();
        assert!(
            warning.starts_with("warning: ") && warning.contains("up to 100 of them or 3.0 GiB"),
            "{warning}"
        );
        assert_eq!(check(4000).unwrap(), None);
    }

    #[test]
    fn r11_a_run_has_at_most_so_many_saves_left() {
        for (step, steps, save, eval) in [
            (0, 6, 2, 3),
            (0, 1000, 500, 100),
            (900, 1000, 500, 100),
            (899, 1000, 300, 70),
            (0, 1000, 0, 0),
            (0, 7, 0, 3),
            (1000, 1000, 500, 100),
        ] {
            let due = |at: u64, every: u64| every > 0 && at.is_multiple_of(every);
            let saved = |at: &u64| *at == steps || due(*at, save) || due(*at, eval);
            let counted = (step + 1..=steps).filter(saved).count() as u64;
            assert_eq!(most_saves(step, steps, save, eval), counted);
        }
        assert_eq!(most_saves(1200, 1000, 500, 100), 0);
    }
}
