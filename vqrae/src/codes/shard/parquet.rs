//! A column a field of a [`Row`], and the [`Header`] in the file's metadata under `vqrae`.
//!
//! Codes are a fixed-size list of uint16 (uint32 above a codebook of 65,536) where all images have one grid, else a list. They
//! are stored by a dictionary of the codes in use, which is as many bits a code as their number needs: no compression
//! would gain on that.

use std::fs::File;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow_array::builder::{FixedSizeListBuilder, ListBuilder, PrimitiveBuilder};
use arrow_array::cast::AsArray;
use arrow_array::types::{ArrowPrimitiveType, Int64Type, UInt16Type, UInt32Type};
use arrow_array::{Array, ArrayRef, Int64Array, RecordBatch, StringArray, UInt32Array};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::basic::Compression;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;

use super::{Header, Row, Rows};

/// Where the file's metadata has the header.
const METADATA: &str = "vqrae";

/// Rows that are held in memory before they are written as one group.
const GROUP: usize = 4096;

/// Rows that are handed to the encoder at once, and read at once.
const BATCH: usize = 256;

fn schema(header: &Header) -> SchemaRef {
    let text = |name: &str| Field::new(name, DataType::Utf8, true);
    let number = |name: &str| Field::new(name, DataType::UInt32, true);
    let code = if header.code_dtype() == "uint16" { DataType::UInt16 } else { DataType::UInt32 };
    let item = Arc::new(Field::new("element", code, true));
    let codes = match header.codes_per_row() {
        Some(count) => DataType::FixedSizeList(item, count as i32),
        None => DataType::List(item),
    };
    Arc::new(Schema::new(vec![
        Field::new("key", DataType::Utf8, false),
        Field::new("path", DataType::Utf8, false),
        text("view"),
        Field::new("codes", codes, true),
        Field::new("h", DataType::UInt32, false),
        Field::new("w", DataType::UInt32, false),
        Field::new("c", DataType::UInt32, false),
        number("width"),
        number("height"),
        text("class"),
        Field::new("label", DataType::Int64, true),
        text("caption"),
        text("content_hash"),
        Field::new("status", DataType::Utf8, false),
        text("error"),
    ]))
}

pub(super) struct Writer<W: Write + Send> {
    header: Header,
    schema: SchemaRef,
    rows: Vec<Row>,
    writer: ArrowWriter<W>,
}

impl<W: Write + Send> Writer<W> {
    pub(super) fn new(out: W, header: &Header) -> Result<Self, String> {
        if header.codes_per_row().is_some_and(|count| i32::try_from(count).is_err()) {
            return Err("a row of more codes than a list holds".to_string());
        }
        let schema = schema(header);
        let statement = serde_json::to_string(header).map_err(|error| error.to_string())?;
        let properties = WriterProperties::builder()
            .set_created_by(concat!("vqrae ", env!("CARGO_PKG_VERSION")).to_string())
            .set_key_value_metadata(Some(vec![KeyValue::new(METADATA.to_string(), statement)]))
            .set_max_row_group_row_count(Some(GROUP))
            // Text of paths and captions; codes are packed by their dictionary.
            .set_compression(Compression::SNAPPY)
            .set_dictionary_page_size_limit(4 << 20)
            .build();
        let writer = ArrowWriter::try_new(out, schema.clone(), Some(properties)).map_err(|error| error.to_string())?;
        Ok(Self { header: header.clone(), schema, rows: Vec::new(), writer })
    }

    pub(super) fn write(&mut self, row: &Row) -> Result<(), String> {
        self.rows.push(row.clone());
        if self.rows.len() == BATCH { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), String> {
        let batch = batch(&self.rows, &self.header, &self.schema)?;
        self.rows.clear();
        self.writer.write(&batch).map_err(|error| error.to_string())
    }

    pub(super) fn finish(mut self) -> Result<W, String> {
        self.flush()?;
        self.writer.into_inner().map_err(|error| error.to_string())
    }
}

fn batch(rows: &[Row], header: &Header, schema: &SchemaRef) -> Result<RecordBatch, String> {
    let text =
        |field: fn(&Row) -> Option<&str>| -> ArrayRef { Arc::new(rows.iter().map(field).collect::<StringArray>()) };
    let number =
        |field: fn(&Row) -> Option<u32>| -> ArrayRef { Arc::new(rows.iter().map(field).collect::<UInt32Array>()) };
    let c = header.codes_per_token as u32;
    let codes = match header.code_dtype() {
        "uint16" => codes::<UInt16Type>(rows, header, |code| code as u16),
        _ => codes::<UInt32Type>(rows, header, |code| code),
    };
    let columns = vec![
        text(|row| Some(&row.key)),
        text(|row| Some(&row.path)),
        text(|row| row.view.as_deref()),
        codes,
        number(|row| Some(row.h)),
        number(|row| Some(row.w)),
        Arc::new(UInt32Array::from(vec![c; rows.len()])),
        number(|row| row.width),
        number(|row| row.height),
        text(|row| row.class.as_deref()),
        Arc::new(rows.iter().map(|row| row.label).collect::<Int64Array>()),
        text(|row| row.caption.as_deref()),
        text(|row| row.content_hash.as_deref()),
        text(|row| Some(row.status())),
        text(|row| row.error.as_deref()),
    ];
    RecordBatch::try_new(schema.clone(), columns).map_err(|error| error.to_string())
}

/// The lists of codes; `narrow` loses nothing, since every code is below the codebook's size.
fn codes<T: ArrowPrimitiveType>(rows: &[Row], header: &Header, narrow: impl Fn(u32) -> T::Native) -> ArrayRef {
    let item = Arc::new(Field::new("element", T::DATA_TYPE, true));
    let values = PrimitiveBuilder::<T>::new();
    let narrowed = |codes: &[u32]| codes.iter().map(|&code| narrow(code)).collect::<Vec<_>>();
    match header.codes_per_row() {
        Some(count) => {
            let mut lists = FixedSizeListBuilder::new(values, count as i32).with_field(item);
            for row in rows {
                match &row.codes {
                    Some(codes) => lists.values().append_slice(&narrowed(codes)),
                    None => lists.values().append_nulls(count),
                }
                lists.append(row.codes.is_some());
            }
            Arc::new(lists.finish())
        }
        None => {
            let mut lists = ListBuilder::new(values).with_field(item);
            for row in rows {
                lists.values().append_slice(&narrowed(row.codes.as_deref().unwrap_or_default()));
                lists.append(row.codes.is_some());
            }
            Arc::new(lists.finish())
        }
    }
}

/// The header and the rows of a file, a batch at a time.
pub(super) fn read(file: File) -> Result<(Header, Rows), String> {
    // Whatever the reader does with a hostile file, the program goes on.
    let opened = catch_unwind(AssertUnwindSafe(|| open(file))).unwrap_or_else(|_| Err(DAMAGED.to_string()));
    let (header, reader) = opened?;
    let mut rows = Batches { reader, rows: Vec::new().into_iter(), failed: false };
    let next = move || -> Option<Result<Row, String>> {
        match catch_unwind(AssertUnwindSafe(|| rows.next())) {
            Ok(row) => row,
            Err(_) => {
                rows.failed = true;
                Some(Err(DAMAGED.to_string()))
            }
        }
    };
    Ok((header, Box::new(std::iter::from_fn(next))))
}

const DAMAGED: &str = "a damaged parquet file";

fn open(file: File) -> Result<(Header, ParquetRecordBatchReader), String> {
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| error.to_string())?;
    let metadata = builder.metadata().file_metadata().key_value_metadata();
    let statement = metadata.and_then(|all| all.iter().find(|entry| entry.key == METADATA)?.value.clone());
    let statement = statement.ok_or("a parquet file, but not of codes: its metadata has no `vqrae`")?;
    let header = serde_json::from_str(&statement).map_err(|error| format!("its metadata `vqrae`: {error}"))?;
    let reader = builder.with_batch_size(BATCH).build().map_err(|error| error.to_string())?;
    Ok((header, reader))
}

struct Batches {
    reader: ParquetRecordBatchReader,
    rows: std::vec::IntoIter<Row>,
    failed: bool,
}

impl Iterator for Batches {
    type Item = Result<Row, String>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.failed {
            if let Some(row) = self.rows.next() {
                return Some(Ok(row));
            }
            match self.reader.next()?.map_err(|error| error.to_string()).and_then(|batch| to_rows(&batch)) {
                Ok(rows) => self.rows = rows.into_iter(),
                Err(reason) => {
                    self.failed = true;
                    return Some(Err(reason));
                }
            }
        }
        None
    }
}

fn to_rows(batch: &RecordBatch) -> Result<Vec<Row>, String> {
    let column = |name: &str| batch.column_by_name(name).ok_or_else(|| format!("the column `{name}` is missing"));
    let of_type = |name: &str, expected: &str| format!("the column `{name}` is not {expected}");
    let text = |name: &'static str| -> Result<&StringArray, String> {
        column(name)?.as_string_opt().ok_or_else(|| of_type(name, "text"))
    };
    let number = |name: &'static str| -> Result<&UInt32Array, String> {
        column(name)?.as_primitive_opt::<UInt32Type>().ok_or_else(|| of_type(name, "uint32"))
    };
    let [key, path, view, class] = [text("key")?, text("path")?, text("view")?, text("class")?];
    let [caption, hash, error] = [text("caption")?, text("content_hash")?, text("error")?];
    let [h, w, width, height] = [number("h")?, number("w")?, number("width")?, number("height")?];
    let label = column("label")?.as_primitive_opt::<Int64Type>().ok_or_else(|| of_type("label", "int64"))?;
    let codes = column("codes")?;
    let word = |column: &StringArray, i: usize| column.is_valid(i).then(|| column.value(i).to_string());
    let count = |column: &UInt32Array, i: usize| column.is_valid(i).then(|| column.value(i));
    let row = |i: usize| {
        Ok(Row {
            key: word(key, i).ok_or("a row without a key")?,
            path: word(path, i).ok_or("a row without a path")?,
            view: word(view, i),
            codes: codes_of(codes, i)?,
            h: count(h, i).unwrap_or_default(),
            w: count(w, i).unwrap_or_default(),
            width: count(width, i),
            height: count(height, i),
            class: word(class, i),
            label: label.is_valid(i).then(|| label.value(i)),
            caption: word(caption, i),
            content_hash: word(hash, i),
            error: word(error, i),
        })
    };
    (0..batch.num_rows()).map(row).collect()
}

/// The codes of one row.
fn codes_of(column: &ArrayRef, i: usize) -> Result<Option<Vec<u32>>, String> {
    if column.is_null(i) {
        return Ok(None);
    }
    let list = match column.data_type() {
        DataType::FixedSizeList(..) => column.as_fixed_size_list().value(i),
        DataType::List(_) => column.as_list::<i32>().value(i),
        other => return Err(format!("the column `codes` is {other}, expected: a list of uint16 or uint32")),
    };
    let codes = match list.data_type() {
        DataType::UInt16 => list.as_primitive::<UInt16Type>().values().iter().map(|&code| u32::from(code)).collect(),
        DataType::UInt32 => list.as_primitive::<UInt32Type>().values().to_vec(),
        other => return Err(format!("the column `codes` is a list of {other}, expected: uint16 or uint32")),
    };
    if list.null_count() > 0 { Err("a code that is null".to_string()) } else { Ok(Some(codes)) }
}
