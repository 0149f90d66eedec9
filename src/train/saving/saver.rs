//! Saving while training goes on.
//!
//! A save copies the run's state, about two passes over memory, into the memory of the copy before, and hands it to a
//! thread of its own, which codes it, writes it, flushes it and deletes what is no longer kept. The thread and its helpers
//! have the lowest priority there is: they take what the training leaves of the cores. One save at a time: the next one
//! waits for it.

use std::thread::JoinHandle;

use crate::checkpoint::{
    Capture, ChainOptions, CheckpointError, CheckpointStore, Progress, Warning,
};
use crate::model::Tensors;

/// A state to be saved.
pub(super) struct Job {
    pub(super) store: CheckpointStore,
    pub(super) progress: Progress,
    pub(super) capture: Capture,
    /// Whether it is the best so far.
    pub(super) best: bool,
    pub(super) options: ChainOptions,
    /// Checkpoints to keep.
    pub(super) limit: usize,
}

/// A save that has come to its end.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) step: u64,
    /// Of the run, when its state was copied.
    pub(super) seconds: f64,
    /// Steps that were deleted after it.
    pub(super) deleted: Vec<u64>,
    /// Warnings to report about the save.
    pub(super) warnings: Vec<Warning>,
}

/// What came of a save, and the copy that was saved.
type Done = (Saved, Capture);

impl Job {
    /// Returns the copy, too, whose memory serves for the next.
    pub(super) fn run(self) -> Result<Done, CheckpointError> {
        let step = self.progress.step;
        let saved = self
            .store
            .save_delta(&self.progress, &self.capture, &self.options)?;
        let mut warnings = saved.warnings;
        if self.best {
            self.store.mark_best(step)?;
        }
        let rotated = self.store.rotate(self.limit)?;
        warnings.extend(rotated.warnings);
        let saved = Saved {
            step,
            seconds: self.progress.seconds,
            deleted: rotated.deleted,
            warnings,
        };
        Ok((saved, self.capture))
    }
}

/// What saves in the background.
#[derive(Default)]
pub(in crate::train) struct Saver {
    /// Made with the first save.
    pool: Option<rayon::ThreadPool>,
    running: Option<JoinHandle<(rayon::ThreadPool, Result<Done, CheckpointError>)>>,
    /// The last copy, when it has been saved.
    spare: Option<Capture>,
}

impl Saver {
    /// Tensors to be written over by the next copy: weights, and the optimizer's.
    pub(super) fn spare(&mut self) -> (Tensors, Tensors) {
        let spare = self.spare.take();
        spare.map_or_else(Default::default, |spare| {
            (spare.weights, spare.optimizer.tensors)
        })
    }

    /// Begins a save. The one before must have been waited for.
    pub(super) fn begin(&mut self, job: Job) -> std::io::Result<()> {
        debug_assert!(self.running.is_none());
        let pool = match self.pool.take() {
            Some(pool) => pool,
            None => rayon::ThreadPoolBuilder::new()
                .num_threads(rayon::current_num_threads())
                .thread_name(|i| format!("save-{i}"))
                .start_handler(|_| step_back())
                .build()
                .map_err(std::io::Error::other)?,
        };
        let save = move || {
            step_back();
            let saved = pool.install(|| job.run());
            (pool, saved)
        };
        let thread = std::thread::Builder::new().name("save".to_string());
        self.running = Some(thread.spawn(save)?);
        Ok(())
    }

    /// The save that has come to its end, if one has.
    pub(super) fn poll(&mut self) -> Option<Result<Saved, CheckpointError>> {
        let is_over = self.running.as_ref().is_some_and(JoinHandle::is_finished);
        if is_over { self.wait() } else { None }
    }

    /// Waits for the save that is under way, if there is one.
    pub(super) fn wait(&mut self) -> Option<Result<Saved, CheckpointError>> {
        let running = self.running.take()?;
        match running.join() {
            Ok((pool, saved)) => {
                self.pool = Some(pool);
                Some(saved.map(|(saved, capture)| {
                    self.spare = Some(capture);
                    saved
                }))
            }
            // It panicked: so does who waits for it.
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Saver {
    /// A run that ends early has what it began to save.
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            let _ = running.join();
        }
    }
}

/// Lets everything else go first, where the system has a way to say so for one thread.
fn step_back() {
    #[cfg(target_os = "linux")]
    // Without it saving is no less correct, only less polite.
    let _ = rustix::process::nice(19);
}
