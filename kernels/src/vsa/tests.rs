use proptest::prelude::*;

use super::hypervector::HypervectorError;
use super::{Bundle, Hypervector, Seed, reference};

fn trits(len: usize) -> impl Strategy<Value = Vec<i8>> {
    prop::collection::vec(-1i8..=1, len)
}

/// Up to so many vectors of one length; odd ones, and both sides of a word.
fn vectors(most: usize) -> impl Strategy<Value = Vec<Vec<i8>>> {
    let lengths = prop_oneof![0usize..4, 60usize..70, 120usize..140, 500usize..700];
    lengths.prop_flat_map(move |len| prop::collection::vec(trits(len), 2..=most))
}

fn vector(trits: &[i8]) -> Hypervector {
    Hypervector::from_trits(trits).expect("trits")
}

/// The planes are those of a hypervector: disjoint, without padding.
fn checked(vector: Hypervector) -> Hypervector {
    let (plus, minus) = vector.planes();
    Hypervector::from_planes(vector.len(), plus.to_vec(), minus.to_vec()).expect("valid planes")
}

proptest! {
    #[test]
    fn t8_every_operation_is_the_references(pair in vectors(2), shift in -1000isize..1000) {
        let (a, b) = (&pair[0], &pair[1]);
        let (x, y) = (vector(a), vector(b));
        prop_assert_eq!(&x.to_trits(), a);
        prop_assert_eq!(checked(x.bind(&y)).to_trits(), reference::bind(a, b));
        prop_assert_eq!(checked(x.add_mod3(&y)).to_trits(), reference::add_mod3(a, b));
        prop_assert_eq!(checked(x.permute(shift)).to_trits(), reference::permute(a, shift));
        prop_assert_eq!(x.dot(&y), reference::dot(a, b));
        prop_assert_eq!(x.nonzeros() as i64, reference::dot(a, a));
        prop_assert_eq!(x.negate().dot(&y), -x.dot(&y));
    }

    #[test]
    fn t8_unbinding_gives_back_what_was_bound(pair in vectors(2), seed: u64, shift in -1000isize..1000) {
        let (a, b) = (vector(&pair[0]), vector(&pair[1]));
        prop_assert_eq!(checked(a.add_mod3(&b)).sub_mod3(&b), a.clone());
        prop_assert_eq!(checked(a.sub_mod3(&b)).add_mod3(&b), a.clone());
        let key = Hypervector::bipolar(a.len(), Seed::new(seed));
        prop_assert_eq!(a.bind(&key).unbind(&key), a.clone());
        prop_assert_eq!(a.permute(shift).permute(-shift), a);
    }

    #[test]
    fn t8_a_bundle_is_the_sum(vectors in vectors(20), split in 0usize..20) {
        let len = vectors[0].len();
        let all: Vec<Hypervector> = vectors.iter().map(|trits| vector(trits)).collect();
        let whole = Bundle::of(len, &all);
        let sums = reference::sums(len, &vectors);
        prop_assert_eq!(&whole.sums(), &sums);
        let signs: Vec<i8> = sums.iter().map(|sum| sum.signum() as i8).collect();
        prop_assert_eq!(checked(whole.majority()).to_trits(), signs);
        let split = split.min(all.len());
        let mut merged = Bundle::of(len, &all[..split]);
        merged.merge(&Bundle::of(len, &all[split..]));
        prop_assert_eq!(merged.vectors(), whole.vectors());
        prop_assert_eq!(merged.sums(), sums);
    }
}

#[test]
fn t8_random_vectors_follow_from_the_seed_alone() {
    let seed = Seed::new(7).with_name("layers.0.weight");
    let vector = Hypervector::bipolar(200, seed);
    assert_eq!(vector, Hypervector::bipolar(200, seed));
    assert_eq!(vector.nonzeros(), 200);
    // A longer vector begins with the same elements.
    let longer = checked(Hypervector::bipolar(1000, seed));
    assert_eq!(longer.to_trits()[..200], vector.to_trits());
    // These bits are the same on every machine.
    assert_eq!(vector.planes().0[0], 2_602_384_842_287_634_282);
}

#[test]
fn t8_sparse_vectors_have_their_density() {
    for density in [0.0, 0.05, 0.3, 0.5, 1.0] {
        let vector = checked(Hypervector::sparse(100_003, density, Seed::new(3)));
        let share = vector.nonzeros() as f64 / 100_003.0;
        // Five standard deviations.
        let tolerance = 5.0 * (density * (1.0 - density) / 1e5).sqrt();
        assert!(
            (share - density).abs() <= tolerance + 1e-5,
            "{share} of {density}"
        );
        let balance = vector.dot(&Hypervector::from_signs(&[1.0; 100_003]));
        assert!((balance as f64).abs() <= 5.0 * (density * 1e5).sqrt());
    }
}

#[test]
fn t8_random_vectors_are_nearly_orthogonal() {
    let random = |i| Hypervector::bipolar(10_000, Seed::new(1).with(i));
    for (a, b) in [(0, 1), (1, 2), (5, 100)] {
        let similarity = random(a).similarity(&random(b));
        assert!(similarity.abs() < 0.05, "{similarity}");
    }
    assert_eq!(random(3).similarity(&random(3)), 1.0);
    assert_eq!(random(3).similarity(&Hypervector::zeros(10_000)), 0.0);
}

#[test]
fn t8_what_is_no_hypervector_is_refused() {
    let of_planes = |len, plus, minus| Hypervector::from_planes(len, vec![plus], vec![minus]);
    assert_eq!(
        Hypervector::from_trits(&[0, 1, 2]),
        Err(HypervectorError::Trit { place: 2, value: 2 })
    );
    assert_eq!(
        of_planes(64, 0b110, 0b010),
        Err(HypervectorError::Overlap { place: 1 })
    );
    assert_eq!(
        of_planes(3, 0b1000, 0),
        Err(HypervectorError::Padding { place: 3, len: 3 })
    );
    assert_eq!(
        of_planes(65, 0, 0),
        Err(HypervectorError::Words {
            len: 65,
            expected: 2,
            found: 1
        })
    );
}

#[test]
#[should_panic(expected = "hypervectors of 3 and 4 elements")]
fn t8_lengths_have_to_agree() {
    let _ = Hypervector::zeros(3).bind(&Hypervector::zeros(4));
}
