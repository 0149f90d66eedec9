//! Named metrics that an objective measures in addition to its loss.
//!
//! The metrics files, the report, TensorBoard and the terminal read the [`MetricSpec`]s that the
//! objective announces. They know no metric by name.

use std::borrow::Cow;
use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The description of a metric.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricSpec {
    /// The name of the metric, which is also its column in metrics.csv. A metric of an evaluation
    /// that is also measured in training begins with `val_`.
    pub name: Cow<'static, str>,
    /// The unit in words: "bits per byte".
    pub unit: Cow<'static, str>,
    /// Which values are better.
    pub better: Better,
}

/// Whether lower or higher values of a metric are better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// Lower values are better.
    Lower,
    /// Higher values are better.
    Higher,
}

impl MetricSpec {
    /// A metric for which lower values are better.
    pub const fn lower(name: &'static str, unit: &'static str) -> Self {
        Self {
            name: Cow::Borrowed(name),
            unit: Cow::Borrowed(unit),
            better: Better::Lower,
        }
    }

    /// A metric for which higher values are better.
    pub const fn higher(name: &'static str, unit: &'static str) -> Self {
        Self {
            name: Cow::Borrowed(name),
            unit: Cow::Borrowed(unit),
            better: Better::Higher,
        }
    }

    /// A value of the metric in words: "0.875 bits per byte", "reward accuracy 0.875".
    pub fn phrase(&self, value: f64) -> String {
        let title = self.title();
        if title == self.unit {
            format!("{value:.3} {title}")
        } else {
            format!("{title} {value:.3}")
        }
    }

    /// The name in words: "val reward accuracy".
    pub fn title(&self) -> String {
        self.name.replace('_', " ")
    }
}

/// The metrics of an objective, announced once before the first step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ObjectiveSpec {
    /// The name of the objective.
    pub name: Cow<'static, str>,
    /// The unit of the loss: "nats per token".
    pub loss_unit: Cow<'static, str>,
    /// The metrics of every optimizer step.
    pub step: Cow<'static, [MetricSpec]>,
    /// The metrics of every evaluation.
    pub evaluation: Cow<'static, [MetricSpec]>,
}

/// Metric values by name, in the order in which they were measured.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics(Vec<(Cow<'static, str>, f64)>);

impl Metrics {
    /// Pairs the names of `specs` with `values`, in order.
    pub fn of(specs: &[MetricSpec], values: impl IntoIterator<Item = f64>) -> Self {
        let names = specs.iter().map(|spec| spec.name.clone());
        Self(names.zip(values).collect())
    }

    /// The value of the metric `name`.
    pub fn get(&self, name: &str) -> Option<f64> {
        let found = self.0.iter().find(|(other, _)| other == name);
        found.map(|(_, value)| *value)
    }

    /// Names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(name, value)| (name.as_ref(), *value))
    }
}

impl Serialize for Metrics {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Metrics {
    /// Reads every number, and null as NaN, which JSON cannot write. Values that are not numbers are
    /// skipped: with `serde(flatten)` this map also receives fields of the surrounding struct.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Numbers;
        impl<'de> Visitor<'de> for Numbers {
            type Value = Metrics;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("numbers by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metrics, A::Error> {
                let mut metrics = Metrics::default();
                while let Some((name, value)) = map.next_entry::<String, serde_json::Value>()? {
                    let number = match value {
                        serde_json::Value::Null => Some(f64::NAN),
                        value => value.as_f64(),
                    };
                    let entry = number.map(|number| (Cow::Owned(name), number));
                    metrics.0.extend(entry);
                }
                Ok(metrics)
            }
        }
        deserializer.deserialize_map(Numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_survive_json_in_order_and_what_is_no_number_is_not_finite() {
        let specs = [MetricSpec::lower("b", "x"), MetricSpec::higher("a", "x")];
        let metrics = Metrics::of(&specs, [0.1 + 0.2, f64::NAN]);
        let text = serde_json::to_string(&metrics).unwrap();
        assert_eq!(text, r#"{"b":0.30000000000000004,"a":null}"#);
        let back: Metrics = serde_json::from_str(&text).unwrap();
        assert_eq!(back.get("b"), metrics.get("b"));
        assert!(back.get("a").unwrap().is_nan());
        assert_eq!(back.get("c"), None);
    }

    #[test]
    fn a_number_is_said_with_its_unit_or_its_name() {
        assert_eq!(
            MetricSpec::lower("bits_per_byte", "bits per byte").phrase(1.5),
            "1.500 bits per byte"
        );
        assert_eq!(
            MetricSpec::higher("reward_accuracy", "share of pairs").phrase(0.5),
            "reward accuracy 0.500"
        );
    }
}
