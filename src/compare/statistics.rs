//! Means over seeds, and ratios paired by seed.
//!
//! Intervals cover 95 % under Student's t distribution. The test of a ratio is the two-sided
//! one-sample t test on the logarithms of the paired ratios, against a ratio of one.

use serde::{Deserialize, Serialize};
use statrs::distribution::{ContinuousCDF, StudentsT};

/// A mean over seeds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    /// Number of values.
    pub n: usize,
    /// Their mean.
    pub mean: f64,
    /// The 95 % interval; none for fewer than two values.
    pub interval: Option<[f64; 2]>,
}

/// A ratio paired by seed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Number of pairs.
    pub n: usize,
    /// The geometric mean of the ratios.
    pub ratio: f64,
    /// The 95 % interval; none for fewer than two pairs.
    pub interval: Option<[f64; 2]>,
    /// The two-sided p value against a ratio of one; none for fewer than two pairs, and where all
    /// ratios are the same number, because nothing can be said about their spread then.
    pub p: Option<f64>,
}

/// The mean of some values; none without values.
///
/// ```
/// let mean = firebrick::compare::mean(&[2.5, 3.0, 3.5]).unwrap();
/// assert_eq!((mean.n, mean.mean), (3, 3.0));
/// assert!((mean.interval.unwrap()[0] - 1.7579).abs() < 1e-4);
/// ```
pub fn mean(values: &[f64]) -> Option<Mean> {
    let (mean, error) = mean_and_error(values)?;
    let half = error.map(|error| error * quantile(values.len()));
    Some(Mean {
        n: values.len(),
        mean,
        interval: half.map(|half| [mean - half, mean + half]),
    })
}

/// The ratio of each first to its second number, over all pairs; none without pairs, or if a
/// number is not positive.
///
/// ```
/// let ratio = firebrick::compare::ratio(&[(2.0, 1.0), (4.0, 1.0), (8.0, 1.0)]).unwrap();
/// assert!((ratio.ratio - 4.0).abs() < 1e-12);
/// assert!((ratio.p.unwrap() - 0.074180).abs() < 1e-6);
/// ```
pub fn ratio(pairs: &[(f64, f64)]) -> Option<Ratio> {
    if pairs.iter().any(|(a, b)| !(*a > 0.0 && *b > 0.0)) {
        return None;
    }
    let logs: Vec<f64> = pairs.iter().map(|(a, b)| (a / b).ln()).collect();
    let (mean, error) = mean_and_error(&logs)?;
    let half = error.map(|error| error * quantile(logs.len()));
    // Rounding leaves a spread where there is none.
    let spread = error.filter(|error| *error > 1e-14 * mean.abs().max(1.0));
    Some(Ratio {
        n: logs.len(),
        ratio: mean.exp(),
        interval: half.map(|half| [(mean - half).exp(), (mean + half).exp()]),
        p: spread.map(|error| two_sided(mean / error, logs.len())),
    })
}

/// The mean and its standard error, which takes two values.
fn mean_and_error(values: &[f64]) -> Option<(f64, Option<f64>)> {
    if values.is_empty() {
        return None;
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let error = (values.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt());
    Some((mean, error))
}

fn student(n: usize) -> StudentsT {
    // Scale and degrees of freedom are positive: callers have at least two values.
    StudentsT::new(0.0, 1.0, (n - 1) as f64).expect("at least one degree of freedom")
}

/// The factor of the standard error in a 95 % interval.
fn quantile(n: usize) -> f64 {
    student(n).inverse_cdf(0.975)
}

fn two_sided(t: f64, n: usize) -> f64 {
    // The lower tail keeps its digits where the upper one is 1 minus a small number.
    2.0 * student(n).cdf(-t.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    const T_TESTS: [(f64, usize, f64); 7] = [
        (0.5, 2, 0.7048327646991335),
        (2.0, 3, 0.18350341907227397),
        (4.5, 5, 0.010822550462608249),
        (2.776445, 5, 0.05000000538209156),
        (10.0, 10, 3.578237431924736e-06),
        (1.96, 1000, 0.050273462733810045),
        (60.0, 5, 4.621068727635128e-07),
    ];
    const QUANTILES: [(usize, f64); 5] = [
        (2, 12.706204736174694),
        (3, 4.302652729749462),
        (5, 2.7764451051977934),
        (10, 2.262157162798205),
        (100, 1.9842169515864174),
    ];
    const RATIO: [f64; 4] = [
        1.526190788153083,
        1.407806160319865,
        1.654530564999163,
        0.00013019290036087776,
    ];

    /// The expected values are by scipy 1.17: `2 * stats.t.sf(t, n - 1)`, `stats.t.ppf(0.975, n - 1)`
    /// and, below, its t test of one sample, of the logarithms.
    #[test]
    fn p3_p_values_and_quantiles_are_students() {
        for (t, n, p) in T_TESTS {
            let found = two_sided(t, n);
            assert!(
                (found - p).abs() < 1e-6 * p.max(1e-3),
                "{t} {n}: {found} {p}"
            );
            assert_eq!(two_sided(-t, n), found);
        }
        for (n, expected) in QUANTILES {
            assert!(
                (quantile(n) / expected - 1.0).abs() < 1e-6,
                "{n}: {}",
                quantile(n)
            );
        }
    }

    #[test]
    fn p3_a_ratio_is_the_geometric_mean_of_its_pairs() {
        let pairs = [
            (30.0, 20.0),
            (33.0, 20.0),
            (28.0, 19.0),
            (31.0, 22.0),
            (29.0, 18.0),
        ];
        let found = ratio(&pairs).unwrap();
        let [r, low, high, p] = RATIO;
        let interval = found.interval.unwrap();
        assert!((found.ratio - r).abs() < 1e-9);
        assert!((interval[0] - low).abs() < 1e-6 && (interval[1] - high).abs() < 1e-6);
        assert!((found.p.unwrap() / p - 1.0).abs() < 1e-6, "{:?}", found.p);
        let swapped = ratio(&pairs.map(|(a, b)| (b, a))).unwrap();
        assert!((swapped.ratio * found.ratio - 1.0).abs() < 1e-12);
        assert!((swapped.p.unwrap() - found.p.unwrap()).abs() < 1e-12);
    }

    #[test]
    fn p3_too_few_values_have_no_interval_and_equal_ratios_no_p() {
        assert_eq!(mean(&[]), None);
        assert_eq!(mean(&[2.0]).unwrap().interval, None);
        let one = ratio(&[(2.0, 1.0)]).unwrap();
        assert_eq!((one.n, one.interval, one.p), (1, None, None));
        assert_eq!(ratio(&[(3.0, 1.0), (0.3, 0.1)]).unwrap().p, None);
        assert_eq!(ratio(&[(1.0, 0.0)]), None);
    }
}
