//! A difference as a file: a valid safetensors file of U8 tensors, one a section, with the index as a string among its
//! metadata.
//!
//! safetensors allows no holes. Its header is filled up with spaces to a multiple of 64 bytes, and each section with zeros,
//! which count as its own: every section begins at a multiple of 64, to be mapped and read in place. A section is its
//! chunks, one after another, and the table of them: for each chunk its length, its CRC-32C and its codec.
//!
//! The header says nothing that does not follow from the index, whose BLAKE3 stands beside it; tables are covered by a
//! CRC in the index, chunks by the tables. A reader checks all of it, so that no changed bit goes unnoticed.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::index::{Index, Section};
use super::{Codec, DeltaError};
use crate::durable::{self, Draft};

const ALIGNMENT: u64 = 64;
/// Bytes before the header: its length.
const PREFIX: u64 = 8;
/// What safetensors allows a header.
const MOST_HEADER: u64 = 100_000_000;
const FORMAT: &str = "firebrick-delta";
/// Bytes of a row of a table of chunks.
pub(super) const ROW: usize = 12;

/// A chunk of a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row {
    pub length: u32,
    pub crc: u32,
    pub codec: Codec,
}

/// A file that is being written: sections first, the header at last, in the room that was left for it.
pub(super) struct Writer {
    draft: Draft,
    header: u64,
}

/// A section that is being written.
#[derive(Debug, Default)]
pub(super) struct OpenSection {
    bytes: u64,
    rows: Vec<Row>,
}

impl Writer {
    /// `longest` is an index whose text is no shorter than the one that will be.
    pub(super) fn create(path: &Path, longest: &Index) -> Result<Self, DeltaError> {
        let header = filled(header_text(longest, true).len() as u64);
        if header > MOST_HEADER {
            let message =
                format!("it needs a header of {header} bytes: safetensors allows {MOST_HEADER}");
            return Err(DeltaError::header(path, message));
        }
        let mut draft = Draft::create(path).map_err(DeltaError::io(path))?;
        draft.skip(PREFIX + header).map_err(DeltaError::io(path))?;
        Ok(Self { draft, header })
    }

    pub(super) fn chunk(
        &mut self,
        section: &mut OpenSection,
        codec: Codec,
        bytes: &[u8],
    ) -> Result<(), DeltaError> {
        section.bytes += bytes.len() as u64;
        section.rows.push(Row {
            length: bytes.len() as u32,
            crc: crc32c::crc32c(bytes),
            codec,
        });
        self.write(bytes)
    }

    /// Ends a section; one whose chunks are all the parent's takes no room, and is none.
    pub(super) fn end(
        &mut self,
        open: OpenSection,
        section: &mut Section,
    ) -> Result<bool, DeltaError> {
        if open.rows.iter().all(|row| row.codec == Codec::Same) {
            return Ok(false);
        }
        let mut table = Vec::with_capacity(open.rows.len() * ROW);
        let mut codecs = BTreeMap::new();
        for row in &open.rows {
            table.extend(row.length.to_le_bytes());
            table.extend(row.crc.to_le_bytes());
            table.extend([row.codec.id(), 0, 0, 0]);
            *codecs.entry(row.codec.name().to_string()).or_default() += 1;
        }
        section.bytes = open.bytes + table.len() as u64;
        section.table = crc32c::crc32c(&table);
        section.codecs = codecs;
        self.write(&table)?;
        let fill = filled(section.bytes) - section.bytes;
        self.write(&[0; ALIGNMENT as usize][..fill as usize])?;
        Ok(true)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), DeltaError> {
        let written = self.draft.write(bytes);
        written.map_err(DeltaError::io(self.draft.path()))
    }

    /// Writes the header and flushes all to the disk. Returns the file's length.
    pub(super) fn finish(self, index: &Index) -> Result<u64, DeltaError> {
        let path = self.draft.path().to_path_buf();
        let mut header = header_text(index, false).into_bytes();
        assert!(
            header.len() as u64 <= self.header,
            "a header longer than was foreseen"
        );
        header.resize(self.header as usize, b' ');
        let mut start = self.header.to_le_bytes().to_vec();
        start.append(&mut header);
        self.draft.finish(&start).map_err(DeltaError::io(path))
    }
}

fn filled(length: u64) -> u64 {
    length.next_multiple_of(ALIGNMENT)
}

/// The header that belongs to an index. `longest`: with every number as long as it can be.
fn header_text(index: &Index, longest: bool) -> String {
    #[derive(Serialize)]
    struct Metadata<'a> {
        format: &'a str,
        blake3: String,
        index: String,
    }
    #[derive(Serialize)]
    struct Tensor {
        dtype: &'static str,
        shape: [u64; 1],
        data_offsets: [u64; 2],
    }
    let index_text = json(index);
    let metadata = Metadata {
        format: FORMAT,
        blake3: blake3::hash(index_text.as_bytes()).to_hex().to_string(),
        index: index_text,
    };
    let mut text = format!("{{\"__metadata__\":{}", json(&metadata));
    let mut offset = 0;
    for section in &index.sections {
        let length = filled(section.bytes);
        let (start, end) = if longest {
            (length, length)
        } else {
            (offset, offset + length)
        };
        let tensor = Tensor {
            dtype: "U8",
            shape: [length],
            data_offsets: [start, end],
        };
        text += &format!(",{}:{}", json(&section.name), json(&tensor));
        offset = end;
    }
    text + "}"
}

/// An index is made of numbers, strings, lists and maps of strings.
fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("all of it has a text in JSON")
}

/// A file whose header and tables have been checked.
#[derive(Debug)]
pub(super) struct Reader {
    pub path: PathBuf,
    pub index: Index,
    file: File,
    /// Where each section begins, and its chunks: where they begin in it, and what the table says of them.
    sections: Vec<(u64, Vec<(u64, Row)>)>,
    pub length: u64,
}

impl Reader {
    pub(super) fn open(path: &Path) -> Result<Self, DeltaError> {
        let file = File::open(path).map_err(DeltaError::io(path))?;
        let length = file.metadata().map_err(DeltaError::io(path))?.len();
        let read = |at: u64, length: u64| -> Result<Vec<u8>, DeltaError> {
            let mut bytes = vec![0; length as usize];
            durable::read_at(&file, at, &mut bytes).map_err(DeltaError::io(path))?;
            Ok(bytes)
        };
        let wrong = |message: &str| DeltaError::header(path, message);
        if length < PREFIX {
            return Err(wrong("it is no difference: it is too short"));
        }
        let prefix = read(0, PREFIX)?;
        let header_length = prefix
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes));
        if header_length > MOST_HEADER || header_length > length - PREFIX {
            return Err(wrong(
                "it is no difference, or is cut short: its header is longer than the file",
            ));
        }
        let header = read(PREFIX, header_length)?;
        let index = read_index(&header).map_err(wrong)?;
        index.check(path)?;
        let text = header_text(&index, false);
        let fill = header.strip_prefix(text.as_bytes());
        let fill = fill.filter(|fill| fill.iter().all(|&byte| byte == b' '));
        if fill.is_none() || !header_length.is_multiple_of(ALIGNMENT) {
            return Err(wrong("it is damaged: its header is not that of its index"));
        }

        let mut sections = Vec::with_capacity(index.sections.len());
        let mut start = PREFIX + header_length;
        for section in &index.sections {
            let end = start.checked_add(filled(section.bytes));
            if end.is_none_or(|end| end > length) {
                return Err(wrong("it is cut short, or has sections longer than itself"));
            }
            let chunks = read_table(&read, start, section, &index)?;
            let chunks = chunks.ok_or_else(|| {
                let message = "the table of its chunks is damaged";
                DeltaError::tensor(path, &section.name, message)
            })?;
            sections.push((start, chunks));
            start += filled(section.bytes);
        }
        if start != length {
            return Err(wrong("it has bytes after its last section"));
        }
        Ok(Self {
            path: path.to_path_buf(),
            index,
            file,
            sections,
            length,
        })
    }

    /// A chunk of a section, checked against its CRC.
    pub(super) fn chunk(&self, section: usize, row: usize) -> Result<(Codec, Vec<u8>), DeltaError> {
        let (start, chunks) = &self.sections[section];
        let (at, row) = chunks[row];
        let mut bytes = vec![0; row.length as usize];
        durable::read_at(&self.file, start + at, &mut bytes).map_err(DeltaError::io(&self.path))?;
        if crc32c::crc32c(&bytes) != row.crc {
            let name = &self.index.sections[section].name;
            return Err(DeltaError::tensor(
                &self.path,
                name,
                "a chunk is damaged: its CRC is another",
            ));
        }
        Ok((row.codec, bytes))
    }
}

/// The chunks of a section that begins at `start`, none if its table is damaged.
fn read_table(
    read: &impl Fn(u64, u64) -> Result<Vec<u8>, DeltaError>,
    start: u64,
    section: &Section,
    index: &Index,
) -> Result<Option<Vec<(u64, Row)>>, DeltaError> {
    let (rows, longest) = index.chunks(section);
    let length = (rows as u64).saturating_mul(ROW as u64);
    let Some(table_at) = section.bytes.checked_sub(length) else {
        return Ok(None);
    };
    let bytes = read(
        start + table_at,
        length + filled(section.bytes) - section.bytes,
    )?;
    let (table, fill) = bytes.split_at(length as usize);
    if crc32c::crc32c(table) != section.table || fill.iter().any(|&byte| byte != 0) {
        return Ok(None);
    }
    let mut chunks = Vec::with_capacity(rows);
    let mut at = 0;
    for row in table.as_chunks::<ROW>().0 {
        let [l0, l1, l2, l3, c0, c1, c2, c3, codec, ..] = *row;
        let Some(codec) = Codec::of_id(codec) else {
            return Ok(None);
        };
        let row = Row {
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            crc: u32::from_le_bytes([c0, c1, c2, c3]),
            codec,
        };
        if row.length as usize > longest {
            return Ok(None);
        }
        chunks.push((at, row));
        at += u64::from(row.length);
    }
    Ok((at == table_at).then_some(chunks))
}

fn read_index(header: &[u8]) -> Result<Index, &'static str> {
    #[derive(serde::Deserialize)]
    struct Metadata {
        format: String,
        blake3: String,
        index: String,
    }
    #[derive(serde::Deserialize)]
    struct Header {
        #[serde(rename = "__metadata__")]
        metadata: Metadata,
    }
    let fill = header
        .iter()
        .rev()
        .take_while(|&&byte| byte == b' ')
        .count();
    let header: Header = serde_json::from_slice(&header[..header.len() - fill])
        .map_err(|_| "it is no difference, or its header is damaged")?;
    let Metadata {
        format,
        blake3,
        index,
    } = header.metadata;
    if format != FORMAT {
        return Err("it is a safetensors file, and no difference");
    }
    if blake3::hash(index.as_bytes()).to_hex().as_str() != blake3 {
        return Err("it is damaged: its index has another BLAKE3");
    }
    serde_json::from_str(&index).map_err(|_| "it has an index that this build does not understand")
}
