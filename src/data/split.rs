//! Training and validation parts of a dataset.
//!
//! The validation part is the tail: of plain text the last characters, of records the last
//! rows. The cut is where nanoGPT makes it, `data[:int(n * (1 - val_fraction))]`, in characters
//! and in floating point, so that losses on the same file can be compared. It is made before
//! anything is tokenised: a tokenizer trained on the training part has not seen the rest.

use super::documents::{Documents, Format};

/// A dataset's documents on either side of the cut.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Split {
    /// Documents to train on.
    pub(super) train: Vec<String>,
    /// Documents to validate on.
    pub(super) val: Vec<String>,
}

/// Cuts a dataset's documents. Text files and records in one dataset are cut each by its own
/// measure. A cut inside a document makes two documents.
pub(super) fn split(files: Vec<(Format, Documents)>, val_fraction: f64) -> Split {
    let texts = |format| {
        let wanted = move |(f, _): &&(Format, Documents)| *f == format;
        files
            .iter()
            .filter(wanted)
            .flat_map(|(_, documents)| &documents.texts)
    };
    let characters: usize = texts(Format::Text).map(|text| text.chars().count()).sum();
    let rows = texts(Format::Records).count();
    let mut characters_left = train_share(characters, val_fraction);
    let mut rows_left = train_share(rows, val_fraction);

    let mut result = Split::default();
    for (format, documents) in files {
        for mut text in documents.texts {
            match format {
                Format::Records if rows_left > 0 => {
                    rows_left -= 1;
                    result.train.push(text);
                }
                Format::Records => result.val.push(text),
                Format::Text => {
                    let tail = cut(&mut text, &mut characters_left);
                    result
                        .train
                        .extend(Some(text).filter(|text| !text.is_empty()));
                    result
                        .val
                        .extend(Some(tail).filter(|tail| !tail.is_empty()));
                }
            }
        }
    }
    result
}

/// `int(n * (1 - val_fraction))`.
pub(super) fn train_share(n: usize, val_fraction: f64) -> usize {
    (n as f64 * (1.0 - val_fraction)) as usize
}

/// Leaves the first `left` characters in `text` and returns the others.
fn cut(text: &mut String, left: &mut usize) -> String {
    let mut taken = 0;
    let mut at = text.len();
    for (position, _) in text.char_indices() {
        if taken == *left {
            at = position;
            break;
        }
        taken += 1;
    }
    *left -= taken;
    text.split_off(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(format: Format, texts: &[&str]) -> (Format, Documents) {
        let texts = texts.iter().map(|text| text.to_string()).collect();
        (
            format,
            Documents {
                texts,
                ..Documents::default()
            },
        )
    }

    #[test]
    fn r3_text_is_cut_by_characters_not_bytes() {
        let files = vec![
            documents(Format::Text, &["ééé"]),
            documents(Format::Text, &["ééééééé"]),
        ];
        let parts = split(files, 0.1);
        assert_eq!(parts.train, ["ééé", "éééééé"]);
        assert_eq!(parts.val, ["é"]);
    }

    #[test]
    fn r3_the_cut_is_nanogpts() {
        assert_eq!(train_share(1_115_394, 0.1), 1_003_854);
        assert_eq!(train_share(10, 0.0), 10);
    }

    #[test]
    fn r3_records_are_cut_by_row() {
        let files = vec![
            documents(Format::Records, &["a", "b", "c", "d"]),
            documents(Format::Text, &["0123456789"]),
            documents(Format::Records, &["e"]),
        ];
        let parts = split(files, 0.4);
        assert_eq!(parts.train, ["a", "b", "c", "012345"]);
        assert_eq!(parts.val, ["d", "6789", "e"]);
    }

    #[test]
    fn r3_a_cut_at_a_document_end_makes_no_empty_document() {
        let parts = split(vec![documents(Format::Text, &["12345", "67890"])], 0.5);
        assert_eq!(parts.train, ["12345"]);
        assert_eq!(parts.val, ["67890"]);
    }
}
