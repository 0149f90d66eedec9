//! Sums and gatherings made of messages between every two ranks.
//!
//! A sum that has to be the same bits everywhere is added in the order of the ranks, whatever order
//! the messages arrive in. For many numbers each rank adds up one slice of them and sends it to the
//! others, so that a rank sends and receives about twice as many bytes as there are, however many
//! ranks there are: a reduce-scatter and an all-gather (Thakur, Rabenseifner and Gropp, 2005).

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
    fn exchange(
        &self,
        what: What,
        outgoing: Outgoing,
    ) -> Result<Vec<Vec<u8>>, CollectiveError>;
}

/// The purpose of an exchange. Ranks that meet for different ones are told so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Sum = 1,
    SumOfGradient,
    Gather,
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
                values.iter().flat_map(|value| value.to_le_bytes()).collect()
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
