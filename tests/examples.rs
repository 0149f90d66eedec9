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
