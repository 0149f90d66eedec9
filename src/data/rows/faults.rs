//! Rows that cannot be trained on, counted so that one error speaks of all of them.

use super::{Place, RowError};

/// Rows that do not fit a sequence, and rows of which nothing would be trained.
#[derive(Default)]
pub(super) struct Faults {
    too_long: u64,
    first_too_long: Option<(Place, (u64, bool))>,
    longest: (u64, bool),
    untrainable: u64,
    first_untrainable: Option<(Place, String, bool)>,
}

impl Faults {
    pub(super) fn too_long(&mut self, place: Place, tokens: (u64, bool)) {
        self.too_long += 1;
        self.longest = self.longest.max(tokens);
        self.first_too_long.get_or_insert((place, tokens));
    }

    pub(super) fn untrainable(&mut self, place: Place, reason: String, is_cut: bool) {
        self.untrainable += 1;
        self.first_untrainable
            .get_or_insert((place, reason, is_cut));
    }

    /// One error for all of them; `rows` is how many there were.
    pub(super) fn check(self, rows: u64, sequence_len: usize) -> Result<(), RowError> {
        if let Some((place, tokens)) = self.first_too_long {
            return Err(RowError::Overlong {
                count: self.too_long,
                rows,
                place,
                tokens,
                longest: self.longest,
                sequence_len,
            });
        }
        match self.first_untrainable {
            None => Ok(()),
            Some((place, reason, cut)) => Err(RowError::Untrainable {
                count: self.untrainable,
                rows,
                place,
                reason,
                cut,
            }),
        }
    }
}
