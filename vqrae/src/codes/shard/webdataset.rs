//! A tar for the readers of WebDataset: `KEY.codes.npy`, an array that `numpy.load` opens, and `KEY.json`, the rest of the row with
//! what is needed to decode it. A row without codes has the `.json` alone. `.cls` and `.txt` hold label and caption, where
//! there are any.

use std::io::Write;

use super::{Header, Row};
use crate::codes::npy::{NpyType, npy_array};

pub(super) struct Writer<W: Write> {
    tar: tar::Builder<W>,
    header: Header,
}

impl<W: Write> Writer<W> {
    pub(super) fn new(out: W, header: &Header) -> Self {
        Self { tar: tar::Builder::new(out), header: header.clone() }
    }

    pub(super) fn write(&mut self, row: &Row) -> Result<(), String> {
        // A sample's members share all before the first dot of their names, and their order is that of their names.
        let key = row.key.replace('.', "_");
        if let Some(label) = row.label {
            self.member(&key, "cls", label.to_string().as_bytes())?;
        }
        if let Some(codes) = &row.codes {
            let c = self.header.codes_per_token;
            let (h, w) = (row.h as usize, row.w as usize);
            let shape = if c == 1 { vec![h, w] } else { vec![h, w, c] };
            let dtype = if self.header.code_dtype() == "uint16" { NpyType::U16 } else { NpyType::I32 };
            let codes: Vec<i64> = codes.iter().map(|&code| i64::from(code)).collect();
            self.member(&key, "codes.npy", &npy_array(dtype, &shape, &codes)?)?;
        }
        let rest = Row { codes: None, ..row.clone() };
        let json = serde_json::json!({ "row": rest, "codes": self.header });
        self.member(&key, "json", json.to_string().as_bytes())?;
        match &row.caption {
            Some(caption) => self.member(&key, "txt", caption.as_bytes()),
            None => Ok(()),
        }
    }

    fn member(&mut self, key: &str, extension: &str, bytes: &[u8]) -> Result<(), String> {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(0);
        let name = format!("{key}.{extension}");
        self.tar.append_data(&mut header, name, bytes).map_err(|error| error.to_string())
    }

    pub(super) fn finish(self) -> Result<W, String> {
        self.tar.into_inner().map_err(|error| error.to_string())
    }
}
