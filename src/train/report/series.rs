//! A line of a chart in bounded memory, however many rows a run has.

/// Points of a line, thinned so that no extreme is lost: rows are gathered in buckets of which the
/// lowest, the highest and the last point are kept. When there are too many buckets, neighbours are
/// merged and buckets take twice as many rows.
#[derive(Debug, Clone)]
pub(super) struct Series {
    limit: usize,
    rows_per_bucket: u64,
    buckets: Vec<Bucket>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    rows: u64,
    sum: f64,
    first_step: u64,
    low: (u64, f64),
    high: (u64, f64),
    last: (u64, f64),
}

impl Bucket {
    fn merge(&mut self, later: &Bucket) {
        self.rows += later.rows;
        self.sum += later.sum;
        self.last = later.last;
        if later.low.1 < self.low.1 {
            self.low = later.low;
        }
        if later.high.1 > self.high.1 {
            self.high = later.high;
        }
    }
}

impl Default for Series {
    /// Twice as many points as a chart is wide, in pixels, on most screens.
    fn default() -> Self {
        Self::new(600)
    }
}

impl Series {
    /// A line of at most `limit` buckets.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            rows_per_bucket: 1,
            buckets: Vec::new(),
        }
    }

    /// Adds a point to the right of the others. What is not finite has no place on a chart.
    pub(super) fn push(&mut self, step: u64, value: f64) {
        if !value.is_finite() {
            return;
        }
        let point = (step, value);
        let single = Bucket {
            rows: 1,
            sum: value,
            first_step: step,
            low: point,
            high: point,
            last: point,
        };
        match self.buckets.last_mut() {
            Some(bucket) if bucket.rows < self.rows_per_bucket => bucket.merge(&single),
            _ => self.buckets.push(single),
        }
        if self.buckets.len() > self.limit {
            self.rows_per_bucket *= 2;
            let merged = self.buckets.chunks(2).map(|pair| {
                let mut bucket = pair[0];
                pair[1..].iter().for_each(|later| bucket.merge(later));
                bucket
            });
            self.buckets = merged.collect();
        }
    }

    /// The points to draw, from left to right.
    pub(super) fn points(&self) -> Vec<(u64, f64)> {
        let mut points = Vec::new();
        for (index, bucket) in self.buckets.iter().enumerate() {
            let mut kept = vec![bucket.low, bucket.high];
            if index + 1 == self.buckets.len() {
                kept.push(bucket.last);
            }
            kept.sort_by_key(|point| point.0);
            kept.dedup_by_key(|point| point.0);
            points.extend(kept);
        }
        points
    }

    /// The course of the line without its noise: means over a window around each bucket, which
    /// unlike means over the past do not lag behind. Towards the ends the window narrows.
    pub(super) fn smoothed(&self) -> Vec<(u64, f64)> {
        let count = self.buckets.len();
        let reach = (count / 80).max(2);
        let mean = |index: usize| {
            let reach = reach.min(index).min(count - 1 - index);
            let window = &self.buckets[index - reach..=index + reach];
            let sum: f64 = window.iter().map(|bucket| bucket.sum).sum();
            let rows: u64 = window.iter().map(|bucket| bucket.rows).sum();
            // Where the window's rows lie: its last bucket may not be full yet.
            let middle = |bucket: &Bucket| bucket.first_step.midpoint(bucket.last.0);
            let steps = window.iter().map(|bucket| middle(bucket) * bucket.rows);
            (steps.sum::<u64>() / rows, sum / rows as f64)
        };
        (0..count).map(mean).collect()
    }

    /// The highest value.
    pub(super) fn highest(&self) -> Option<f64> {
        let values = self.buckets.iter().map(|bucket| bucket.high.1);
        values.reduce(f64::max)
    }
}

/// Items over a run, thinned evenly to a limited number; the first and the newest are always there.
#[derive(Debug, Clone)]
pub(super) struct Spread<T> {
    limit: usize,
    stride: usize,
    seen: usize,
    items: Vec<T>,
    /// The newest item, where the stride passes it over.
    newest: Option<T>,
}

impl<T> Spread<T> {
    /// At most `limit` items and the newest.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            stride: 1,
            seen: 0,
            items: Vec::new(),
            newest: None,
        }
    }

    pub(super) fn push(&mut self, item: T) {
        if self.seen.is_multiple_of(self.stride) {
            self.items.push(item);
            self.newest = None;
        } else {
            self.newest = Some(item);
        }
        self.seen += 1;
        if self.items.len() > self.limit {
            let mut index = 0;
            let every_other = |_: &T| {
                index += 1;
                index % 2 == 1
            };
            if self.items.len().is_multiple_of(2) {
                self.newest = self.items.pop();
            }
            self.items.retain(every_other);
            self.stride *= 2;
        }
    }

    pub(super) fn newest_mut(&mut self) -> Option<&mut T> {
        self.newest.as_mut().or(self.items.last_mut())
    }

    /// In order.
    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = &T> {
        self.items.iter().chain(&self.newest)
    }

    /// Items that were left out.
    pub(super) fn left_out(&self) -> usize {
        self.seen - self.iter().count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn r12_thinning_keeps_extremes_order_and_the_end(
            values in prop::collection::vec(-1e6f64..1e6, 1..2000),
            limit in 1usize..64,
        ) {
            let mut series = Series::new(limit);
            for (step, value) in values.iter().enumerate() {
                series.push(step as u64, *value);
            }
            let points = series.points();
            prop_assert!(points.len() <= 2 * limit + 1);
            prop_assert!(points.windows(2).all(|pair| pair[0].0 < pair[1].0));
            prop_assert!(points.iter().all(|&(step, value)| values[step as usize] == value));
            let extreme = |pick: fn(f64, f64) -> f64, numbers: &mut dyn Iterator<Item = f64>| numbers.reduce(pick);
            for pick in [f64::min as fn(f64, f64) -> f64, f64::max] {
                let kept = extreme(pick, &mut points.iter().map(|point| point.1));
                prop_assert_eq!(kept, extreme(pick, &mut values.iter().copied()));
            }
            prop_assert_eq!(points.last().map(|point| point.1), values.last().copied());
            if values.len() <= limit {
                prop_assert_eq!(points.len(), values.len());
            }
        }

        #[test]
        fn r12_a_spread_keeps_the_first_and_the_newest(count in 1usize..500, limit in 1usize..20) {
            let mut spread = Spread::new(limit);
            (0..count).for_each(|item| spread.push(item));
            let items: Vec<usize> = spread.iter().copied().collect();
            prop_assert!(items.len() <= limit + 1);
            prop_assert_eq!((items[0], items[items.len() - 1]), (0, count - 1));
            prop_assert!(items.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert_eq!(items.len() + spread.left_out(), count);
            prop_assert_eq!(spread.newest_mut().copied(), Some(count - 1));
        }
    }

    #[test]
    fn r12_smoothing_follows_a_straight_line_and_calms_a_noisy_one() {
        let (mut straight, mut noisy) = (Series::new(50), Series::new(50));
        for step in 0..1000 {
            straight.push(step, step as f64);
            noisy.push(step, (step % 2) as f64);
        }
        for (step, value) in straight.smoothed() {
            assert!((value - step as f64).abs() <= 1.0, "{step}: {value}");
        }
        assert!(
            noisy
                .smoothed()
                .iter()
                .all(|point| (point.1 - 0.5).abs() < 0.1)
        );
    }

    #[test]
    fn r12_what_is_not_finite_has_no_place_on_a_chart() {
        let mut series = Series::default();
        for value in [f64::NAN, 1.0, f64::INFINITY] {
            series.push(1, value);
        }
        assert_eq!(series.points(), [(1, 1.0)]);
    }
}
