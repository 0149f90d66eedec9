//! Sums and gatherings made of messages between every two ranks.
//!
//! Every rank has to get the same bits, so the values are added in the order of the ranks, and not in
//! the order in which their messages arrive. If there are many values, each rank adds up one slice of
//! them and sends its sum to the others: a reduce-scatter and an all-gather (Thakur, Rabenseifner and
//! Gropp, 2005). A rank then sends and receives about twice the bytes of the values, however many
//! ranks there are.

use std::ops::AddAssign;

use super::CollectiveError;

/// Messages between every two ranks of a group.
pub(super) trait Messages {
    /// The number of this rank, counted from 0.
    fn rank(&self) -> usize;

    /// The number of ranks.
    fn ranks(&self) -> usize;

    /// Sends every rank its message. Returns what each of them sent to this one, in the order of the
    /// ranks, its own message included.
    fn exchange(&self, what: What, outgoing: Outgoing) -> Result<Vec<Vec<u8>>, CollectiveError>;
}

/// The purpose of an exchange. Ranks that meet for different ones are told so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Sum = 1,
    SumOfGradient,
    #[cfg(feature = "mpi")]
    Gather,
    #[cfg(feature = "mpi")]
    Collect,
}

/// The messages of one rank.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// The same for all.
    Same(Vec<u8>),
    /// One for each rank.
    Each(Vec<Vec<u8>>),
}

impl Outgoing {
    pub(super) fn to(&self, rank: usize) -> &[u8] {
        match self {
            Self::Same(message) => message,
            Self::Each(messages) => &messages[rank],
        }
    }
}

/// Below so many numbers a sum takes one exchange in place of two: the time of a message counts for
/// more than its bytes.
const FEW: usize = 1024;

/// Replaces the values by their sums over all ranks.
pub(super) fn sum<T: Number>(
    messages: &impl Messages,
    what: What,
    values: &mut [T],
) -> Result<(), CollectiveError> {
    let (rank, ranks) = (messages.rank(), messages.ranks());
    if ranks == 1 {
        return Ok(());
    }
    if values.len() < FEW {
        let all = messages.exchange(what, Outgoing::Same(T::to_bytes(values)))?;
        return add_up(rank, &all, values);
    }
    let bounds = |rank: usize| rank * values.len() / ranks..(rank + 1) * values.len() / ranks;
    let slices = (0..ranks).map(|rank| T::to_bytes(&values[bounds(rank)]));
    let all = messages.exchange(what, Outgoing::Each(slices.collect()))?;
    let own = bounds(rank);
    add_up(rank, &all, &mut values[own.clone()])?;
    drop(all);
    let all = messages.exchange(what, Outgoing::Same(T::to_bytes(&values[own])))?;
    let mut rest = values;
    let len = rest.len();
    for (other, bytes) in all.iter().enumerate() {
        let count = (other + 1) * len / ranks - other * len / ranks;
        let (slice, after) = rest.split_at_mut(count);
        T::from_bytes(bytes, slice).ok_or_else(|| other_length(rank, other))?;
        rest = after;
    }
    Ok(())
}

/// Adds what all ranks sent, in their order.
fn add_up<T: Number>(rank: usize, all: &[Vec<u8>], sum: &mut [T]) -> Result<(), CollectiveError> {
    let mut of_rank = sum.to_vec();
    for (other, bytes) in all.iter().enumerate() {
        if other == 0 {
            T::from_bytes(bytes, sum).ok_or_else(|| other_length(rank, other))?;
            continue;
        }
        T::from_bytes(bytes, &mut of_rank).ok_or_else(|| other_length(rank, other))?;
        for (sum, value) in sum.iter_mut().zip(&of_rank) {
            *sum += *value;
        }
    }
    Ok(())
}

fn other_length(rank: usize, other: usize) -> CollectiveError {
    CollectiveError {
        rank,
        reason: format!("rank {other} has another number of values"),
    }
}

/// A number that travels as its little-endian bytes.
pub(super) trait Number: Copy + AddAssign {
    fn to_bytes(values: &[Self]) -> Vec<u8>;

    /// Fills `values`; None if the bytes are of another number of values.
    fn from_bytes(bytes: &[u8], values: &mut [Self]) -> Option<()>;
}

macro_rules! number {
    ($number:ty) => {
        impl Number for $number {
            fn to_bytes(values: &[Self]) -> Vec<u8> {
                values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect()
            }

            fn from_bytes(bytes: &[u8], values: &mut [Self]) -> Option<()> {
                let (parts, rest) = bytes.as_chunks();
                if parts.len() != values.len() || !rest.is_empty() {
                    return None;
                }
                for (value, part) in values.iter_mut().zip(parts) {
                    *value = Self::from_le_bytes(*part);
                }
                Some(())
            }
        }
    };
}

number!(f32);
number!(f64);

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use proptest::prelude::*;

    use super::*;
    use crate::collective::{Collective, ThreadRank};

    /// Threads that send each other messages.
    struct Post {
        rank: usize,
        outgoing: Vec<Sender<Vec<u8>>>,
        incoming: Vec<Receiver<Vec<u8>>>,
    }

    impl Messages for Post {
        fn rank(&self) -> usize {
            self.rank
        }

        fn ranks(&self) -> usize {
            self.outgoing.len()
        }

        fn exchange(
            &self,
            _what: What,
            outgoing: Outgoing,
        ) -> Result<Vec<Vec<u8>>, CollectiveError> {
            for (other, sender) in self.outgoing.iter().enumerate() {
                sender.send(outgoing.to(other).to_vec()).unwrap();
            }
            let incoming = self.incoming.iter();
            Ok(incoming.map(|receiver| receiver.recv().unwrap()).collect())
        }
    }

    fn post(ranks: usize) -> Vec<Post> {
        // By sender, then by receiver.
        let mut senders: Vec<Vec<Sender<Vec<u8>>>> = vec![Vec::new(); ranks];
        let mut posts = Vec::new();
        for _ in 0..ranks {
            let (all, incoming): (Vec<_>, Vec<_>) = (0..ranks).map(|_| channel()).unzip();
            senders
                .iter_mut()
                .zip(all)
                .for_each(|(of, sender)| of.push(sender));
            posts.push(incoming);
        }
        let both = senders.into_iter().zip(posts).enumerate();
        let post = both.map(|(rank, (outgoing, incoming))| Post {
            rank,
            outgoing,
            incoming,
        });
        post.collect()
    }

    fn numbers(rank: usize, len: usize, seed: u32) -> Vec<f32> {
        let number = |i: usize| {
            let mixed =
                (i as u32 ^ seed).wrapping_mul(0x9e37_79b9) ^ (rank as u32).wrapping_mul(77);
            (mixed as f32 / 4e9 - 0.5) * 10f32.powi((mixed % 13) as i32 - 6)
        };
        (0..len).map(number).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 24, ..ProptestConfig::default() })]

        #[test]
        fn n1_sums_of_slices_are_the_sums_in_the_order_of_the_ranks(
            ranks in 1usize..6, len in 0usize..5000, seed in any::<u32>()
        ) {
            let timeout = std::time::Duration::from_secs(60);
            let groups = post(ranks).into_iter().zip(ThreadRank::group(ranks, timeout));
            std::thread::scope(|scope| {
                for (post, thread) in groups {
                    scope.spawn(move || {
                        let mut found = numbers(post.rank, len, seed);
                        let mut expected = found.clone();
                        sum(&post, What::SumOfGradient, &mut found).unwrap();
                        thread.sum_gradient("", &mut expected).unwrap();
                        assert_eq!(found, expected);
                    });
                }
            });
        }
    }

    #[test]
    fn n1_another_number_of_values_is_an_error_that_names_the_rank() {
        let ends = std::thread::scope(|scope| {
            let threads: Vec<_> = post(2)
                .into_iter()
                .map(|post| {
                    scope.spawn(move || {
                        let mut values = vec![1.0f64; 3 + post.rank];
                        sum(&post, What::Sum, &mut values).unwrap_err().to_string()
                    })
                })
                .collect();
            let ends = threads.into_iter().map(|thread| thread.join().unwrap());
            ends.collect::<Vec<String>>()
        });
        assert!(
            ends[0].contains("rank 1 has another number of values"),
            "{ends:?}"
        );
        assert!(
            ends[1].contains("rank 0 has another number of values"),
            "{ends:?}"
        );
    }
}
