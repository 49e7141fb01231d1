//! A row a line, as JSON.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};

use super::Row;
use crate::codes::MAX_INDICES;

/// More than the longest line that a row makes.
const MAX_LINE: u64 = 16 * MAX_INDICES as u64;

pub(super) struct Writer<W> {
    out: W,
}

impl<W: Write> Writer<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out }
    }

    pub(super) fn write(&mut self, row: &Row) -> Result<(), String> {
        let mut line = serde_json::to_vec(row).map_err(|error| error.to_string())?;
        line.push(b'\n');
        self.out.write_all(&line).map_err(|error| error.to_string())
    }

    pub(super) fn finish(self) -> W {
        self.out
    }
}

/// The rows of a file, and why one of its lines is none.
pub(super) fn rows(file: File) -> impl Iterator<Item = Result<Row, String>> {
    let mut file = BufReader::new(file);
    (1..).map_while(move |number| match next(&mut file) {
        Ok(None) => None,
        Ok(Some(row)) => Some(Ok(row)),
        Err(reason) => Some(Err(format!("line {number}: {reason}"))),
    })
}

fn next(file: &mut impl BufRead) -> Result<Option<Row>, String> {
    let mut line = Vec::new();
    file.take(MAX_LINE).read_until(b'\n', &mut line).map_err(|error| error.to_string())?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => serde_json::from_slice(&line).map(Some).map_err(|error| error.to_string()),
        Some(_) => Err("cut short".to_string()),
    }
}
