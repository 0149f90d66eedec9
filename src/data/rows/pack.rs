//! Which rows share a sequence.
//!
//! Best-fit decreasing: the longest rows first, each into the sequence with the least room that
//! still takes it. The number of sequences depends on the lengths alone and is at most 11/9 of the
//! least possible, plus one (Johnson, 1973). GSM8K in sequences of 512, some three rows in each,
//! leaves two to four places in a hundred empty. A row is never cut in two.

use std::collections::BTreeSet;

/// Items in bins, bin after bin.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Bins {
    /// Numbers of the items.
    items: Vec<u32>,
    /// Where each bin ends in `items`.
    ends: Vec<usize>,
}

impl Bins {
    /// Every item in a bin of its own, in order.
    pub(super) fn singles(count: usize) -> Self {
        Self {
            items: (0..count as u32).collect(),
            ends: (1..=count).collect(),
        }
    }

    /// Items of the given sizes, none larger than `room`, in bins of that size. Of items of the same
    /// size the earlier one is placed first.
    pub(super) fn packed(sizes: &[usize], room: usize) -> Self {
        let mut order: Vec<u32> = (0..sizes.len() as u32).collect();
        order.sort_by_key(|&item| std::cmp::Reverse(sizes[item as usize]));
        let mut bins: Vec<Vec<u32>> = Vec::new();
        // Room that is left and the bin, so that the first one not below a size is the best fit.
        let mut open: BTreeSet<(usize, usize)> = BTreeSet::new();
        for item in order {
            let size = sizes[item as usize];
            let fit = open.range((size, 0)..).next().copied();
            let (left, bin) = fit.unwrap_or_else(|| {
                bins.push(Vec::new());
                (room, bins.len() - 1)
            });
            open.remove(&(left, bin));
            bins[bin].push(item);
            // An item that is larger than a bin has one for itself.
            let left = left.saturating_sub(size);
            if left > 0 {
                open.insert((left, bin));
            }
        }
        let mut packed = Self::default();
        for bin in bins {
            packed.items.extend(bin);
            packed.ends.push(packed.items.len());
        }
        packed
    }

    /// Number of bins.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The items of a bin.
    pub(super) fn get(&self, bin: usize) -> &[u32] {
        let start = bin.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.items[start..self.ends[bin]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn r4_every_row_is_in_one_sequence_that_it_fits(sizes in proptest::collection::vec(1usize..=64, 0..200)) {
            let bins = Bins::packed(&sizes, 64);
            let mut seen = Vec::new();
            for bin in 0..bins.len() {
                let items = bins.get(bin);
                prop_assert!(!items.is_empty());
                prop_assert!(items.iter().map(|&item| sizes[item as usize]).sum::<usize>() <= 64);
                seen.extend_from_slice(items);
            }
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..sizes.len() as u32).collect::<Vec<_>>());
            let least = sizes.iter().sum::<usize>().div_ceil(64);
            prop_assert!(bins.len() <= 2 * least, "{} of {least}", bins.len());
        }

        /// The number of sequences of an epoch does not depend on the order of its rows.
        #[test]
        fn r4_the_number_of_sequences_depends_on_lengths_alone(
            mut sizes in proptest::collection::vec(1usize..=64, 0..100),
        ) {
            let count = Bins::packed(&sizes, 64).len();
            sizes.reverse();
            prop_assert_eq!(Bins::packed(&sizes, 64).len(), count);
        }
    }

    #[test]
    fn r4_the_best_fit_is_taken() {
        let bins = Bins::packed(&[6, 3, 5, 4, 2], 10);
        // 6, 5 open bins; 4 goes beside 6, 3 and 2 beside 5.
        assert_eq!((bins.get(0), bins.get(1)), (&[0, 3][..], &[2, 1, 4][..]));
        let singles = Bins::singles(2);
        assert_eq!(
            (singles.len(), singles.get(0), singles.get(1)),
            (2, &[0][..], &[1][..])
        );
    }
}
