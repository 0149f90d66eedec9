//! Rows in memory: token ids one after another, and an index.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Place;
use super::encode::EncodedRow;
use crate::data::TokenStream;

/// Rows of token ids, each with the parts of it that are trained. Cheap to clone.
#[derive(Debug, Clone)]
pub struct RowSet {
    tokens: TokenStream,
    /// Trained ranges of all rows, as start and end within the row.
    spans: TokenStream,
    index: Arc<[Entry]>,
    files: Arc<[PathBuf]>,
}

#[derive(Debug, Clone)]
struct Entry {
    /// First token.
    start: usize,
    tokens: u32,
    /// First number of its ranges.
    spans: usize,
    span_count: u32,
    file: u32,
    line: u32,
}

impl RowSet {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Token ids of a row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn tokens(&self, row: usize) -> Vec<u32> {
        let entry = &self.index[row];
        let range = entry.start..entry.start + entry.tokens as usize;
        self.tokens.ids(range).collect()
    }

    /// Ranges of a row's tokens that are trained, in order.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn trained(&self, row: usize) -> Vec<Range<usize>> {
        let entry = &self.index[row];
        let numbers = entry.spans..entry.spans + 2 * entry.span_count as usize;
        let numbers: Vec<usize> = self.spans.ids(numbers).map(|n| n as usize).collect();
        numbers
            .chunks_exact(2)
            .map(|span| span[0]..span[1])
            .collect()
    }

    /// Places of a sequence that a row takes: every token but the last is an input, every token but
    /// the first a target.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn places(&self, row: usize) -> usize {
        (self.index[row].tokens as usize).saturating_sub(1)
    }

    /// Predictions of a row that count: its trained tokens but the first, which is given.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn targets(&self, row: usize) -> usize {
        let spans = self.trained(row);
        spans
            .into_iter()
            .map(|span| span.end - span.start.max(1))
            .sum()
    }

    /// Where a row comes from.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn place(&self, row: usize) -> Place {
        let entry = &self.index[row];
        let path = self.files.get(entry.file as usize);
        Place {
            path: path.map_or_else(PathBuf::new, |path| path.to_path_buf()),
            line: entry.line as usize,
        }
    }

    /// Tokens of all rows.
    pub fn token_count(&self) -> u64 {
        self.tokens.len() as u64
    }

    /// Predictions of all rows that count.
    pub fn target_count(&self) -> u64 {
        (0..self.len()).map(|row| self.targets(row) as u64).sum()
    }

    /// Bytes that the rows take, in memory or mapped into it.
    pub fn bytes(&self) -> u64 {
        let streams = [&self.tokens, &self.spans];
        let streams = streams.map(|stream| stream.len() * stream.width().bytes());
        (streams.iter().sum::<usize>() + size_of_val(&*self.index)) as u64
    }

    /// The rows of the streams that [`RowSetBuilder::streams`] has made; none if they do not fit
    /// together.
    pub(super) fn from_streams(
        streams: &mut HashMap<String, TokenStream>,
        name: &str,
        files: Arc<[PathBuf]>,
    ) -> Option<Self> {
        let mut take = |part: &str| streams.remove(&format!("{name}.{part}"));
        let (tokens, spans, rows) = (take(TOKENS)?, take(SPANS)?, take(ROWS)?);
        let numbers: Vec<u32> = rows.iter().collect();
        let (mut start, mut first) = (0, 0);
        let mut index = Vec::with_capacity(numbers.len() / NUMBERS);
        for row in numbers.chunks_exact(NUMBERS) {
            let entry = Entry {
                start,
                tokens: row[0],
                spans: first,
                span_count: row[1],
                file: row[2],
                line: row[3],
            };
            start += row[0] as usize;
            first += 2 * row[1] as usize;
            index.push(entry);
        }
        (start == tokens.len() && first == spans.len()).then(|| Self {
            tokens,
            spans,
            index: index.into(),
            files,
        })
    }
}

const TOKENS: &str = "tokens";
const SPANS: &str = "spans";
const ROWS: &str = "rows";
/// Numbers of a row in the stream [`ROWS`]: tokens, ranges, file, line.
const NUMBERS: usize = 4;

/// Collects rows.
#[derive(Debug, Default)]
pub(super) struct RowSetBuilder {
    tokens: Vec<u32>,
    spans: Vec<u32>,
    rows: Vec<u32>,
}

impl RowSetBuilder {
    /// Adds a row of the file number `file`. Rows are shorter than 2^32 tokens and lines: a
    /// sequence is at most 2^24.
    pub(super) fn push(&mut self, row: &EncodedRow, file: usize, line: usize) {
        self.tokens.extend(&row.ids);
        let ends = row.trained.iter().flat_map(|span| [span.start, span.end]);
        self.spans.extend(ends.map(|end| end as u32));
        let line = u32::try_from(line).unwrap_or(u32::MAX);
        self.rows.extend([
            row.ids.len() as u32,
            row.trained.len() as u32,
            file as u32,
            line,
        ]);
    }

    /// The rows as streams of numbers, for the cache.
    pub(super) fn streams(self, name: &str, vocab_size: usize) -> [(String, TokenStream); 3] {
        let wide = usize::MAX;
        let stream = |part: &str, numbers: &[u32], size| {
            (
                format!("{name}.{part}"),
                TokenStream::from_ids(numbers, size),
            )
        };
        [
            stream(TOKENS, &self.tokens, vocab_size),
            stream(SPANS, &self.spans, wide),
            stream(ROWS, &self.rows, wide),
        ]
    }
}

/// A path that messages name a file by.
pub(super) fn file_paths<'a>(paths: impl Iterator<Item = &'a Path>) -> Arc<[PathBuf]> {
    paths.map(Path::to_path_buf).collect()
}
