//! The examples do what they say.
#![allow(missing_docs)]

#[allow(dead_code)]
#[path = "../examples/custom_loop.rs"]
mod custom_loop;

#[test]
fn custom_loop_learns() {
    let (_, losses) = custom_loop::train(40, 20).unwrap();
    assert_eq!(losses.len(), 3);
    assert!(losses[2] < losses[0] - 1.0, "{losses:?}");
}

#[allow(dead_code)]
#[path = "../examples/custom_adapter.rs"]
mod custom_adapter;

#[test]
fn a11_custom_adapter_learns_mixes_and_merges() {
    let losses = custom_adapter::run(30).unwrap();
    let [base, river, read, merged, clock, mixed] = losses[..] else {
        panic!("{losses:?}");
    };
    assert!(river.1 < base.1 - 0.5, "{losses:?}");
    assert!(
        (river.1 - read.1).abs() < 1e-4 && (river.1 - merged.1).abs() < 1e-4,
        "{losses:?}"
    );
    assert!(river.1 < mixed.1 && mixed.1 < clock.1, "{losses:?}");
}
