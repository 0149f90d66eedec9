use burn::tensor::{Device, TensorData};

use super::fit::AGE;
use super::*;
use crate::config::Preset;
use crate::model::DecoderSpec;

fn model() -> Decoder {
    let spec = DecoderSpec {
        shape: Preset::Stories260K.shape(),
        vocab_size: 8,
        eos_token_id: None,
        bos_token_id: None,
    };
    Decoder::new(&spec, 1, &Device::flex().autodiff()).unwrap()
}

/// A gradient of one parameter with these values.
fn gradient(order: &Arc<ParameterOrder>, values: &[f32]) -> Gradient {
    let mut all = vec![0.0; 64];
    all[..values.len()].copy_from_slice(values);
    let tensors = Tensors::from([("norm.weight".to_string(), TensorData::new(all, [64]))]);
    Gradient::from_tensors(tensors, order, &Device::flex()).unwrap()
}

fn values(gradient: &Gradient, count: usize) -> Vec<f32> {
    let data = gradient.to_tensors().remove("norm.weight").unwrap();
    data.iter::<f32>().take(count).collect()
}

/// Weighted least squares in f64: the line through the values at t = -n + 1..=0, at t = 1.
fn extrapolated(history: &[f64]) -> f64 {
    let count = history.len();
    let (mut n, mut t1, mut t2, mut g0, mut g1) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for (place, value) in history.iter().enumerate() {
        let age = (count - 1 - place) as f64;
        let (weight, t) = (AGE.powf(age), -age);
        n += weight;
        t1 += weight * t;
        t2 += weight * t * t;
        g0 += weight * value;
        g1 += weight * t * value;
    }
    let determinant = n * t2 - t1 * t1;
    if determinant < 1e-9 {
        return g0 / n;
    }
    let slope = (n * g1 - t1 * g0) / determinant;
    (g0 - slope * t1) / n + slope
}

#[test]
fn p2_least_squares_continue_the_line_through_the_last_gradients() {
    let order = Arc::new(ParameterOrder::of(&model()));
    let mut fit = Fit::default();
    let mut histories = [Vec::new(), Vec::new(), Vec::new()];
    for step in 0..12 {
        let t = f64::from(step);
        // A line, a curve, and something without order.
        let new = [
            3.0 - 0.5 * t,
            (t * 0.7).sin(),
            ((step * 7919) % 13) as f64 - 6.0,
        ];
        let sent: Vec<f32> = new.iter().map(|&value| value as f32).collect();
        fit.take(&gradient(&order, &sent));
        for (history, value) in histories.iter_mut().zip(new) {
            history.push(value);
        }
        let found = values(&fit.next().unwrap(), 3);
        for (found, history) in found.iter().zip(&histories) {
            let expected = extrapolated(history);
            let near = 1e-4 * (1.0 + expected.abs());
            assert!(
                (f64::from(*found) - expected).abs() < near,
                "{found} {expected}"
            );
        }
        if step > 0 {
            let line = 3.0 - 0.5 * (t + 1.0);
            assert!((f64::from(found[0]) - line).abs() < 1e-3, "{found:?}");
        }
    }
}

#[test]
fn p2_momentum_is_the_mean_of_the_last_gradients() {
    let order = Arc::new(ParameterOrder::of(&model()));
    let mut predictor = Predictor::new(PredictConfig::default());
    let mut mean = 0.0;
    for step in 0..6 {
        let value = 1.0 + f64::from(step);
        mean = if step == 0 {
            value
        } else {
            0.9 * mean + 0.1 * value
        };
        predictor.take_gradient(&gradient(&order, &[value as f32]));
    }
    let found = values(&predictor.gradient().unwrap(), 1)[0];
    assert!((f64::from(found) - mean).abs() < 1e-5, "{found} {mean}");
}

#[test]
fn p2_weights_are_predicted_from_the_mean_step_of_the_cycle() {
    let mut predictor = Predictor::new(PredictConfig {
        method: PredictMethod::Weights,
        ..PredictConfig::default()
    });
    let mut model = model();
    let order = Arc::new(ParameterOrder::of(&model));
    for step in [0.25, 0.5] {
        let before = Gradient::of_weights(&model, &order);
        model = gradient(&order, &[step, -step]).added_to(model);
        predictor.take_weights(before, &model);
    }
    let moved = predictor.displacement(&model).unwrap();
    assert_eq!(values(&moved, 3), [0.375, -0.375, 0.0]);
}

#[test]
fn p2_roles_follow_the_cycle_and_a_bad_cosine_turns_prediction_off() {
    let order = Arc::new(ParameterOrder::of(&model()));
    let mut predictor = Predictor::new(PredictConfig {
        every: 3,
        ..PredictConfig::default()
    });
    let roles = |predictor: &Predictor| {
        (0..7)
            .map(|place| predictor.role(place))
            .collect::<Vec<_>>()
    };
    use Role::{Correct, Full, Predict};
    // Nothing is predicted before the first comparison.
    assert_eq!(
        roles(&predictor),
        [Full, Full, Full, Correct, Full, Full, Correct]
    );
    predictor.take_gradient(&gradient(&order, &[1.0, 1.0]));
    predictor.begin(Correct);
    predictor.take_gradient(&gradient(&order, &[1.0, 0.8]));
    assert!(predictor.cosine().unwrap() > 0.9);
    assert_eq!(
        roles(&predictor),
        [Full, Full, Predict, Correct, Full, Predict, Correct]
    );
    predictor.take_gradient(&gradient(&order, &[-1.0, 0.0]));
    assert!(predictor.is_off() && predictor.gradient().is_none());
    assert_eq!(roles(&predictor), [Full; 7]);
    assert!(matches!(predictor.take_turned_off(), Some(TurnedOff::Cosine(cosine)) if cosine < 0.0));
    assert!(predictor.take_turned_off().is_none());
}

#[test]
fn p2_rejections_in_a_row_turn_prediction_off() {
    let mut predictor = Predictor::new(PredictConfig::default());
    for is_kept in [false, false, true, false, false] {
        predictor.count(is_kept);
        assert!(!predictor.is_off());
    }
    predictor.count(false);
    assert!(predictor.is_off());
    assert_eq!(predictor.counts(), [1, 5]);
}

#[test]
fn p2_the_saved_state_predicts_the_same() {
    let model = model();
    let order = Arc::new(ParameterOrder::of(&model));
    for method in [PredictMethod::Momentum, PredictMethod::LeastSquares] {
        let config = PredictConfig {
            method,
            ..PredictConfig::default()
        };
        let mut saved = Predictor::new(config);
        for value in [1.0, 1.5, 1.25] {
            saved.take_gradient(&gradient(&order, &[value, 2.0]));
        }
        saved.take_loss(2.5);
        saved.count(false);
        let mut restored = Predictor::new(config);
        restored
            .load(&saved.state(), &model, &Device::flex())
            .unwrap();
        let predicted = |predictor: &Predictor| values(&predictor.gradient().unwrap(), 64);
        assert_eq!(predicted(&saved), predicted(&restored));
        assert_eq!(saved.state(), restored.state());
        let mut torn = saved.state();
        torn.scalars.remove("kept");
        assert!(restored.load(&torn, &model, &Device::flex()).is_err());
    }
}
