//! R1: nothing that can be written makes the reader panic.

use firebrick::cli::report::render_config;
use proptest::prelude::*;

use crate::{MINIMAL, resolve};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn r1_no_text_panics(text in "(?s).{0,200}", set in "(?s).{0,40}") {
        if let Err(error) = resolve(&text, &[&set]) {
            prop_assert!(!render_config(&error, true).is_empty());
        }
    }

    /// TOML-like text, with the format's own words in the wrong places.
    #[test]
    fn r1_no_arrangement_of_our_words_panics(
        words in proptest::collection::vec(proptest::sample::select(WORDS), 0..60),
    ) {
        let text = words.concat();
        if let Err(error) = resolve(&text, &[&text]) {
            prop_assert!(!render_config(&error, false).is_empty());
        }
    }

    #[test]
    fn r1_no_toml_value_panics(key in "[a-z_]{1,12}(\\.[a-z_]{1,12}){0,3}", value in value()) {
        let set = format!("{key}={value}");
        if let Err(error) = resolve(MINIMAL, &[&set]) {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}

const WORDS: &[&str] = &[
    "[",
    "]",
    "[[",
    "]]",
    "{",
    "}",
    "=",
    ".",
    ",",
    "\n",
    "\n",
    " ",
    "\"",
    "'",
    "\"\"\"",
    "#",
    "\r",
    "model",
    "train",
    "data",
    "datasets",
    "data.datasets",
    "path",
    "type",
    "fields",
    "optimizer",
    "name",
    "betas",
    "adamw",
    "\"adamw\"",
    "0",
    "1",
    "-1",
    "1.5",
    "nan",
    "1e999",
    "true",
    "ö",
    "1979-05-27",
    "\n[model]\n",
    "\n[[data.datasets]]\n",
    "preset = \"gpt2\"\n",
    "max_steps = 1\n",
];

/// Any TOML value, nested.
fn value() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        any::<i64>().prop_map(|number| number.to_string()),
        any::<f64>().prop_map(|number| format!("{number:?}").to_lowercase()),
        any::<bool>().prop_map(|truth| truth.to_string()),
        "\\PC{0,12}".prop_map(|text| toml::Value::from(text).to_string()),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4)
                .prop_map(|items| format!("[{}]", items.join(", "))),
            ("[a-z_]{1,8}", inner).prop_map(|(key, value)| format!("{{ {key} = {value} }}")),
        ]
    })
}
