//! Blockwise codes of a real model.
#![allow(missing_docs)]

use firebrick_kernels::blockwise::{BlockwiseShape, Format, Scales, quantise};
use safetensors::SafeTensors;

/// Q1: BLAKE3 of codes and absmax, since the bytes themselves are the model's, and larger than what belongs into a
/// repository. kernels/tests/data/peer_codes.py has written them with bitsandbytes.
#[test]
#[ignore = "needs FIREBRICK_DATA"]
fn q1_codes_of_stories260k_are_those_of_bitsandbytes() {
    let folder = std::env::var_os("FIREBRICK_DATA").expect("FIREBRICK_DATA is not set");
    let file = std::path::Path::new(&folder).join("stories260K/hf/model.safetensors");
    let bytes = std::fs::read(file).unwrap();
    let model = SafeTensors::deserialize(&bytes).unwrap();
    let lines = include_str!("../kernels/tests/data/stories260K.txt").lines();
    let mut matrices = 0;
    for line in lines {
        let [name, format, expected] = line.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{line}");
        };
        let tensor = model.tensor(name).unwrap();
        let weights: Vec<f32> = (tensor.data().as_chunks::<4>().0.iter())
            .map(|&bytes| f32::from_le_bytes(bytes))
            .collect();
        let shape = BlockwiseShape {
            rows: tensor.shape()[0],
            cols: tensor.shape()[1],
            format: Format::from_name(format).unwrap(),
            block: 64,
            double: false,
        };
        let quantised = quantise(&weights, shape).unwrap();
        let Scales::Single(scales) = quantised.scales() else {
            panic!("single scales were asked for");
        };
        let mut hash = blake3::Hasher::new();
        hash.update(quantised.codes());
        scales.iter().for_each(|scale| {
            hash.update(&scale.to_le_bytes());
        });
        assert_eq!(
            hash.finalize().to_hex().as_str(),
            expected,
            "{name} {format}"
        );
        matrices += 1;
    }
    assert!(matrices > 60, "{matrices}");
}
