//! Parquet files, with the Cargo feature `parquet`.

use super::DataError;
use super::files::FileRecord;
use super::records::Take;

/// Reads a file's rows as records, numbered from 1.
#[cfg(feature = "parquet")]
pub(super) fn read(file: &FileRecord, take: &mut Take) -> Result<(), DataError> {
    use ::parquet::file::reader::{FileReader, SerializedFileReader};

    let invalid = |error: ::parquet::errors::ParquetError| DataError::Parquet {
        path: file.path.clone(),
        reason: error.to_string(),
    };
    if FileRecord::survey(&file.path)? != *file {
        return Err(DataError::Changed {
            path: file.path.clone(),
        });
    }
    let opened = std::fs::File::open(&file.path).map_err(|source| DataError::Unreadable {
        path: file.path.clone(),
        source,
    })?;
    let reader = SerializedFileReader::new(opened).map_err(invalid)?;
    for (index, row) in reader.get_row_iter(None).map_err(invalid)?.enumerate() {
        let row = row.map_err(invalid)?.to_json_value();
        if let serde_json::Value::Object(fields) = row {
            take(fields, index + 1)?;
        }
    }
    Ok(())
}

/// Says which feature is missing.
#[cfg(not(feature = "parquet"))]
pub(super) fn read(file: &FileRecord, _take: &mut Take) -> Result<(), DataError> {
    Err(DataError::ParquetNotCompiledIn {
        path: file.path.clone(),
    })
}
