//! How long a run has taken, and how fast it is.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Wall-clock time of a run over all its sessions, and the speed of its last steps.
pub(super) struct Clock {
    /// When the run went on; none while it waits.
    started: Option<Instant>,
    /// Seconds before that.
    before: f64,
    window: VecDeque<(Duration, f64)>,
    length: usize,
}

impl Clock {
    pub(super) fn new(seconds_before: f64, window: u64) -> Self {
        let length = window.clamp(1, 1000) as usize;
        Self {
            started: Some(Instant::now()),
            before: seconds_before,
            window: VecDeque::new(),
            length,
        }
    }

    pub(super) fn stepped(&mut self, time: Duration, tokens: f64) {
        self.window.push_back((time, tokens));
        if self.window.len() > self.length {
            self.window.pop_front();
        }
    }

    pub(super) fn tokens_per_second(&self) -> f64 {
        let time: Duration = self.window.iter().map(|(time, _)| *time).sum();
        let tokens: f64 = self.window.iter().map(|(_, tokens)| tokens).sum();
        tokens / time.as_secs_f64().max(1e-9)
    }

    pub(super) fn total_seconds(&self) -> f64 {
        let now = self.started.map(|started| started.elapsed().as_secs_f64());
        self.before + now.unwrap_or(0.0)
    }

    /// Stops counting while another run has the machine.
    pub(super) fn pause(&mut self) {
        self.before = self.total_seconds();
        self.started = None;
    }

    /// Counts again.
    pub(super) fn go_on(&mut self) {
        self.started.get_or_insert_with(Instant::now);
    }
}
