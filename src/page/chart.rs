//! Charts: lines as SVG, axes and legends as HTML around it.
//!
//! The SVG is stretched to whatever room there is while lines keep their width and text its size,
//! so a chart reads the same on a wide screen, a narrow one and paper, with scripts off too. The
//! points are given once more as JSON for the read-out under the pointer.

use std::fmt::Write;

use serde_json::{Value, json};

use super::escaped;
use crate::readable::{bytes, grouped};

/// Side of the square that lines are drawn in before it is stretched.
const SIDE: f64 = 1000.0;
/// A line with fewer points shows each as a dot.
const FEW_POINTS: usize = 30;
/// Extremes further apart than this are shown on a logarithmic axis, if the chart may have one.
const WIDE: f64 = 200.0;

/// One chart.
pub(crate) struct Chart<'a> {
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) unit: Unit,
    /// Where the vertical axis begins.
    pub(crate) floor: Floor,
    /// Whether the axis may be logarithmic, where values are far apart.
    pub(crate) may_log: bool,
    /// Whether there is a legend; another chart may have the same.
    pub(crate) has_legend: bool,
    /// Whether the legend explains the marks for resumes and skipped steps.
    pub(crate) explains_marks: bool,
    pub(crate) lines: Vec<Line>,
    /// A horizontal line to compare with.
    pub(crate) baseline: Option<(&'static str, f64)>,
    /// The meaning of the horizontal axis.
    pub(crate) horizontal: Horizontal,
    /// The value at its right edge.
    pub(crate) last: f64,
    pub(crate) skips: &'a [u64],
    /// The steps after which phases begin, and their names; empty for a run with one phase.
    pub(crate) phases: &'a [(u64, String)],
    pub(crate) resumes: &'a [u64],
}

/// One line of a chart.
pub(crate) struct Line {
    pub(crate) name: String,
    /// Colour and weight, by its name in the style sheet.
    pub(crate) class: String,
    pub(crate) points: Vec<(f64, f64)>,
    pub(crate) dots: bool,
}

impl Line {
    pub(crate) fn new(name: &str, class: &str, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.to_string(),
            class: class.to_string(),
            points,
            dots: false,
        }
    }

    /// A line over steps.
    pub(crate) fn by_step(name: &str, class: &str, points: Vec<(u64, f64)>) -> Self {
        let points = points.into_iter().map(|(step, value)| (step as f64, value));
        Self::new(name, class, points.collect())
    }
}

/// The meaning of a horizontal axis.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Horizontal {
    Steps,
    Tokens,
    /// Seconds of training steps.
    Seconds,
}

impl Horizontal {
    fn name(self) -> &'static str {
        match self {
            Self::Steps => "step",
            Self::Tokens => "tokens",
            Self::Seconds => "seconds",
        }
    }

    /// A value below the axis. The first says what is counted.
    fn label(self, value: f64) -> String {
        let short = match self {
            Self::Steps => grouped(value as u64),
            Self::Tokens | Self::Seconds => Unit::Plain.label(value),
        };
        match self {
            Self::Steps if value == 0.0 => format!("step {short}"),
            Self::Tokens if value == 0.0 => format!("{short} tokens"),
            Self::Seconds => format!("{short} s"),
            Self::Steps | Self::Tokens => short,
        }
    }
}

/// How the values of a chart read.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Unit {
    Plain,
    Rate,
    Speed,
    Bytes,
}

/// Where a vertical axis begins.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Floor {
    /// A little below the lowest value.
    Lowest,
    /// At zero.
    Zero,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Rate => "rate",
            Self::Speed => "speed",
            Self::Bytes => "bytes",
        }
    }

    /// What values of up to `high` are written in.
    fn scale(self, high: f64) -> f64 {
        let steps = high.max(1.0).log(1024.0).floor();
        if self == Self::Bytes {
            1024f64.powf(steps)
        } else {
            1.0
        }
    }

    /// A value beside an axis.
    fn label(self, value: f64) -> String {
        match self {
            Self::Bytes => bytes(value.max(0.0) as u64),
            Self::Rate if value != 0.0 => format!("{value:e}"),
            _ if value.abs() >= 1e6 => format!("{}M", value / 1e6),
            _ if value.abs() >= 1e4 => format!("{}k", value / 1e3),
            _ => value.to_string(),
        }
    }
}

/// A vertical axis: from values to places between 0 (bottom) and 1 (top).
struct Axis {
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    fn new(values: &[f64], floor: Floor, may_log: bool) -> Self {
        let lowest = values.iter().copied().fold(f64::INFINITY, f64::min);
        let highest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log = may_log && lowest > 0.0 && highest / lowest > WIDE;
        let (mut low, mut high) = match floor {
            _ if log => (lowest / 1.2, highest * 1.2),
            Floor::Lowest => {
                let room = (highest - lowest) * 0.05;
                let low = lowest - room;
                // Where nothing is below zero, neither is the axis.
                let low = if lowest >= 0.0 { low.max(0.0) } else { low };
                (low, highest + room)
            }
            Floor::Zero => (0.0f64.min(lowest), highest * 1.05),
        };
        if high <= low {
            let room = (low.abs() * 0.1).max(1e-9);
            (low, high) = (low - room, high + room);
        }
        Self { low, high, log }
    }

    fn place(&self, value: f64) -> f64 {
        if self.log {
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        }
    }

    fn ticks(&self, unit: Unit) -> Vec<f64> {
        if !self.log {
            // Round in the unit that is written, not in bytes.
            let scale = unit.scale(self.high);
            let round = ticks(self.low / scale, self.high / scale, 5);
            return round.into_iter().map(|tick| tick * scale).collect();
        }
        let powers = self.low.log10().floor() as i32..=self.high.log10().floor() as i32;
        let few = powers.clone().count() < 4;
        let digits: &[u32] = if few { &[1, 2, 5] } else { &[1] };
        // 10f64.powi rounds its own way below one; the parser gives the number that is meant.
        let exact = |digit: &u32, exponent: i32| format!("{digit}e{exponent}").parse::<f64>().ok();
        let ticks =
            powers.flat_map(|exponent| digits.iter().map(move |digit| exact(digit, exponent)));
        let within = |tick: &f64| (self.low..=self.high).contains(tick);
        let ticks: Vec<f64> = ticks.flatten().filter(within).collect();
        if few {
            return ticks;
        }
        let every = ticks.len().div_ceil(6).max(1);
        ticks.into_iter().step_by(every).collect()
    }
}

impl Chart<'_> {
    /// The chart as HTML.
    pub(crate) fn html(&self) -> String {
        let points = self.lines.iter().flat_map(|line| &line.points);
        let values: Vec<f64> = points.map(|point| point.1).collect();
        let title = escaped(&self.title);
        if values.is_empty() {
            return format!(
                "<figure><figcaption><h3>{title}</h3></figcaption><p class=none>Nothing yet.</p></figure>\n"
            );
        }
        let range = values
            .iter()
            .copied()
            .chain(self.baseline.map(|(_, value)| value));
        let axis = Axis::new(&range.collect::<Vec<_>>(), self.floor, self.may_log);
        let note = if axis.log { ", logarithmic" } else { "" };
        format!(
            "<figure><figcaption><h3>{title}{note}</h3>{legend}</figcaption>\n\
             <div class=plot id=\"{id}\" tabindex=0 aria-label=\"{title}{note}, by {by}\">{y_labels}{x_labels}{phases}\n\
             <svg viewBox=\"0 0 {SIDE} {SIDE}\" preserveAspectRatio=none aria-hidden=true>{grid}{marks}{lines}</svg></div>\n\
             </figure>\n",
            id = self.id,
            by = self.horizontal.name(),
            legend = self.legend(),
            y_labels = self.y_labels(&axis),
            x_labels = self.x_labels(),
            phases = self.phase_labels(),
            grid = self.grid(&axis),
            marks = self.marks(),
            lines = self.lines(&axis),
        )
    }

    /// The points as the script reads them.
    pub(crate) fn data(&self) -> Value {
        let lines = self.lines.iter().map(|line| {
            let places: Vec<Value> = line.points.iter().map(|point| number(point.0)).collect();
            // Six digits are more than can be told apart, and the page stays small.
            let values = line.points.iter().map(|point| {
                let short = format!("{:.5e}", point.1);
                json!(short.parse().unwrap_or(point.1))
            });
            json!({"name": line.name, "class": line.class, "x": places, "y": values.collect::<Vec<_>>()})
        });
        let lines: Vec<Value> = lines.collect();
        json!({
            "id": self.id, "unit": self.unit.name(), "x": self.horizontal.name(),
            "last": number(self.width()), "lines": lines,
        })
    }

    /// The value at the right edge, which is never zero.
    fn width(&self) -> f64 {
        let least = match self.horizontal {
            Horizontal::Steps | Horizontal::Tokens => 1.0,
            Horizontal::Seconds => 1e-3,
        };
        self.last.max(least)
    }

    fn x(&self, value: f64) -> f64 {
        value / self.width()
    }

    fn legend(&self) -> String {
        let mut html = String::new();
        if !self.has_legend {
            return html;
        }
        let several = self.lines.len() > 1 || self.baseline.is_some();
        let key = |class: &str, name: &str| format!("<li class={class}><i></i>{name}</li>");
        if several {
            let named = |line: &&Line| !line.points.is_empty() && !line.name.is_empty();
            for line in self.lines.iter().filter(named) {
                html.push_str(&key(&format!("\"{}\"", line.class), &escaped(&line.name)));
            }
        }
        if let Some((name, _)) = self.baseline {
            html.push_str(&key("baseline", name));
        }
        if self.explains_marks && !self.resumes.is_empty() {
            html.push_str(&key("resume", "resumed"));
        }
        if self.explains_marks && !self.skips.is_empty() {
            html.push_str(&key("skip", "step skipped"));
        }
        if html.is_empty() {
            html
        } else {
            format!("<ul class=legend>{html}</ul>")
        }
    }

    fn y_labels(&self, axis: &Axis) -> String {
        let label = |tick: f64| {
            let (top, text) = (100.0 * (1.0 - axis.place(tick)), self.unit.label(tick));
            format!("<b class=y style=\"top:{top:.2}%\">{text}</b>")
        };
        axis.ticks(self.unit).into_iter().map(label).collect()
    }

    fn x_labels(&self) -> String {
        let label = |value: f64| {
            let (left, text) = (100.0 * self.x(value), self.horizontal.label(value));
            format!("<b class=x style=\"left:{left:.2}%\">{text}</b>")
        };
        let is_counted = self.horizontal != Horizontal::Seconds;
        let places = ticks(0.0, self.width(), 6);
        let shown = places
            .into_iter()
            .filter(|place| !is_counted || place.fract() == 0.0);
        shown.map(label).collect()
    }

    fn grid(&self, axis: &Axis) -> String {
        let mut path = String::new();
        for tick in axis.ticks(self.unit) {
            // Writing to a string cannot fail.
            let _ = write!(path, "M0 {:.1}H{SIDE}", SIDE * (1.0 - axis.place(tick)));
        }
        let mut html = format!("<path class=grid d=\"{path}\"/>");
        if let Some((_, value)) = self.baseline {
            let y = SIDE * (1.0 - axis.place(value));
            let _ = write!(html, "<path class=baseline d=\"M0 {y:.1}H{SIDE}\"/>");
        }
        html
    }

    /// Where the run was resumed, over the whole height, and where steps were skipped, as ticks.
    fn marks(&self) -> String {
        let mut html = String::new();
        for (class, steps, height) in [
            ("resume", self.resumes, SIDE),
            ("skip", self.skips, SIDE * 0.06),
        ] {
            let mut places: Vec<u64> = steps
                .iter()
                .map(|&s| (self.x(s as f64) * SIDE) as u64)
                .collect();
            places.dedup();
            let path: String = places
                .iter()
                .map(|x| format!("M{x} {SIDE}v-{height}"))
                .collect();
            if !path.is_empty() {
                let _ = write!(html, "<path class={class} d=\"{path}\"/>");
            }
        }
        for (step, _) in self.phases.iter().filter(|(step, _)| *step > 0) {
            let x = SIDE * self.x(*step as f64);
            let _ = write!(html, "<path class=phase d=\"M{x:.1} {SIDE}v-{SIDE}\"/>");
        }
        html
    }

    /// The names of the phases above the plot, each where it begins.
    fn phase_labels(&self) -> String {
        let label = |(step, name): &(u64, String)| {
            let left = 100.0 * self.x(*step as f64);
            format!(
                "<b class=phase style=\"left:{left:.2}%\">{}</b>",
                escaped(name)
            )
        };
        self.phases.iter().map(label).collect()
    }

    fn lines(&self, axis: &Axis) -> String {
        let mut html = String::new();
        for line in &self.lines {
            let (mut path, mut dots) = (String::new(), String::new());
            let few = line.points.len() < FEW_POINTS;
            for &(place, value) in &line.points {
                let (x, y) = (SIDE * self.x(place), SIDE * (1.0 - axis.place(value)));
                let verb = if path.is_empty() { 'M' } else { 'L' };
                let _ = write!(path, "{verb}{x:.1} {y:.1}");
                if line.dots || (few && !line.name.is_empty()) {
                    // Nothing long with round ends: a dot that stretching leaves round.
                    let _ = write!(dots, "M{x:.1} {y:.1}h0");
                }
            }
            let class = &line.class;
            let _ = write!(html, "<path class=\"{class}\" d=\"{path}\"/>");
            if !dots.is_empty() {
                let _ = write!(html, "<path class=\"{class} dots\" d=\"{dots}\"/>");
            }
        }
        html
    }
}

/// Returns the number as JSON; a whole number is written without a fraction.
fn number(value: f64) -> Value {
    match value.fract() == 0.0 && value.abs() < 9e15 {
        true => json!(value as i64),
        false => json!(value),
    }
}

/// About `count` round numbers (1, 2 or 5 times a power of ten apart) between two numbers.
fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let rough = (high - low) / count as f64;
    let exponent = rough.log10().floor() as i32;
    let in_powers = rough / 10f64.powi(exponent);
    let factor = [1, 2, 5]
        .into_iter()
        .find(|&f| f64::from(f) >= in_powers * 0.999);
    let factor = i64::from(factor.unwrap_or(10));
    let spacing = factor as f64 * 10f64.powi(exponent);
    let (first, last) = (
        (low / spacing).ceil() as i64,
        (high / spacing).floor() as i64,
    );
    // Through text, so that the third of 0.1 is 0.3 and not 0.30000000000000004.
    let exact = |index: i64| format!("{}e{exponent}", index * factor).parse().ok();
    (first..=last).filter_map(exact).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r12_ticks_are_round_numbers_within_the_range() {
        assert_eq!(
            ticks(0.0, 60.0, 6),
            [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
        );
        assert_eq!(ticks(2.31, 3.02, 5), [2.4, 2.6, 2.8, 3.0]);
        assert_eq!(ticks(0.0, 1.05e-3, 5), [0.0, 0.0005, 0.001]);
        assert_eq!(ticks(0.0, 1.05e30, 5), [0.0, 5e29, 1e30]);
        assert_eq!(ticks(0.0, 1.0, 6), [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]);
    }

    #[test]
    fn r12_values_far_apart_get_a_logarithmic_axis() {
        let axis = Axis::new(&[0.5, 2.0, 9000.0], Floor::Zero, true);
        assert!(axis.log);
        assert_eq!(axis.ticks(Unit::Plain), [1.0, 10.0, 100.0, 1000.0, 10000.0]);
        let narrower = Axis::new(&[0.02, 5.0], Floor::Lowest, true);
        assert_eq!(
            narrower.ticks(Unit::Plain),
            [0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
        );
        assert!(axis.place(0.5) > 0.0 && axis.place(9000.0) < 1.0);
        assert!(!Axis::new(&[0.5, 2.0], Floor::Zero, true).log);
        // 400 MB in steps of 100 MiB.
        let memory = Axis::new(&[4e8], Floor::Zero, false);
        assert_eq!(
            memory.ticks(Unit::Bytes),
            [0.0, 1e2, 2e2, 3e2, 4e2].map(|mib| mib * 1048576.0)
        );
        // One value, or many equal ones, still make an axis.
        let flat = Axis::new(&[3.0], Floor::Lowest, true);
        assert!((flat.place(3.0) - 0.5).abs() < 1e-9);
    }

    #[test]
    fn r12_labels_are_short() {
        for (unit, value, text) in [
            (Unit::Plain, 2.5, "2.5"),
            (Unit::Speed, 12000.0, "12k"),
            (Unit::Rate, 0.0005, "5e-4"),
            (Unit::Rate, 0.0, "0"),
            (Unit::Bytes, 209_715_200.0, "200 MiB"),
        ] {
            assert_eq!(unit.label(value), text);
        }
    }
}
