//! A row of a code shard: one view of one image, with its codes or the reason why there are none.

use serde::{Deserialize, Serialize};

use super::Codes;

/// What all rows of a set of shards have in common: what is needed to decode them, and what makes two sets the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The id of the model that made the codes.
    pub model_id: String,
    /// How images were prepared, several ways separated by `, `: see [`Codes::preprocessing`].
    pub preprocessing: String,
    /// What the model computed in: see [`Codes::dtype`].
    pub dtype: String,
    /// Rows in the codebook, or in each of the codebooks: every code is below it.
    pub codebook_size: usize,
    /// Codes a token, C.
    pub codes_per_token: usize,
    /// Rows and columns of the grid, where all images have the same; else every row has its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grid: Option<(usize, usize)>,
}

impl Header {
    /// Codes of a row, h · w · C, where all rows have as many.
    pub fn codes_per_row(&self) -> Option<usize> {
        let (h, w) = self.grid?;
        h.checked_mul(w)?.checked_mul(self.codes_per_token)
    }

    /// The narrowest unsigned type that holds every code: `uint16` up to a codebook of 65,536, else `uint32`.
    pub fn code_dtype(&self) -> &'static str {
        if self.codebook_size <= 1 << 16 { "uint16" } else { "uint32" }
    }
}

/// One view of one image: its codes or, with [`error`](Self::error), the reason why there are none.
///
/// As JSON, what is absent is left out.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Row {
    /// Unique in a set: the shard's name and the row's number in it.
    pub key: String,
    /// Where the image was: its path below the input folder; of a tar's member or a table's row below that file's path.
    pub path: String,
    /// Which view of the image, where a run makes several: `384x256`, `256x256/flip`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub view: Option<String>,
    /// `h · w · C` codes in raster order, those of a token side by side, counted from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub codes: Option<Vec<u32>>,
    /// Rows of the grid; 0 where there are no codes.
    #[serde(default)]
    pub h: u32,
    /// Columns of the grid; 0 where there are no codes.
    #[serde(default)]
    pub w: u32,
    /// The image's own columns, upright, in pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<u32>,
    /// The image's own rows, upright, in pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub height: Option<u32>,
    /// The name of the image's class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<String>,
    /// The number of the image's class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<i64>,
    /// Text that goes with the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caption: Option<String>,
    /// BLAKE3 of the image file's bytes, its first 16 bytes as hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_hash: Option<String>,
    /// Why there are no codes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Row {
    /// `ok`, or `error` where there are no codes.
    pub fn status(&self) -> &'static str {
        if self.codes.is_some() { "ok" } else { "error" }
    }

    /// The codes as those of one image; `None` where there are none.
    pub fn to_codes(&self, header: &Header) -> Option<Codes> {
        Some(Codes {
            indices: self.codes.clone()?,
            h: self.h as usize,
            w: self.w as usize,
            c: header.codes_per_token,
            model_id: header.model_id.clone(),
            codebook_size: header.codebook_size,
            source: self.path.clone(),
            preprocessing: header.preprocessing.clone(),
            dtype: header.dtype.clone(),
        })
    }

    /// What must hold of a row of a set, read or about to be written.
    pub(super) fn check(&self, header: &Header) -> Result<(), String> {
        let wrong = |reason: String| Err(format!("row {}: {reason}", self.key));
        match (&self.codes, &self.error) {
            (None, Some(_)) => return Ok(()),
            (Some(_), None) => {}
            (Some(_), Some(_)) => return wrong("both codes and an error".to_string()),
            (None, None) => return wrong("neither codes nor an error".to_string()),
        }
        if let Some(grid) = header.grid.filter(|&(h, w)| (h, w) != (self.h as usize, self.w as usize)) {
            return wrong(format!("a grid of {}x{}, but all of the set have {}x{}", self.h, self.w, grid.0, grid.1));
        }
        self.to_codes(header).map_or(Ok(()), |codes| codes.check()).or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            model_id: "0f".into(),
            preprocessing: "squash".into(),
            dtype: "f32".into(),
            codebook_size: 16,
            codes_per_token: 1,
            grid: Some((1, 2)),
        }
    }

    #[test]
    fn a_row_has_codes_of_the_grid_or_an_error() {
        let row = Row { key: "k".into(), codes: Some(vec![3, 15]), h: 1, w: 2, ..Row::default() };
        assert_eq!(row.check(&header()), Ok(()));
        let error = |row: Row| row.check(&header()).unwrap_err();
        assert!(error(Row { codes: Some(vec![3, 16]), ..row.clone() }).contains("index 16 at position 1"));
        assert!(error(Row { codes: Some(vec![3]), ..row.clone() }).contains("there are 1 indices"));
        assert!(error(Row { h: 2, w: 1, ..row.clone() }).contains("a grid of 2x1, but all of the set have 1x2"));
        assert!(error(Row { error: Some("is no image".into()), ..row.clone() }).contains("both"));
        assert!(error(Row { codes: None, ..row.clone() }).contains("neither"));
        let failed = Row { codes: None, h: 0, w: 0, error: Some("is no image".into()), ..row };
        assert_eq!((failed.check(&header()), failed.status()), (Ok(()), "error"));
    }

    #[test]
    fn json_leaves_out_what_is_absent() {
        let row = Row { key: "000000001".into(), path: "a.jpg".into(), error: Some("empty".into()), ..Row::default() };
        let text = serde_json::to_string(&row).unwrap();
        assert_eq!(text, r#"{"key":"000000001","path":"a.jpg","h":0,"w":0,"error":"empty"}"#);
        assert_eq!(serde_json::from_str::<Row>(&text).unwrap(), row);
    }
}
