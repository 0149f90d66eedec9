//! Ranks that are threads of one process, for tests and experiments.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Collective, CollectiveError};

/// One rank of a group of threads. A rank that is dropped has left: every later exchange of the
/// others is an error that names it.
#[derive(Debug)]
pub struct ThreadRank {
    rank: usize,
    timeout: Duration,
    meeting: Arc<Meeting>,
}

/// Where the ranks of a group exchange values.
#[derive(Debug)]
struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Exchanges that have ended.
    ended: u64,
    /// What each rank brings to the present exchange; None until it comes.
    brought: Vec<Option<Values>>,
    /// What all ranks brought to the last exchange that ended.
    together: Arc<Vec<Values>>,
    /// Ranks that have left.
    left: Vec<usize>,
}

/// The values of one rank.
#[derive(Debug, Clone)]
enum Values {
    F64(Vec<f64>),
    F32(Vec<f32>),
    Bytes(Vec<u8>),
}

impl ThreadRank {
    /// A group of so many ranks, one for each thread. A rank waits for the others for at most
    /// `timeout` in each exchange.
    ///
    /// # Panics
    /// If there are no ranks.
    ///
    /// ```
    /// use std::time::Duration;
    /// use firebrick::collective::{Collective, ThreadRank};
    ///
    /// let ranks = ThreadRank::group(3, Duration::from_secs(10));
    /// std::thread::scope(|scope| {
    ///     for rank in ranks {
    ///         scope.spawn(move || {
    ///             let mut values = [rank.rank() as f64, 1.0];
    ///             rank.sum(&mut values).unwrap();
    ///             assert_eq!(values, [3.0, 3.0]);
    ///         });
    ///     }
    /// });
    /// ```
    pub fn group(ranks: usize, timeout: Duration) -> Vec<Self> {
        assert!(ranks > 0, "a group without ranks");
        let state = State {
            brought: vec![None; ranks],
            ..State::default()
        };
        let meeting = Arc::new(Meeting {
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let rank = |rank| Self {
            rank,
            timeout,
            meeting: meeting.clone(),
        };
        (0..ranks).map(rank).collect()
    }

    /// What all ranks bring to this exchange, in their order.
    fn exchange(&self, values: Values) -> Result<Arc<Vec<Values>>, CollectiveError> {
        let deadline = Instant::now() + self.timeout;
        let mut state = self.lock();
        if let Some(rank) = state.left.first() {
            return Err(self.error(format!("rank {rank} has left")));
        }
        let number = state.ended;
        state.brought[self.rank] = Some(values);
        if state.brought.iter().all(Option::is_some) {
            let together = state.brought.iter_mut().filter_map(Option::take);
            state.together = Arc::new(together.collect());
            state.ended += 1;
            self.meeting.changed.notify_all();
            return Ok(state.together.clone());
        }
        loop {
            // No further exchange can end before this rank has come to it.
            if state.ended > number {
                return Ok(state.together.clone());
            }
            if let Some(rank) = state.left.first() {
                return Err(self.error(format!("rank {rank} has left")));
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                // This exchange is over for all: a rank that comes later finds that this one has left.
                state.left.push(self.rank);
                self.meeting.changed.notify_all();
                let late = state.brought.iter().position(Option::is_none);
                let (late, timeout) = (late.unwrap_or(self.rank), self.timeout);
                return Err(self.error(format!("rank {late} did not come within {timeout:?}")));
            };
            let waited = self.meeting.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A thread that panics while it holds the lock leaves the state whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        let locked = self.meeting.state.lock();
        locked.unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, reason: String) -> CollectiveError {
        CollectiveError {
            rank: self.rank,
            reason,
        }
    }

    /// Adds what all ranks brought, in their order.
    fn sum_of<T: Copy + std::ops::AddAssign>(
        &self,
        own: &mut [T],
        all: &[Values],
        of: impl Fn(&Values) -> Option<&[T]>,
    ) -> Result<(), CollectiveError> {
        for (rank, values) in all.iter().enumerate() {
            let Some(values) = of(values).filter(|values| values.len() == own.len()) else {
                let reason = format!("rank {rank} came to another exchange");
                return Err(self.error(reason));
            };
            if rank == 0 {
                own.copy_from_slice(values);
                continue;
            }
            for (sum, value) in own.iter_mut().zip(values) {
                *sum += *value;
            }
        }
        Ok(())
    }
}

impl Drop for ThreadRank {
    fn drop(&mut self) {
        self.lock().left.push(self.rank);
        self.meeting.changed.notify_all();
    }
}

impl Collective for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.lock().brought.len()
    }

    fn sum(&self, values: &mut [f64]) -> Result<(), CollectiveError> {
        let all = self.exchange(Values::F64(values.to_vec()))?;
        self.sum_of(values, &all, |values| match values {
            Values::F64(values) => Some(values),
            _ => None,
        })
    }

    fn sum_gradient(&self, _path: &str, values: &mut [f32]) -> Result<(), CollectiveError> {
        let all = self.exchange(Values::F32(values.to_vec()))?;
        self.sum_of(values, &all, |values| match values {
            Values::F32(values) => Some(values),
            _ => None,
        })
    }

    fn gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let all = self.exchange(Values::Bytes(bytes))?;
        let bytes = all.iter().enumerate().map(|(rank, values)| match values {
            Values::Bytes(bytes) => Ok(bytes.clone()),
            _ => Err(self.error(format!("rank {rank} came to another exchange"))),
        });
        bytes.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each rank of a group returns.
    fn in_threads<T: Send>(
        ranks: usize,
        timeout: Duration,
        of: impl Fn(ThreadRank) -> T + Sync,
    ) -> Vec<T> {
        let group = ThreadRank::group(ranks, timeout);
        std::thread::scope(|scope| {
            let of = &of;
            let threads: Vec<_> = group
                .into_iter()
                .map(|rank| scope.spawn(move || of(rank)))
                .collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined.map(|result| result.expect("no panic")).collect()
        })
    }

    #[test]
    fn n1_sums_are_in_the_order_of_the_ranks_and_payloads_may_differ_in_length() {
        let ends = in_threads(4, Duration::from_secs(60), |rank| {
            let mut found = Vec::new();
            for round in 0..50 {
                // In f32, 1e8 swallows a 1 that is added to it: another order gives other bits.
                let mut values = [[1e8f32, 1.0, -1e8, 1.0][(rank.rank() + round) % 4]];
                rank.sum_gradient("a", &mut values).unwrap();
                let bytes = rank
                    .gather(vec![rank.rank() as u8; rank.rank() * round])
                    .unwrap();
                found.push((values[0], bytes));
            }
            found
        });
        for (round, (sum, bytes)) in ends[0].iter().enumerate() {
            let in_order = |sum: f32, i| sum + [1e8f32, 1.0, -1e8, 1.0][(i + round) % 4];
            assert_eq!(*sum, (1..4).fold(in_order(0.0, 0), in_order));
            for (rank, bytes) in bytes.iter().enumerate() {
                assert_eq!(*bytes, vec![rank as u8; rank * round]);
            }
        }
        assert!(ends.iter().all(|end| *end == ends[0]));
    }

    #[test]
    fn n3_a_rank_that_leaves_is_named_by_all_others() {
        let ends = in_threads(3, Duration::from_secs(60), |rank| {
            let mut values = [1.0];
            rank.sum(&mut values).unwrap();
            if rank.rank() == 1 {
                return None;
            }
            Some(rank.sum(&mut values).unwrap_err().reason)
        });
        let reason = Some("rank 1 has left".to_string());
        assert_eq!(ends, [reason.clone(), None, reason]);
    }

    #[test]
    fn n3_a_rank_that_does_not_come_is_named_after_the_timeout_and_finds_out() {
        let timeout = Duration::from_millis(100);
        let ends = in_threads(2, timeout, |rank| {
            if rank.rank() == 1 {
                std::thread::sleep(10 * timeout);
            }
            rank.sum(&mut [1.0]).unwrap_err().reason
        });
        assert_eq!(
            ends,
            ["rank 1 did not come within 100ms", "rank 0 has left"]
        );
    }

    #[test]
    fn n1_ranks_that_meet_for_different_things_are_told() {
        let ends = in_threads(2, Duration::from_secs(60), |rank| match rank.rank() {
            0 => rank.sum(&mut [1.0]).unwrap_err().reason,
            _ => rank.gather(vec![1]).unwrap_err().reason,
        });
        assert_eq!(
            ends,
            [
                "rank 1 came to another exchange",
                "rank 0 came to another exchange"
            ]
        );
    }
}
