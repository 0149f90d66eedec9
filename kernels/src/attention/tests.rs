//! Every path against the scalar reference, on odd sizes.

use proptest::prelude::*;

use super::{AttentionShape, Operands, cpu, reference};
use crate::panel::Path;
use crate::samples::{Random, paths};

/// Values that an [`Operands`] is a view of.
#[derive(Debug, Clone)]
struct Case {
    shape: AttentionShape,
    qkv: [Vec<f32>; 3],
    upstream: Vec<f32>,
    angles: Vec<f32>,
    spans: Vec<i32>,
}

/// What spans are like.
#[derive(Debug, Clone, Copy)]
enum Sight {
    Causal,
    Window(usize),
    Packed,
    Any,
}

impl Case {
    fn new(shape: AttentionShape, seq: usize, sight: Sight, turned: bool, seed: u64) -> Self {
        let mut random = Random(seed | 1);
        let tokens = shape.rows * seq;
        let spans = (0..tokens).flat_map(|i| {
            let token = i % seq;
            let [start, end] = match sight {
                Sight::Causal => [0, token + 1],
                Sight::Window(width) => [(token + 1).saturating_sub(width), token + 1],
                Sight::Packed => [token / 37 * 37, token + 1],
                // Some see nothing, some what comes after them.
                Sight::Any => [random.bits() % seq, random.bits() % (seq + 1)],
            };
            [start as i32, end as i32]
        });
        let spans = spans.collect();
        let angles = (0..if turned { tokens } else { 0 }).flat_map(|_| {
            let angles = random.values(shape.head_dim / 2, 3.0);
            let cosines: Vec<f32> = angles.iter().map(|angle| angle.cos()).collect();
            let sines = angles.into_iter().map(f32::sin);
            cosines.into_iter().chain(sines)
        });
        let angles = angles.collect();
        Self {
            shape,
            qkv: [shape.width(), shape.kv_width(), shape.kv_width()]
                .map(|width| random.values(tokens * width, 2.0)),
            upstream: random.values(tokens * shape.width(), 1.0),
            angles,
            spans,
        }
    }

    fn operands(&self) -> Operands<'_> {
        let [q, k, v] = self.qkv.each_ref().map(Vec::as_slice);
        Operands {
            q,
            k,
            v,
            angles: &self.angles,
            spans: &self.spans,
            shape: self.shape,
        }
    }

    fn forward(&self, path: Path) -> Vec<f32> {
        let mut out = vec![0.0; self.qkv[0].len()];
        cpu::forward(path, &self.operands(), &mut out);
        out
    }

    fn backward(&self, path: Path) -> [Vec<f32>; 3] {
        let mut gradients = self.qkv.each_ref().map(|x| vec![0.0; x.len()]);
        let places = gradients.each_mut().map(Vec::as_mut_slice);
        cpu::backward(path, &self.operands(), &self.upstream, places);
        gradients
    }
}

fn assert_close(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        let error = (a - b).abs();
        assert!(
            error <= 2e-5 * (1.0 + b.abs()),
            "{what} {i}: {a} instead of {b}"
        );
    }
}

fn check(case: &Case) {
    let forward = reference::forward(&case.operands());
    let [dq, dk, dv] = reference::backward(&case.operands(), &case.upstream);
    for path in paths() {
        assert_close(&format!("{path:?} o"), &case.forward(path), &forward);
        let [q, k, v] = case.backward(path);
        assert_close(&format!("{path:?} dq"), &q, &dq);
        assert_close(&format!("{path:?} dk"), &k, &dk);
        assert_close(&format!("{path:?} dv"), &v, &dv);
    }
}

fn shape() -> impl Strategy<Value = AttentionShape> {
    let head_dim = prop::sample::select(vec![2, 6, 8, 16, 24, 32, 48, 64, 80, 128, 130, 256]);
    (1usize..=2, 1usize..=3, 1usize..=3, head_dim).prop_map(|(rows, kv_heads, group, head_dim)| {
        AttentionShape {
            rows,
            heads: kv_heads * group,
            kv_heads,
            head_dim,
        }
    })
}

fn sight() -> impl Strategy<Value = Sight> {
    prop_oneof![
        Just(Sight::Causal),
        (1usize..200).prop_map(Sight::Window),
        Just(Sight::Packed),
        Just(Sight::Any),
    ]
}

/// Without positions, heads may be of an odd width.
#[test]
fn f2_attention_of_odd_heads() {
    for head_dim in [1, 7, 33] {
        let shape = AttentionShape {
            rows: 2,
            heads: 2,
            kv_heads: 2,
            head_dim,
        };
        check(&Case::new(shape, 70, Sight::Causal, false, 3));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn f2_attention_equals_the_reference(
        shape in shape(),
        seq in 1usize..=150,
        sight in sight(),
        turned in any::<bool>(),
        seed in any::<u64>(),
    ) {
        check(&Case::new(shape, seq, sight, turned, seed));
    }
}

/// More keys than two pieces, more queries than a block.
#[test]
fn f2_attention_over_several_pieces_of_keys() {
    let shape = AttentionShape {
        rows: 2,
        heads: 2,
        kv_heads: 1,
        head_dim: 16,
    };
    for sight in [Sight::Causal, Sight::Window(150), Sight::Packed, Sight::Any] {
        check(&Case::new(shape, 301, sight, true, 7));
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let shape = AttentionShape {
        rows: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
    };
    let case = Case::new(shape, 130, Sight::Causal, true, 3);
    let bits = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let run = || (case.forward(Path::detect()), case.backward(Path::detect()));
        let (out, gradients) = pool.build().unwrap().install(run);
        let values = out.into_iter().chain(gradients.into_iter().flatten());
        values.map(f32::to_bits).collect::<Vec<_>>()
    };
    assert_eq!(bits(1), bits(3));
}

/// Queries at zero, where all keys are alike: what comes out is their mean.
#[test]
fn queries_of_zero_see_the_mean() {
    let shape = AttentionShape {
        rows: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 2,
    };
    let mut case = Case::new(shape, 3, Sight::Causal, false, 1);
    case.qkv[0].fill(0.0);
    case.qkv[2] = vec![1.0, 10.0, 2.0, 20.0, 6.0, 60.0];
    for path in paths() {
        assert_close("o", &case.forward(path), &[1.0, 10.0, 1.5, 15.0, 3.0, 30.0]);
    }
}

/// Queries that see the same are weighed together: a value spreads among them, and a key does not.
#[test]
fn a_key_that_is_not_a_number_stays_with_those_who_see_it_and_a_value_reaches_them() {
    let shape = AttentionShape {
        rows: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 8,
    };
    let mut case = Case::new(shape, 40, Sight::Packed, true, 1);
    case.qkv[1][38 * 8] = f32::NAN;
    for path in paths() {
        let out = case.forward(path);
        assert!(out[..38 * 8].iter().all(|o| o.is_finite()));
        assert!(out[38 * 8..].iter().all(|o| o.is_nan()));
    }
    let mut case = Case::new(shape, 40, Sight::Packed, true, 1);
    case.qkv[2][38 * 8] = f32::NAN;
    for path in paths() {
        let out = case.forward(path);
        assert!(out[38 * 8..].chunks(8).all(|o| o[0].is_nan()));
    }
}

/// One table for all rows is as good as the same for each.
#[test]
fn rows_share_tables() {
    let shape = AttentionShape {
        rows: 3,
        heads: 2,
        kv_heads: 1,
        head_dim: 6,
    };
    let seq = 45;
    let mut apart = Case::new(shape, seq, Sight::Window(20), true, 9);
    let mut shared = apart.clone();
    shared.spans.truncate(2 * seq);
    shared.angles.truncate(seq * shape.head_dim);
    apart.spans = shared.spans.repeat(shape.rows);
    apart.angles = shared.angles.repeat(shape.rows);
    check(&apart);
    for path in paths() {
        assert_eq!(shared.forward(path), apart.forward(path));
        assert_eq!(shared.backward(path), apart.backward(path));
    }
}
