//! What was measured, as a table or as JSON lines.

use serde_json::json;

/// One contestant of a round: who, on what, and the seconds of a call in each of its samples.
pub struct Row {
    pub who: String,
    pub cache: &'static str,
    pub work: Work,
    pub samples: Vec<f64>,
}

#[derive(Clone, Copy)]
pub enum Work {
    /// A product with weights of so many bytes.
    Product { bytes: f64 },
    /// So many operations in registers.
    Operations(f64),
    /// So many bytes read.
    Bytes(f64),
}

/// The rows that show limits.
pub const PEAK: &str = "peak in registers";
pub const READ: &str = "memory read";

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
    pub inputs: usize,
    pub outputs: usize,
    pub tokens: usize,
    pub threads: usize,
    pub rows: Vec<Row>,
}

impl Round {
    /// Operations a second of one core.
    fn operations(&self, row: &Row) -> Option<f64> {
        let operations = match row.work {
            Work::Product { .. } => 2.0 * (self.tokens * self.inputs * self.outputs) as f64,
            Work::Operations(operations) => operations,
            Work::Bytes(_) => return None,
        };
        Some(operations / row.seconds() / self.threads as f64)
    }

    /// Bytes a second, of all threads, where weights are read once.
    fn bytes(&self, row: &Row) -> Option<f64> {
        match row.work {
            Work::Bytes(bytes) => Some(bytes / row.seconds()),
            Work::Product { bytes } if self.tokens == 1 => Some(bytes / row.seconds()),
            _ => None,
        }
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

    /// Its time over that of the dense row with the same outputs.
    fn of_dense(&self, row: &Row) -> Option<f64> {
        let (_, what) = row.who.rsplit_once(' ')?;
        let dense = format!("dense f32 {what}");
        let dense = self.rows.iter().find(|row| row.who == dense)?;
        matches!(row.work, Work::Product { .. }).then(|| row.seconds() / dense.seconds())
    }

    /// Formats, and the time of their y and dx together over that of the dense ones.
    fn steps(&self) -> Vec<(&str, f64)> {
        let seconds = |who: &str| {
            let row = self.rows.iter().find(|row| row.who == who)?;
            Some(row.seconds())
        };
        let both = |who: &str| Some(seconds(&format!("{who} y"))? + seconds(&format!("{who} dx"))?);
        let dense = both("dense f32");
        let formats = self
            .rows
            .iter()
            .filter_map(|row| row.who.strip_suffix(" dx"));
        formats
            .filter(|who| *who != "dense f32")
            .filter_map(|who| Some((who, both(who)? / dense?)))
            .collect()
    }

    pub fn print(&self, json: bool) {
        if !json {
            println!(
                "\n{} inputs, {} outputs, {} tokens, {} threads\n{:<18} {:<9} {:>10} {:>10} {:>12} {:>8} {:>7} {:>8} {:>9}",
                self.inputs,
                self.outputs,
                self.tokens,
                self.threads,
                "",
                "weights",
                "us",
                "median us",
                "GF/s a core",
                "of peak",
                "GB/s",
                "of read",
                "of dense"
            );
        }
        for row in &self.rows {
            if json {
                self.print_json(row);
            } else {
                self.print_row(row);
            }
        }
        for (format, ratio) in self.steps() {
            if json {
                let object = json!({
                    "who": format!("{format} y and dx"), "inputs": self.inputs,
                    "outputs": self.outputs, "tokens": self.tokens, "threads": self.threads,
                    "of_dense": ratio,
                });
                println!("{object}");
            } else {
                println!("{format}: y and dx take {ratio:.3} of the dense time");
            }
        }
    }

    fn print_json(&self, row: &Row) {
        let object = json!({
            "who": row.who, "inputs": self.inputs, "outputs": self.outputs,
            "tokens": self.tokens, "threads": self.threads, "weights": row.cache,
            "samples": row.samples.len(), "seconds": row.seconds(),
            "median_seconds": row.quantile(0.5),
            "operations_per_second_and_core": self.operations(row),
            "bytes_per_second": self.bytes(row),
            "of_peak": self.of_limit(row, |row| self.operations(row), PEAK),
            "of_read": self.of_limit(row, |row| self.bytes(row), READ),
            "of_dense": self.of_dense(row),
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
            "{:<18} {:<9} {:>10.1} {:>10.1} {:>12} {:>8} {:>7} {:>8} {:>9}",
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
            self.of_dense(row)
                .map_or("-".to_string(), |ratio| format!("{ratio:.3}")),
        );
    }
}
