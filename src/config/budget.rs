//! `--budget`: how much each run of a comparison may use.

use std::fmt;
use std::str::FromStr;

/// What is counted, and how much of it. Without an amount, what the first file needs for its own
/// length.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// What is counted.
    pub kind: BudgetKind,
    /// How much: seconds, tokens, steps, passes or FLOPs.
    pub amount: Option<f64>,
}

/// What a budget counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BudgetKind {
    /// Seconds of training steps.
    Wall,
    /// Trained tokens.
    Tokens,
    /// Optimizer steps.
    Steps,
    /// Forward-backward passes.
    Backward,
    /// Multiplications and additions, by the forecast.
    Flops,
}

impl BudgetKind {
    const ALL: [Self; 5] = [
        Self::Wall,
        Self::Tokens,
        Self::Steps,
        Self::Backward,
        Self::Flops,
    ];

    /// The word in `--budget`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Wall => "wall",
            Self::Tokens => "tokens",
            Self::Steps => "steps",
            Self::Backward => "backward",
            Self::Flops => "flops",
        }
    }

    /// The factor of a unit; none for a unit that this kind does not have.
    fn factor(self, unit: &str) -> Option<f64> {
        match (self, unit) {
            (_, "") => Some(1.0),
            (Self::Wall, "s") => Some(1.0),
            (Self::Wall, "m" | "min") => Some(60.0),
            (Self::Wall, "h") => Some(3600.0),
            (Self::Wall, _) => None,
            (_, "k") => Some(1e3),
            (_, "M") => Some(1e6),
            (_, "G" | "B") => Some(1e9),
            (_, "T") => Some(1e12),
            (_, "P") => Some(1e15),
            _ => None,
        }
    }
}

impl FromStr for Budget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = "wall:300s, tokens:2M, steps:500, backward:500 or flops:1e15";
        let (name, amount) = match text.split_once(':') {
            Some((name, amount)) => (name, Some(amount)),
            None => (text, None),
        };
        let mut kinds = BudgetKind::ALL.into_iter();
        let Some(kind) = kinds.find(|kind| kind.name() == name) else {
            return Err(format!("`{text}` is not a budget such as {form}"));
        };
        let amount = amount.map(|amount| {
            let digits = amount.trim_end_matches(|c: char| c.is_alphabetic());
            let number = digits.parse::<f64>().ok();
            let factor = kind.factor(&amount[digits.len()..]);
            let found = number.zip(factor).map(|(number, factor)| number * factor);
            let positive = found.filter(|amount| amount.is_finite() && *amount > 0.0);
            positive.ok_or_else(|| format!("`{amount}` is not an amount for `{name}`: {form}"))
        });
        Ok(Self {
            kind,
            amount: amount.transpose()?,
        })
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.name())?;
        match (self.kind, self.amount) {
            (_, None) => Ok(()),
            (BudgetKind::Wall, Some(seconds)) => write!(f, ":{seconds}s"),
            (_, Some(amount)) if amount < 1e15 => write!(f, ":{amount}"),
            (_, Some(amount)) => write!(f, ":{amount:e}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p3_budgets_are_read_in_their_units_and_written_back() {
        for (text, kind, amount, written) in [
            ("wall:300s", BudgetKind::Wall, Some(300.0), "wall:300s"),
            ("wall:2m", BudgetKind::Wall, Some(120.0), "wall:120s"),
            ("wall:1.5h", BudgetKind::Wall, Some(5400.0), "wall:5400s"),
            ("wall", BudgetKind::Wall, None, "wall"),
            ("tokens:2M", BudgetKind::Tokens, Some(2e6), "tokens:2000000"),
            ("steps:500", BudgetKind::Steps, Some(500.0), "steps:500"),
            (
                "backward:1k",
                BudgetKind::Backward,
                Some(1e3),
                "backward:1000",
            ),
            ("flops:1e15", BudgetKind::Flops, Some(1e15), "flops:1e15"),
        ] {
            let budget: Budget = text.parse().unwrap();
            assert_eq!(budget, Budget { kind, amount }, "{text}");
            assert_eq!(budget.to_string(), written);
            assert_eq!(written.parse::<Budget>().unwrap(), budget);
        }
        for text in [
            "",
            "time:3",
            "wall:",
            "wall:3k",
            "steps:-1",
            "steps:x",
            "tokens:0",
            "flops:inf",
        ] {
            assert!(text.parse::<Budget>().is_err(), "{text}");
        }
    }
}
