//! Packed weights: bytes that are no trits, layouts that lie.

use firebrick::config::{Granularity, PackedLayout, Ternary};
use serde_json::{Value, json};

use super::{Model, runner};

const FILE: &str = "model.safetensors";
const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

fn packed(layout: PackedLayout) -> Model {
    Model::packed(Ternary {
        granularity: Granularity::Tensor,
        rounds_activations: true,
        packed: Some(layout),
    })
}

/// Where a tensor's bytes are in the file.
fn place(bytes: &[u8], name: &str) -> std::ops::Range<usize> {
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let offsets = json[name]["data_offsets"].as_array().unwrap();
    let at = |i: usize| 8 + header + offsets[i].as_u64().unwrap() as usize;
    at(0)..at(1)
}

#[test]
fn t2_bytes_that_are_no_trits_are_refused_wherever_they_are() {
    for layout in [PackedLayout::Compute, PackedLayout::Storage] {
        let model = packed(layout);
        model.load("as it was").unwrap();
        let good = model.read(FILE);
        let place = place(&good, DOWN);
        for at in [place.start, (place.start + place.end) / 2, place.end - 1] {
            let mut bad = good.clone();
            bad[at] = 0xff;
            model.write(FILE, &bad);
            model.refused(&[DOWN]);
        }
    }
}

#[test]
fn t2_weights_in_the_padding_are_refused() {
    // 40 inputs are two and a half blocks: the last bytes belong to columns that do not exist.
    let model = packed(PackedLayout::Compute);
    let mut bytes = model.read(FILE);
    let place = place(&bytes, DOWN);
    bytes[place.end - 1] = 0b10_01_01_01;
    model.write(FILE, &bytes);
    model.refused(&[DOWN, "padding"]);
}

#[test]
fn t2_a_config_that_names_another_layout_is_refused() {
    let cases = [
        ("ternary-1.6bit", "ternary-2bit-16x16, config.json says"),
        ("ternary-9bit", "quantization_config.layout"),
    ];
    for (layout, named) in cases {
        let model = packed(PackedLayout::Compute);
        let mut config: Value = serde_json::from_slice(&model.read("config.json")).unwrap();
        config["quantization_config"]["layout"] = json!(layout);
        model.write("config.json", config.to_string());
        let error = model.load(layout).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    // Packed weights under a config that says they are latent, and the other way round.
    let model = packed(PackedLayout::Compute);
    let mut config: Value = serde_json::from_slice(&model.read("config.json")).unwrap();
    let object = config["quantization_config"].as_object_mut().unwrap();
    object.remove("layout");
    model.write("config.json", config.to_string());
    model.refused(&["config.json says none"]);
}

#[test]
fn t2_a_header_that_names_another_layout_is_refused() {
    let model = packed(PackedLayout::Compute);
    let bytes = model.read(FILE);
    let (found, other) = ("ternary-2bit-16x16", "ternary-1.6bit----");
    let at = bytes
        .windows(found.len())
        .position(|w| w == found.as_bytes());
    let at = at.expect("the layout is named in the header");
    let mut lying = bytes.clone();
    lying[at..at + found.len()].copy_from_slice(other.as_bytes());
    model.write(FILE, &lying);
    model.refused(&[other, found]);
}

#[test]
fn t2_a_negative_scale_is_refused() {
    let model = packed(PackedLayout::Compute);
    let mut bytes = model.read(FILE);
    let name = format!("{DOWN}_scale");
    let place = place(&bytes, &name);
    bytes[place].copy_from_slice(&(-0.5f32).to_le_bytes());
    model.write(FILE, &bytes);
    model.refused(&[&name, "negative"]);
}

#[test]
fn t2_unknown_fields_of_our_own_method_are_refused() {
    let model = packed(PackedLayout::Compute);
    let mut config: Value = serde_json::from_slice(&model.read("config.json")).unwrap();
    config["quantization_config"]["codebook"] = json!(3);
    model.write("config.json", config.to_string());
    model.refused(&["quantization_config.codebook"]);
}

#[test]
fn t2_a_scale_that_is_not_a_number_is_found_when_it_is_used() {
    let model = packed(PackedLayout::Compute);
    let mut bytes = model.read(FILE);
    let place = place(&bytes, &format!("{DOWN}_scale"));
    bytes[place].copy_from_slice(&f32::NAN.to_le_bytes());
    model.write(FILE, &bytes);
    model.load("a scale that is NaN").unwrap();
    let path = model.path("");
    let out = model.path("l.safetensors");
    let arguments = [
        "logits",
        "--model",
        path.to_str().unwrap(),
        "--tokens",
        "1,2",
        "--out",
        out.to_str().unwrap(),
    ];
    let (code, said) = runner(&path, &arguments);
    assert_ne!(code, 0, "{said}");
    assert!(said.contains("finite"), "{said}");
}

#[test]
fn t2_a_cut_file_is_refused_at_every_length() {
    for layout in [PackedLayout::Compute, PackedLayout::Storage] {
        let model = packed(layout);
        let whole = model.read(FILE);
        for length in (0..whole.len()).filter(|n| n % 97 == 0) {
            model.write(FILE, &whole[..length]);
            model.refused(&[FILE]);
        }
    }
}
