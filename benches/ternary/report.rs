//! What was measured, as a table or as JSON lines.

use firebrick_kernels::ternary::layout::compute;
use serde_json::json;

/// One contestant of a round: who, on what, and the seconds of a call in each of its samples.
pub struct Row {
    pub who: String,
    pub cache: &'static str,
    /// Operations and bytes of weights of a call.
    pub work: Work,
    pub samples: Vec<f64>,
}

#[derive(Clone, Copy)]
pub enum Work {
    /// A product.
    Product,
    /// So many operations in registers.
    Operations(f64),
    /// So many bytes read.
    Bytes(f64),
    /// Something that is not a product; only its time is of interest.
    Pass,
}

impl Row {
    pub fn new(who: impl Into<String>, cache: &'static str, work: Work) -> Self {
        Self {
            who: who.into(),
            cache,
            work,
            samples: Vec::new(),
        }
    }

    /// The sample that so large a part of the others is slower than.
    fn quantile(&self, part: f64) -> f64 {
        let mut samples = self.samples.clone();
        samples.sort_by(f64::total_cmp);
        samples[(part * (samples.len() - 1) as f64).round() as usize]
    }

    /// A tenth of the samples is faster: what a neighbour on the machine does to the others does not decide.
    fn seconds(&self) -> f64 {
        self.quantile(0.1)
    }
}

/// Rows that were measured in turns.
pub struct Round {
    pub size: usize,
    pub tokens: usize,
    pub threads: usize,
    pub rows: Vec<Row>,
}

impl Round {
    /// Operations a second of one core.
    fn operations(&self, row: &Row) -> Option<f64> {
        let operations = match row.work {
            Work::Product => 2.0 * (self.tokens * self.size * self.size) as f64,
            Work::Operations(operations) => operations,
            Work::Bytes(_) | Work::Pass => return None,
        };
        Some(operations / row.seconds() / self.threads as f64)
    }

    /// Bytes a second, of all threads, where weights are read once.
    fn bytes(&self, row: &Row) -> Option<f64> {
        let bytes = match row.work {
            Work::Bytes(bytes) => bytes,
            Work::Product if row.who.starts_with("ternary") && self.tokens == 1 => {
                4.0 * compute::words(self.size, self.size) as f64
            }
            _ => return None,
        };
        Some(bytes / row.seconds())
    }

    /// What a row reaches of the row with the same measure that shows a limit, in this round.
    fn of_limit(
        &self,
        row: &Row,
        measure: impl Fn(&Row) -> Option<f64>,
        limit: &str,
    ) -> Option<f64> {
        let limit = self.rows.iter().find(|row| row.who == limit)?;
        Some(measure(row)? / measure(limit)?)
    }

    /// How many times as fast the first row is that had the same to do.
    fn times(&self, row: &Row) -> Option<f64> {
        let first = &self.rows.iter().find(|r| r.cache == row.cache)?;
        matches!(row.work, Work::Product).then(|| row.seconds() / first.seconds())
    }

    pub fn print(&self, json: bool) {
        if !json {
            println!(
                "\n{0} x {0}, {1} tokens, {2} threads\n{3:<20} {4:<9} {5:>11} {6:>11} {7:>12} {8:>8} {9:>7} {10:>8} {11:>10}",
                self.size,
                self.tokens,
                self.threads,
                "",
                "weights",
                "us",
                "median us",
                "GOP/s a core",
                "of peak",
                "GB/s",
                "of read",
                "first is x"
            );
        }
        for row in &self.rows {
            if json {
                self.print_json(row);
            } else {
                self.print_row(row);
            }
        }
    }

    fn print_json(&self, row: &Row) {
        let object = json!({
            "who": row.who, "size": self.size, "tokens": self.tokens, "threads": self.threads,
            "weights": row.cache, "samples": row.samples.len(), "seconds": row.seconds(),
            "median_seconds": row.quantile(0.5),
            "operations_per_second_and_core": self.operations(row),
            "bytes_per_second": self.bytes(row),
            "of_peak": self.of_limit(row, |row| self.operations(row), PEAK),
            "of_read": self.of_limit(row, |row| self.bytes(row), READ),
            "first_is_times_as_fast": self.times(row),
        });
        println!("{object}");
    }

    fn print_row(&self, row: &Row) {
        let number = |value: Option<f64>, scale: f64, unit: &str| {
            value.map_or("-".to_string(), |value| {
                format!("{:.1}{unit}", value * scale)
            })
        };
        println!(
            "{:<20} {:<9} {:>11.1} {:>11.1} {:>12} {:>8} {:>7} {:>8} {:>10}",
            row.who,
            row.cache,
            1e6 * row.seconds(),
            1e6 * row.quantile(0.5),
            number(self.operations(row), 1e-9, ""),
            number(
                self.of_limit(row, |row| self.operations(row), PEAK),
                100.0,
                "%"
            ),
            number(self.bytes(row), 1e-9, ""),
            number(self.of_limit(row, |row| self.bytes(row), READ), 100.0, "%"),
            number(self.times(row), 1.0, ""),
        );
    }
}

/// The rows that show limits.
pub const PEAK: &str = "peak in registers";
pub const READ: &str = "memory read";
