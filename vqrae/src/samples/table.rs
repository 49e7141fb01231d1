//! A parquet file with a column of images, as `datasets` of the Hugging Face hub write it: a struct of `bytes` and `path`, or the bytes
//! alone.

use std::collections::BTreeMap;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use arrow_array::cast::AsArray;
use arrow_array::types::{Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type};
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::{DataType, SchemaRef};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::file::metadata::KeyValue;

use super::{Keys, Sample};

/// Rows that are read at once: images may be large.
const BATCH: usize = 8;

/// The rows of a parquet file; made to be read about in order, from several threads.
pub struct Table {
    path: PathBuf,
    rows: usize,
    columns: Columns,
    window: Mutex<Window>,
}

/// Which columns are taken.
#[derive(Debug, Clone)]
struct Columns {
    image: String,
    caption: Option<String>,
    label: Option<String>,
    /// Names of the classes, where the file tells them: label i is the i-th.
    classes: Vec<String>,
}

/// Rows that were read and not yet asked for.
#[derive(Default)]
struct Window {
    reader: Option<ParquetRecordBatchReader>,
    next: usize,
    ready: BTreeMap<usize, Result<Sample, String>>,
}

const DAMAGED: &str = "a damaged parquet file";

/// Whatever the reader does with a hostile file, the program goes on.
fn guarded<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err(DAMAGED.to_string()))
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table").field("path", &self.path).field("rows", &self.rows).finish_non_exhaustive()
    }
}

impl Table {
    /// Opens a file and chooses its columns.
    ///
    /// # Errors
    /// If it is no parquet file, or has no column of images.
    pub fn open(path: &Path, keys: &Keys) -> Result<Self, String> {
        guarded(|| {
            let builder = builder(path)?;
            let metadata = builder.metadata().file_metadata();
            let rows = usize::try_from(metadata.num_rows()).map_err(|_| DAMAGED)?;
            let columns = Columns::choose(builder.schema(), keys, metadata.key_value_metadata())?;
            Ok(Self { path: path.to_path_buf(), rows, columns, window: Mutex::default() })
        })
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Reads a row.
    ///
    /// # Errors
    /// If the row has no image, or the file is damaged there.
    pub fn read(&self, row: usize) -> Result<Sample, String> {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sample) = window.ready.remove(&row) {
            return sample;
        }
        let ahead = BATCH * 256;
        if window.reader.is_none() || row < window.next || row > window.next + ahead {
            *window = Window { reader: Some(guarded(|| self.reader(row))?), next: row, ready: BTreeMap::new() };
        }
        while window.next <= row {
            let start = window.next;
            let reader = window.reader.as_mut().ok_or(DAMAGED)?;
            let read = guarded(|| match reader.next() {
                None => Err("the file has fewer rows than it says".to_string()),
                Some(batch) => self.columns.samples(&batch.map_err(|error| error.to_string())?),
            });
            let samples = match read {
                Ok(samples) if samples.is_empty() => return Err(DAMAGED.to_string()),
                Ok(samples) => samples,
                Err(reason) => {
                    window.reader = None;
                    return Err(reason);
                }
            };
            window.next += samples.len();
            window.ready.extend((start..).zip(samples));
        }
        window.ready.remove(&row).unwrap_or_else(|| Err(DAMAGED.to_string()))
    }

    fn reader(&self, first: usize) -> Result<ParquetRecordBatchReader, String> {
        let builder = builder(&self.path)?;
        let names = [Some(&self.columns.image), self.columns.caption.as_ref(), self.columns.label.as_ref()];
        let wanted = |name: &str| names.into_iter().flatten().any(|wanted| wanted == name);
        let roots: Vec<usize> =
            builder.schema().fields().iter().enumerate().filter(|(_, f)| wanted(f.name())).map(|(i, _)| i).collect();
        let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
        let builder = builder.with_projection(mask).with_batch_size(BATCH).with_offset(first);
        builder.build().map_err(|error| error.to_string())
    }
}

fn builder(path: &Path) -> Result<ParquetRecordBatchReaderBuilder<File>, String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| error.to_string())
}

impl Columns {
    fn choose(schema: &SchemaRef, keys: &Keys, metadata: Option<&Vec<KeyValue>>) -> Result<Self, String> {
        let first = |wanted: &[String]| wanted.iter().find(|name| schema.field_with_name(name).is_ok()).cloned();
        let image = first(&keys.image).ok_or_else(|| {
            let have: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
            format!("no column of images: it has {}; name one with --image-key", have.join(", "))
        })?;
        let label = first(&keys.label);
        let classes = label.as_ref().and_then(|label| classes(metadata?, label)).unwrap_or_default();
        Ok(Self { image, caption: first(&keys.caption), label, classes })
    }

    fn samples(&self, batch: &RecordBatch) -> Result<Vec<Result<Sample, String>>, String> {
        let column = |name: &String| batch.column_by_name(name).ok_or_else(|| DAMAGED.to_string());
        let image = column(&self.image)?;
        let bytes = match image.data_type() {
            DataType::Struct(_) => {
                let bytes = image.as_struct().column_by_name("bytes");
                bytes.ok_or_else(|| format!("the column `{}` has no field `bytes`", self.image))?
            }
            _ => image,
        };
        let caption = self.caption.as_ref().map(column).transpose()?;
        let label = self.label.as_ref().map(column).transpose()?;
        let sample = |i: usize| {
            let bytes = binary(bytes, i).ok_or_else(|| format!("no bytes in the column `{}`", self.image))?;
            let mut sample = Sample { bytes, caption: caption.and_then(|column| text(column, i)), ..Sample::default() };
            sample.label = label.and_then(|column| integer(column, i));
            sample.class = match sample.label {
                Some(label) => usize::try_from(label).ok().and_then(|label| self.classes.get(label).cloned()),
                None => label.and_then(|column| text(column, i)),
            };
            Ok(sample)
        };
        Ok((0..batch.num_rows()).map(sample).collect())
    }
}

/// The names of a label's classes, as `datasets` write them into a file's metadata.
fn classes(metadata: &[KeyValue], label: &str) -> Option<Vec<String>> {
    let text = metadata.iter().find(|entry| entry.key == "huggingface")?.value.as_deref()?;
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    let names = value.get("info")?.get("features")?.get(label)?.get("names")?.as_array()?;
    names.iter().map(|name| name.as_str().map(str::to_string)).collect()
}

fn binary(column: &ArrayRef, i: usize) -> Option<Vec<u8>> {
    if column.is_null(i) {
        return None;
    }
    Some(match column.data_type() {
        DataType::Binary => column.as_binary::<i32>().value(i).to_vec(),
        DataType::LargeBinary => column.as_binary::<i64>().value(i).to_vec(),
        DataType::BinaryView => column.as_binary_view().value(i).to_vec(),
        _ => return None,
    })
}

fn text(column: &ArrayRef, i: usize) -> Option<String> {
    if column.is_null(i) {
        return None;
    }
    Some(match column.data_type() {
        DataType::Utf8 => column.as_string::<i32>().value(i).to_string(),
        DataType::LargeUtf8 => column.as_string::<i64>().value(i).to_string(),
        DataType::Utf8View => column.as_string_view().value(i).to_string(),
        // Several captions: the first.
        DataType::List(_) => {
            let list = column.as_list::<i32>().value(i);
            return (!list.is_empty()).then(|| text(&list, 0)).flatten();
        }
        _ => return None,
    })
}

fn integer(column: &ArrayRef, i: usize) -> Option<i64> {
    if column.is_null(i) {
        return None;
    }
    Some(match column.data_type() {
        DataType::Int64 => column.as_primitive::<Int64Type>().value(i),
        DataType::Int32 => column.as_primitive::<Int32Type>().value(i).into(),
        DataType::Int16 => column.as_primitive::<Int16Type>().value(i).into(),
        DataType::Int8 => column.as_primitive::<Int8Type>().value(i).into(),
        DataType::UInt32 => column.as_primitive::<UInt32Type>().value(i).into(),
        DataType::UInt16 => column.as_primitive::<UInt16Type>().value(i).into(),
        DataType::UInt8 => column.as_primitive::<UInt8Type>().value(i).into(),
        _ => return None,
    })
}
